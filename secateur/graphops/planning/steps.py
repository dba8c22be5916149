"""Candidates: which units leave a group together, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.graphops.coupling.units import Coupling, UnitGroup
from secateur.graphops.planning.normalisers import Normalise, normalisers
from secateur.recipe import Recipe

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Step:
    """Units that leave one group together.

    Attributes:
        key: steps go in ascending order of it.
        group: index of the group.
        units: what goes.
        left: units of the group that stay after this step.
    """

    key: float
    group: int
    units: npt.NDArray[np.int32]
    left: int


def sequence(coupling: Coupling, scores: Scores, recipe: Recipe) -> list[Step]:
    """All steps in the order in which they may go."""
    protected = _protected(coupling, scores)
    scales = normalisers(coupling, scores, recipe.normaliser)
    steps: list[Step] = []
    for index, group in enumerate(coupling.groups):
        if group.kind in recipe.granularity:
            steps += _steps(index, group, scores, scales[index], protected, recipe)
    return sorted(steps, key=lambda step: (step.key, step.group, -step.left))


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


def _steps(
    index: int,
    group: UnitGroup,
    scores: Scores,
    scale: Normalise,
    protected: Mask,
    recipe: Recipe,
) -> list[Step]:
    """The steps of one group: lowest scores first, kept counts multiples of the rounding."""
    total = group.units.size
    multiple = rounding(group, recipe)
    candidates = group.units[~protected[group.units]]
    order = candidates[np.lexsort((candidates, scores[candidates]))]
    most = min(total - multiple, order.size)
    steps: list[Step] = []
    gone, key = 0, -math.inf
    size = total % multiple or multiple
    while gone + size <= most:
        units = order[gone : gone + size]
        gone += size
        size = multiple
        if recipe.scope == "local":
            key = gone / total
        else:
            key = max(key, scale(float(scores[units].mean())))
        steps.append(Step(key, index, units, total - gone))
    return steps


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
