"""Refits a pruned model, node by node in graph order, on what the repaired part feeds each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.data import Array
from secateur.graphops.calibration.moments import (
    WIDEST,
    linear_maps,
    sample_places,
    weight_of,
    width,
)
from secateur.graphops.calibration.network import Network, Piece
from secateur.graphops.calibration.observed import HELD_BACK, Observed
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.opening import node_label
from secateur.graphops.repair.fit import Fitted, Sums, choose
from secateur.graphops.repair.target import Target
from secateur.graphops.rules.linear import pick_rows
from secateur.report import RepairStep

Mask = npt.NDArray[np.bool_]
_EXACT = 1e-9  # relative error below which nothing has reached the node


def repair(
    pruned: ir.Model,
    observed: Observed,
    keep: Mask,
    seed: int,
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[RepairStep, ...]:
    """Refits W and b of every matrix product so that the pruned model gives the original's values.

    Each is fitted on what the part before it, already repaired, feeds it, towards what the
    original puts out there.

    Args:
        pruned: cut from the model that was observed; its weights are changed.
        observed: the original and its calibration batches.
        keep: per unit whether it stays.
        seed: of the positions that are sampled.
        tell: told the share that is done.
    """
    original, coupling = observed.model, observed.coupling
    before, after = Network(original, observed.batches), Network(pruned, observed.batches)
    nodes = {str(node.outputs[0].name): node for node in original.graph}
    places = {node: place for place, node in enumerate(pruned.graph)}
    views = [
        view
        for view in linear_maps(pruned, coupling.shapes)
        if str(view.node.outputs[0].name) in nodes and width(view) <= WIDEST
    ]
    steps = []
    for place, view in enumerate(views):
        target = Target.of(view, places)
        if target is None:
            continue
        before.advance(nodes[str(view.node.outputs[0].name)])
        after.advance(view.node)
        fitted = _Fit(target, before, after, coupling, keep, seed + place).run()
        if fitted is not None:
            steps.append(
                RepairStep(
                    node=node_label(view.node), error_before=fitted.before, error_after=fitted.after
                )
            )
            if fitted.damping is not None:
                target.write(pruned.graph, fitted.weight, fitted.bias)
        tell((place + 1) / len(views))
    return tuple(steps)


def make_room(pruned: ir.Model, coupling: Coupling) -> None:
    """Gives nodes the biases that `repair` may give them, all zeros: its file is no larger.

    Args:
        pruned: is changed.
        coupling: of the model it was cut from.
    """
    places = {node: place for place, node in enumerate(pruned.graph)}
    for view in list(linear_maps(pruned, coupling.shapes)):
        target = Target.of(view, places) if width(view) <= WIDEST else None
        if target is None or not target.biased:
            continue
        if target.bias is None or len(target.bias.uses()) > 1:
            weight = weight_of(view)
            target.write(pruned.graph, weight, np.zeros(weight.shape[:2]))


class _Fit:
    """The refit of one node."""

    def __init__(
        self,
        target: Target,
        before: Network,
        after: Network,
        coupling: Coupling,
        keep: Mask,
        seed: int,
    ) -> None:
        node = target.view.node
        self._target = target
        self._x, self._y = str(getattr(node.inputs[0], "name", "")), str(node.outputs[0].name)
        self._wanted: Piece = before.piece([target.observed])
        self._found: Piece = after.piece([self._x, self._y, *target.rest])
        self._coupling, self._keep = coupling, keep
        self._generator = np.random.default_rng(seed)
        self._batches = after.batches

    def run(self) -> Fitted | None:
        """None where the node's input and the rest are what they were, or other shapes meet."""
        weight = weight_of(self._target.view)
        groups, out, entries = weight.shape
        bias = self._target.numbers(groups)
        start = np.zeros((groups, out)) if bias is None else bias
        seen, held = (Sums.zeros(groups, entries, out) for _ in range(2))
        for batch in range(self._batches):
            rows = self._rows(batch, weight.shape)
            if rows is None:
                return None
            last = batch == self._batches - 1
            sums = held if batch % HELD_BACK == HELD_BACK - 1 or last else seen
            sums.add(*rows)
            if batch == 0 and sums.error(weight, start) <= _EXACT * max(sums.variance(), 1e-30):
                return None
        if not seen.count:
            return None  # one batch: nothing to judge a fit by
        return choose(seen, held, weight, start, biased=self._target.biased)

    def _rows(
        self, batch: int, shape: tuple[int, ...]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
        """x and the y it should give, (groups, places, k) and (groups, places, out / groups)."""
        view, (groups, out, entries) = self._target.view, shape
        values = self._found.run(batch)
        goal = self._kept(self._wanted.run(batch)[self._target.observed])
        y_shape = values[self._y].shape
        rest = [values[name] for name in self._target.rest]
        if any(array.shape != y_shape for array in (goal, *rest)):
            return None
        positions = goal.size // y_shape[view.y_axis]
        places = sample_places(positions, self._batches, entries, self._generator)
        aim = pick_rows(goal, view.y_axis, places).astype(np.float32)
        for array in rest:
            aim -= pick_rows(array, view.y_axis, places)
        x = view.rows(values[self._x], y_shape, places).astype(np.float32, copy=False)
        return x, aim.reshape(len(places), groups, out).transpose(1, 0, 2)

    def _kept(self, array: Array) -> Array:
        """The original's tensor without the positions that went."""
        for axis, units in self._coupling.axes(self._target.observed).items():
            mask = self._keep[units]
            if not mask.all() and mask.size == array.shape[axis]:
                array = np.compress(mask, array, axis=axis)
        return array
