"""Puts tensors in the place of sequences of tensors where the model fixes which tensor is read.

TorchScript spells lists of tensors, and with them `torch.tensor_split`, as sequences: filled by
loops that turn a fixed number of times, read at fixed positions. A sequence has no shape, so
whatever passed through one would have to stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.model.attributes import integer, operand
from secateur.graphops.model.graph import bodies, constant_of
from secateur.graphops.model.names import free_name
from secateur.graphops.model.unread import discard

_MOST_NODES = 10_000  # that loops may become
_LONGEST = 256  # tensors of a sequence
_COUNTS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def spread(model: ir.Model) -> None:
    """Gives the readers of sequences the tensors themselves, in place; what nothing reads then is
    left.

    Sequences that are read at computed positions, leave the model, or come from loops that turn as
    often as the data say, stay as they are.
    """
    spreading = _Spreading(model.graph, model.opset_imports.get("", 1))
    for node in list(model.graph):
        spreading.visit(node)


class _Spreading:
    """One pass over a graph.

    Attributes:
        opset: of ai.onnx.
    """

    def __init__(self, graph: ir.Graph, opset: int) -> None:
        self.opset = opset
        self._held: dict[ir.Value | None, list[ir.Value]] = {}  # by sequence
        self._graph = graph
        self._made = 0  # nodes
        self._taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
        self._taken |= {value.name for node in graph.all_nodes() for value in node.outputs}

    def visit(self, node: ir.Node) -> None:
        if node.domain != "":
            return
        if node.op_type == "Loop":
            self._unroll(node)
        elif node.op_type == "Identity" and (tensors := self.tensors(node)) is not None:
            self.hold(node, tensors)
        elif node.op_type in _RULES:
            _RULES[node.op_type](self, node)

    def tensors(self, node: ir.Node) -> list[ir.Value] | None:
        """Those of the sequence that a node reads first; None where they are not known."""
        return self._held.get(operand(node, 0))

    def hold(self, node: ir.Node, tensors: list[ir.Value]) -> None:
        """Notes which tensors are in the sequence that a node gives."""
        if len(tensors) <= _LONGEST:
            self._held[node.outputs[0]] = tensors

    def add(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None] = (),
        attributes: Sequence[ir.Attr] = (),
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """The outputs of a new node."""
        node = ir.Node("", op_type, inputs, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = f"{before.outputs[0].name}__{op_type}"
        self._place(before, node)
        return node.outputs

    def constant(self, before: ir.Node, tensor: ir.TensorProtocol) -> ir.Value:
        """The output of a new Constant node."""
        return self.add(before, "Constant", (), [ir.AttrTensor("value", tensor)])[0]

    def _like(self, declared: ir.Value, before: ir.Node, content: int | bool) -> ir.Value:
        """A number of the rank that a loop's body takes it in: 0, or 1 where it says so."""
        vector = declared.shape is not None and declared.shape.rank() == 1
        return self.constant(before, ir.tensor(np.array([content] if vector else content)))

    def _place(self, before: ir.Node, node: ir.Node) -> None:
        for value in node.outputs:
            if value.name:
                value.name = free_name(value.name, self._taken, "__")
                self._taken.add(value.name)
        node.name = node.outputs[0].name
        self._graph.insert_before(before, node)
        self._made += 1

    def _unroll(self, loop: ir.Node) -> None:
        """Puts its turns in the place of a loop that carries sequences."""
        body = bodies(loop).get("body")
        carried: Sequence[ir.Value | None] = loop.inputs[2:]
        times, begins = _number(operand(loop, 0)), operand(loop, 1)
        if (
            body is None
            or times is None
            or times * len(body) > _MOST_NODES - self._made
            or None in carried
            or not any(value in self._held for value in carried)
            or len(body.inputs) != len(carried) + 2
            or len(body.outputs) != len(carried) + 1  # it gathers nothing of every turn
            or any(bodies(node) for node in body)
            or any(value.is_graph_output() for value in loop.outputs)
            or (begins is not None and not _number(begins))
            or not _goes_on(body)
        ):
            return
        for turn in range(times):
            carried = self._turn(loop, body, turn, carried)
        for output, last in zip(loop.outputs, carried, strict=False):
            assert last is not None
            output.replace_all_uses_with(last)
        discard(loop)

    def _turn(
        self, loop: ir.Node, body: ir.Graph, turn: int, carried: Sequence[ir.Value | None]
    ) -> list[ir.Value | None]:
        """What a turn hands on."""
        copy = body.clone(allow_outer_scope_values=True)
        number, goes_on = copy.inputs[:2]
        told = [self._like(number, loop, turn), self._like(goes_on, loop, True)]
        fed = [*told, *carried]
        entering = dict(zip(copy.inputs, fed, strict=True))
        for constant in copy.initializers.values():
            assert constant.const_value is not None
            entering[constant] = self.constant(loop, constant.const_value)
        handed_on = [entering.get(value, value) for value in copy.outputs[1:]]
        copy.outputs.clear()
        nodes = list(copy)
        copy.remove(nodes)
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value in entering:
                    node.replace_input_with(index, entering[value])
            self._place(loop, node)
            self.visit(node)
        return handed_on


