"""LAMP: how much of what is left in its group a unit holds.

    lamp(u) = ‖u‖² / Σ { ‖v‖² : v of the group, ‖v‖ ≥ ‖u‖ }

Lee, Park, Mo, Ahn, Shin: Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, there
for single weights of a layer. Within a group the order is that of l2; what changes is how groups
compare: with `scope=global`, and `normaliser=none`, as the score is a share already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.graphops.criteria import magnitude
from secateur.graphops.criteria.context import Context


def lamp(context: Context) -> npt.NDArray[np.float64]:
    """Share of the squared weights of the group's units that are at least as large."""
    squares = magnitude.l2(context) ** 2
    scores = np.zeros_like(squares)
    for group in context.coupling.groups:
        descending = group.units[np.argsort(-squares[group.units], kind="stable")]
        scores[descending] = shares(squares[descending])
    return scores


def shares(descending: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Of each number, its part of the sum of itself and those before it, which are no smaller."""
    left = np.cumsum(descending)
    return descending / np.where(left > 0, left, 1)
