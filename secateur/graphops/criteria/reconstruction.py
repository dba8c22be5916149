"""Reconstruction: what is lost at a unit's consumers after the rest has taken over.

Removing the entries P of x costs a consumer y = W·x, its weights refitted by least squares,

    Δ(P) = Σ over outputs w:  w_Pᵀ ([S⁻¹]_PP)⁻¹ w_P          S = Cov(x)

(LeCun, Denker, Solla: Optimal Brain Damage; Hassibi, Stork: Optimal Brain Surgeon, 1993; in blocks
and on activations: Frantar, Alistarh: Optimal Brain Compression, 2022; Meng et al.: OSSCAR, 2024).
Units go one after another, or a few together; after each step W and S⁻¹ are those of what is left:

    W ← W − W_P ([S⁻¹]_PP)⁻¹ [S⁻¹]_P         S⁻¹ ← S⁻¹ − [S⁻¹]_·P ([S⁻¹]_PP)⁻¹ [S⁻¹]_P

S is damped, and the least damped loss is that of the error and of δ‖ΔW‖² together. The second is no
loss: a unit that others say exactly costs nothing. It is taken off where that may decide.

What a consumer's output misses counts as much as the model's outputs depend on it: each w is taken
times the root of its curvature (`calibration.curvature`), so that a unit's losses at its consumers
add up to what the outputs miss. Where an operator has no derivative, all outputs of a consumer
count alike, and its loss is relative to their variance. The score is the loss of its group when the
unit has gone: it grows from unit to unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.moments import weight_of
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import Units
from secateur.graphops.criteria import magnitude
from secateur.graphops.criteria.context import Context, places_of

Matrix = npt.NDArray[np.float64]
Columns = npt.NDArray[np.int64]

_TINY = 1e-12  # where nothing varies
_LEAST = 1e-6  # of the largest curvature: below it derivatives are noise
_AT_ONCE = 32  # one in that many of the units that are left goes in one step
_LIKELY = 8  # times as many are looked at closely, but no fewer than
_LEAST_LIKELY = 32


@dataclass(slots=True)
class Consumer:
    """One matrix product that reads units, and what is left of it.

    Attributes:
        weight: (out, k).
        inverse: (k, k), of the damped covariance.
        damping: δ, what was added to each variance.
        columns: (units, entries of x per unit), those of each unit of the group.
        scale: of its losses beside those of others.
    """

    weight: Matrix
    inverse: Matrix
    damping: float
    columns: Columns
    scale: float

    def losses(self, left: Columns) -> Matrix:
        """Δ of each unit in `left`, damping included, shape (left,)."""
        columns = self.columns[left]
        weights, solved = self._solved(columns)
        lost: Matrix = self.scale * np.einsum("upo,upo->u", weights, solved)
        return lost

    def errors(self, left: Columns) -> Matrix:
        """Δ of each unit in `left`, shape (left,)."""
        columns = self.columns[left]
        weights, solved = self._solved(columns)
        rows = self.inverse[columns]  # ΔW = (W_P ([S⁻¹]_PP)⁻¹) [S⁻¹]_P
        moved = np.einsum("upo,upq,uqo->u", solved, rows @ rows.transpose(0, 2, 1), solved)
        lost = np.einsum("upo,upo->u", weights, solved) - self.damping * moved
        errors: Matrix = self.scale * np.maximum(lost, 0.0)
        return errors

    def _solved(self, columns: Columns) -> tuple[Matrix, Matrix]:
        """W_Pᵀ and ([S⁻¹]_PP)⁻¹ W_Pᵀ of each unit, shapes (units, entries, out)."""
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = self.weight[:, columns].transpose(1, 2, 0)
        if columns.shape[1] == 1:
            return weights, weights / blocks
        return weights, np.asarray(np.linalg.solve(blocks, weights), np.float64)

    def remove(self, units: Columns) -> float:
        """Takes units out; what that costs together."""
        gone = self.columns[units].reshape(-1)
        block = self.inverse[np.ix_(gone, gone)]
        solved = np.linalg.solve(block, self.inverse[gone])
        lost = self.weight[:, gone]
        moved = lost @ solved
        cost = float(np.einsum("op,op->", lost, np.linalg.solve(block, lost.T).T))
        cost -= self.damping * float(np.einsum("ok,ok->", moved, moved))
        self.weight -= moved
        self.inverse -= self.inverse[:, gone] @ solved
        self.weight[:, gone] = 0
        # What is gone stays gone: nothing couples to it, and its block stays invertible.
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0
        self.inverse[gone, gone] = 1
        return self.scale * max(cost, 0.0)


def reconstruction(context: Context) -> Matrix:
    """Loss at the consumers when each unit has gone, in the order that loses least.

    Groups without a consumer that is a matrix product (a table that only a Gather reads) are
    ranked by l2.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    observed = context.seen("reconstruction")
    scores = np.zeros(context.coupling.count + 1)
    reads: dict[int, list[str]] = {}
    for name, view in observed.consumers.items():
        line = observed.line(view)
        for unit in np.unique(line).tolist() if line is not None else ():
            reads.setdefault(unit, []).append(name)
    norms: Matrix | None = None  # read from every weight: only for a group that needs them
    for group in context.coupling.groups:
        names = reads.get(int(group.units[0]), ())
        derived = all(name in observed.curvature.of for name in names)
        consumers = [
            consumer
            for name in names
            for consumer in _consumers(observed, name, group.units, derived)
        ]
        if consumers:
            scores[group.units] = eliminate(consumers, group.units.size)
        else:
            norms = magnitude.l2(context) if norms is None else norms
            scores[group.units] = norms[group.units]
    return scores