def _number(value: ir.Value | None) -> int | None:
    """The one number that a constant holds, behind Identity nodes or not; None for others."""
    value = _source(value)
    tensor = constant_of(value)
    if value is None or value.is_graph_input() or tensor is None or tensor.size != 1:
        return None
    return int(tensor.numpy().reshape(())) if tensor.dtype in _COUNTS else None


def _source(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) and node.op_type == "Identity":
        value = node.inputs[0]
    return value


def _goes_on(body: ir.Graph) -> bool:
    """Whether each turn says that there shall be another."""
    goes_on = _source(body.outputs[0])
    return goes_on is body.inputs[1] or bool(_number(goes_on))


def _become(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = ()
) -> None:
    node.op_type = op_type
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    node.attributes.update({one.name: one for one in attributes})


def _position(node: ir.Node, index: int, default: int, length: int) -> int | None:
    """The position that an input says, counted from the start; None where that is not known."""
    given = operand(node, index)
    if given is None:
        return default
    place = _number(given)
    if place is None or not -length <= place <= length:
        return None
    return place + length if place < 0 else place


def _construct(graph: _Spreading, node: ir.Node) -> None:
    graph.hold(node, [value for value in node.inputs if value is not None])


def _insert(graph: _Spreading, node: ir.Node) -> None:
    tensors, added = graph.tensors(node), operand(node, 1)
    if tensors is None or added is None:
        return
    place = _position(node, 2, len(tensors), len(tensors))
    if place is not None:
        graph.hold(node, [*tensors[:place], added, *tensors[place:]])


def _erase(graph: _Spreading, node: ir.Node) -> None:
    if not (tensors := graph.tensors(node)):
        return
    place = _position(node, 1, len(tensors) - 1, len(tensors))
    if place is not None and place < len(tensors):
        graph.hold(node, tensors[:place] + tensors[place + 1 :])


def _at(graph: _Spreading, node: ir.Node) -> None:
    if not (tensors := graph.tensors(node)) or operand(node, 1) is None:
        return
    place = _position(node, 1, 0, len(tensors))
    if place is not None and place < len(tensors):
        _become(node, "Identity", [tensors[place]])


def _length(graph: _Spreading, node: ir.Node) -> None:
    if (tensors := graph.tensors(node)) is not None:
        count = ir.tensor(np.array(len(tensors), np.int64))
        _become(node, "Constant", [], [ir.AttrTensor("value", count)])


def _split(graph: _Spreading, node: ir.Node) -> None:
    """Into parts of the sizes that are given one by one."""
    given = operand(node, 1)
    sizes = constant_of(given)
    if sizes is None or sizes.shape.rank() != 1 or not 0 < sizes.size <= _LONGEST:
        return
    attributes = [ir.AttrInt64("axis", integer(node, "axis", 0))]
    inputs = [operand(node, 0), given]
    if graph.opset < 13:  # where Split has its sizes as an attribute
        attributes.append(ir.AttrInt64s("split", sizes.numpy().tolist()))
        inputs = inputs[:1]
    graph.hold(node, list(graph.add(node, "Split", inputs, attributes, sizes.size)))


def _join(graph: _Spreading, node: ir.Node) -> None:
    if not (tensors := graph.tensors(node)):
        return
    axis = integer(node, "axis", 0)
    if integer(node, "new_axis", 0):
        attributes = [] if graph.opset >= 13 else [ir.AttrInt64s("axes", [axis])]
        axes = [graph.constant(node, ir.tensor([axis]))] if graph.opset >= 13 else []
        tensors = [graph.add(node, "Unsqueeze", [t, *axes], attributes)[0] for t in tensors]
    _become(node, "Concat", tensors, [ir.AttrInt64("axis", axis)])


_RULES: dict[str, Callable[[_Spreading, ir.Node], None]] = {
    "ConcatFromSequence": _join,
    "SequenceAt": _at,
    "SequenceConstruct": _construct,
    "SequenceEmpty": _construct,
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SequenceLength": _length,
    "SplitToSequence": _split,
}

OPERATORS = frozenset(_RULES)
