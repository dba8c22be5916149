"""Refits a pruned model, node by node in graph order, on what the repaired part feeds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops import rules
from secateur.graphops.calibration.data import Array
from secateur.graphops.calibration.moments import WIDEST, linear_maps, sample_places, width
from secateur.graphops.calibration.network import Network, OutputShapes, Piece, last_uses
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.graph import constant_of, node_label, walk
from secateur.graphops.model.shapes import Shapes
from secateur.graphops.repair.fit import Fitted, Sums
from secateur.graphops.repair.gates import Gates, input_weight
from secateur.graphops.repair.interval import Bounds, Intervals, loosen
from secateur.graphops.repair.target import Correction, Repairable, Target
from secateur.graphops.rules.linear import by_group, pick_rows
from secateur.report import RepairStep

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.float32]
EXACT = 1e-9  # relative error below which nothing has reached the node


def repair(
    pruned: ir.Model,
    observed: Observed,
    keep: Mask,
    seed: int,
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[RepairStep, ...]:
    """Refits W and b of every matrix product so that the pruned model gives the original's values.

    Each is fitted on what the part before it, already repaired, feeds it, towards what the
    original puts out there. Where a refit does not apply, scale and shift are corrected.

    Args:
        pruned: cut from the model that was observed; its weights are changed.
        observed: the original and its calibration batches.
        keep: per unit whether it stays.
        seed: of the positions that are sampled.
        tell: told the share that is done.
    """
    before, after = Network(observed.model, observed.batches), Network(pruned, observed.batches)
    nodes = {_first(node): node for node in observed.model.graph}
    found = [one for one in repairable(pruned, observed.coupling.shapes) if _y(one) in nodes]
    places = stands(observed.model, [target.end.observed for target in found])
    opsets = dict(pruned.opset_imports)
    steps, refitted = [], set[str]()
    for place, target in enumerate(found):
        if _follows(target.node, refitted):
            continue
        before.advance(places[place] or nodes[_y(target)])
        after.advance(target.node)
        flat, whole = _flat_beyond(target, opsets), nodes[_y(target)]
        given = target, flat, before, after, observed, keep, seed + place
        gates = isinstance(target, Gates)  # no fit is held: each has sessions of its own
        fitted = _GatesFit(whole, *given).run() if gates else _Fit(*given).run()
        if fitted is not None:
            steps.append(
                RepairStep(
                    node=node_label(target.node),
                    error_before=fitted.before,
                    error_after=fitted.after,
                    method=target.method,
                )
            )
            if fitted.damping is not None:
                target.write(pruned.graph, fitted.weight, fitted.bias)
                if isinstance(target, Target):
                    refitted.add(target.end.observed)
        tell((place + 1) / len(found))
    return tuple(steps)


def stands(original: ir.Model, aims: Sequence[str]) -> list[ir.Node | None]:
    """Where the original can stand so that what each fit aims at has run; None: no such place.

    That is behind it, unless a later fit aims at something before, or nothing would read it there.

    Args:
        original: that the aims are tensors of.
        aims: names, in the order in which they are aimed at.
    """
    order = list(original.graph)
    made = {str(value.name): place for place, node in enumerate(order) for value in node.outputs}
    read, first, places = last_uses(order), len(order), list[ir.Node | None]()
    for aim in reversed(aims):
        place = made.get(aim, -1)
        first = min(first, place)
        held = place > first or read.get(aim, -1) > place
        places.append(order[first + 1] if held and first + 1 < len(order) else None)
    return places[::-1]


def make_room(pruned: ir.Model, coupling: Coupling) -> None:
    """Gives nodes the tensors that `repair` may give them, of no effect: its file is no larger.

    Args:
        pruned: is changed.
        coupling: of the model it was cut from.
    """
    for target in repairable(pruned, coupling.shapes):
        if target.grows:
            target.write(pruned.graph, *target.start())


def repairable(model: ir.Model, shapes: Shapes) -> list[Repairable]:
    """What can be set, in the order of the graph.

    Args:
        model: the pruned one.
        shapes: of the original, whose ranks are the same.
    """
    places = {node: place for place, node in enumerate(model.graph)}
    views = {view.node: view for view in linear_maps(model, shapes, quantised=True)}
    opsets = dict(model.opset_imports)
    found: list[Repairable | None] = []
    for node in places:
        if node in views:
            target = Target.of(views[node], places)
            fits = target is not None and not target.shared and width(views[node]) <= WIDEST
            corrected = None if fits or target is None else Correction.of_product(target)
            found.append(target if fits else corrected)
            continue
        rule = rules.of(node, opsets)
        shape = shapes.of(str(node.outputs[0].name)) if node.outputs else None
        if rule is not None and rule.family == "recurrent":
            found.append(Gates.of(node))
        if rule is not None and rule.affine is not None and shape:
            found.append(Correction.of_normalisation(node, rule, len(shape), places))
    return [one for one in found if one is not None]


def left(model: ir.Model, shapes: Shapes | None) -> tuple[str, ...]:
    """Labels of products with constant weights that repair leaves as they are: in fused operators,
    in bodies, packed in blocks. Without data only those are meant that are quantised.

    Args:
        model: the pruned one.
        shapes: of the original; None where there are no data to fit by.
    """
    opsets = dict(model.opset_imports)
    fitted = {target.node for target in repairable(model, shapes)} if shapes is not None else set()
    found = []
    for node in walk(model.graph):
        rule = rules.of(node, opsets)
        if rule is None or rule.macs is None or node in fitted:
            continue
        integers = rule.family == "quantised" or any(map(_dequantised, node.inputs))
        # what attention adds to its scores is no weight
        operands = node.inputs[:3] if rule.family == "attention" else node.inputs
        if integers or (shapes is not None and any(map(_is_matrix, operands))):
            found.append(node_label(node))
    return tuple(found)


def _dequantised(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear makes it of a constant."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return False
    return constant_of(node.inputs[0]) is not None


def _is_matrix(value: ir.Value | None) -> bool:
    tensor = constant_of(value)
    return tensor is not None and len(tensor.shape) > 1


def _y(target: Repairable) -> str:
    return _first(target.node)


def _first(node: ir.Node) -> str:
    """The first output that has a name: recurrent layers may leave some out."""
    return next((str(output.name) for output in node.outputs if output.name), "")


def _follows(node: ir.Node, refitted: set[str]) -> bool:
    """Whether a node scales and shifts what a refit has put out, which has left it nothing to do.

    Least squares leaves an error that does not run together with what was fitted. Of the nodes
    that normalise, BatchNormalization alone has statistics that are constants.
    """
    x = node.inputs[0]
    return node.op_type == "BatchNormalization" and x is not None and str(x.name) in refitted


def _flat_beyond(target: Repairable, opsets: Mapping[str, int]) -> Bounds | None:
    """Beyond what it makes no difference what a node puts out, as far as is known."""
    if isinstance(target, Gates) or not target.end.biased:
        return None
    reader = target.end.reader(target.node)
    if reader is None:
        return None
    rule = rules.of(reader, opsets)
    return None if rule is None or rule.flat is None else rule.flat(reader)


def kept_positions(array: Array, name: str, coupling: Coupling, keep: Mask) -> Array:
    """The original's tensor without the positions that went.

    Args:
        array: the tensor.
        name: its name.
        coupling: of the original.
        keep: per unit whether it stays.
    """
    for axis, units in coupling.axes(name).items():
        mask = keep[units]
        if not mask.all() and mask.size == array.shape[axis]:
            array = np.compress(mask, array, axis=axis)
    return array


class _Fit:
    """The fit of one node."""

    def __init__(
        self,
        target: Repairable,
        flat: Bounds | None,
        before: Network,
        after: Network,
        observed: Observed,
        keep: Mask,
        seed: int,
    ) -> None:
        self._target, self._flat, self._y = target, flat, _y(target)
        self._wanted: Piece = before.piece([target.end.observed])
        self._found: Piece = after.piece([target.x, *target.end.rest])
        self._shapes = OutputShapes(after, self._y)
        self._coupling, self._keep = observed.coupling, keep
        self._judging = observed.judges_with
        self._generator = np.random.default_rng(seed)
        self._batches = after.batches

    def run(self) -> Fitted | None:
        """None where the node's input and the rest are what they were, or other shapes meet."""
        weight, start = self._target.start()
        groups, out, entries = weight.shape
        seen, held = (Sums.zeros(groups, entries, out) for _ in range(2))
        loose = [self._room(weight.shape) for _ in range(2)]
        for batch in range(self._batches):
            rows = self._rows(batch, weight.shape)
            if rows is None:
                return None
            sums, intervals = (held, loose[1]) if self._judging(batch) else (seen, loose[0])
            x, wanted, rest = rows
            sums.add(x, wanted)
            if intervals is not None:
                intervals.add(x, wanted, rest)
            told = batch == 0 and sums.count
            if told and sums.error(weight, start) <= EXACT * max(sums.variance(), 1e-30):
                return None
        if not seen.count or not held.count:
            return None  # one batch, or an expert that none reaches: nothing to judge a fit by
        fitted = self._target.fit(seen, held)
        if fitted.damping is None or loose[0] is None or loose[1] is None:
            return fitted
        assert isinstance(self._target, Target)  # what else there is has one entry
        stored = self._target.stored
        return loosen(fitted, (seen, held), (loose[0], loose[1]), weight, start, stored)

    def _room(self, shape: tuple[int, ...]) -> Intervals | None:
        return None if self._flat is None else Intervals.room(self._flat, shape, self._batches)

    def _rows(self, batch: int, shape: tuple[int, ...]) -> tuple[Rows, Rows, Rows] | None:
        """x, the y it should give, and what is added to that.

        (groups, places, k), and twice (groups, places, out / groups).
        """
        target, (groups, out, entries) = self._target, shape
        values = self._found.run(batch)
        name = target.end.observed
        goal = kept_positions(self._wanted.run(batch)[name], name, self._coupling, self._keep)
        y_shape = self._shapes.of(batch, values[target.x])
        rest = [values[name] for name in target.end.rest]
        if any(array.shape != y_shape for array in (goal, *rest)):
            return None
        positions = goal.size // y_shape[target.y_axis]
        places = sample_places(positions, self._batches, groups, entries, self._generator)
        added = np.zeros((len(places), groups * out), np.float32)
        for array in rest:
            added += pick_rows(array, target.y_axis, places)
        aim = pick_rows(goal, target.y_axis, places).astype(np.float32) - added
        x = target.rows(values[target.x], y_shape, places).astype(np.float32, copy=False)
        return x, by_group(aim, groups), by_group(added, groups)


