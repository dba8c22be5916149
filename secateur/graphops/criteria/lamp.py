"""LAMP: how much of what is left in its group a unit holds.

    lamp(u) = ‖u‖² / Σ { ‖v‖² : v of the group, ‖v‖ ≥ ‖u‖ }

Lee, Park, Mo, Ahn, Shin: Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, there
for single weights of a layer. Within a group the order is that of l2; what changes is how groups
compare: with `scope=global`, and `normaliser=none`, as the score is a share already.
"""

from __future__ import annotations

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
        left = np.cumsum(squares[descending])
        scores[descending] = squares[descending] / np.where(left > 0, left, 1.0)
    return scores
