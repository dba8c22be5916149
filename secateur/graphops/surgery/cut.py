"""Cuts a model: rewrites nodes, slices constants, drops what nothing reads any more."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops import rules
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.collecting import uncollected
from secateur.graphops.model.constants import set_constant
from secateur.graphops.model.graph import bodies, constant_of, constant_tensor, node_label, walk
from secateur.graphops.model.opening import release
from secateur.graphops.model.unread import drop_unread, unread
from secateur.graphops.rules.registry import Rewrite
from secateur.graphops.surgery.surgeon import Mask, Surgeon
from secateur.plan import KeptTensor

_LARGE = 1 << 16  # bytes of a constant that is sliced late
Kept = dict[str, dict[int, tuple[int, ...]]]  # constant → axis → kept indices


@uncollected()
def cut(
    model: ir.Model, coupling: Coupling, keep: Mask, copies: Mapping[str, str]
) -> tuple[ir.Model, tuple[KeptTensor, ...]]:
    """A new model without the units that go; the one given is not touched.

    Args:
        model: normalised.
        coupling: of that model.
        keep: per unit number whether it stays.
        copies: name of each copy that normalising made → name of its source.

    Returns:
        the new model, and what was kept of each changed constant.
    """
    result, before = model.clone(), unread(model.graph)
    if coupling.branch_ends:
        _end_branches(result.graph, coupling, keep)
        drop_unread(result.graph, before, listed=True)
    surgeon = Surgeon(result, coupling, keep)
    nodes = list(walk(result.graph))
    for node in nodes:
        rule = rules.find(node.domain, node.op_type, surgeon.opset(node))
        if rule is not None and rule.rewrite is not None:
            _rewrite(rule.rewrite, surgeon, node)
    owners = [result.graph, *(body for node in nodes for body in bodies(node).values())]
    kept = _slice_constants(owners, nodes, surgeon)
    _resize_values(owners, nodes, surgeon)
    _merge_copies(result.graph, kept, copies)
    drop_unread(result.graph, before)
    entries = tuple(
        KeptTensor(tensor=name, source=copies.get(name, name), axes=axes)
        for name, axes in kept.items()
        if axes
    )
    return result, entries


def _end_branches(graph: ir.Graph, coupling: Coupling, keep: Mask) -> None:
    """Joins do without the branches that go."""
    ends = [end for end in coupling.branch_ends if not keep[list(end.labels)].any()]
    names = {str(end.node.outputs[0].name) for end in ends}
    nodes = {name: n for n in graph if n.outputs and (name := str(n.outputs[0].name)) in names}
    dropped: dict[str, set[int]] = {}
    for end in ends:  # in the order of the graph: the next join reads what this one leaves
        name = str(end.node.outputs[0].name)
        if end.left is not None:
            _pass_on(nodes[name], end.left)
        elif end.without is not None:
            dropped.setdefault(name, set()).add(end.without)
    for name, indices in dropped.items():
        node = nodes[name]
        stay = [value for index, value in enumerate(node.inputs) if index not in indices]
        for index, value in enumerate(stay):
            node.replace_input_with(index, value)
        node.resize_inputs(len(stay))


def _pass_on(node: ir.Node, index: int) -> None:
    """Has readers of a node read one of its inputs; it becomes an Identity where callers do."""
    left, output = node.inputs[index], node.outputs[0]
    assert left is not None
    if output.is_graph_output():
        node.op_type = "Identity"
        node.attributes.clear()
        node.replace_input_with(0, left)
        node.resize_inputs(1)
    else:
        output.replace_all_uses_with(left)


def _rewrite(rewrite: Rewrite, surgeon: Surgeon, node: ir.Node) -> None:
    """Raises `INVALID_MODEL` for a node that lacks what its operator needs."""
    try:
        rewrite(surgeon, node)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise refuse(
            Code.INVALID_MODEL,
            f"node {node_label(node)!r} is not as {node.op_type} is defined: {error}",
            nodes=(node_label(node),),
            hint="Write the node as its operator is defined, or keep its channels with --ignore.",
        ) from error


def _slice_constants(
    owners: Sequence[ir.Graph], nodes: Sequence[ir.Node], surgeon: Surgeon
) -> Kept:
    kept: Kept = {}
    for owner in owners:
        for name, value in owner.initializers.items():
            tensor, axes = _sliced(surgeon, value, value.const_value)
            if tensor is not None:
                set_constant(value, tensor)
            kept[str(name)] = axes
    for node in nodes:
        if node.op_type == "Constant" and node.domain == "":
            output = node.outputs[0]
            tensor, axes = _sliced(surgeon, output, constant_tensor(node))
            if tensor is not None:
                set_constant(output, tensor)
                kept[str(output.name)] = axes
    return kept


def _sliced(
    surgeon: Surgeon, value: ir.Value, tensor: ir.TensorProtocol | None
) -> tuple[ir.TensorProtocol | None, dict[int, tuple[int, ...]]]:
    """The constant without the positions that go; None when it is not changed."""
    masks = surgeon.masks(value)
    if tensor is None or not masks:
        return None, {}
    axes = {axis: np.flatnonzero(mask) for axis, mask in sorted(masks.items())}
    sliced: ir.TensorProtocol
    if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > _LARGE:
        # Sliced when it is written: no two copies of all weights, and weights in files may be
        # larger than memory.
        shape = [axes[a].size if a in axes else int(n) for a, n in enumerate(tensor.shape.numpy())]
        take = functools.partial(_take, tensor, axes)
        sliced = ir.LazyTensor(take, tensor.dtype, ir.Shape(shape), name=tensor.name)
    else:
        sliced = _take(tensor, axes)
    return sliced, {axis: tuple(indices.tolist()) for axis, indices in axes.items()}


def _take(tensor: ir.TensorProtocol, axes: Mapping[int, npt.NDArray[np.intp]]) -> ir.TensorProtocol:
    array = tensor.numpy()
    # The axis that shrinks most first: the copies stay small.
    for axis in sorted(axes, key=lambda a: axes[a].size / array.shape[a]):
        array = np.take(array, axes[axis], axis=axis)
    release(tensor)
    return ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=tensor.name)


def _resize_values(owners: Sequence[ir.Graph], nodes: Sequence[ir.Node], surgeon: Surgeon) -> None:
    """Brings the recorded shapes along: ONNX Runtime warns where they disagree.

    The name of a size ("8*batch", of merged heads) stands for one number everywhere: where that
    changed it is dropped, or buffers would be taken for as large as others of that name.
    """
    values = [output for node in nodes for output in node.outputs]
    for owner in owners:
        values += [*owner.inputs, *owner.initializers.values()]
    for value in values:
        sizes = surgeon.changed_sizes(value)
        if sizes and value.shape is not None:
            value.shape = ir.Shape(
                [
                    dim if axis not in sizes else sizes[axis] if isinstance(dim, int) else None
                    for axis, dim in enumerate(value.shape)
                ]
            )


def _merge_copies(graph: ir.Graph, kept: Kept, copies: Mapping[str, str]) -> None:
    """Copies that were cut as their source was become the source again."""
    for name, source in copies.items():
        copy, original = graph.initializers.get(name), graph.initializers.get(source)
        if copy is None or original is None or copy.is_graph_output():
            continue
        if kept.get(name) == kept.get(source) and _equal(copy, original):
            copy.replace_all_uses_with(original)
            if copy.is_graph_input():
                graph.inputs.remove(copy)
            del graph.initializers[name]
            kept.pop(name, None)


def _equal(copy: ir.Value, original: ir.Value) -> bool:
    """Whether two vectors hold the same numbers: one may have come into another basis."""
    first, second = constant_of(copy), constant_of(original)
    assert first is not None
    assert second is not None
    return first is second or first.tobytes() == second.tobytes()
