"""Least squares from second moments.

    minimise  E‖y − W·x − b‖² + λ·v·‖W − W₀‖²        v: mean variance of the entries of x

    W = W₀ + (Cyx − W₀·Cxx)·(Cxx + λ·v·I)⁻¹        b = E[y] − W·E[x]

Ridge regression towards the weights that are there (He, Zhang, Sun: Channel Pruning for
Accelerating Very Deep Neural Networks, ICCV 2017, fit without λ). λ is chosen by the error on
moments of batches that the fit has not seen; no λ at all means the old weights stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from secateur.graphops.calibration.moments import gram, total

Matrix = npt.NDArray[np.float64]
Stored = Callable[[Matrix], Matrix]  # what is left of a W where it is written

DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(slots=True)
class Sums:
    """Sums over rows of x (groups, k) and of the y (groups, out) that they should give.

    Attributes:
        count: rows.
        x, y: (groups, k) and (groups, out).
        xx, yx: (groups, k, k) and (groups, out, k).
        yy: (groups, out), squares.
    """

    count: int
    x: Matrix
    y: Matrix
    xx: Matrix
    yx: Matrix
    yy: Matrix

    @classmethod
    def zeros(cls, groups: int, k: int, out: int) -> Sums:
        """Of no rows."""
        shapes = [(groups, k), (groups, out), (groups, k, k), (groups, out, k), (groups, out)]
        return cls(0, *(np.zeros(shape) for shape in shapes))

    def add(self, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> None:
        """Adds rows.

        Args:
            x: (groups, rows, k).
            y: (groups, rows, out).
        """
        self.count += x.shape[1]
        self.x += total(x)
        self.y += y.sum(axis=1, dtype=np.float64)
        self.xx += gram(x)
        self.yx += np.matmul(y.transpose(0, 2, 1), x)
        self.yy += np.einsum("gro,gro->go", y, y, dtype=np.float64)

    def __add__(self, other: Sums) -> Sums:
        """Over the rows of both."""
        return Sums(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.yx + other.yx,
            self.yy + other.yy,
        )

    def error(self, weight: Matrix, bias: Matrix) -> float:
        """E‖y − W·x − b‖², summed over outputs.

        Args:
            weight: (groups, out, k).
            bias: (groups, out).
        """
        n = self.count
        mean_x, mean_y = self.x / n, self.y / n
        fitted = np.einsum("gok,gk->go", weight, mean_x)
        squares = self.yy / n - 2 * np.einsum("gok,gok->go", weight, self.yx) / n
        squares += np.einsum("gok,gok->go", np.matmul(weight, self.xx / n), weight)
        squares += 2 * bias * (fitted - mean_y) + bias**2
        return float(np.maximum(squares, 0).sum())

    def variance(self) -> float:
        """Var(y), summed over outputs."""
        return float((self.yy / self.count - (self.y / self.count) ** 2).sum())

    def bias(self, weight: Matrix) -> Matrix:
        """The best b for a W, shape (groups, out)."""
        best: Matrix = (self.y - np.einsum("gok,gk->go", weight, self.x)) / self.count
        return best

    def fit(self, weight: Matrix, damping: float, *, biased: bool) -> Matrix:
        """The W of the equation above.

        Args:
            weight: W₀.
            damping: λ.
            biased: whether there is a b; without one the moments are about zero.
        """
        n = self.count
        xx, yx = self.xx / n, self.yx / n
        if biased:
            mean_x, mean_y = self.x / n, self.y / n
            xx = xx - mean_x[:, :, None] * mean_x[:, None, :]
            yx = yx - mean_y[:, :, None] * mean_x[:, None, :]
        return ridge(weight, xx, yx, damping)


def ridge(weight: Matrix, xx: Matrix, yx: Matrix, damping: float) -> Matrix:
    """The W of the equation above, shape (groups, out, k).

    Args:
        weight: W₀.
        xx: Cxx, (groups, k, k).
        yx: Cyx, (groups, out, k).
        damping: λ.
    """
    damped, entries = xx.copy(), np.arange(xx.shape[1])
    variances = np.trace(xx, axis1=1, axis2=2) / entries.size
    damped[:, entries, entries] += damping * np.maximum(variances, 1e-12)[:, None]
    missing = (yx - weight @ xx).transpose(0, 2, 1)
    change = _solve(damped, missing)
    result: Matrix = weight + change.transpose(0, 2, 1)
    return result


def _solve(damped: Matrix, missing: Matrix) -> Matrix:
    """Solves positive definite systems: many small ones at once, or one by its Cholesky factor;
    by least squares where rounding has left one indefinite."""
    try:
        if len(damped) > 1:
            np.linalg.cholesky(damped)  # tells whether they are; small ones cost little
            return np.asarray(np.linalg.solve(damped, missing), np.float64)
        factor = scipy.linalg.cho_factor(damped[0], check_finite=False)
        solved: Matrix = scipy.linalg.cho_solve(factor, missing[0], check_finite=False)[None]
    except np.linalg.LinAlgError:
        if len(damped) == 1:
            return np.asarray(np.linalg.lstsq(damped[0], missing[0], rcond=None)[0])[None]
        pairs = zip(damped, missing, strict=True)
        solved = np.concatenate([_solve(one[None], goal[None]) for one, goal in pairs])
    return solved


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of one fit.

    Attributes:
        weight, bias: (groups, out, k) and (groups, out).
        before, after: relative error on held-back batches, E‖y − ŷ‖² / Var(y).
        damping: λ, infinite where only b was fitted; None where the old weights were best.
    """

    weight: Matrix
    bias: Matrix
    before: float
    after: float
    damping: float | None


def choose(
    seen: Sums,
    held: Sums,
    weight: Matrix,
    bias: Matrix,
    *,
    biased: bool,
    stored: Stored = lambda weight: weight,
) -> Fitted:
    """Fits on one part of the data, keeps what is best on the other, and then uses both.

    Args:
        seen, held: sums over both parts.
        weight, bias: as they are.
        biased: whether there is a b.
        stored: errors are those of what it leaves.
    """
    scale = 1 / max(held.variance(), 1e-30)
    before = held.error(weight, bias)
    best, damping = before, None
    for candidate in DAMPINGS:
        fitted = stored(seen.fit(weight, candidate, biased=biased))
        error = held.error(fitted, seen.bias(fitted) if biased else bias)
        if np.isfinite(error) and error < best:
            best, damping = error, candidate
    if damping is None:
        return Fitted(weight, bias, before * scale, before * scale, None)
    together = seen + held
    weight = stored(together.fit(weight, damping, biased=biased))
    bias = together.bias(weight) if biased else bias
    return Fitted(weight, bias, before * scale, best * scale, damping)


def shift(seen: Sums, held: Sums, weight: Matrix, bias: Matrix) -> Fitted:
    """The best b alone, for a W that stays, as `choose` would have it."""
    scale = 1 / max(held.variance(), 1e-30)
    before, after = held.error(weight, bias), held.error(weight, seen.bias(weight))
    if not after < before:
        return Fitted(weight, bias, before * scale, before * scale, None)
    return Fitted(weight, (seen + held).bias(weight), before * scale, after * scale, np.inf)
