"""Magnitude: the norm of all weights that a unit takes.

    l1(u) = Σ |w|            l2(u) = √(Σ w²)        over the slices w of u

Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017, there for
single filters; here over every slice that goes with the unit, its consumers' included. Another
reduction than the sum takes the place of the outer Σ, over the slices of u.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from secateur.graphops.criteria.context import Context, Part
from secateur.graphops.model.opening import release


def l1(context: Context) -> npt.NDArray[np.float64]:
    """Sum of absolute weights per unit."""
    return context.reduce(_power_sums(context, 1))


def l2(context: Context) -> npt.NDArray[np.float64]:
    """Euclidean norm of the weights per unit."""
    return np.sqrt(context.reduce(_power_sums(context, 2)))


def _power_sums(context: Context, power: int) -> Iterator[Part]:
    for name, tensor in context.weights():
        array = tensor.numpy().astype(np.float32, copy=False)
        for axis in context.coupling.axes(name):
            # One row per position of the axis.
            rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
            if power == 1:
                sums = np.abs(rows).sum(axis=1, dtype=np.float64)
            else:
                sums = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
            yield name, axis, sums
        del array, rows
        release(tensor)
