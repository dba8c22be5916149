"""The weights of one layer on their way down a slope.

    m ← m + (1 − β₁)·(∇ − m)      v ← v + (1 − β₂)·(∇² − v)      β₁ = 0.9, β₂ = 0.999
    W ← W − η·r·m̂ / √v̂            m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)

(Kingma, Ba: Adam, ICLR 2015) with r the root mean square of the output's row of W as it was: a
step is a share of it, whatever the scale that a folded BatchNormalization has left there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.data import Array
from secateur.graphops.calibration.moments import sample_places, tensor_of, total
from secateur.graphops.repair.target import Target
from secateur.graphops.rules.linear import by_group, pick_rows

Floats = npt.NDArray[np.float32]

_FIRST, _SECOND = 0.1, 0.001  # 1 − β₁ and 1 − β₂
_SMALL = 1e-6  # of the largest √v̂: below it a derivative is noise


class Descending:
    """W and b of a layer, and what Adam keeps of their derivatives.

    Attributes:
        weight, bias: (groups, out, k) and (groups, out).
    """

    def __init__(self, target: Target) -> None:
        weight, bias = target.start()
        self.weight, self.bias = weight.astype(np.float32), bias.astype(np.float32)
        self._target, self._start = target, self.bias
        tensor = tensor_of(target.view)
        assert tensor is not None
        self.shape = tensor.shape.numpy()
        rows = np.sqrt(np.mean(self.weight**2, axis=2, keepdims=True))
        self._moving = [_Moving.of(self.weight, rows)]
        if target.end.biased:
            self._moving.append(_Moving.of(self.bias, rows[..., 0]))

    def tensor(self) -> Floats:
        """W as the node will read it."""
        weight = self._target.stored(self.weight)
        return np.ascontiguousarray(self._target.view.tensor(weight, self.shape), np.float32)

    def shift(self, shape: tuple[int, ...]) -> Floats:
        """What b has become larger by, at every position of an output of that shape."""
        sizes = [1] * len(shape)
        sizes[self._target.y_axis] = -1
        change = (self.bias - self._start).reshape(sizes)
        return np.ascontiguousarray(np.broadcast_to(change, shape))

    def learn(self, x: Array, slope: Array, batches: int, generator: np.random.Generator) -> None:
        """Adds the derivatives of one batch.

        Args:
            x: what the node reads.
            slope: the derivative with respect to what it puts out.
            batches: how many there are, for the number of positions that are looked at.
            generator: draws them.
        """
        groups, out, entries = self.weight.shape
        positions = slope.size // (groups * out)
        places = sample_places(positions, batches, groups, entries, generator)
        rows = self._target.rows(x, slope.shape, places).astype(np.float32, copy=False)
        slopes = by_group(pick_rows(slope, self._target.y_axis, places), groups)
        share = len(places) / positions
        found = np.matmul(slopes.transpose(0, 2, 1), rows) / share, total(slopes) / share
        for moving, gradient in zip(self._moving, found, strict=False):
            moving.gradient += gradient

    def step(self, rate: float, count: int) -> None:
        """Moves W and b.

        Args:
            rate: η.
            count: t, from 1.
        """
        self.weight = self._moving[0].step(self.weight, rate, count)
        if len(self._moving) > 1:
            self.bias = self._moving[1].step(self.bias, rate, count)

    def write(self, graph: ir.Graph) -> None:
        """Puts W and b where the node reads them."""
        weight, bias = self.weight.astype(np.float64), self.bias.astype(np.float64)
        self._target.write(graph, weight, bias)


class _Moving:
    """Of one array: ∇ of the batches since the last step, m, v and r."""

    def __init__(self, gradient: Floats, mean: Floats, square: Floats, size: Floats) -> None:
        self.gradient, self._mean, self._square, self._size = gradient, mean, square, size

    @classmethod
    def of(cls, array: Floats, size: Floats) -> _Moving:
        gradient, mean, square = (np.zeros_like(array) for _ in range(3))
        return cls(gradient, mean, square, size)

    def step(self, array: Floats, rate: float, count: int) -> Floats:
        self._mean += _FIRST * (self.gradient - self._mean)
        self._square += _SECOND * (self.gradient**2 - self._square)
        self.gradient[...] = 0
        mean = self._mean / (1 - (1 - _FIRST) ** count)
        root = np.sqrt(self._square / (1 - (1 - _SECOND) ** count))
        moved: Floats = array - np.float32(rate) * self._size * mean / (
            root + _SMALL * root.max() + np.float32(1e-30)
        )
        return moved
