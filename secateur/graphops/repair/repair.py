"""Refits a pruned model, node by node in graph order, on what the repaired part feeds each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.data import Array, Feeds
from secateur.graphops.calibration.moments import (
    WIDEST,
    linear_maps,
    sample_places,
    tensor_of,
    weight_of,
    width,
)
from secateur.graphops.calibration.network import Network
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.opening import node_label
from secateur.graphops.model.shapes import constant_of
from secateur.graphops.repair.fit import Fitted, Sums, choose
from secateur.graphops.rules.linear import LinearMap, pick_rows

Mask = npt.NDArray[np.bool_]
_HELD_BACK = 5  # every fifth batch judges the fit made on the others
_EXACT = 1e-9  # relative error below which nothing has reached the node


@dataclass(frozen=True, slots=True)
class Step:
    """One node's refit: relative error of its output on held-back samples, before and after."""

    node: str
    before: float
    after: float
    ridge: float | None


def repair(
    original: ir.Model,
    pruned: ir.Model,
    coupling: Coupling,
    keep: Mask,
    batches: Sequence[Feeds],
    *,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Step]:
    """Refits W and b of every matrix product so that the pruned model gives the original's values.

    Args:
        original: unshared.
        pruned: cut from it; its weights are changed.
        coupling: of the original.
        keep: per unit whether it stays.
        batches: calibration data; at least two, so that some can be held back.
        seed: of the positions that are sampled.
        progress: told the share that is done.
    """
    before, after = Network(original, batches), Network(pruned, batches)
    nodes = {str(node.outputs[0].name): node for node in original.graph}
    views = [
        view
        for view in linear_maps(pruned, coupling.shapes)
        if width(view) <= WIDEST
        and str(view.node.outputs[0].name) in nodes
        and len(view.node.inputs[view.weight].uses()) == 1  # others are tied on purpose
    ]
    steps = []
    for place, view in enumerate(views):
        target = _Target.of(view, after._place)
        first = nodes[str(view.node.outputs[0].name)]
        before.advance(first)
        after.advance(view.node)
        fitted = _fit(view, target, before, after, coupling, keep, seed + place)
        if fitted is not None:
            steps.append(
                Step(node_label(view.node), fitted.before, fitted.after, fitted.ridge)
            )
            if fitted.ridge is not None:
                _write(pruned.graph, view, target, fitted.weight, fitted.bias)
        progress((place + 1) / len(views))
    return steps


@dataclass(frozen=True, slots=True)
class _Target:
    """What a node's output should be, said of the sum that it ends in.

    A residual block ends in y + rest. What earlier cuts have changed in the rest, y can take back:
    its target is the original's sum minus the rest as it now is.

    Attributes:
        observed: name of the sum.
        rest: names of what is added to y on the way.
        bias: the constant that plays b, None where there is none.
        owner: the Add that adds it, None where the node does itself.
        biased: whether b can be fitted.
    """

    observed: str
    rest: tuple[str, ...]
    bias: ir.Value | None
    owner: ir.Node | None
    biased: bool

    @classmethod
    def of(cls, view: LinearMap, places) -> _Target:
        node, bias, owner, biased = view.node, None, None, False
        if view.bias is not None:
            given = node.inputs[view.bias] if view.bias < len(node.inputs) else None
            bias, biased = given, given is None or _is_vector(given)
        value, rest = node.outputs[0], []
        while not value.is_graph_output() and len(value.uses()) == 1:
            user, index = next(iter(value.uses()))
            if user.op_type != "Add" or user.domain not in ("", "ai.onnx"):
                break
            other = user.inputs[1 - index]
            if other is None:
                break
            if constant_of(other) is not None:
                if biased or rest or not _is_vector(other):
                    break
                bias, owner, biased = other, user, True
            else:
                producer = other.producer()
                if producer is not None and places[producer] > places[node]:
                    break
                rest.append(str(other.name))
            value = user.outputs[0]
        return cls(str(value.name), tuple(rest), bias, owner, biased)


def _is_vector(value: ir.Value) -> bool:
    tensor = constant_of(value)
    return tensor is not None and len(tensor.shape) == 1


