"""Shapes of every tensor, and values of the small integers that shapes are computed from.

Symbolic sizes (batch, sequence) are bound to numbers, twice, to different numbers: what is equal
in both is fixed by the model, what differs follows its inputs. That decides by construction which
sizes a rewrite may write down as constants, without symbolic algebra. A walk evaluates the shape
arithmetic and asks each operator's own inference function (`onnx.shape_inference`), nodes alike
once. Symbolic inference by other libraries took 1 to 50 s on the same models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.model import arithmetic, contrib
from secateur.graphops.model.attributes import integer
from secateur.graphops.model.checking import AGAIN
from secateur.graphops.model.collecting import uncollected
from secateur.graphops.model.graph import (
    bodies,
    body_inputs,
    body_outputs,
    constant_tensor,
    live_branch,
    node_label,
    real_inputs,
)

Shape = tuple[int | None, ...]
Array = npt.NDArray[Any]

# Sizes to try for symbolic axes other than the batch, most realistic first. Each pair is the two
# bindings. Images want multiples of 32, raw audio is long. Position tables may be short, often have
# a power of two of rows, and some count from the third (RoBERTa): sequences are shorter than that.
_SEQUENCES = ((96, 64), (48, 32), (24, 16), (12, 8), (6, 4), (4, 3))
_IMAGES = (  # height, width; a line of text is 32 or 48 high
    ((224, 192), (224, 192)),
    ((256, 320), (256, 320)),
    ((64, 96), (64, 96)),
    ((48, 48), (320, 256)),
    ((32, 32), (320, 256)),
    ((512, 640), (512, 640)),
    ((16, 24), (16, 24)),
)
_AUDIO = ((16000, 12800), (4096, 3072), (512, 640))
_BATCHES = (2, 3)
_ONE = (1, 1)  # the batch of a model that says its batch is free, and takes no other
# How many positions NonZero is taken to find: a size that follows the data, and no input's size.
_FOUND = (61, 47)
_MOVES = ("Cast", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze")  # of sizes, as they are
_MAKERS = ("ConstantOfShape", "Expand", "Tile")  # of tensors as large as their last input says
_LARGEST = 1 << 48  # elements of one tensor
_LONGEST_SHAPE = 1 << 20  # positions of a graph input that may be a vector of sizes
_LONGEST_TOLD = 8  # numbers of a vector that inference may read where they are not int64


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is known of tensors by name, under the first binding of symbolic sizes.

    Attributes:
        inputs: (first, second) binding of each graph input that is not an initializer.
        first: shapes under the first binding; None inside a shape where a size is unknown.
        second: shapes under the second.
        values: small constants and shape arithmetic, under the first binding.
        second_values: the same under the second.
        elements: ONNX element types, by name, where known.
    """

    inputs: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    first: Mapping[str, Shape]
    second: Mapping[str, Shape]
    values: Mapping[str, Array]
    second_values: Mapping[str, Array]
    elements: Mapping[str, int]

    def of(self, name: str) -> Shape | None:
        """The shape under the first binding, None when not even the rank is known."""
        return self.first.get(name)

    def is_fixed(self, name: str, axis: int) -> bool:
        """Whether the size of an axis is the model's own, whatever the input sizes."""
        first, second = self.first.get(name), self.second.get(name)
        if first is None or second is None or len(first) != len(second):
            return False
        return first[axis] is not None and first[axis] == second[axis]

    def axes_by_data(self, name: str) -> tuple[int, ...]:
        """Axes whose sizes the data decide: those of the inputs do not tell them."""
        first, second = self.first.get(name, ()), self.second.get(name, ())
        pairs = enumerate(zip(first, second, strict=False))
        return tuple(axis for axis, sizes in pairs if None in sizes or sizes == _FOUND)

    def is_fixed_value(self, name: str) -> bool:
        """Whether a value is known, and the model's own, whatever the input sizes."""
        fixed = self.fixed_entries(name)
        return fixed is not None and bool(fixed.all())

    def fixed_entries(self, name: str) -> npt.NDArray[np.bool_] | None:
        """For a known value: which entries do not follow the input sizes; None if not known."""
        first, second = self.values.get(name), self.second_values.get(name)
        if first is None or second is None:
            return None
        if first.shape != second.shape:
            return np.zeros(first.shape, np.bool_)
        return np.asarray(first == second)


