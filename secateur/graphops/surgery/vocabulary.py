"""Keeps some tokens of a vocabulary: rows of embeddings, and columns of the heads that name them.

Ids are renumbered: token `ids[n]` of the original is token `n` of the result. The input that tokens
come by is the one whose values index a table of enough rows; whatever else reads it would still
count in the old ids, and is refused. A head is what ends in a graph output with one entry per
token: a matrix product with a constant weight, and element-wise arithmetic with constants behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration.data import Feeds
from secateur.graphops.model.attributes import integer, integers
from secateur.graphops.model.constants import set_constant
from secateur.graphops.model.graph import constant_of, node_label, real_inputs
from secateur.graphops.model.names import matching
from secateur.graphops.model.shapes import Shapes

# Operators through which an id stays an id, and logits stay logits.
_PASSES = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_SAME = frozenset({"Identity", "Cast"})
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Where tokens come in and go out.

    Attributes:
        input: name of the graph input that holds ids.
        ids: that are kept; the place of each is its new id.
        rows: tokens there were.
        axes: the axis of each constant that has an entry per token.
        outputs: names of graph outputs that have an entry per token along their last axis.
        between: names of the other values that have.
    """

    input: str
    ids: npt.NDArray[np.int64]
    rows: int
    axes: Mapping[str, int]
    outputs: frozenset[str]
    between: frozenset[str]

    def old(self, feeds: Feeds) -> Feeds:
        """Feeds of the original, given those of the result."""
        tokens = feeds[self.input]
        return {**feeds, self.input: self.ids[tokens].astype(tokens.dtype)}

    def new(self, feeds: Feeds) -> Feeds:
        """Feeds of the result, given those of the original.

        Raises:
            Refused: `INVALID_CALIBRATION` where they hold tokens that are not kept.
        """
        tokens = feeds[self.input]
        numbers = np.full(self.rows, -1, np.int64)
        numbers[self.ids] = np.arange(self.ids.size)
        inside = (tokens >= 0) & (tokens < self.rows)
        found = np.where(inside, numbers[np.where(inside, tokens, 0)], -1)
        if (found < 0).any():
            missing = np.unique(tokens[found < 0])
            raise refuse(
                Code.INVALID_CALIBRATION,
                f"calibration data hold {missing.size} tokens that are not kept",
                nodes=(self.input,),
                expected=f"only the {self.ids.size} tokens of vocabulary",
                found=", ".join(map(str, missing[:10].tolist())),
                hint="Keep those tokens too, or leave the samples out.",
            )
        return {**feeds, self.input: found.astype(tokens.dtype)}

    def cut(self, model: ir.Model) -> ir.Model:
        """A new model of the tokens that are kept; the one given is not touched."""
        result = model.clone()
        graph = result.graph
        values = [*graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in values:
            name = str(value.name)
            if name in self.axes:
                self._slice(value, self.axes[name])
            elif name in self.outputs and value.shape is not None:
                value.shape = ir.Shape([*list(value.shape)[:-1], int(self.ids.size)])
            elif name in self.between:
                value.shape = None
        return result

    def _slice(self, value: ir.Value, axis: int) -> None:
        old = constant_of(value)
        assert old is not None
        array = np.ascontiguousarray(np.take(old.numpy(), self.ids, axis))
        tensor = ir.Tensor(array, dtype=old.dtype, name=old.name)
        set_constant(value, tensor)
        value.shape = tensor.shape


def find(model: ir.Model, shapes: Shapes, ids: Sequence[int], ignore: Sequence[str]) -> Vocabulary:
    """Finds what has an entry per token.

    Args:
        model: normalised.
        shapes: of that model.
        ids: of the tokens that are kept.
        ignore: globs over nodes and initializers; tables that match are no vocabulary.

    Raises:
        Refused: `INVALID_RECIPE` where no input, or more than one, indexes tables with so many
            rows, `NOTHING_TO_PRUNE` where something else reads it, or an output has an entry per
            token in a way that is not understood.
    """
    found = [
        tokens
        for tokens in (_Tokens.of(value, ignore) for value in real_inputs(model.graph))
        if tokens.tables and max(tokens.tables.values()) > max(ids)
    ]
    if len(found) != 1:
        raise refuse(
            Code.INVALID_RECIPE,
            f"{len(found)} inputs index tables of more than {max(ids)} rows",
            nodes=tuple(tokens.name for tokens in found),
            expected="one input whose values are tokens",
            found=", ".join(f"{t.name}: {max(t.tables.values())} rows" for t in found) or "none",
            hint="--ignore the tables that hold no tokens."
            if found
            else "Check the largest id, or prune without vocabulary.",
        )
    tokens = found[0]
    rows = set(tokens.tables.values())
    if tokens.others or len(rows) != 1:
        raise _not_understood(
            f"tokens of {tokens.name!r} are not only looked up in tables of one size",
            tokens.others,
            f"tables of {sorted(rows)} rows",
        )
    size = rows.pop()
    axes = dict.fromkeys(tokens.tables, 0)
    heads = [
        _Head.of(output, size, model.graph)
        for output in model.graph.outputs
        if (shapes.of(str(output.name)) or (None,))[-1] == size
    ]
    for head in heads:
        axes |= head.axes
    between = frozenset(name for head in heads for name in head.between)
    outputs = frozenset(head.output for head in heads)
    _check_alone(model.graph, axes, between, tokens.lookups)
    return Vocabulary(tokens.name, np.array(ids, np.int64), size, axes, outputs, between - outputs)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What reads one graph input.

    Attributes:
        name: of the input.
        tables: rows of each constant that its values index.
        lookups: names of what comes out there.
        others: nodes that do something else with them than to look at their shape.
    """

    name: str
    tables: dict[str, int]
    lookups: frozenset[str]
    others: tuple[str, ...]

    @classmethod
    def of(cls, value: ir.Value, ignore: Sequence[str]) -> _Tokens:
        tables: dict[str, int] = {}
        lookups: set[str] = set()
        others: list[str] = []
        frontier = [value] if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) else []
        while frontier:
            for user, index in frontier.pop().uses():
                table = user.inputs[0]
                rows = constant_of(table) if user.op_type == "Gather" and index == 1 else None
                if table is not None and rows is not None and not integer(user, "axis", 0):
                    names = [str(table.name), user.name or ""]
                    if matching(ignore, names) is not None:
                        others.append(node_label(user))
                    else:
                        tables[str(table.name)] = int(rows.shape.numpy()[0])
                        lookups.add(str(user.outputs[0].name))
                elif user.op_type in _PASSES and index == 0:
                    frontier += user.outputs
                elif user.op_type != "Shape":
                    others.append(node_label(user))
        return cls(str(value.name), tables, frozenset(lookups), tuple(others))


@dataclass(slots=True)
class _Head:
    """What ends in an output with an entry per token.

    Attributes:
        output: its name.
        axes: the axis of each constant that has an entry per token.
        between: values that have, the output among them.
    """

    output: str
    axes: dict[str, int] = field(default_factory=dict)
    between: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, output: ir.Value, size: int, graph: ir.Graph) -> _Head:
        head = cls(str(output.name))
        value: ir.Value | None = output
        while value is not None:
            head.between.add(str(value.name))
            node = value.producer()
            if node is None or node.domain != "":
                raise head._unknown(node)
            value = head._step(node, size)
        return head

    def _step(self, node: ir.Node, size: int) -> ir.Value | None:
        """Notes the constants of a node; returns where to go on, None behind the product."""
        if node.op_type in _SAME:
            return node.inputs[0]
        if node.op_type in _ARITHMETIC:
            constants = [constant_of(value) for value in node.inputs]
            if (constants[0] is None) == (constants[1] is None):
                raise self._unknown(node)
            place = 0 if constants[0] is not None else 1
            self._note(node.inputs[place], size, -1)
            return node.inputs[1 - place]
        if node.op_type == "MatMul":
            self._weight(node, size, 1)
        elif node.op_type == "Gemm":
            self._weight(node, size, 0 if integer(node, "transB", 0) else 1)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                self._note(node.inputs[2], size, -1)
        else:
            raise self._unknown(node)
        return None

    def _weight(self, node: ir.Node, size: int, axis: int) -> None:
        weight = node.inputs[1]
        producer = None if weight is None else weight.producer()
        if weight is not None and producer is not None and producer.op_type == "Transpose":
            order = integers(producer, "perm") or [1, 0]
            self.between.add(str(weight.name))
            weight, axis = producer.inputs[0], order[axis]
        tensor = constant_of(weight)
        if tensor is None or len(tensor.shape) != 2 or tensor.shape.numpy()[axis] != size:
            raise self._unknown(node)
        self._note(weight, size, axis)

    def _note(self, value: ir.Value | None, size: int, axis: int) -> None:
        """A constant with an entry per token on an axis, or with one for all of them."""
        tensor = constant_of(value)
        if value is None or tensor is None:
            raise self._unknown(None)
        shape = tensor.shape.numpy()
        if shape and shape[axis] == size:
            self.axes[str(value.name)] = axis % len(shape)

    def _unknown(self, node: ir.Node | None) -> Refused:
        return _not_understood(
            f"output {self.output!r} has an entry per token, and is not a matrix product with "
            "constant arithmetic behind it",
            () if node is None else (node_label(node),),
            "another operator" if node is None else node.op_type,
        )


def _check_alone(
    graph: ir.Graph, axes: Mapping[str, int], between: frozenset[str], lookups: frozenset[str]
) -> None:
    """Refuses constants and values with an entry per token that others read."""
    for node in graph.all_nodes():
        made = {str(value.name) for value in node.outputs}
        for name in (str(value.name) for value in node.inputs if value is not None):
            known = between | lookups if name in axes else between
            if (name in axes or name in between) and not made & known:
                raise _not_understood(
                    f"{name!r} has an entry per token, and others read it", (node_label(node),), ""
                )


def _not_understood(message: str, nodes: Sequence[str], found: str) -> Refused:
    return refuse(
        Code.NOTHING_TO_PRUNE,
        f"the vocabulary cannot be cut: {message}",
        nodes=tuple(nodes[:5]),
        expected="tokens that are looked up in embeddings, and heads that are matrix products",
        found=found,
        hint="Prune without vocabulary.",
    )
