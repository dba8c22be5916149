"""Least squares behind an activation that is flat beyond a bound.

Relu gives 0 for whatever lies below 0, Clip its bounds for what lies beyond them. Where the wanted
y is there, W·x + b may be anything beyond the bound, which leaves W free to fit the rest. With
[l, h] the values that do as well as y,

    minimise  E dist(W·x + b, [l, h])² + λ·v·‖W − W₀‖²

in turns: z ← W·x + b brought into [l, h], then W and b ← the ridge regression of `fit` towards z;
no turn makes it larger (Zhang, Zou, He, Sun: Accelerating Very Deep Convolutional Networks for
Classification and Detection, TPAMI 2016, section 3.2, fit through Relu; here by majorisation).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.moments import total
from secateur.graphops.repair.fit import Fitted, Matrix, Stored, Sums, ridge

Rows = npt.NDArray[np.float32]
Bounds = tuple[float, float]

_ENTRIES = 3 << 22  # float32 numbers of rows to hold: 48 MiB
_LEAST_WIDTH = 16  # of x; the nine weights of a depthwise kernel have nothing to gain
_ROWS_PER_ENTRY = 4  # to be held at least: fewer say nothing of W
_TURNS = 8
_GAIN = 2e-3  # of the error, below which turns end


@dataclass(slots=True)
class Intervals:
    """Rows of x, the y they should give, and what would do as well: all (groups, rows, ·).

    Attributes:
        bounds: beyond which what reads y + rest is flat.
        most: rows of each batch that are held.
    """

    bounds: Bounds
    most: int
    x: list[Rows] = field(default_factory=list)
    y: list[Rows] = field(default_factory=list)
    low: list[Rows] = field(default_factory=list)
    high: list[Rows] = field(default_factory=list)

    @classmethod
    def room(cls, bounds: Bounds, shape: tuple[int, ...], batches: int) -> Intervals | None:
        """Room for rows of W's shape (groups, out, k); None where it would gain nothing."""
        groups, out, entries = shape
        most = _ENTRIES // (groups * (entries + 3 * out) * batches)
        enough = entries >= _LEAST_WIDTH and most * batches >= _ROWS_PER_ENTRY * entries
        return cls(bounds, most) if enough else None

    def add(self, x: Rows, y: Rows, rest: Rows) -> None:
        """Some rows of a batch, evenly.

        Args:
            x: (groups, rows, k).
            y: (groups, rows, out), wanted.
            rest: what is added to y before it is flattened, shaped like y.
        """
        step = -(-x.shape[1] // self.most)
        x, y, rest = x[:, ::step].copy(), y[:, ::step], rest[:, ::step]  # a view would hold all
        low, high = (np.float32(bound) - rest for bound in self.bounds)
        self.x.append(x)
        self.y.append(y)
        self.low.append(np.where(y <= low, np.float32(-np.inf), np.minimum(y, high)))
        self.high.append(np.where(y >= high, np.float32(np.inf), np.maximum(y, low)))

    def joined(self) -> Intervals:
        """All rows as one batch."""
        parts = ([np.concatenate(p, axis=1)] for p in (self.x, self.y, self.low, self.high))
        return Intervals(self.bounds, self.most, *parts)

    def __add__(self, other: Intervals) -> Intervals:
        """The rows of both."""
        return Intervals(
            self.bounds,
            self.most,
            self.x + other.x,
            self.y + other.y,
            self.low + other.low,
            self.high + other.high,
        )

    def error(self, weight: Matrix, bias: Matrix) -> float:
        """E dist(W·x + b, [l, h])², summed over outputs."""
        squares, count = 0.0, 0
        for x, low, high in zip(self.x, self.low, self.high, strict=True):
            given = _product(x, weight, bias)
            squares += float(np.square(given - np.clip(given, low, high)).sum(dtype=np.float64))
            count += x.shape[1]
        return squares / count

    def missing(self, weight: Matrix, bias: Matrix) -> tuple[Matrix, Matrix]:
        """E[δ] (groups, out) and Cov(δ, x) (groups, out, k) of δ = z − y, z as above."""
        shift = np.zeros(bias.shape)
        cross, mean = np.zeros(weight.shape), np.zeros((len(weight), weight.shape[2]))
        count = 0
        for x, y, low, high in zip(self.x, self.y, self.low, self.high, strict=True):
            delta = np.clip(_product(x, weight, bias), low, high) - y
            shift += total(delta)
            mean += total(x)
            cross += np.matmul(delta.transpose(0, 2, 1), x)
            count += x.shape[1]
        shift /= count
        return shift, cross / count - shift[:, :, None] * (mean / count)[:, None, :]


def _product(x: Rows, weight: Matrix, bias: Matrix) -> Rows:
    given: Rows = np.matmul(x, weight.transpose(0, 2, 1).astype(np.float32))
    given += bias[:, None].astype(np.float32)
    return given


@dataclass(frozen=True, slots=True)
class _Turns:
    """W and b turn by turn, from what least squares gives for y itself."""

    sums: Sums
    rows: Intervals
    damping: float
    first: tuple[Matrix, Matrix]

    @classmethod
    def of(cls, sums: Sums, rows: Intervals, damping: float, weight: Matrix) -> _Turns:
        fitted = sums.fit(weight, damping, biased=True)
        return cls(sums, rows, damping, (fitted, sums.bias(fitted)))

    def next(self, weight: Matrix, bias: Matrix) -> tuple[Matrix, Matrix]:
        shift, cross = self.rows.missing(weight, bias)
        mean = self.sums.x / self.sums.count
        xx = self.sums.xx / self.sums.count - mean[:, :, None] * mean[:, None, :]
        changed = ridge(np.zeros_like(weight), xx, cross, self.damping)
        first, start = self.first
        return first + changed, start + shift - np.einsum("gok,gk->go", changed, mean)


def loosen(
    fitted: Fitted,
    sums: tuple[Sums, Sums],
    rows: tuple[Intervals, Intervals],
    weight: Matrix,
    bias: Matrix,
    stored: Stored = lambda weight: weight,
) -> Fitted:
    """Lets y be anything that does as well, where that helps on held-back rows.

    Args:
        fitted: towards y itself, with a bias.
        sums: of what was learnt from, and of what is held back.
        rows: of the same.
        weight, bias: those that were there before the fit.
        stored: errors are those of what it leaves.

    Returns:
        the best of the two and of what was there; its errors are distances to the intervals.
    """
    assert fitted.damping is not None
    (seen, held), (learnt, judges) = sums, (rows[0].joined(), rows[1].joined())
    scale = 1 / max(held.variance(), 1e-30)
    turns = _Turns.of(seen, learnt, fitted.damping, weight)
    now, taken = turns.first, 0
    error = judges.error(stored(now[0]), now[1])
    while taken < _TURNS:
        now = turns.next(*now)
        fresh = judges.error(stored(now[0]), now[1])
        if not fresh < error * (1 - _GAIN):
            break
        error, taken = fresh, taken + 1
    before, after = judges.error(weight, bias) * scale, error * scale
    if not after < before:
        return Fitted(weight, bias, before, before, None)
    if not taken:
        return replace(fitted, before=before, after=after)
    turns = _Turns.of(seen + held, learnt + judges, fitted.damping, weight)
    now = turns.first
    for _ in range(taken):
        now = turns.next(*now)
    return Fitted(*now, before, after, fitted.damping)