_Bound = dict[str, tuple[int, ...]]  # sizes of each input


class _InvalidBinding(Exception):
    """The sizes chosen for symbolic axes contradict the model."""


@uncollected()
def infer_shapes(model: ir.Model, given: Mapping[str, tuple[int, ...]] | None = None) -> Shapes:
    """Shapes and small values of every tensor of the main graph.

    Args:
        model: its recorded value infos are not trusted.
        given: shapes of inputs as calibration data has them, batch axis included; they are the
            first binding of the symbolic axes.
    """
    with np.errstate(all="ignore"):  # arithmetic that never runs may divide by zero
        return _infer_shapes(model, given)


def _infer_shapes(model: ir.Model, given: Mapping[str, tuple[int, ...]] | None) -> Shapes:
    skeleton = _Skeleton(model)
    candidates = max(len(_SEQUENCES), len(_IMAGES), len(_AUDIO))
    nothing = (None, None)
    attempts = [
        *((attempt, _FOUND, _BATCHES) for attempt in range(candidates - 1) if skeleton.finds),
        *((attempt, nothing, _BATCHES) for attempt in range(candidates - 1)),
        *((attempt, nothing, _ONE) for attempt in range(candidates - 1)),
        (candidates - 1, nothing, _BATCHES),
    ]
    for attempt, found, batch in attempts:
        last = attempt == candidates - 1
        kinds = (None,) if last else (0, 1, None)
        ways = [_bindings(model.graph, attempt, batch, given, last, apart) for apart in kinds]
        try:
            first = skeleton.infer(ways[0][0], found[0], strict=not last)
        except _InvalidBinding:
            continue
        for place, bindings in enumerate(ways):
            if bindings in ways[:place]:
                continue
            try:
                second = skeleton.infer(bindings[1], found[1], strict=not last)
            except _InvalidBinding:
                continue
            if skeleton.impossible and bindings[0] == bindings[1]:
                raise refuse(
                    Code.INVALID_MODEL,
                    f"node {skeleton.impossible!r} would put out a tensor of a negative size",
                    nodes=(skeleton.impossible,),
                    expected="a kernel no wider than what it slides over",
                    found="one that is wider",
                    hint="Give the model a larger input, or pad it before the node.",
                )
            inputs = {name: (bindings[0][name], bindings[1][name]) for name in bindings[0]}
            return Shapes(inputs, first[0], second[0], first[1], second[1], first[2])
    raise AssertionError("the last attempt is not strict and cannot fail")


