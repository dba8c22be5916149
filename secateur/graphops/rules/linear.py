"""Nodes that map one activation linearly, seen as a matrix product over sampled positions.

    y[p] = W · x[p] + b

p is a position of the output (a pixel, a token), y[p] its channels, and x[p] what the node reads
for it: one row of a MatMul, the patch under a convolution's kernel (im2col). Criteria take second
moments of x, repair fits W and b; neither has to know which operator it was.

What both kinds of view have:

    node, weight, bias   the node, and the input indices of W and b (None: the operator has no b)
    x_axis, y_axis       the axis of input 0 that is summed over, and that of the output's channels
    groups               independent maps side by side (grouped convolution)
    rows(x, shape, p)    x[p], (groups, places, k), of an output of that shape; p are flat indices
                         of its positions, its channel axis left out, ascending
    channels(size)       (groups, k): of which position of `x_axis` each entry of x[p] is
    matrix(weight)       W, (groups, out / groups, k); `tensor` is its inverse
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.model.attributes import integer, integers, real, text

Floats = npt.NDArray[np.floating[Any]]
Places = npt.NDArray[np.int64]


def pick_rows(y: Floats, axis: int, places: Places) -> Floats:
    """y[p], shape (places, channels)."""
    moved = np.moveaxis(y, axis, -1)
    rows: Floats = moved[np.unravel_index(places, moved.shape[:-1])]  # no copy of all of y
    return rows


def by_group(rows: Floats, groups: int) -> Floats:
    """(places, groups · out) as (groups, places, out), laid out as BLAS reads it."""
    split = rows.reshape(len(rows), groups, rows.shape[1] // groups)
    return np.ascontiguousarray(split.transpose(1, 0, 2))


@dataclass(frozen=True, slots=True)
class Product:
    """MatMul and Gemm with a constant matrix on the right: W is its transpose, times alpha.

    Attributes:
        stored: whether the constant is (out, in) rather than (in, out).
        alpha: factor that the node applies.
    """

    node: ir.Node
    x_axis: int
    y_axis: int
    bias: int | None
    stored: bool = False
    alpha: float = 1.0
    weight: int = 1
    groups: int = 1

    def rows(self, x: Floats, shape: Sequence[int], places: Places) -> Floats:
        """Rows of x."""
        return pick_rows(x, self.x_axis, places)[None]

    def channels(self, size: int) -> npt.NDArray[np.int64]:
        """One entry per channel."""
        return np.arange(size)[None]

    def matrix(self, weight: Floats) -> Floats:
        """(1, out, in)."""
        return self.alpha * (weight if self.stored else weight.T)[None]

    def tensor(self, matrix: Floats, shape: Sequence[int]) -> Floats:
        """(in, out), or as stored."""
        weight: Floats = (matrix[0] if self.stored else matrix[0].T) / self.alpha
        return weight


def linear_matmul(
    node: ir.Node, x_shape: Sequence[int], w_shape: Sequence[int]
) -> LinearMap | None:
    """`…k, kn → …n`, the matrix constant."""
    if len(w_shape) != 2 or len(x_shape) < 2:
        return None
    last = len(x_shape) - 1
    return Product(node, x_axis=last, y_axis=last, bias=None)


def linear_gemm(node: ir.Node, x_shape: Sequence[int], w_shape: Sequence[int]) -> LinearMap | None:
    """`α·A'·B' + C`, B constant. With β other than 1 the bias is not C itself: left alone."""
    if real(node, "beta", 1.0) != 1.0:
        return None
    return Product(
        node,
        x_axis=0 if integer(node, "transA", 0) else 1,
        y_axis=1,
        bias=2,
        stored=bool(integer(node, "transB", 0)),
        alpha=real(node, "alpha", 1.0),
    )


@dataclass(frozen=True, slots=True)
class Convolution:
    """Conv and ConvTranspose, of any number of spatial axes.

    Entry k of x[p] is (kernel position, channel of the group), the channel running fastest.

    Attributes:
        kernel, strides, dilations: per spatial axis.
        transposed: whether the kernel spreads inputs rather than gathers them.
    """

    node: ir.Node
    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    transposed: bool
    weight: int = 1
    bias: int | None = 2
    x_axis: int = 1
    y_axis: int = 1

    def rows(self, x: Floats, shape: Sequence[int], places: Places) -> Floats:
        """Patches, zeros where they reach beyond the input."""
        taps = np.indices(self.kernel).reshape(len(self.kernel), -1)  # (axes, kernel)
        spread = [dilation * tap for dilation, tap in zip(self.dilations, taps, strict=True)]
        begins = self._begins(x.shape[2:], shape[2:])
        sample, *where = np.unravel_index(places, (shape[0], *shape[2:]))
        dense = places.size * taps.shape[1] > x.size // x.shape[1]  # x is read more than once
        if dense and not self.transposed and self.groups < x.shape[1]:
            patches = self._dense(x, sample, where, begins, spread)
        else:
            index, valid = self._positions(x.shape[2:], where, begins, spread)
            if self.groups == x.shape[1]:
                return _depthwise(x, sample, np.ravel_multi_index(index, x.shape[2:]), valid)
            moved = np.moveaxis(x, 1, -1)
            moved = np.ascontiguousarray(moved) if dense else moved
            patches = moved[(sample[:, None], *index)]
            if not valid.all():
                patches = patches * valid[..., None]
        split = patches.reshape(*patches.shape[:2], self.groups, -1)
        rows: Floats = np.moveaxis(split, 2, 0)
        return np.ascontiguousarray(rows).reshape(self.groups, places.size, -1)

    def _positions(
        self,
        sizes: Sequence[int],
        where: Sequence[Places],
        begins: Sequence[int],
        spread: Sequence[Places],
    ) -> tuple[list[Places], npt.NDArray[np.bool_]]:
        """Along each axis, (places, kernel): what is read, some position where there is nothing;
        and whether there is something.

        Args:
            sizes: of x.
            where: the places, along each axis.
            begins: padding before each axis.
            spread: of the kernel along each axis.
        """
        valid = np.ones((where[0].size, spread[0].size), np.bool_)
        index = []
        for axis, size in enumerate(sizes):
            step = self.strides[axis]
            if self.transposed:
                ahead = where[axis][:, None] + begins[axis] - spread[axis]
                position, beside = ahead // step, ahead % step
                valid &= beside == 0
            else:
                position = where[axis][:, None] * step - begins[axis] + spread[axis]
            valid &= (position >= 0) & (position < size)
            index.append(np.clip(position, 0, size - 1))
        return index, valid

    def _dense(
        self,
        x: Floats,
        sample: Places,
        where: Sequence[Places],
        begins: Sequence[int],
        spread: Sequence[Places],
    ) -> Floats:
        """(places, kernel, channels), of a copy of x that has its padding and channels last.

        Args:
            sample: of each place; the rest as for `_positions`.
        """
        at = [
            one[:, None] * step + taps
            for one, step, taps in zip(where, self.strides, spread, strict=True)
        ]
        parts = list(zip(begins, x.shape[2:], at, strict=True))
        wide = [max(begin + size, int(read.max()) + 1) for begin, size, read in parts]
        padded = np.zeros((len(x), *wide, x.shape[1]), x.dtype)
        inside = [slice(begin, begin + size) for begin, size, _ in parts]
        padded[:, *inside] = np.moveaxis(x, 1, -1)
        flat = np.ravel_multi_index([sample[:, None], *at], padded.shape[:-1])
        patches: Floats = padded.reshape(-1, x.shape[1]).take(flat, axis=0)
        return patches

    def channels(self, size: int) -> npt.NDArray[np.int64]:
        """Every channel of the group once per kernel position."""
        per_group = np.arange(size).reshape(self.groups, -1)
        return np.tile(per_group, (1, math.prod(self.kernel)))

    def matrix(self, weight: Floats) -> Floats:
        """From (g·o, c, k…) of Conv, (g·c, o, k…) of ConvTranspose."""
        split = weight.reshape(self.groups, -1, weight.shape[1], math.prod(self.kernel))
        # both become (group, out, kernel, channel)
        order = (0, 2, 3, 1) if self.transposed else (0, 1, 3, 2)
        return split.transpose(order).reshape(self.groups, split.shape[order[1]], -1)

    def tensor(self, matrix: Floats, shape: Sequence[int]) -> Floats:
        """Back to the operator's layout."""
        split = matrix.reshape(*matrix.shape[:2], math.prod(self.kernel), -1)
        order = (0, 3, 1, 2) if self.transposed else (0, 1, 3, 2)
        return split.transpose(order).reshape(shape)

    def _begins(self, sizes: Sequence[int], spatial: Sequence[int]) -> list[int]:
        """Padding before each spatial axis."""
        mode = text(self.node, "auto_pad", "NOTSET")
        rank = len(self.kernel)
        if mode in ("NOTSET", ""):
            return (integers(self.node, "pads") or [0] * rank)[:rank]
        if mode == "VALID":
            return [0] * rank
        begins = []
        for axis in range(rank):
            reach = self.dilations[axis] * (self.kernel[axis] - 1) + 1
            small, large = sizes[axis], spatial[axis]
            if not self.transposed:
                small, large = large, small
            total = max((small - 1) * self.strides[axis] + reach - large, 0)
            begins.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        return begins


