"""Criteria that look at the matrix products which read a unit: their weights, and the moments of
what they read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.moments import Moments, weight_of
from secateur.graphops.criteria import magnitude
from secateur.graphops.criteria.context import Context, Part

Matrix = npt.NDArray[np.float64]
# From W, (groups, out / groups, k), and the moments of x, a value per entry of x: (groups, k).
Value = Callable[[Matrix, Moments], Matrix]


def by_consumers(context: Context, criterion: str, value: Value) -> Matrix:
    """One score per unit from what the consumers say of the entries of x that are its own.

    Units without a consumer that is a matrix product (a table that only a Gather reads) are
    ranked by l2 among themselves.

    Args:
        context: with calibration data.
        criterion: that asks.
        value: ≥ 0.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    observed = context.seen(criterion)
    parts: list[Part] = []
    read = np.zeros(context.coupling.count + 1, np.bool_)
    for name, view in observed.consumers.items():
        line = observed.line(view)
        assert line is not None
        values = value(weight_of(view), observed.moments[name])
        sums = np.zeros(line.size)
        np.add.at(sums, view.channels(line.size), values)
        x = view.node.inputs[0]
        assert x is not None
        parts.append((str(x.name), view.x_axis, sums))
        read[line] = True
    return np.where(read, context.reduce(parts), magnitude.l2(context))


def variances(moments: Moments) -> Matrix:
    """Var(x) per entry, (groups, k)."""
    mean = moments.mean()
    diagonal = np.diagonal(moments.second, axis1=1, axis2=2) / moments.count
    return np.maximum(diagonal - mean**2, 0.0)