def _bindings(
    graph: ir.Graph,
    attempt: int,
    batch: tuple[int, int],
    given: Mapping[str, tuple[int, ...]] | None,
    alone: bool,
    apart: int | None,
) -> tuple[_Bound, _Bound]:
    """Two sizes for every symbolic axis.

    Args:
        graph: of the model.
        attempt: at sizes that the model takes.
        batch: sizes of the first axis.
        given: see `infer_shapes`.
        alone: whether the model takes no other sizes than those given.
        apart: from which axis of each input on other names mean other second sizes: 0, 1 (all
            batches alike), or None (all of a kind alike).
    """
    named: dict[str, tuple[int, int]] = {}
    used: list[tuple[int, int]] = []
    result: tuple[_Bound, _Bound] = ({}, {})
    for value in real_inputs(graph):
        name = str(value.name)
        dims = list(value.shape) if value.shape is not None else []
        observed = (given or {}).get(name)
        pairs = []
        for axis, dim in enumerate(dims):
            if isinstance(dim, int) and dim > 0:
                pairs.append((dim, dim))
                continue
            key = str(dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value else ""
            if key in named:
                pairs.append(named[key])
                continue
            pair = batch if axis == 0 else _candidate(value, len(dims), axis, attempt)
            if observed is not None and len(observed) == len(dims) and axis > 0:
                # What the data shows fits. Another size tells what follows it from what is the
                # model's own, unless the model takes no other (`alone`).
                others = [size for size in pair[::-1] if size != observed[axis]]
                second = others[0] if others and not alone else observed[axis]
                pair = (observed[axis], second)
                if not alone:
                    pair = _told_apart(pair, [_BATCHES])
            if apart is not None and axis >= apart:
                pair = _told_apart(pair, used)
            used.append(pair)
            if key:
                named[key] = pair
            pairs.append(pair)
        for which in (0, 1):
            result[which][name] = tuple(pair[which] for pair in pairs)
    return result


def _told_apart(pair: tuple[int, int], others: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """With another second size, where these two are as those of another axis, or a multiple."""
    first, wish = pair
    step = math.gcd(first, wish)
    sizes = [wish, *(wish + step * k for n in range(1, 9) for k in (-n, n))]
    for size in sizes:
        if 1 < size != first and all(size * a != first * b for a, b in others):
            return first, size
    return pair


def _candidate(value: ir.Value, rank: int, axis: int, attempt: int) -> tuple[int, int]:
    integer = value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    if rank >= 4 and not integer:
        height, width = _IMAGES[min(attempt, len(_IMAGES) - 1)]
        return width if axis == rank - 1 else height
    audio = rank <= 3 and not integer and axis == rank - 1
    choices: tuple[tuple[int, int], ...] = _AUDIO if audio else _SEQUENCES
    return choices[min(attempt, len(choices) - 1)]


# The type of a value: elements and shape of a tensor; serialised for anything else.
_Type = tuple[int, Shape | None] | bytes
_Attributes = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """One node as the walks read it: onnx_ir's properties cost more than what is asked of them.

    Attributes:
        node: itself.
        serialised: for inference by its operator's own function.
        attributes: serialised, to tell nodes apart; None where a subgraph is one of them.
        inputs, outputs: names, empty where absent.
        op_type: of the ai.onnx domain; empty for other domains.
        bodies: its subgraphs.
    """

    node: ir.Node
    serialised: onnx.NodeProto
    attributes: _Attributes | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    op_type: str
    bodies: tuple[ir.Graph, ...]

    @classmethod
    def of(cls, node: ir.Node) -> _Step:
        inputs = tuple(["" if value is None else value.name or "" for value in node.inputs])
        outputs = tuple([value.name or "" for value in node.outputs])
        serialised = _serialise_node(node, inputs, outputs)
        graphs = any(item.HasField("g") or item.graphs for item in serialised.attribute)
        return cls(
            node=node,
            serialised=serialised,
            attributes=None
            if graphs
            else tuple([item.SerializeToString() for item in serialised.attribute]),
            inputs=inputs,
            outputs=outputs,
            op_type=node.op_type if node.domain == "" else "",
            bodies=tuple(bodies(node).values()),
        )


@dataclass(slots=True)
class _Facts:
    """What one walk through the graph has found so far, by the names of values.

    Attributes:
        elements: of tensors.
        others: serialised types of what is no tensor.
        shapes: None where not even the rank is known.
        values: small constants and shape arithmetic.
        measured: sizes of which not all are known: what Shape nodes answer, and joined.
        found: how many positions NonZero finds; None where that is left open.
        strict: whether sizes that contradict the model end the walk.
    """

    elements: dict[str, int]
    others: dict[str, bytes]
    shapes: dict[str, Shape | None]
    values: dict[str, Array]
    measured: dict[str, Shape]
    found: int | None
    strict: bool

    def type_of(self, name: str) -> _Type | None:
        """None where nothing is known, not even whether it is a tensor."""
        elements = self.elements.get(name)
        if elements is not None:
            return elements, self.shapes.get(name)
        value = self.values.get(name)
        if value is None:
            return self.others.get(name)
        elements = self.elements[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return elements, value.shape

    def told(self, name: str) -> Array | None:
        """The value of an input that inference may read: sizes, axes, the scales of a Resize.

        Other vectors are weights, and would tell apart nodes that are alike.
        """
        value = self.values.get(name)
        if value is None or value.dtype.kind not in "iubf":
            return None
        return value if value.dtype == np.int64 or value.size <= _LONGEST_TOLD else None


class _Skeleton:
    """The graph without its weights, ready for shape inference under several bindings."""

    def __init__(self, model: ir.Model) -> None:
        graph = self._graph = model.graph
        self._opsets = dict(model.opset_imports)
        self._ir_version = max(model.ir_version, 4)
        self._imports = [onnx.helper.make_opsetid(d, v) for d, v in self._opsets.items()]
        self._known: dict[str, Array] = {}
        self._elements = {str(value.name): int(value.dtype or 1) for value in real_inputs(graph)}
        self._sizes: dict[str, Shape | None] = {}
        self._protos: dict[_Type, onnx.TypeProto] = {}
        self._inferred: dict[tuple[Any, ...], list[_Type | None] | None] = {}
        self.impossible = ""  # the last node of the main graph whose result has a negative size
        self._bodies: dict[ir.Graph, list[_Step]] = {}
        self._steps = self._read(graph)
        self.finds = any(step.op_type == "NonZero" for step in self._steps)

    def _read(self, graph: ir.Graph) -> list[_Step]:
        """The nodes of a graph that are not constants, and of its subgraphs on the way."""
        for name, value in graph.initializers.items():
            self._add_constant(str(name), value.const_value)
        steps = []
        for node in graph:
            op_type = node.op_type
            if op_type == "Constant" and node.domain == "":
                tensor = constant_tensor(node)
                if tensor is not None:
                    self._add_constant(str(node.outputs[0].name), tensor)
                    continue
            if op_type in _MAKERS:
                self._check_size(node)
            if op_type in arithmetic.OPERATORS and self._fold(node):
                continue
            step = _Step.of(node)
            for body in step.bodies:
                self._bodies[body] = self._read(body)
            steps.append(step)
        return steps

    def _add_constant(self, name: str, tensor: ir.TensorProtocol | None) -> None:
        if tensor is None:
            return
        elements, shape = _elements_and_sizes(tensor)
        self._elements[name], self._sizes[name] = elements, shape
        if elements not in _EVALUATED:
            return
        size = math.prod(shape)
        integer = elements in _INTEGERS
        if (len(shape) <= 1 and size <= 64) or (integer and size <= 1024):
            self._known[name] = tensor.numpy()

    def _check_size(self, node: ir.Node) -> None:
        """Raises `LIMIT_EXCEEDED` for a tensor that no machine holds: native code would try to."""
        if node.domain != "" or not node.inputs:
            return
        sizes = node.inputs[-1]
        known = self._known.get(sizes.name or "") if sizes is not None else None
        if known is None or known.dtype.kind not in "iu":
            return
        count = math.prod(abs(int(size)) for size in known.reshape(-1) if size)
        if count > _LARGEST:
            raise refuse(
                Code.LIMIT_EXCEEDED,
                f"node {node_label(node)!r} makes a tensor that no machine holds",
                nodes=(node_label(node),),
                expected=f"at most {_LARGEST} elements",
                found=count,
            )

    def _fold(self, node: ir.Node) -> bool:
        """Evaluates arithmetic on constants once, for all bindings."""
        if node.domain != "":
            return False
        inputs = []
        for value in node.inputs:
            array = None if value is None else self._known.get(value.name or "")
            if array is None and value is not None:
                return False
            inputs.append(array)
        outputs = arithmetic.evaluate(node, inputs) if inputs else None
        if outputs is None:
            return False
        for value, array in zip(node.outputs, outputs, strict=False):
            name = str(value.name)
            self._known[name], self._sizes[name] = array, array.shape
            self._elements[name] = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return True

    def infer(
        self, binding: Mapping[str, tuple[int, ...]], found: int | None, strict: bool
    ) -> tuple[dict[str, Shape], dict[str, Array], dict[str, int]]:
        """Shapes, values and element types under one binding.

        Raises:
            _InvalidBinding: with `strict`, when the sizes contradict the model.
        """
        facts = _Facts(
            elements=dict(self._elements),
            others={},
            shapes={**self._sizes, **binding},
            values=dict(self._known),
            measured={},
            found=found,
            strict=strict,
        )
        for name, shape in binding.items():
            if len(shape) == 1 and shape[0] > _LONGEST_SHAPE:
                # onnx makes as many axes as a vector of sizes is long, and does not ask how many.
                facts.shapes[name] = None
        for step in self._steps:
            self._visit(step, facts)
        shapes = {name: shape for name, shape in facts.shapes.items() if shape is not None}
        return shapes, facts.values, facts.elements

    def _visit(self, step: _Step, facts: _Facts) -> None:
        outputs = self._evaluate(step, facts)
        if outputs is not None:
            for name, array in zip(step.outputs, outputs, strict=False):
                facts.values[name], facts.shapes[name] = array, array.shape
            return
        live = None
        if step.bodies and step.inputs:
            live = live_branch(step.node, facts.values.get(step.inputs[0]))
        for body in step.bodies:
            self._visit_body(step.node, body, facts, live in (None, body))
        if live is not None:
            for result, inner, _ in body_outputs(step.node, live):
                if result.name and inner.name in facts.values:
                    facts.values[result.name] = facts.values[inner.name]
        if facts.strict and (check := _CHECKS.get(step.op_type)) is not None:
            check(step, facts.shapes, facts.values)
        if step.op_type == "NonZero" and facts.found is not None and step.inputs:
            shape = facts.shapes.get(step.inputs[0])
            if shape is not None and step.outputs:
                facts.elements[step.outputs[0]] = onnx.TensorProto.INT64
                facts.shapes[step.outputs[0]] = (len(shape), facts.found)
                return
        if step.bodies and _bodies_told(step, facts):
            return
        if not self._infer_contrib(step, facts):
            self._infer_node(step, facts)
        if facts.measured and step.op_type in ("Concat", "Reshape", "Expand"):
            _follow_measured(step, facts)
        elif step.op_type == "Split":
            _split_by_data(step, facts)

    def _visit_body(self, node: ir.Node, body: ir.Graph, facts: _Facts, live: bool) -> None:
        """Shapes inside a branch or a loop's body, and from there the node's own outputs.

        A branch that is never taken says nothing of them, nor whether sizes suit the model. A
        loop's body is walked with the shapes of the first turn; what it carries to the next turn
        with another shape has none that holds.
        """
        elements, shapes = facts.elements, facts.shapes
        for inner, outer, scan in body_inputs(node, body):
            if outer is None and inner.name:  # the number of the turn, or whether there is another
                elements[inner.name] = int(inner.dtype or onnx.TensorProto.INT64)
                shapes[inner.name] = ()
                continue
            known = None if outer is None else facts.type_of(outer.name or "")
            if not isinstance(known, tuple) or known[1] is None or not inner.name:
                continue
            elements[inner.name] = known[0]
            shapes[inner.name] = known[1][1:] if scan else known[1]
        strict, facts.strict = facts.strict, facts.strict and live
        for step in self._bodies[body]:
            self._visit(step, facts)
        facts.strict = strict
        steady = _is_steady(node, body, shapes)
        for result, inner, scan in body_outputs(node, body) if live else ():
            shape = shapes.get(inner.name or "")
            if shape is None or not result.name:
                continue
            found = (None, *shape) if scan else shape
            before = shapes.get(result.name)
            if before is not None and len(before) == len(found):
                pairs = zip(before, found, strict=True)
                found = tuple(b if a == b or (a is None and steady) else None for a, b in pairs)
            shapes[result.name] = found
            if isinstance(known := facts.type_of(inner.name or ""), tuple):
                elements[result.name] = known[0]

    def _infer_contrib(self, step: _Step, facts: _Facts) -> bool:
        """Operators whose schema onnx has no shape inference for."""
        inputs = [facts.shapes.get(name) if name else None for name in step.inputs]
        inferred = contrib.infer(step.node, inputs)
        if inferred is None:
            return False
        place = contrib.elements_from(step.node)
        source = None
        if place is not None and place < len(step.inputs):
            source = facts.type_of(step.inputs[place])
        elements = source[0] if isinstance(source, tuple) else onnx.TensorProto.FLOAT
        if step.op_type in contrib.COMPARISONS:
            elements = onnx.TensorProto.BOOL
        for name, shape in zip(step.outputs, inferred, strict=False):
            if shape is not None and name:
                facts.shapes[name], facts.elements[name] = shape, elements
        return True

    def _evaluate(self, step: _Step, facts: _Facts) -> list[Array] | None:
        if step.op_type in ("Shape", "Size") and step.inputs:
            return _sizes(step, facts)
        if step.op_type in _MOVES and facts.measured.keys() & step.inputs[:1]:
            return _move_measured(step, facts)
        if step.op_type not in arithmetic.OPERATORS or not step.inputs:
            return None
        inputs: list[Array | None] = []
        for name in step.inputs:
            array = facts.values.get(name) if name else None
            if array is None and name:
                return None
            inputs.append(array)
        return arithmetic.evaluate(step.node, inputs)

    def _infer_node(self, step: _Step, facts: _Facts) -> None:
        """By the operator's own function; nodes alike are asked once."""
        types: dict[str, _Type] = {}
        data: dict[str, Array] = {}
        for name in step.inputs:
            if name:
                known = facts.type_of(name)
                if known is None:
                    return
                types[name] = known
                value = facts.told(name)
                if value is not None:
                    data[name] = value
        node = step.serialised
        key = None
        if step.attributes is not None:
            told = [(name, a.dtype.char, a.tobytes()) for name, a in data.items()]
            places = {name: place for place, name in enumerate(types)}
            key = (
                node.domain,
                node.op_type,
                step.attributes,
                tuple([places.get(name) for name in step.inputs]),
                tuple([bool(name) for name in step.outputs]),
                tuple(types.values()),
                tuple([(places[name], char, content) for name, char, content in told]),
            )
        if key is None or key not in self._inferred:
            answer = self._ask(node, step.outputs, types, data)
            if key is not None:
                self._inferred[key] = answer
        else:
            answer = self._inferred[key]
        if answer is not None and any(map(_is_negative, answer)):
            answer = None  # a kernel wider than what it slides over
            if step.node.graph is self._graph:  # a body may never run
                self.impossible = node.name or next(iter(step.outputs))
        if answer is None:
            if facts.strict:
                raise _InvalidBinding
            return
        for name, found in zip(step.outputs, answer, strict=True):
            if isinstance(found, bytes):
                facts.others[name] = found
            elif found is not None:
                facts.elements[name], facts.shapes[name] = found

    def _proto_of(self, found: _Type) -> onnx.TypeProto:
        proto = self._protos.get(found)
        if proto is None:
            proto = self._protos[found] = _as_proto(found)
        return proto

    def _ask(
        self,
        node: onnx.NodeProto,
        outputs: Sequence[str],
        types: Mapping[str, _Type],
        data: Mapping[str, Array],
    ) -> list[_Type | None] | None:
        """Types of the outputs; None where the inputs' sizes disagree."""
        unknown: list[_Type | None] = [None] * len(outputs)
        if not onnx.defs.has(node.op_type, node.domain):
            return unknown
        try:
            schema = _schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
            inferred = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self._proto_of(found) for name, found in types.items()},
                {name: onnx.numpy_helper.from_array(array, name) for name, array in data.items()},
                opset_imports=self._imports,
                ir_version=self._ir_version,
            )
        except onnx.shape_inference.InferenceError as error:
            return None if _contradicts(error) else unknown
        except Exception:  # no schema, or the node is malformed: unknown is a valid answer
            return unknown
        return [_as_type(inferred[name]) if name in inferred else None for name in outputs]


def _bodies_told(step: _Step, facts: _Facts) -> bool:
    """Whether its bodies told the shapes of all outputs of a node. How often a loop turns, along
    which its results are gathered, stays open."""
    told = [facts.shapes.get(name) for name in step.outputs if name]
    if step.op_type == "If":
        return all(map(_is_complete, told))
    return None not in told


def _is_steady(node: ir.Node, body: ir.Graph, shapes: Mapping[str, Shape | None]) -> bool:
    """Whether a loop carries tensors of the same shapes to its next turn: what was inferred for
    the first turn then holds for all."""
    if node.op_type == "If":
        return False
    entering = [inner for inner, outer, scan in body_inputs(node, body) if outer and not scan]
    leaving = [inner for _, inner, scan in body_outputs(node, body) if not scan]
    before, after = ([shapes.get(v.name or "") for v in side] for side in (entering, leaving))
    return None not in before and before == after


def _is_negative(found: _Type | None) -> bool:
    """Whether a size is: native code that reads it ends the process."""
    sizes = found[1] if isinstance(found, tuple) else None
    return any(size is not None and size < 0 for size in sizes or ())


_EVALUATED = (
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.BOOL,
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.DOUBLE,
    ir.DataType.UINT8,
    ir.DataType.INT8,
)
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def _elements_and_sizes(tensor: ir.TensorProtocol) -> tuple[int, tuple[int, ...]]:
    """Of a tensor read from a file straight from there: onnx_ir makes a Shape of objects first."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, onnx.TensorProto):
        return raw.data_type, tuple(raw.dims)
    return int(tensor.dtype), tuple([int(size) for size in tensor.shape.numpy()])


def _serialise_node(node: ir.Node, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.NodeProto:
    """Raises `INVALID_MODEL` for what a file can hold and nobody can write again: text that is
    not UTF-8, attributes without a type."""
    try:
        proto = onnx.NodeProto(
            op_type=node.op_type, domain=node.domain, input=inputs, output=outputs
        )
        proto.attribute.extend(map(ir.serde.serialize_attribute, node.attributes.values()))
    except (ir.serde.SerdeError, TypeError, ValueError) as error:
        raise refuse(
            Code.INVALID_MODEL,
            f"node {str(node_label(node))!r} is damaged: {error.__cause__ or error}",
            nodes=(str(node_label(node)),),
            hint=AGAIN,
        ) from None
    return proto


def _schema(op_type: str, opset: int, domain: str) -> onnx.defs.OpSchema:
    """The operator at that version. Of one that came later, which ONNX Runtime's optimizer writes
    into older models all the same, the newest."""
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return onnx.defs.get_schema(op_type, domain)


# In what onnx says where sizes disagree: of products and broadcasts, of a Squeeze, of an LSTM.
_CONTRADICTIONS = ("incompatible", "mismatch", "divisible", "must be 1", "must have rank")


def _contradicts(error: Exception) -> bool:
    """Whether inference failed because two sizes disagree, not for lack of knowledge."""
    said = str(error).lower()
    return any(words in said for words in _CONTRADICTIONS)


def _sizes(step: _Step, facts: _Facts) -> list[Array] | None:
    """What Shape and Size answer; an answer of Shape that is known in part is noted."""
    shape = facts.shapes.get(step.inputs[0])
    if shape is None:
        return None
    if step.op_type == "Size":
        total = None if None in shape else np.array(shape, np.int64).prod()
        return None if total is None else [np.array(total, np.int64)]
    begin, end = integer(step.node, "start", 0), integer(step.node, "end", len(shape))
    sizes = shape[begin:end]
    if _is_complete(sizes):
        return [np.array(sizes, np.int64)]
    facts.measured[step.outputs[0]] = sizes
    return None


def _split_by_data(step: _Step, facts: _Facts) -> None:
    """Of parts whose sizes the data decide, onnx says nothing; along other axes they are known."""
    shape, elements = facts.shapes.get(step.inputs[0]), facts.elements.get(step.inputs[0])
    if not shape or elements is None:
        return
    axis = integer(step.node, "axis", 0) % len(shape)
    for name in step.outputs:
        if name and facts.shapes.get(name) is None:
            facts.shapes[name] = (*shape[:axis], None, *shape[axis + 1 :])
            facts.elements[name] = elements


def _follow_measured(step: _Step, facts: _Facts) -> None:
    """What a Concat makes of sizes known in part, and the shapes that they give."""
    if step.op_type == "Concat":
        _join_measured(step, facts)
        return
    sizes = facts.measured.get(step.inputs[1]) if len(step.inputs) > 1 else None
    if sizes is None or _is_complete(facts.shapes.get(step.outputs[0])):
        return
    if step.op_type == "Reshape":
        facts.shapes[step.outputs[0]] = tuple(size if (size or 0) > 0 else None for size in sizes)
        return
    before = facts.shapes.get(step.inputs[0])
    if before is not None and len(before) <= len(sizes):
        pairs = zip((1,) * (len(sizes) - len(before)) + before, sizes, strict=True)
        facts.shapes[step.outputs[0]] = tuple(
            old if new == 1 else new if old == 1 else old or new for old, new in pairs
        )


def _join_measured(step: _Step, facts: _Facts) -> None:
    """Sizes that a Concat puts together, if some come from a Shape known in part."""
    joined: tuple[int | None, ...] = ()
    for name in step.inputs:
        if (known := facts.values.get(name)) is not None:
            joined += tuple(map(int, known.flat))
        elif (part := facts.measured.get(name)) is not None:
            joined += part
        elif facts.shapes.get(name) == (1,):
            joined += (None,)
        else:
            return
    if facts.measured.keys() & step.inputs:
        facts.measured[step.outputs[0]] = joined


def _move_measured(step: _Step, facts: _Facts) -> list[Array] | None:
    """Those of some sizes that a node takes, if they are known; else they are noted."""
    sizes = facts.measured[step.inputs[0]]
    others = [facts.values.get(name) if name else None for name in step.inputs[1:]]
    if any(array is None and name for array, name in zip(others, step.inputs[1:], strict=True)):
        return None
    found = []
    for unknown in (-1, 0):  # where it decides what comes out, that is not known
        told = np.array([unknown if size is None else size for size in sizes], np.int64)
        answer = arithmetic.evaluate(step.node, [told, *others])
        if answer is None:
            return None
        found.append(answer[0])
    if (found[0] == found[1]).all():
        return found[:1]
    if found[0].ndim == 1:
        facts.measured[step.outputs[0]] = tuple(
            int(a) if a == b else None for a, b in zip(*found, strict=True)
        )
    return None


def _check_indices(
    step: _Step, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]
) -> None:
    """A position beyond the end of its table shows that a sequence was bound too long."""
    if len(step.inputs) < 2:
        return
    shape, known = shapes.get(step.inputs[0]), values.get(step.inputs[1])
    place = integer(step.node, "axis", 0)
    size = shape[place] if shape and -len(shape) <= place < len(shape) else None
    if known is not None and known.size and size is not None and int(known.max()) >= size:
        raise _InvalidBinding


def _check_broadcast(
    step: _Step, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]
) -> None:
    """Whole-graph inference lets operands pass whose sizes disagree."""
    known = {shapes.get(name) for name in step.inputs if name}
    complete = [shape for shape in known if shape is not None and None not in shape]
    if len(complete) < 2:
        return
    try:
        np.broadcast_shapes(*complete)  # type: ignore[arg-type]
    except ValueError:
        raise _InvalidBinding from None


def _check_concat(
    step: _Step, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]
) -> None:
    """Operands of a Concat agree on every other axis."""
    known = [shapes.get(name) for name in step.inputs if name]
    complete = [shape for shape in known if shape is not None and None not in shape]
    if not complete or len({len(shape) for shape in complete}) > 1 or not complete[0]:
        return
    axis = integer(step.node, "axis", 1) % len(complete[0])
    if len({shape[:axis] + shape[axis + 1 :] for shape in complete}) > 1:
        raise _InvalidBinding


def _check_reshape(
    step: _Step, shapes: Mapping[str, Shape | None], values: Mapping[str, Array]
) -> None:
    """A Reshape makes neither more elements nor fewer."""
    shape, sizes = shapes.get(step.inputs[0]), values.get(step.inputs[-1])
    if shape is None or None in shape or sizes is None or sizes.ndim != 1:
        return
    if integer(step.node, "allowzero", 0):
        return
    told = [
        shape[axis] if size == 0 and axis < len(shape) else int(size)
        for axis, size in enumerate(sizes)
    ]
    given, wanted = math.prod(shape), math.prod(told)  # type: ignore[arg-type]
    if (wanted > 0 and given != wanted) or (wanted < 0 and given % wanted):
        raise _InvalidBinding


# Operator → what contradicts the sizes chosen for symbolic axes.
_CHECKS = {
    "Reshape": _check_reshape,
    "Gather": _check_indices,
    "Concat": _check_concat,
    **dict.fromkeys(
        ["Add", "Sub", "Mul", "Div", "Pow", "Where", "And", "Or", "Equal", "Less", "Greater"],
        _check_broadcast,
    ),
}


def _as_proto(found: _Type) -> onnx.TypeProto:
    if isinstance(found, bytes):
        return onnx.TypeProto.FromString(found)
    return onnx.helper.make_tensor_type_proto(*found)


def _as_type(proto: onnx.TypeProto) -> _Type | None:
    tensor = proto.tensor_type
    if not proto.HasField("tensor_type"):
        return proto.SerializeToString() or None
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(
        [dim.dim_value or (0 if dim.HasField("dim_value") else None) for dim in tensor.shape.dim]
    )


def _is_complete(shape: Shape | None) -> bool:
    return shape is not None and None not in shape
