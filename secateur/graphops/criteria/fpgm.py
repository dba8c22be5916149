"""FPGM: the distance of a unit to all others of its group; those near the middle go.

    fpgm(u) = Σ over v of the group:  ‖w_u − w_v‖₂        w: the slices on one axis of one weight

He, Liu, Wang, Hu, Yang: Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
Acceleration, CVPR 2019: a filter near the geometric median is one that the others can replace.
The distances on the axes that a unit slices are reduced.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from secateur.graphops.criteria.context import Context, Part, places_of
from secateur.graphops.model.opening import release

_ROWS = 1024  # whose distances to all others are in memory together


def fpgm(context: Context) -> npt.NDArray[np.float64]:
    """Sum of Euclidean distances to the other units of the group."""
    return context.reduce(_distances(context))


def _distances(context: Context) -> Iterator[Part]:
    for name, tensor in context.weights():
        array = tensor.numpy().astype(np.float64)
        for axis, line in context.coupling.axes(name).items():
            rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
            values = np.zeros(line.size)
            for group in context.coupling.groups:
                places = places_of(line, group.units) if (name, axis) in group.axes else None
                if places is not None:
                    # The first position of a unit speaks for all of them.
                    values[places[:, 0]] = _to_others(rows[places].reshape(len(places), -1))
            yield name, axis, values
        release(tensor)


def _to_others(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum of the distances of each row to all rows, shape (rows,)."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    sums = np.zeros(len(vectors))
    for start in range(0, len(vectors), _ROWS):
        some = slice(start, start + _ROWS)
        between = squares[some, None] + squares - 2 * (vectors[some] @ vectors.T)
        own = np.arange(len(between))
        between[own, start + own] = 0.0
        sums[some] = np.sqrt(np.maximum(between, 0.0)).sum(axis=1)
    return sums
