"""The plan: what a prune keeps, as a value. It is what a dry run prints, a golden test stores
and `--plan` replays."""

from __future__ import annotations

import pathlib
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from secateur.errors import Code, refuse
from secateur.recipe import Recipe


class KeptTensor(BaseModel):
    """What is kept of one changed tensor.

    Attributes:
        tensor: its name in the result (an initializer, or the output of a Constant node).
        source: its name in the original.
        axes: axis → kept indices in the original, ascending. Axes not listed are whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: str
    source: str
    axes: dict[int, tuple[int, ...]]


class RemovedRegion(BaseModel):
    """A part of the graph that was left out whole.

    Attributes:
        entry: the value that its readers read instead of `exit`.
        exit: the value it ended in.
        nodes: that went, by the name of their first output, in the original's order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    entry: str
    exit: str
    nodes: tuple[str, ...]


class FactoredProduct(BaseModel):
    """A matrix product that was split in two.

    Attributes:
        output: of the node.
        rank: channels between the two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str
    rank: int


class Plan(BaseModel):
    """A frozen, serialisable decision.

    Attributes:
        version: of this format.
        source: SHA-256 (hex) of the original model's bytes.
        recipe: what was asked; its vocabulary is taken before all that follows, which does not
            name the rows that went with it.
        rotated: ids of groups whose channels were turned into another basis before anything went.
            What is kept of them is counted in that basis, which calibration data gave; the same
            data, recipe and model give it again.
        removed: regions that went, before anything else but that.
        factored: products that were split, before anything was cut.
        kept: one entry per changed tensor, in the result's order. The source of a tensor that
            came by a split is the tensor as it then was, under its own name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    source: str
    recipe: Recipe
    rotated: tuple[str, ...] = ()
    removed: tuple[RemovedRegion, ...] = ()
    factored: tuple[FactoredProduct, ...] = ()
    kept: tuple[KeptTensor, ...]

    def to_json(self) -> str:
        """One JSON document, stable: the same plan gives the same text."""
        return self.model_dump_json() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The plan in `text`.

        Raises:
            Refused: `INVALID_PLAN` when it is not one.
        """
        try:
            return cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise refuse(
                Code.INVALID_PLAN,
                f"not a plan: {where}: {first['msg']}",
                hint="Give a file that --save-plan wrote.",
            ) from None

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Plan:
        """The plan in a file. Raises as `from_json`."""
        try:
            text = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise refuse(
                Code.INVALID_PLAN,
                f"plan {path} cannot be read: {error}",
                hint="Check the path, and that the file may be read.",
            ) from None
        return cls.from_json(text)