def _fit(
    view: LinearMap,
    target: _Target,
    before: Network,
    after: Network,
    coupling: Coupling,
    keep: Mask,
    seed: int,
) -> Fitted | None:
    """The refit of one node; None where its input and the rest are what they were."""
    x, y = str(view.node.inputs[0].name), str(view.node.outputs[0].name)  # type: ignore[union-attr]
    wanted = before.session([target.observed])
    found = after.session([x, y, *target.rest])
    generator = np.random.default_rng(seed)
    weight = weight_of(view)
    groups, out, entries = weight.shape
    bias = np.zeros((groups, out)) if target.bias is None else _numbers(target.bias).reshape(groups, -1)
    if not target.biased:
        bias = np.zeros((groups, out))
    seen, held = (Sums.zeros(groups, entries, out) for _ in range(2))
    for batch in range(after.batches):
        values = found.run(batch)
        goal = _kept(wanted.run(batch)[target.observed], target.observed, coupling, keep)
        shape = values[y].shape
        if goal.shape != shape or any(values[name].shape != shape for name in target.rest):
            return None
        places = sample_places(goal.size // shape[view.y_axis], after.batches, entries, generator)
        aim = pick_rows(goal, view.y_axis, places).astype(np.float32)
        for name in target.rest:
            aim = aim - pick_rows(values[name], view.y_axis, places)
        if view.bias is not None and not target.biased:
            return None  # a bias of another form: what the node adds is not known
        rows = view.rows(values[x], shape, places).astype(np.float32)
        sums = held if batch % _HELD_BACK == _HELD_BACK - 1 or batch == after.batches - 1 else seen
        sums.add(rows, aim.reshape(len(places), groups, out).transpose(1, 0, 2))
        if batch == 0 and sums.error(weight, bias) <= _EXACT * max(sums.variance(), 1e-30):
            return None
    return choose(seen, held, weight, bias, biased=target.biased)


def _kept(array: Array, name: str, coupling: Coupling, keep: Mask) -> Array:
    """The original's tensor without the positions that went."""
    for axis, units in coupling.axes(name).items():
        mask = keep[units]
        if not mask.all() and mask.size == array.shape[axis]:
            array = np.compress(mask, array, axis=axis)
    return array


def _numbers(value: ir.Value) -> npt.NDArray[np.float64]:
    tensor = constant_of(value)
    assert tensor is not None
    numbers: npt.NDArray[np.float64] = tensor.numpy().astype(np.float64)
    return numbers


def _write(graph: ir.Graph, view: LinearMap, target: _Target, weight, bias) -> None:
    """Puts W and b where the node reads them; a tensor that others read too stays theirs."""
    tensor = tensor_of(view)
    assert tensor is not None
    matrix = view.tensor(weight, tensor.shape.numpy())
    _replace(graph, view.node, view.weight, matrix, f"{view.node.outputs[0].name}_weight")
    if not target.biased:
        return
    owner, index = view.node, view.bias
    if target.owner is not None:
        owner, index = target.owner, list(target.owner.inputs).index(target.bias)
    assert index is not None
    if index >= len(owner.inputs):
        owner.resize_inputs(index + 1)
    _replace(graph, owner, index, bias.reshape(-1), f"{view.node.outputs[0].name}_bias")


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: npt.NDArray[Any], name: str) -> None:
    """Gives input `index` of a node new numbers."""
    value = node.inputs[index]
    old = constant_of(value)
    like = old if old is not None else constant_of(node.inputs[1])
    assert like is not None
    producer = None if value is None else value.producer()
    if value is not None and len(value.uses()) == 1 and producer is None:
        name = str(value.name)
    tensor = ir.Tensor(np.ascontiguousarray(array.astype(like.dtype.numpy())), dtype=like.dtype, name=name)
    if value is not None and len(value.uses()) == 1:
        if producer is not None:
            producer.attributes.clear()
            producer.attributes["value"] = ir.AttrTensor("value", tensor)
        else:
            value.const_value = tensor
        return
    fresh = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(fresh)
    node.replace_input_with(index, fresh)