def _consumers(observed: Observed, name: str, units: Units, derived: bool) -> Iterator[Consumer]:
    """The consumers of a group of units in one node, one per group of the convolution.

    Args:
        derived: whether losses are of the model's outputs, rather than relative to the node's.
    """
    view, moments = observed.consumers[name], observed.moments[name]
    line = observed.line(view)
    assert line is not None
    weights, covariances, dampings = weight_of(view), moments.damped(), moments.damping()
    if derived:
        curvature = observed.curvature.of[name]
        least = np.maximum(curvature, _LEAST * curvature.max())
        weights = weights * np.sqrt(least).reshape(*weights.shape[:2], 1)
    for weight, covariance, damping, channels in zip(
        weights, covariances, dampings, view.channels(line.size), strict=True
    ):
        columns = places_of(line[channels], units)
        if columns is None:
            continue  # whole groups go: every unit is of one group of the convolution only
        scale = 1.0
        if not derived:
            variance = float(np.einsum("oi,oi->", weight @ covariance, weight))
            scale = 1 / max(variance, _TINY)
        yield Consumer(weight.copy(), np.linalg.inv(covariance), float(damping), columns, scale)


def eliminate(consumers: list[Consumer], units: int) -> Matrix:
    """Takes all units of a group out, the least missed first.

    Returns:
        the loss when each unit has gone, shape (units,), ascending in the order of going.
    """
    scores = np.zeros(units)
    left = np.arange(units)
    loss = 0.0
    while left.size:
        together = max(1, left.size // _AT_ONCE)
        losses = np.sum([consumer.losses(left) for consumer in consumers], axis=0)
        count = max(_LIKELY * together, _LEAST_LIKELY)
        likely = np.sort(left[np.argsort(losses, kind="stable")[:count]])
        errors = np.sum([consumer.errors(likely) for consumer in consumers], axis=0)
        chosen = likely[np.argsort(errors, kind="stable")[:together]]
        step = sum(consumer.remove(chosen) for consumer in consumers)
        # Those that go together share the step in the order of what each alone would cost.
        scores[chosen] = loss + step * np.arange(1, together + 1) / together
        loss += step
        left = np.setdiff1d(left, chosen, assume_unique=True)
    return scores
