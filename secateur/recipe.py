"""The recipe: everything a caller may ask for, validated once for YAML, flags, Python and wire."""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import Code, refuse
from secateur.sparsity import Pattern

TARGETS = ("channels", "params", "macs", "layers", "size", "latency", "memory")
BUDGETS = (
    "macs",
    "params",
    "size",
    "latency",
    "memory",
)  # what a target can count of the whole model
IN_BYTES = ("size", "memory")  # targets that may be a number of bytes
Criterion = Literal[
    "l1",
    "l2",
    "lamp",
    "fpgm",
    "bn_scale",
    "random",
    "activation",
    "rms",
    "apoz",
    "variance",
    "wanda",
    "fluctuation",
    "reconstruction",
    "taylor",
    "fisher",
]
Reduction = Literal["sum", "mean", "max", "first"]
Normaliser = Literal["none", "mean", "max", "isomorphic"]
Granularity = Literal["channel", "head", "head_dim", "expert", "weight", "layer", "rank"]
UNITS: tuple[Granularity, ...] = ("channel", "head", "expert")
Grouped = Literal["auto", "whole", "balanced"]
WeightCriterion = Literal["magnitude", "wanda", "second_order"]
Quantize = Literal["int8", "int8_dynamic", "fp16"]
Scope = Literal["local", "global", "measured"]


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _bytes(target: str, text: str) -> float:
    """A share, or a number of bytes with or without a unit."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in ("", *_UNITS):
        raise refuse(
            Code.INVALID_TARGET,
            f"target {target}={text} is not a size",
            nodes=("target",),
            expected="a share, or bytes: 0.5, 4MiB, 500kB",
            found=text,
        )
    number = float(found[1])
    return number if not found[2] else float(math.floor(number * _UNITS[found[2].lower()]))


class Recipe(BaseModel):
    """What to prune and how far.

    Attributes:
        target: what is *kept*, as fractions of the original in (0, 1]: `channels` (of every
            group; of all units together with `scope="global"`), `params`, `macs`, `layers` (of
            the matrix products with weights; with `granularity=layer`), `size` (of the file that
            is written, sparsity and quantisation counted; also in bytes, a number above 1 or a
            text like `4MiB`), `latency` (median time of a run of one sample in ONNX Runtime on
            this machine), `memory` (bytes by which a fresh process grows over such a run; stated
            as `size` is). These two are measured as units go, and need not give the same bytes
            twice. The last three not with `granularity=layer` or `rank`. Each is met from below,
            as closely as one unit, rounding step or region allows. Several: all hold. Empty where
            only single weights go.
        criterion: how units are ranked (`docs/guide.md`); those after `random` need calibration
            data. None: `reconstruction` with calibration
            data, else `l2`.
        reduction: of what the tensors that one unit runs through say of it, for criteria that
            score tensors: norms, scales, distances, activations.
        normaliser: what makes scores of different groups comparable with `scope="global"`: `mean`
            or `max` of the group divides them, `isomorphic` replaces them by their rank among the
            groups of the same structure, which then shrink alike; `none` leaves them.
        granularity: which kinds of units may go. `head_dim`, in the place of `head`: the same
            dimensions of every attention head instead of whole heads. `expert`: whole experts of a
            mixture, with calibration data those that its router chooses least. `weight`: single
            weights of what is left, as `sparsity` says. `layer`: parts of the model that end in the
            shape in which they begin, whole; needs calibration data and a target among `macs`,
            `params` and `layers`. `rank`: matrix products are split in two with few channels
            between; needs a target among `macs` and `params`. With units beside `layer` or `rank`,
            how much goes as which is measured, on calibration data.
        grouped: what grouped convolutions and group normalisations lose: `whole` groups,
            `balanced` parts (the same channels of every group), or `auto`: whichever leaves more
            channels free, and among equals balanced parts where they leave eight units or more.
        scope: `local` takes the same share of every group; `global` ranks all units together;
            `measured` takes from each group what the outputs miss least, by trial cuts on
            calibration data. None: `measured` with calibration data and a budget (`macs`,
            `params`), else `local`; `global` where only single weights go.
        ignore: globs over node and initializer names whose channels must all stay.
        round_to: kept channel counts become multiples of this (where anything is cut). Not
            given: `channels` is met to the unit, and budgets take multiples of 8 in groups of 64
            and more, of 4 from 16 on. ONNX Runtime's convolutions fall to a path several times
            slower at other counts, and a budget leaves the choice open.
        rotate: whether channels that only matrix products and sums touch, such as the residual
            streams between linear bottlenecks, are first turned into the basis in which fewest of
            them are needed; needs calibration data. The model computes the same in it, but what is
            kept is no part of the original's weights. None: with calibration data and repair.
        repair: with calibration data, refit what is left, layer by layer, to give the original's
            values; without, move the means of what went into biases, where BatchNormalizations
            tell them. None: as true, but not refused where there is nothing to go by. False: the
            result is the original with zeros where what went was read.
        sparsity: which single weights become zero: at least a share (`0.7`), all but N of every M
            input channels (`2:4`), or blocks of outputs × inputs (`4x1`: half of them;
            `0.7@4x1`). With `scope="global"` the share is of all layers together, else of each.
        weight_criterion: how single weights are ranked: by `magnitude`, by `wanda`, or by
            `second_order`, which updates the weights that stay; the last two need calibration
            data. None: `second_order` with calibration data, else `magnitude`.
        sparse_initializers: store sparse weights as such where that takes fewer bytes.
        vocabulary: ids of the tokens that are kept, in the order of their new ids; None: all.
            Embeddings and heads lose the rows of the others, before anything else goes.
        quantize: what is left to `int8` (QDQ, scales from calibration data), `int8_dynamic`
            (scales at run time) or `fp16`.
        seed: of everything random. Same input, recipe, seed and version: same bytes, but for a
            target that is measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: dict[str, float] = Field(default_factory=lambda: {"channels": 0.5})
    criterion: Criterion | None = None
    reduction: Reduction = "sum"
    normaliser: Normaliser = "mean"
    granularity: tuple[Granularity, ...] = Field(default=UNITS, min_length=1)
    grouped: Grouped = "auto"
    scope: Scope | None = None
    ignore: tuple[str, ...] = ()
    round_to: int | None = Field(default=None, ge=1, le=1024)
    rotate: bool | None = None
    repair: bool | None = None
    sparsity: str | None = None
    weight_criterion: WeightCriterion | None = None
    sparse_initializers: bool = False
    vocabulary: tuple[int, ...] | None = None
    quantize: Quantize | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_target_for_weights_alone(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and list(fields.get("granularity") or ()) == ["weight"]:
            return {"target": {}, **fields}
        return fields

    @pydantic.field_validator("target", mode="before")
    @classmethod
    def _read_size(cls, target: Any) -> Any:
        if not isinstance(target, dict):
            return target
        texts = {key: value for key, value in target.items() if isinstance(value, str)}
        return {**target, **{key: _bytes(key, texts[key]) for key in IN_BYTES if key in texts}}

    @pydantic.field_validator("sparsity", mode="before")
    @classmethod
    def _check_sparsity(cls, value: Any) -> Any:
        if value is None:
            return None
        Pattern.parse(str(value))
        return str(value)

    @pydantic.field_validator("vocabulary")
    @classmethod
    def _check_vocabulary(cls, ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if ids is not None and (not ids or min(ids) < 0 or len(set(ids)) < len(ids)):
            raise refuse(
                Code.INVALID_RECIPE,
                "vocabulary is the ids of the tokens that are kept, each once",
                nodes=("vocabulary",),
                expected="at least one id, none below 0 and none twice",
                found=f"{len(ids)} ids, {len(set(ids))} different",
            )
        return ids

    @pydantic.field_validator("quantize", mode="before")
    @classmethod
    def _spell_quantize(cls, value: Any) -> Any:
        return value.replace("-", "_") if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Recipe:
        weights = "weight" in self.granularity
        if weights != (self.sparsity is not None):
            raise refuse(
                Code.INVALID_RECIPE,
                "single weights go by granularity=weight and sparsity=… together",
                nodes=("granularity", "sparsity"),
                expected="both, or neither",
                found="granularity=weight alone" if weights else f"sparsity={self.sparsity} alone",
            )
        for field in ("weight_criterion", "sparse_initializers"):
            if getattr(self, field) and not weights:
                raise refuse(
                    Code.INVALID_RECIPE,
                    f"{field} says how single weights go, and none do",
                    nodes=(field,),
                    expected="granularity=weight and sparsity=…",
                    found=", ".join(self.granularity),
                )
        if self.sparse_initializers and self.quantize is not None:
            raise refuse(
                Code.INVALID_RECIPE,
                "quantised weights are not stored as sparse initializers",
                nodes=("sparse_initializers", "quantize"),
                expected="one of them",
                found="both",
                hint="An index takes 8 bytes, a dense int8 weight 1.",
            )
        self._check_targets_fit()
        if "size" in self.target and self.sparse_initializers and self.scope == "global":
            raise refuse(
                Code.INVALID_RECIPE,
                "how many weights of each layer become zero is not known before they do, and with "
                "it what is stored as a sparse initializer",
                nodes=("target", "sparse_initializers", "scope"),
                expected="scope=local or measured, or another target than size",
                found="scope=global",
            )
        return self

    def _check_targets_fit(self) -> None:
        structured = set(self.granularity) != {"weight"}
        if structured and not self.target:
            raise refuse(
                Code.INVALID_TARGET,
                "no target was given",
                expected=f"at least one of {', '.join(TARGETS)}",
                found="none",
                hint="Say what to keep, for example macs=0.5.",
            )
        if not structured and self.target:
            raise refuse(
                Code.INVALID_RECIPE,
                "a target counts what leaves whole, and here only single weights go",
                nodes=("target", "granularity"),
                expected="sparsity=… alone, or another granularity beside weight",
                found=", ".join(f"{key}={value:g}" for key, value in self.target.items()),
            )

    @pydantic.field_validator("target")
    @classmethod
    def _check_target(cls, target: dict[str, float]) -> dict[str, float]:
        for key, value in target.items():
            if key not in TARGETS:
                raise refuse(
                    Code.INVALID_TARGET,
                    f"unknown target {key!r}",
                    expected=f"one of {', '.join(TARGETS)}",
                    found=key,
                )
            in_bytes = key in IN_BYTES and 1.0 < value < math.inf
            if not (0.0 < value <= 1.0 or in_bytes):  # also refuses NaN
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

    @property
    def units(self) -> tuple[Granularity, ...]:
        """The kinds of units that may go."""
        return tuple(kind for kind in self.granularity if kind not in ("weight", "layer", "rank"))

    def settled(self, calibrated: bool) -> Recipe:
        """The same recipe with every choice made that was left open.

        Args:
            calibrated: whether there are calibration data.

        Raises:
            Refused: `INVALID_CALIBRATION` when something was asked for that needs them and there
                are none, `INVALID_RECIPE` for measured scope without a budget.
        """
        if {"layer", "rank"} & set(self.granularity):
            self._check_structure()
        if "layers" in self.target and "layer" not in self.granularity:
            raise refuse(
                Code.INVALID_RECIPE,
                "the target layers counts what only granularity=layer takes",
                nodes=("target",),
                expected="granularity=layer",
                found=", ".join(self.granularity),
            )
        budget = bool(self.target) and "channels" not in self.target
        chosen = {
            "criterion": self.criterion,
            "scope": self.scope,
            "repair": self.repair is not False,
            "rotate": self.rotate
            if self.rotate is not None
            else calibrated and self.repair is not False and "channel" in self.granularity,
            "weight_criterion": self.weight_criterion
            or ("second_order" if calibrated else "magnitude"),
            "quantize": self.quantize,
        }
        if self.units:
            chosen["criterion"] = self.criterion or ("reconstruction" if calibrated else "l2")
            chosen["scope"] = self.scope or ("measured" if calibrated and budget else "local")
        elif "weight" in self.granularity:
            chosen["scope"] = self.scope or "global"
        for field, needs in (
            ("scope", "measured"),
            ("weight_criterion", "wanda"),
            ("weight_criterion", "second_order"),
            ("quantize", "int8"),
            ("rotate", True),
        ):
            if chosen[field] == needs and not calibrated:
                raise refuse(
                    Code.INVALID_CALIBRATION,
                    f"{field}={str(needs).lower()} needs calibration data",
                    expected="--calibration PATH",
                    found="none",
                    hint="Give a few hundred unlabelled samples, or leave it out.",
                )
        if chosen["scope"] == "measured" and not budget:
            raise refuse(
                Code.INVALID_RECIPE,
                "scope=measured divides a budget, and channels=… says the share of every group",
                expected=f"a target among {', '.join(BUDGETS)}",
                found=", ".join(self.target),
            )
        return self.model_copy(update=chosen)

    def _check_structure(self) -> None:
        """Which layers go, and which ranks, is measured; what cannot be heeded is refused."""
        given: dict[str, object] = {"criterion": self.criterion, "scope": self.scope}
        if "rank" not in self.granularity:
            given["round_to"] = self.round_to
        for field, value in given.items():
            if value is not None and not self.units:
                raise refuse(
                    Code.INVALID_RECIPE,
                    f"{field} is about channels and heads, and this recipe takes none",
                    nodes=(field,),
                    expected=f"no {field}",
                    found=value,
                )
        for target, near in (("size", "params"), ("latency", "macs"), ("memory", "params")):
            if target in self.target:
                raise refuse(
                    Code.INVALID_RECIPE,
                    f"{target}=… is met by units, and of other kinds it is not known before they "
                    "go",
                    nodes=("target", "granularity"),
                    expected="a target among macs, params, layers",
                    found=", ".join(self.target),
                    hint=f"{near}=… is close to it.",
                )
        if "channels" in self.target:
            raise refuse(
                Code.INVALID_RECIPE,
                "channels=… says the share of every group, and layers and ranks have none",
                nodes=("target",),
                expected="a target among macs, params, layers",
                found=", ".join(self.target),
                hint="Say what to keep, for example macs=0.8.",
            )

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
