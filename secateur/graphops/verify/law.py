"""The exactness law for a whole model.

    Without repair, the pruned model equals the original in which every consumer has zeros on the
    removed positions of what it sums over.

(Zeroing the producers would not do: a bias, a sigmoid or a shift makes zero non-zero.) Nodes that
normalise or reduce inexactly across a cut axis are the named exceptions; in the reference they
are computed over the positions that stay, everything else being the original's own arithmetic.
Regions that went whole are left out of the reference too; tests hold that to Identity. Results with
split products or fewer tokens are no matter of this law: tests hold those to their own.
The reference is an ordinary ONNX model that ONNX Runtime runs: no rule's rewrite is involved in
it, so it checks surgery against analysis independently.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from secateur.graphops.calibration import Feeds
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.coupling.facts import Contraction
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.constants import add_initializer
from secateur.graphops.model.normalise import normalise
from secateur.graphops.model.opening import ModelSource, open_model, self_contained
from secateur.graphops.model.rounding import leave_rounding_out
from secateur.graphops.model.runtime import Session, open_session
from secateur.graphops.model.shapes import Shape, Shapes, infer_shapes
from secateur.graphops.model.spelling import ON_INTEGERS, spell_out
from secateur.graphops.planning import replay
from secateur.graphops.surgery.bypass import bypass
from secateur.graphops.verify.examples import example_feeds
from secateur.result import Result

_WHERE_SINCE = 9  # the first opset with Where
# Operator → index of its first input's zero point: the integer that stands for zero.
_ZERO_POINTS = {
    "ConvInteger": 2,
    "MatMulInteger": 2,
    "MatMulIntegerToFloat": 4,
    "QAttention": 6,
}
_ON_INTEGERS = {*_ZERO_POINTS, "DynamicQuantizeMatMul", *ON_INTEGERS}
_ROUNDS_ALIKE = 1e-3  # difference up to which nothing was rounded to another step
# Operators that choose and weigh inside; what is not there has a logit of −∞.
_ROUTED = ("MoE", "QMoE")
# Operator → the output that names positions of what it compared.
_NUMBERS = {"TopK": 1, "ArgMax": 0, "ArgMin": 0}
# Operator → the last input that runs with the channels.
_LAST_PARAMETER = {"EmbedLayerNormalization": 6, "QEmbedLayerNormalization": 6}


@dataclass(frozen=True, slots=True)
class LawCheck:
    """How far a result is from the law.

    Attributes:
        difference: largest |result − reference| over all outputs, relative to the largest
            |reference| of that output.
        exceptions: nodes computed over the positions that stay.
        rounded: whether activations were rounded as the model says; if not, its rounding was left
            out of both, because it made something else of differences in the last bit.
    """

    difference: float
    exceptions: tuple[str, ...]
    rounded: bool = True


def check_law(source: ModelSource, result: Result) -> LawCheck:
    """Runs result and reference on the same random inputs.

    Args:
        source: the model that was pruned.
        result: of pruning it without repair.
    """
    opened = open_model(source)
    copies = normalise(opened.model)
    removed = {one.exit: one.entry for one in result.plan.removed}
    model = bypass(opened.model, removed) if removed else opened.model
    shapes = infer_shapes(model)
    coupling = couple(model, shapes, result.plan.recipe)
    keep = replay.units_kept(result.plan, coupling, copies, opened.sha256)
    reference, exceptions = _reference(model, coupling, keep)
    feeds = example_feeds(model.graph, shapes)
    models = [ir.to_proto(self_contained(reference)), onnx.load_from_string(result.model)]
    difference = _difference(models, feeds)
    if difference > _ROUNDS_ALIKE:
        models[1] = spelt_out(result.model)
        left_out = [leave_rounding_out(one) for one in models]
        if all(left_out):
            return LawCheck(_difference(models, feeds), exceptions, rounded=False)
    return LawCheck(difference, exceptions)


def spelt_out(model: bytes) -> onnx.ModelProto:
    """A model as the coupling reads it."""
    opened = open_model(model).model
    spell_out(opened)
    return ir.to_proto(self_contained(opened))


def _difference(models: list[onnx.ModelProto], feeds: Feeds) -> float:
    """Largest difference of the second's outputs from the first's, relative to the largest."""
    wanted, found = (_session(one).run(None, feeds) for one in models)
    differences = [0.0]
    for a, b in zip(wanted, found, strict=True):
        if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.size:
            a, b = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(a)
            scale = float(np.abs(a[finite]).max(initial=0.0)) or 1.0
            differences.append(float(np.abs(a - b)[finite].max(initial=0.0)) / scale)
    return max(differences)


def _session(model: onnx.ModelProto) -> Session:
    """A session whose products are exact. Kernels of some processors saturate where they multiply
    integers, and then neighbours that went change what stays: lean sessions run what lies between
    Q and DQ in floats, and operators on integers are asked not to saturate."""
    serialised = model.SerializeToString()
    if any(node.op_type in _ON_INTEGERS for node in model.graph.node):
        with contextlib.suppress(Exception):  # it rewrites graphs, and cannot rewrite every one
            return open_session(serialised, lean=True, saturating=False)
    return open_session(serialised, lean=True)


def _reference(
    model: ir.Model, coupling: Coupling, keep: npt.NDArray[np.bool_]
) -> tuple[ir.Model, tuple[str, ...]]:
    """The original with zeros (or, at exceptions, without the positions) where units went."""
    clone = model.clone()
    nodes = {node.outputs[0].name: node for node in clone.graph.all_nodes() if node.outputs}
    opset = clone.opset_imports.get("", 1)
    builder = _Builder(clone.graph, opset, coupling.shapes)
    exceptions: list[str] = []
    seen: set[tuple[str, int, int]] = set()
    for contraction in coupling.contractions:
        node = nodes[contraction.node.outputs[0].name]
        value = node.inputs[contraction.index]
        place = (str(node.outputs[0].name), contraction.index, contraction.axis)
        mask = _mask(contraction, coupling, keep)
        if mask is None or place in seen or value is None:
            continue
        seen.add(place)
        rank = _rank(contraction, coupling)
        if contraction.exact and node.op_type in _ZERO_POINTS:
            if contraction.index == 0:  # zeroing one operand is enough
                at = _ZERO_POINTS[node.op_type]
                zero_point = node.inputs[at] if at < len(node.inputs) else None
                builder.zero(node, 0, contraction.axis, rank, mask, zero_point)
        elif contraction.exact:
            builder.zero(node, contraction.index, contraction.axis, rank, mask)
        else:
            exceptions.append(node.name or str(node.outputs[0].name))
            if node.op_type in _ROUTED:
                builder.lower(node, contraction.index, mask)
                continue
            # windows over a padded axis give fewer positions than they read
            left = _along(node.outputs[0], contraction.axis, coupling, keep)
            if contraction.index or left is None:
                left = mask
            builder.without(node, contraction.index, contraction.axis, rank, mask, left)
    return clone, tuple(sorted(set(exceptions)))


def _rank(contraction: Contraction, coupling: Coupling) -> int:
    """Axes of the operand; where its shape is not known, as many as a convolution's weight has."""
    for index in (contraction.index, 1):
        value = contraction.node.inputs[index]
        shape = coupling.shapes.of(str(value.name)) if value is not None else None
        if shape is not None:
            return len(shape)
    raise ValueError(f"the rank of what {contraction.node.name!r} sums over is not known")