def _depthwise(x: Floats, sample: Places, at: Places, valid: npt.NDArray[np.bool_]) -> Floats:
    """Patches of one channel each, laid out as BLAS reads them.

    Args:
        x: (samples, channels, …).
        sample: (places,), ascending.
        at: (places, kernel), flat indices of spatial positions.
        valid: shaped like `at`; zeros elsewhere.
    """
    rows = np.empty((x.shape[1], *at.shape), x.dtype)
    ends = np.searchsorted(sample, np.arange(len(x) + 1))
    for one, start, end in zip(x.reshape(*x.shape[:2], -1), ends, ends[1:], strict=False):
        rows[:, start:end] = np.take(one, at[start:end], axis=1, mode="clip")
    rows *= valid
    return rows


def linear_conv(node: ir.Node, x_shape: Sequence[int], w_shape: Sequence[int]) -> LinearMap | None:
    """Gathers."""
    return _convolution(node, w_shape, transposed=False)


def linear_conv_transpose(
    node: ir.Node, x_shape: Sequence[int], w_shape: Sequence[int]
) -> LinearMap | None:
    """Spreads. An explicit output_shape moves the padding: left alone."""
    if "output_shape" in node.attributes:
        return None
    return _convolution(node, w_shape, transposed=True)


def _convolution(node: ir.Node, w_shape: Sequence[int], *, transposed: bool) -> LinearMap:
    kernel = tuple(w_shape[2:])
    ones = [1] * len(kernel)
    return Convolution(
        node,
        groups=integer(node, "group", 1),
        kernel=kernel,
        strides=tuple(integers(node, "strides") or ones),
        dilations=tuple(integers(node, "dilations") or ones),
        transposed=transposed,
    )


LinearMap = Product | Convolution
Linear = Callable[[ir.Node, Sequence[int], Sequence[int]], LinearMap | None]
