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
        if power == 1:
            array = np.abs(array)
        for axis in context.coupling.axes(name):
            yield name, axis, _sums(array, axis, power)
        if len(context.coupling.parts.get(name, ())) == 1:
            yield name, None, _sums(array, 0, power).sum(keepdims=True)
        del array
        release(tensor)


def _sums(array: npt.NDArray[np.float32], axis: int, power: int) -> npt.NDArray[np.float64]:
    """Sums of a power over all axes but one, read in the order in which they lie in memory."""
    rows = array.reshape(array.shape[0], -1)
    factors, along = ",".join(["ij"] * power), "j" if axis else "i"
    sums: npt.NDArray[np.float64] = np.einsum(f"{factors}->{along}", *[rows] * power).astype(float)
    if axis:  # what is left of the other axes is small
        left = np.moveaxis(sums.reshape(array.shape[1:]), axis - 1, 0)
        sums = left.reshape(array.shape[axis], -1).sum(axis=1)
    return sums