def _mask(
    contraction: Contraction, coupling: Coupling, keep: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_] | None:
    return _along(contraction.node.inputs[contraction.index], contraction.axis, coupling, keep)


def _along(
    value: ir.Value | None, axis: int, coupling: Coupling, keep: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_] | None:
    """Which positions of an axis stay; None where all do."""
    units = coupling.axes(str(value.name) if value is not None else "").get(axis)
    if units is None or keep[units].all():
        return None
    return keep[units]


class _Builder:
    """Inserts the few nodes a reference needs."""

    def __init__(self, graph: ir.Graph, opset: int, shapes: Shapes) -> None:
        self._graph = graph
        self._opset = opset
        self._count = 0
        self._shapes = shapes
        self._copied: dict[str, str] = {}  # new value → what it is like

    def _name(self) -> str:
        self._count += 1
        return f"secateur_law_{self._count}"

    def _like(self, value: ir.Value) -> str:
        """The tensor of the model whose shape and elements a value has."""
        name = str(value.name)
        return self._copied.get(name, name)

    def _shape(self, value: ir.Value | None) -> Shape | None:
        return None if value is None else self._shapes.of(self._like(value))

    def _element(self, value: ir.Value) -> ir.DataType:
        """What a tensor holds: as inferred, for what a file records may be wrong."""
        inferred = self._shapes.elements.get(self._like(value))
        if inferred is not None:
            return ir.DataType(inferred)
        return value.dtype or ir.DataType.FLOAT

    def _constant(self, array: npt.NDArray[np.generic]) -> ir.Value:
        tensor = ir.Tensor(np.ascontiguousarray(array), name=self._name())
        return add_initializer(self._graph, tensor)

    def _node(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Node:
        node = ir.Node(
            "",
            op_type,
            inputs,
            [ir.AttrInt64(name, value) for name, value in attributes.items()],
            name=self._name(),
        )
        node.outputs[0].name = node.name
        return node

    def zero(
        self,
        node: ir.Node,
        index: int,
        axis: int,
        rank: int,
        mask: npt.NDArray[np.bool_],
        zero_point: ir.Value | None = None,
    ) -> None:
        """Where(mask, x, 0) before input `index`, of `rank` axes (x · mask in old opsets)."""
        value = node.inputs[index]
        assert value is not None
        dtype = self._element(value)
        lined = mask.reshape([-1, *[1] * (rank - axis - 1)])
        if self._opset < _WHERE_SINCE:
            where = self._node("Mul", [value, self._constant(lined.astype(dtype.numpy()))])
        else:
            zero = np.zeros((), dtype.numpy())
            nothing = zero_point or self._constant(zero)
            where = self._node("Where", [self._constant(lined), value, nothing])
        self._copied[str(where.outputs[0].name)] = self._like(value)
        (node.graph or self._graph).insert_before(node, where)
        node.replace_input_with(index, where.outputs[0])

    def lower(self, node: ir.Node, index: int, mask: npt.NDArray[np.bool_]) -> None:
        """Where(mask, x, the lowest number) before input `index`, along its last axis."""
        value = node.inputs[index]
        assert value is not None
        dtype = self._element(value)
        lowest = np.array(dtype.min, dtype.numpy())
        operands = [self._constant(mask), value, self._constant(lowest)]
        where = self._node("Where", operands)
        (node.graph or self._graph).insert_before(node, where)
        node.replace_input_with(index, where.outputs[0])

    def without(
        self,
        node: ir.Node,
        first: int,
        axis: int,
        rank: int,
        mask: npt.NDArray[np.bool_],
        left: npt.NDArray[np.bool_],
    ) -> None:
        """Gather what stays before the node and its parameters, spread the result after it.

        Args:
            node: that normalises.
            first: the input that is normalised; tables follow the indices of an embedding.
            axis: of that input.
            rank: of that input.
            mask: what stays along the axis.
            left: what stays along the same axis of the result.
        """
        value = node.inputs[first]
        assert value is not None
        stay = np.flatnonzero(mask).astype(np.int64)
        before = self._node("Gather", [value, self._constant(stay)], axis=axis)
        (node.graph or self._graph).insert_before(node, before)
        node.replace_input_with(first, before.outputs[0])
        if node.op_type.startswith(("Reduce", "Global")):
            return
        if node.op_type in _NUMBERS:  # of those that stay → of all
            numbers = node.outputs[_NUMBERS[node.op_type]]
            all_of = self._node("Gather", [self._constant(stay), numbers], axis=0)
            numbers.replace_all_uses_with(all_of.outputs[0])
            all_of.replace_input_with(1, numbers)
            (node.graph or self._graph).insert_after(node, all_of)
            return
        per_channel = node.op_type == "GroupNormalization"  # its vectors run with axis 1
        across = per_channel or "LayerNorm" in node.op_type or "RMSNorm" in node.op_type
        last = _LAST_PARAMETER.get(node.op_type, len(node.inputs))
        parameters = list(enumerate(node.inputs))[first + 1 : last + 1] if across else []
        for index, parameter in parameters:
            shape = self._shape(parameter)
            own = 0 if per_channel else axis - (rank - len(shape or ()))
            if parameter is not None and shape and own >= 0 and shape[own] == mask.size:
                other = self._node("Gather", [parameter, self._constant(stay)], axis=own)
                (node.graph or self._graph).insert_before(node, other)
                node.replace_input_with(index, other.outputs[0])
        # Positions that went get any value: every consumer has a zero for them.
        spread = np.maximum(np.cumsum(left) - 1, 0).astype(np.int64)
        spread_axis = axis if first == 0 else -1  # an embedding's tables lack the batch
        for place, output in enumerate(node.outputs):
            sizes = (self._shape(output) or ())[spread_axis : spread_axis + 1 or None]
            if place and sizes != (left.size,):
                continue  # a mean or a scale of its own
            after = self._node("Gather", [output, self._constant(spread)], axis=spread_axis)
            self._copied[str(after.outputs[0].name)] = str(output.name)
            output.replace_all_uses_with(after.outputs[0])
            after.replace_input_with(0, output)
            (node.graph or self._graph).insert_after(node, after)
