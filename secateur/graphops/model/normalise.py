"""Brings a model into the form that the coupling reads: every layer owns what it slices.

Exporters store equal initializers once: the zero biases of two unrelated layers, or the unit
scales of two normalisations, become one tensor with two readers, directly or behind `Identity`
nodes. Sliced as it stands, one layer's cut would be forced on the other. Vectors are therefore
given to each reader as its own copy; where the readers are cut alike, surgery merges the copies
back. Matrices with several readers (tied embeddings, Siamese branches) are tied on purpose and
stay one tensor.

A vector of weights that the model writes into before it reads it, as `bias[a:b] = 0` is exported,
is a constant, and becomes one. Sequences of tensors come apart (see `sequences`), and operators
that say the same as plain ones are spelt out (see `spelling`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from secateur.graphops.model import arithmetic, sequences
from secateur.graphops.model.constants import add_initializer
from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.names import free_name
from secateur.graphops.model.spelling import spell_out
from secateur.graphops.model.unread import drop_unread, unread

_RESOLVED = {*sequences.OPERATORS, "ScatterND"}


def normalise(model: ir.Model) -> Mapping[str, str]:
    """Takes sequences and written vectors out, spells operators out, and gives each reader of a
    shared vector its own copy, in place.

    Returns:
        name of each vector that is new → name of the one that it copies, or is cut with.
    """
    graph = model.graph
    given = set(graph.initializers)
    if any(node.op_type in _RESOLVED for node in graph):
        before = unread(graph)
        sequences.spread(model)
        _settle_written(graph)
        drop_unread(graph, before)
    tied = spell_out(model)
    copies = {**tied, **_unshare(model)}
    if model.ir_version < 4:  # where the specification wants every initializer among the inputs
        new = [value for name, value in graph.initializers.items() if name not in given]
        graph.inputs.extend(new)
    return copies


def _settle_written(graph: ir.Graph) -> None:
    """Puts constants in the place of vectors that constants are written into."""
    known: dict[ir.Value | None, arithmetic.Array | None] = {None: None}
    for node in list(graph):
        for value in node.inputs:
            tensor = None if value in known else constant_of(value)
            if value is None or tensor is None or value.is_graph_input():
                continue
            if tensor.size <= arithmetic.MAX_ELEMENTS:
                known[value] = tensor.numpy()
        if not node.inputs or any(value not in known for value in node.inputs):
            continue
        computed = arithmetic.evaluate(node, [known[value] for value in node.inputs])
        known.update(zip(node.outputs, computed or (), strict=False))
        if computed and node.op_type == "ScatterND" and computed[0].dtype.kind == "f":
            _settle(graph, node, computed[0])


def _settle(graph: ir.Graph, node: ir.Node, content: arithmetic.Array) -> None:
    written = node.outputs[0]
    if content.ndim != 1 or written.is_graph_output():
        return
    name, written.name = str(written.name), None  # the constant takes over the name
    written.replace_all_uses_with(add_initializer(graph, ir.tensor(content, name=name)))
    graph.remove(node, safe=True)


def _unshare(model: ir.Model) -> Mapping[str, str]:
    graph = model.graph
    copies: dict[str, str] = {}
    for node in list(graph):
        if node.op_type == "Identity" and node.domain == "":
            _absorb_identity(graph, node, copies)
    for value in list(graph.initializers.values()):
        if not _is_vector(value):
            continue
        for user, index in list(value.uses())[1:]:
            wish = f"{value.name}__{index}_of_{user.outputs[0].name}"
            name = free_name(wish, graph.initializers)
            user.replace_input_with(index, _add_copy(graph, name, value))
            copies[name] = copies.get(str(value.name), str(value.name))
    return copies


def _absorb_identity(graph: ir.Graph, node: ir.Node, copies: dict[str, str]) -> None:
    """Replaces Identity(initializer): a vector by a copy, a matrix by the initializer itself."""
    source, alias = node.inputs[0], node.outputs[0]
    if source is None or not source.is_initializer():
        return
    if alias.is_graph_output() or source.graph is not graph:
        return
    name = alias.name or ""
    if _is_vector(source):
        alias.name = None  # the copy takes over the alias's name
        replacement = _add_copy(graph, name, source)
        copies[name] = copies.get(str(source.name), str(source.name))
    else:
        replacement = source
    alias.replace_all_uses_with(replacement)
    graph.remove(node, safe=True)


def _is_vector(value: ir.Value) -> bool:
    """Whether a constant has one axis longer than 1 and floating-point or quantised content."""
    if value.const_value is None or value.is_graph_output():
        return False
    shape = value.const_value.shape.numpy()
    one_axis = math.prod(shape) == max(shape, default=1) > 1
    return one_axis and value.const_value.dtype not in (ir.DataType.INT64, ir.DataType.STRING)


def _add_copy(graph: ir.Graph, name: str, source: ir.Value) -> ir.Value:
    assert source.const_value is not None
    tensor = ir.Tensor(source.const_value.numpy(), dtype=source.const_value.dtype, name=name)
    return add_initializer(graph, tensor)
