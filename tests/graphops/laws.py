"""Checking a prune against the laws: for a whole model, and for one operator in it.

*Whole model:* ONNX Runtime runs the result and `check_law` finds it equal to the original with
zeros where units went. *One operator:* on an axis it carries, op(slice(x)) = slice(op(x)); on an
axis it contracts, slicing equals zeroing. The single operator is run by itself, the rewritten
node on sliced inputs against the original node on whole ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

import secateur
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.normalise import normalise
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.planning import replay
from secateur.graphops.surgery.cut import cut
from secateur.graphops.verify.examples import example_feeds
from secateur.graphops.verify.law import check_law, spelt_out
from secateur.plan import Plan

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

FLOAT32 = 1e-5  # largest relative difference that rounding explains in these small nets


@dataclass(frozen=True)
class Analysis:
    """A model as the engine sees it."""

    model: ir.Model
    copies: Mapping[str, str]
    coupling: Coupling
    sha256: str

    @classmethod
    def of(cls, source: onnx.ModelProto | bytes) -> Analysis:
        if isinstance(source, onnx.ModelProto):
            source = source.SerializeToString()
        return _analysis(source)

    def node(self, name: str) -> ir.Node:
        return next(node for node in self.model.graph if node.name == name)

    def keep(self, plan: Plan) -> Mask:
        return replay.units_kept(plan, self.coupling, self.copies, self.sha256)

    def kept(self, keep: Mask, name: str | None) -> dict[int, npt.NDArray[np.intp]]:
        """axis → kept indices of a tensor, for the axes that lose positions."""
        masks = {axis: keep[units] for axis, units in self.coupling.axes(name or "").items()}
        return {axis: np.flatnonzero(mask) for axis, mask in masks.items() if not mask.all()}

    def random_plan(self, seed: int) -> Plan:
        """Any choice of units that the coupling allows, whatever their scores and groups."""
        draw = np.random.default_rng(seed)
        keep = draw.random(self.coupling.count + 1) < draw.uniform(0.3, 0.8)
        keep[0] = True
        segments = list(self.coupling.segments)
        for name in self.coupling.constants:
            segments += [(units, 1) for units in self.coupling.axes(name).values()]
        for segment, least in segments:
            while segment.size and keep[segment].sum() < least:
                keep[draw.choice(segment[~keep[segment]])] = True
        _, kept = cut(self.model, self.coupling, keep, self.copies)
        return Plan(source=self.sha256, recipe=secateur.Recipe(repair=False), kept=kept)


@functools.lru_cache(maxsize=4)
def _analysis(source: bytes) -> Analysis:
    opened = open_model(source)
    copies = normalise(opened.model)
    coupling = couple(opened.model, infer_shapes(opened.model))
    return Analysis(opened.model, copies, coupling, opened.sha256)


def prune(source: Any, **recipe: Any) -> secateur.Result:
    """Prunes without timing anything."""
    plan = recipe.pop("plan", None)
    calibration = recipe.pop("calibration", None)
    if calibration is None:
        recipe.setdefault("repair", False)  # the law is about results without repair
    return secateur.prune(
        source,
        secateur.Recipe(**recipe),
        plan=plan,
        calibration=calibration,
        measure_latency=False,
    )


def lawful(source: Any, limit: float = FLOAT32, **recipe: Any) -> secateur.Result:
    """Prunes and asserts the whole-model law; gives the result."""
    result = prune(source, **recipe)
    assert result.plan.kept, "nothing was cut"
    assert check_law(source, result).difference < limit
    return result


def sliced(array: Array, kept: Mapping[int, npt.NDArray[np.intp]]) -> Array:
    for axis, indices in kept.items():
        array = np.take(array, indices, axis=axis)
    return array


# -- one operator ------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatorCheck:
    """What the check of one operator saw.

    Attributes:
        cut: whether positions went from any tensor it reads or writes.
        carried: whether its outputs lost positions, or it summed over lost ones.
        exact: false where it is one of the law's named exceptions on a cut axis.
        difference: largest |op(slice(x)) − slice(op(x))|, relative to the largest value.
    """

    cut: bool
    carried: bool
    exact: bool
    difference: float


def check_operator(
    source: onnx.ModelProto, result: secateur.Result, name: str
) -> OperatorCheck | None:
    """Runs the node called `name` alone, rewritten on sliced inputs and original on whole ones.

    None when the result has no such node any more (its readers read constants now).
    """
    pruned = spelt_out(result.model)
    rewritten = next((item for item in pruned.graph.node if item.name == name), None)
    if rewritten is None:
        return None
    analysis = Analysis.of(source)
    keep = analysis.keep(result.plan)
    node = analysis.node(name)
    tensors = [value for value in (*node.inputs, *node.outputs) if value is not None]
    contracted: list[tuple[int, int, npt.NDArray[np.intp]]] = []
    exact = True
    for contraction in analysis.coupling.contractions:
        if contraction.node is not node:
            continue
        value = node.inputs[contraction.index]
        lost = analysis.kept(keep, None if value is None else value.name).get(contraction.axis)
        if lost is not None:
            contracted.append((contraction.index, contraction.axis, lost))
            exact &= contraction.exact
    outputs = [analysis.kept(keep, value.name) for value in node.outputs]
    whole, parts = _operands(analysis, pruned, node, rewritten, keep)
    for index, axis, indices in contracted:
        point = _ZERO_POINTS.get(node.op_type)
        zero = whole[point] if index == 0 and point is not None and point < len(whole) else 0
        whole[index] = _zeroed(whole[index], axis, indices, zero)
    original = _run(source, ir.serde.serialize_node(node), whole)
    wanted = [sliced(array, kept) for array, kept in zip(original, outputs, strict=True)]
    found = _run(source, rewritten, parts)
    return OperatorCheck(
        cut=any(analysis.kept(keep, value.name) for value in tensors),
        carried=bool(contracted) or any(outputs),
        exact=exact,
        difference=max(
            _difference(a, b, compare=exact) for a, b in zip(wanted, found, strict=True)
        ),
    )


# Operator → input with the integer that stands for zero in input 0.
_ZERO_POINTS = {
    "ConvInteger": 2,
    "MatMulInteger": 2,
    "MatMulIntegerToFloat": 4,
    "QAttention": 6,
}


def _zeroed(array: Array, axis: int, kept: npt.NDArray[np.intp], zero: Any) -> Array:
    array = array.copy()
    np.moveaxis(array, axis, 0)[np.setdiff1d(np.arange(array.shape[axis]), kept)] = zero
    return array


def _difference(wanted: Array, found: Array, compare: bool) -> float:
    """The largest difference relative to the largest value; shapes must agree in any case."""
    assert wanted.shape == found.shape
    if not compare or not wanted.size:
        return 0.0
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    scale = max(1.0, float(np.nanmax(np.abs(wanted))))
    assert np.array_equal(np.isnan(wanted), np.isnan(found))
    return float(np.nanmax(np.abs(wanted - found))) / scale


def _operands(
    analysis: Analysis,
    pruned: onnx.ModelProto,
    node: ir.Node,
    rewritten: onnx.NodeProto,
    keep: Mask,
) -> tuple[list[Any], list[Any]]:
    """The node's inputs in the original, whole; and as the rewritten node gets them.

    Activations are the original's own numbers, sliced: what the layers before did does not
    matter here. Constants are the result's: they are what surgery made of them.
    """
    feeds = example_feeds(analysis.model.graph, analysis.coupling.shapes)
    names = [None if value is None else str(value.name) for value in node.inputs]
    original = _values(ir.to_proto(analysis.model), names, feeds)
    constants = _constants(pruned)
    computed = [name for name in rewritten.input if name not in constants and name not in original]
    added = _values(pruned, [name or None for name in computed], feeds)
    whole = [None if name is None else original[name] for name in names]
    parts: list[Any] = []
    for name in rewritten.input:
        if not name:
            parts.append(None)
        elif name in constants:
            parts.append(constants[name])
        elif name in original:
            parts.append(sliced(original[name], analysis.kept(keep, name)))
        else:
            parts.append(added[name])
    return whole, parts


def _constants(proto: onnx.ModelProto) -> dict[str, Array]:
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(attribute.t)
    return found


def _values(
    proto: onnx.ModelProto, names: Sequence[str | None], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """The values of some tensors when the model runs."""
    found = {**_constants(proto), **feeds}
    missing = sorted({name for name in names if name is not None and name not in found})
    if missing:
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in missing)
        session = open_session(proto.SerializeToString())
        found.update(zip(missing, session.run(missing, dict(feeds)), strict=True))
    return {name: np.asarray(found[name]) for name in names if name is not None}


def _run(source: onnx.ModelProto, node: onnx.NodeProto, operands: list[Any]) -> list[Array]:
    """Runs one node by itself."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    inputs, initializers, feeds = [], [], {}
    for index, array in enumerate(operands):
        copy.input[index] = "" if array is None else f"i{index}"
        if array is None:
            continue
        if index == 0 and node.op_type != "DequantizeLinear":
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(f"i{index}", dtype, array.shape))
            feeds[f"i{index}"] = array
        else:
            initializers.append(numpy_helper.from_array(np.array(array, order="C"), f"i{index}"))
    outputs = [onnx.ValueInfoProto(name=name) for name in copy.output if name]
    graph = helper.make_graph([copy], "one", inputs, outputs, initializers)
    model = helper.make_model(
        graph, ir_version=max(source.ir_version, 4), opset_imports=list(source.opset_import)
    )
    return [np.asarray(array) for array in open_session(model.SerializeToString()).run(None, feeds)]
