"""What every spelling writes and asks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir

from secateur.graphops.model.attributes import operand
from secateur.graphops.model.constants import add_initializer
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.names import free_name
from secateur.graphops.model.unread import discard

AXIS_SINCE = 13  # the opset from which DequantizeLinear, and Softmax, go by one axis
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

Back = Callable[[ir.Node], bool]  # whether the node could become again what it was
Operand = Sequence[ir.Value | None]  # integers, their scale, and a zero point if there is one


class Writer:
    """Writes into a model.

    Attributes:
        tied: name of each vector that is new → name of the one that it is cut with.
        opset: of ai.onnx.
    """

    def __init__(self, model: ir.Model) -> None:
        self.tied: dict[str, str] = {}
        self.opset = model.opset_imports.get("", 1)
        self._model = model
        self._real: dict[tuple[object, ...], ir.Value] = {}

    @functools.cached_property
    def domain(self) -> str:
        """Of QuantizeLinear and DequantizeLinear: that in which they have an axis."""
        if self.opset >= AXIS_SINCE:
            return ""
        self._model.opset_imports.setdefault(CONTRIB, 1)
        return CONTRIB

    @functools.cached_property
    def _taken(self) -> set[str | None]:
        names: set[str | None] = set()
        for graph in self._model.graphs():
            names.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
            names.update(value.name for node in graph for value in node.outputs)
        return names

    def name(self, wish: str) -> str:
        """One that is free, and no longer."""
        name = free_name(wish, self._taken)
        self._taken.add(name)
        return name

    def constant(self, reader: ir.Node, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer beside the node that is to read it."""
        assert reader.graph is not None
        return add_initializer(reader.graph, tensor)

    def dequantise(self, reader: ir.Node, stored: Operand, axis: int = 0) -> ir.Value:
        """(q − zero point) · scale, for a node that is to read it.

        Args:
            reader: it.
            stored: integers, scale and zero point.
            axis: that scales run along, where there are several.
        """
        key = (reader.graph, *stored)
        if key not in self._real:
            integers, scale = stored[:2]
            assert reader.graph is not None
            assert integers is not None
            name = self.name(f"{integers.name}_real")
            made = _node(self.domain, DEQUANTIZE, stored, name, integers, type_by(scale))
            if (tensor := constant_of(scale)) is not None and tensor.size > 1:
                made.attributes["axis"] = ir.AttrInt64("axis", axis)
            reader.graph.insert_before(reader, made)
            self._real[key] = made.outputs[0]
        return self._real[key]

    def quantise(self, node: ir.Node, scale: ir.Value | None, zero: ir.Value | None) -> None:
        """Rounds what a node puts out; the integers have the name and the readers that it had."""
        self.follow(node, self.domain, QUANTIZE, [None, scale, zero])
        node.outputs[0].type = type_by(scale)

    def follow(self, node: ir.Node, domain: str, op_type: str, inputs: Operand) -> ir.Node:
        """A new node between another and its readers; what it puts out has the name of theirs.

        Args:
            node: the other.
            domain, op_type, inputs: of the new node; its first input is what the other puts out.
        """
        y, name = node.outputs[0], str(node.outputs[0].name)
        y.name = self.name(f"{name}_before_{op_type}")
        made = _node(domain, op_type, inputs, name, y, y.type)
        assert node.graph is not None
        node.graph.insert_after(node, made)
        y.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
        made.replace_input_with(0, y)
        return made


def _node(
    domain: str,
    op_type: str,
    inputs: Operand,
    name: str,
    like: ir.Value,
    kind: ir.TypeProtocol | None,
) -> ir.Node:
    made = ir.Node(domain, op_type, inputs, name=f"{name}_{op_type}")
    y = made.outputs[0]
    y.name, y.shape, y.type = name, like.shape, kind
    return made


Spell = Callable[[Writer, ir.Node], Back | None]  # None: the node is left as it is


def extras_of(node: ir.Node, operator: str) -> tuple[ir.Attr, ...]:
    """Attributes that a plain operator does not have.

    Raises:
        TypeError: one that it has is of another type.
    """
    known = onnx.defs.get_schema(operator).attributes
    for name, item in node.attributes.items():
        if name in known and item.type.value != known[name].type.value:  # type: ignore[attr-defined]
            raise TypeError(f"attribute {name!r} is no {known[name].type}")
    return tuple(item for name, item in node.attributes.items() if name not in known)


def type_by(scale: ir.Value | None) -> ir.TypeProtocol | None:
    """Type of the numbers that a scale makes; None where it is not known."""
    tensor = constant_of(scale)
    return None if tensor is None else ir.TensorType(tensor.dtype)


def scale_axis(stored: Operand, along: int | None) -> int | None:
    """That the scales of an operand run along, 0 for one scale; None where they are not as an
    operator takes them.

    Args:
        stored: integers, scale and zero point.
        along: the axis, where there may be several.
    """
    integers, scale, *_ = stored
    if integers is None or scale is None:
        return None
    tensor, steps, start = (constant_of(one) for one in stored)
    if steps is None:
        maker = scale.producer()
        single = maker is not None and maker.op_type == "DynamicQuantizeLinear"
        return 0 if single or (scale.shape is not None and len(scale.shape) == 0) else None
    sizes = {steps.size} if start is None else {steps.size, start.size}
    if sizes == {1}:
        return 0
    if along is None or tensor is None or len(steps.shape) != 1:
        return None
    axis = along % max(len(tensor.shape), 1)
    return axis if sizes == {tensor.shape[axis]} else None


def become(node: ir.Node, domain: str, op_type: str, inputs: Operand) -> None:
    """Makes another operator of a node."""
    while inputs[-1] is None:
        inputs = inputs[:-1]
    node.domain, node.op_type = domain, op_type
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def take_over(y: ir.Value, follower: ir.Node) -> None:
    """Gives a value the name, type and readers of what a node makes of it, which goes."""
    other = follower.outputs[0]
    name, other.name = other.name, None
    y.name, y.type, y.shape = name, other.type, other.shape
    other.replace_all_uses_with(y, replace_graph_outputs=True)
    discard(follower)


def reader_of(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of that operator."""
    users = [user for user, _ in value.uses()]
    if len(users) != 1 or value.is_graph_output() or users[0].op_type != op_type:
        return None
    return users[0]


def stored_in(value: ir.Value | None) -> tuple[ir.Value | None, ...] | None:
    """What a DequantizeLinear makes a value of: integers, scale and zero point; None for others."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != DEQUANTIZE:
        return None
    return tuple(operand(node, index) for index in range(3))
