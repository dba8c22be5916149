"""Candidates: which units leave a group together, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.graphops.coupling.units import Coupling, UnitGroup
from secateur.graphops.planning.normalisers import normalisers
from secateur.recipe import Recipe

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Steps:
    """Sets of units that leave a group together, one such step after another: parallel arrays.

    Attributes:
        groups: index of the group of each step.
        left: units of that group that stay after it.
        units: what goes, of all steps end to end.
        ends: where the units of each step end.
    """

    groups: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    units: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return self.groups.size

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """How many units go with each step."""
        return np.diff(self.ends, prepend=0)

    def of(self, place: int) -> npt.NDArray[np.int32]:
        """The units of one step."""
        return self.units[self.ends[place - 1] if place else 0 : self.ends[place]]

    def ordered(self, order: npt.NDArray[np.intp]) -> Steps:
        """The same steps in another order."""
        sizes = self.sizes[order]
        ends = np.cumsum(sizes)
        moved = np.repeat(self.ends[order] - ends, sizes)  # by how much each step's units move
        units = self.units[np.arange(moved.size) + moved]
        return Steps(self.groups[order], self.left[order], units, ends)


def sequence(coupling: Coupling, scores: Scores, recipe: Recipe) -> Steps:
    """All steps in the order in which they may go."""
    protected = _protected(coupling, scores)
    scales = normalisers(coupling, scores, recipe.normaliser)
    none = np.zeros(0, np.int64)
    keys, groups, left, sizes = [np.zeros(0)], [none], [none], [none]
    units = [np.zeros(0, np.int32)]
    for index, group in enumerate(coupling.groups):
        if group.kind not in recipe.granularity:
            continue
        candidates = group.units[~protected[group.units]]
        order = candidates[np.lexsort((candidates, scores[candidates]))]
        gone = _gone(group.units.size, order.size, rounding(group, recipe))
        if not gone.size:
            continue
        starts = np.r_[0, gone[:-1]]
        if recipe.scope == "local":
            key = gone / group.units.size
        else:
            means = np.add.reduceat(scores[order[: gone[-1]]], starts) / (gone - starts)
            key = np.maximum.accumulate(scales[index](means))
        keys.append(key)
        groups.append(np.full(gone.size, index))
        left.append(group.units.size - gone)
        sizes.append(gone - starts)
        units.append(order[: gone[-1]])
    steps = Steps(
        groups=np.concatenate(groups),
        left=np.concatenate(left),
        units=np.concatenate(units),
        ends=np.cumsum(np.concatenate(sizes)),
    )
    return steps.ordered(np.lexsort((-steps.left, steps.groups, np.concatenate(keys))))


def _gone(total: int, candidates: int, multiple: int) -> npt.NDArray[np.int64]:
    """Units of a group gone after each step: kept counts are multiples of the rounding."""
    first = total % multiple or multiple
    return np.arange(first, min(total - multiple, candidates) + 1, multiple)


def _protected(coupling: Coupling, scores: Scores) -> Mask:
    """The best units of every range of which something must stay, as many as that takes."""
    protected = np.zeros(coupling.count + 1, np.bool_)
    for segment, least in coupling.segments:
        least -= int((segment == 0).sum())
        units, times = np.unique(segment[segment > 0], return_counts=True)
        for place in np.argsort(-scores[units], kind="stable"):
            if least <= 0:
                break
            protected[units[place]] = True
            least -= int(times[place])
    return protected


def rounding(group: UnitGroup, recipe: Recipe) -> int:
    """How many units make the kept positions of every axis a multiple of the rounding.

    Unless one is asked for, budgets prefer counts for which ONNX Runtime has its blocked
    convolution kernels: EfficientNet-Lite0 at half the MACs takes 0.58 of the original's time at
    multiples of 4 or 8, and 2.06 of it at arbitrary counts (`benchmarks/main.py`).
    """
    wanted = recipe.round_to
    if wanted is None:
        size = group.units.size
        wanted = 1 if set(recipe.target) == {"channels"} or size < 16 else 8 if size >= 64 else 4
    return math.lcm(*(wanted // math.gcd(wanted, times) for times in group.axes.values()))