class _GatesFit(_Fit):
    """The fit of a recurrent layer: what its gates get is computed here, not by the graph.

    Args:
        whole: the layer in the original.
        given: as for other fits.
    """

    def __init__(self, whole: ir.Node, *given: Any) -> None:
        super().__init__(*given)
        name = str(getattr(whole.inputs[1], "name", ""))
        units = self._coupling.axes(name).get(1)
        weight = input_weight(whole)
        self._weight = weight if units is None else weight[:, self._keep[units]]

    def _rows(self, batch: int, shape: tuple[int, ...]) -> tuple[Rows, Rows, Rows] | None:
        target, (groups, _, entries) = self._target, shape
        found = self._found.run(batch)[target.x]
        wanted = self._wanted.run(batch)[target.x]
        if found.shape[:2] != wanted.shape[:2]:
            return None
        positions = found.shape[0] * found.shape[1]
        places = sample_places(positions, self._batches, groups, entries, self._generator)
        weight = self._weight.astype(np.float32)
        aim = target.rows(wanted, wanted.shape, places) @ weight.transpose(0, 2, 1)
        x = target.rows(found, found.shape, places).astype(np.float32, copy=False)
        return np.broadcast_to(x, (groups, *x.shape[1:])), aim, np.zeros_like(aim)
