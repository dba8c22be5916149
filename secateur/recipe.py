"""The recipe: everything a caller may ask for, validated once for YAML, flags, Python and wire."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import Code, refuse

TARGETS = ("channels", "params", "macs")
Criterion = Literal["l1", "l2", "random", "bn_scale", "activation"]
Granularity = Literal["channel", "head", "head_dim"]
Grouped = Literal["auto", "whole", "balanced"]


class Recipe(BaseModel):
    """What to prune and how far.

    Attributes:
        target: what is *kept*, as fractions of the original in (0, 1]: `channels` (of every
            group; of all units together with `scope="global"`), `params`, `macs`. Each is met
            from below, as closely as one unit or rounding step allows. Several: all hold.
        criterion: how units are ranked. `activation` needs calibration data.
        granularity: which kinds of units may go. `head_dim`, in the place of `head`: the same
            dimensions of every attention head instead of whole heads.
        grouped: what grouped convolutions and group normalisations lose: `whole` groups,
            `balanced` parts (the same channels of every group), or `auto`: whichever leaves more
            channels free, and among equals balanced parts where they leave eight units or more.
        scope: `local` takes the same share of every group; `global` ranks all units together.
        ignore: globs over node and initializer names whose channels must all stay.
        round_to: kept channel counts become multiples of this (where anything is cut). Not
            given: `channels` is met to the unit, and budgets take multiples of 8 in groups of 64
            and more, of 4 from 16 on. ONNX Runtime's convolutions fall to a path several times
            slower at other counts, and a budget leaves the choice open.
        repair: refit the consumers of what was cut (not available yet: must be false).
        seed: of everything random. Same input, recipe, seed and version: same bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: dict[str, float] = Field(default_factory=lambda: {"channels": 0.5})
    criterion: Criterion = "l2"
    granularity: tuple[Granularity, ...] = Field(default=("channel", "head"), min_length=1)
    grouped: Grouped = "auto"
    scope: Literal["local", "global"] = "local"
    ignore: tuple[str, ...] = ()
    round_to: int | None = Field(default=None, ge=1, le=1024)
    repair: Literal[False] = False
    seed: int = Field(default=0, ge=0, lt=2**32)

    @pydantic.field_validator("target")
    @classmethod
    def _check_target(cls, target: dict[str, float]) -> dict[str, float]:
        if not target:
            raise refuse(
                Code.INVALID_TARGET,
                "no target was given",
                expected=f"at least one of {', '.join(TARGETS)}",
                found="none",
                hint="Say what to keep, for example macs=0.5.",
            )
        for key, value in target.items():
            if key not in TARGETS:
                raise refuse(
                    Code.INVALID_TARGET,
                    f"unknown target {key!r}",
                    expected=f"one of {', '.join(TARGETS)}",
                    found=key,
                )
            if not 0.0 < value <= 1.0:  # also refuses NaN
                raise refuse(
                    Code.INVALID_TARGET,
                    f"target {key} is the fraction of the original that is kept",
                    expected="a number above 0 and at most 1",
                    found=value,
                )
        return {key: target[key] for key in sorted(target)}

    @pydantic.field_validator("granularity")
    @classmethod
    def _check_granularity(cls, kinds: tuple[Granularity, ...]) -> tuple[Granularity, ...]:
        if {"head", "head_dim"} <= set(kinds):
            raise refuse(
                Code.INVALID_RECIPE,
                "attention heads are cut whole or along their dimensions, not both at once",
                nodes=("granularity",),
                expected="head or head_dim",
                found=", ".join(kinds),
                hint="Prune twice: the result of one is a model for the other.",
            )
        return kinds

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Recipe:
        """A recipe from untrusted fields.

        Raises:
            Refused: `INVALID_TARGET` for a bad target, `INVALID_RECIPE` for any other bad field.
        """
        try:
            return cls.model_validate(fields)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise refuse(
                Code.INVALID_TARGET if field.startswith("target") else Code.INVALID_RECIPE,
                f"recipe field {field!r}: {first['msg']}",
                nodes=(field,),
                found=first.get("input", ""),
            ) from None

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Recipe:
        """A recipe from a YAML file.

        Raises:
            Refused: `INVALID_RECIPE` when the file cannot be read or is not a mapping.
        """
        try:
            fields = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise refuse(Code.INVALID_RECIPE, f"recipe {path} cannot be read: {error}") from None
        if not isinstance(fields, dict):
            raise refuse(
                Code.INVALID_RECIPE,
                f"recipe {path} is not a mapping",
                expected="key: value lines",
                found=type(fields).__name__,
            )
        return cls.parse(fields)
