"""What makes scores of different groups comparable, where all units are ranked together.

    none        s
    mean, max   s / mean or largest of the group: each layer by its own measure
    isomorphic  share of the units of all groups of the same structure that score no more than s

The last is Fang, Ma, Mi, Wang: Isomorphic Pruning for Vision Models, ECCV 2024: only like is ranked
with like, and each kind of structure gives up the same share.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from secateur.graphops.coupling.units import Coupling, UnitGroup
from secateur.recipe import Normaliser

Scores = npt.NDArray[np.float64]
Normalise = Callable[[Scores], Scores]


def normalisers(coupling: Coupling, scores: Scores, normaliser: Normaliser) -> list[Normalise]:
    """One function of scores for each group."""
    groups = coupling.groups
    if normaliser == "isomorphic":
        structures = [_structure(coupling, group) for group in groups]
        alike: dict[object, list[Scores]] = defaultdict(list)
        for structure, group in zip(structures, groups, strict=True):
            alike[structure].append(scores[group.units])
        ranks = {key: _rank(np.sort(np.concatenate(parts))) for key, parts in alike.items()}
        return [ranks[structure] for structure in structures]
    if normaliser == "none":
        return [np.asarray for _ in groups]
    measure = np.mean if normaliser == "mean" else np.max
    return [_divide(float(measure(scores[group.units])) or 1.0) for group in groups]


def _divide(by: float) -> Normalise:
    return lambda scores: scores / by


def _rank(ascending: Scores) -> Normalise:
    return lambda scores: np.searchsorted(ascending, scores, "right") / ascending.size


def _structure(coupling: Coupling, group: UnitGroup) -> object:
    """Equal for groups that slice the same axes of as many tensors of the same kinds: of the same
    rank, and the same kernel where they have one."""
    sliced: Counter[object] = Counter()
    for name, axis in group.axes:
        shape = coupling.constants[name].shape.numpy()
        sliced[len(shape), shape[2:], axis] += 1
    return group.kind, frozenset(sliced.items())
