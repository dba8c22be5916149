"""Fused attention: whole heads go (and nothing where a recipe asks for head dimensions).

The hidden axis of queries, keys and values is a matrix (heads, head size). With fewer key-value
heads than query heads (grouped-query attention) each key-value head goes with the query heads it
serves; with a single one (multi-query) query heads go alone. The head size stays, and with it the
scale 1/√d, so a head that goes equals a head whose output nobody reads. States of past positions
and what is added to the scores of each head run with the heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import Labels, single
from secateur.graphops.coupling.units import Axis
from secateur.graphops.model.attributes import integer, integers, operand
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.rules.contraction import all_axes
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon


def _line(flow: Flow, value: ir.Value, axis: int) -> Labels:
    """The labels along an axis of known size, FIXED where it is bare."""
    return flow.line(value, axis, (flow.shape(value) or ())[axis] or 0)


def couple_heads(
    flow: Flow, node: ir.Node, query: Labels, key: Labels, value: Labels
) -> tuple[Labels, Labels]:
    """States which heads go together.

    Args:
        flow: to state it in.
        node: the attention.
        query: labels (query heads, head size).
        key: labels (key-value heads, head size).
        value: labels (key-value heads, value head size).

    Returns:
        one label per query head, and one per key-value head.
    """
    heads, shared = query.shape[0], key.shape[0]
    if flow.by_dimension:
        for labels in (query, key, value):
            flow.freeze(labels, node, "HEAD_SIZE", "a fused attention keeps the size of its heads")
        return np.zeros(heads, np.int32), np.zeros(shared, np.int32)
    if shared == 1 < heads:
        for labels in (key, value):
            flow.freeze(labels, node, "SHARED_HEAD", "the only key-value head")
        rows = query
    else:
        rows = np.concatenate([query.reshape(shared, -1), key, value], axis=1)
    flow.join_rows(node, rows)
    flow.heads.append(rows[:, 0])
    key_heads = np.zeros(1, np.int32) if rows is query else rows[:, 0]
    return (rows[:, 0] if rows is query else np.repeat(rows[:, 0], heads // shared)), key_heads


def _couple(
    flow: Flow,
    node: ir.Node,
    inputs: Sequence[ir.Value],
    heads: tuple[int, int],
    caches: tuple[int, int],
    bias: int,
) -> Labels:
    """Queries, keys and values of rank 3 (batch, sequence, hidden) or 4 (batch, heads, …).

    Args:
        flow: to state it in.
        node: the attention.
        inputs: queries, keys and values.
        heads: of queries, and of keys and values.
        caches: which inputs hold past keys and values, of rank 4.
        bias: which input is added to the scores.

    Returns:
        one label per query head.
    """
    matrices = []
    size = 1
    for value, count in zip(inputs, (heads[0], heads[1], heads[1]), strict=True):
        shape = flow.shape(value) or ()
        axis = 1 if len(shape) == 4 else 2
        for other in range(len(shape)):
            if other != axis:
                flow.freeze_axis(value, other, node, "SEQUENCE", "the sequence or head size")
        matrices.append(_line(flow, value, axis).reshape(count, -1))
        size = shape[3] or 1 if len(shape) == 4 else matrices[-1].shape[1]
    query_heads, key_heads = couple_heads(flow, node, *matrices)
    for index in caches:  # (batch, key-value heads, …), usually graph inputs: then heads stay
        cache = operand(node, index)
        if cache is not None:
            flow.join(node, _line(flow, cache, 1), key_heads)
    _add_to_scores(flow, node, operand(node, bias), query_heads)
    output, *others = node.outputs
    hidden = single(2, np.repeat(query_heads, size))
    flow.set(output, single(1, query_heads) if flow.rank(output) == 4 else hidden)
    # present keys and values, and scores: (batch, heads, sequence, head size or sequence)
    for value, labels in zip(others, (key_heads, key_heads, query_heads), strict=False):
        flow.set(value, single(1, labels))
    return query_heads


def _add_to_scores(flow: Flow, node: ir.Node, bias: ir.Value | None, heads: Labels) -> None:
    """A bias or mask (batch, query heads, sequence, sequence), broadcast from the right: one for
    each head goes with its head."""
    shape = flow.shape(bias)
    if bias is None:
        return None
    along = -1 if shape is None else len(shape) - 3
    if shape is None or (along >= 0 and shape[along] not in (1, heads.size)):
        flow.freeze(heads, node, "UNKNOWN_SHAPE", "the shape of what is added is not known")
        return flow.freeze_value(bias, node, "UNKNOWN_SHAPE", "is added to the scores of heads")
    for axis in range(len(shape)):
        if axis != along:
            flow.freeze_axis(bias, axis, node, "SEQUENCE", "the sequence")
    if along >= 0 and shape[along] != 1:
        flow.join(node, heads, _line(flow, bias, along))
    return None


def couple_attention(flow: Flow, node: ir.Node) -> None:
    """ai.onnx Attention: Q, K, V of rank 3 with head counts as attributes, or of rank 4."""
    inputs = [value for value in node.inputs[:3] if value is not None]
    shapes = [flow.shape(value) for value in inputs]
    if len(inputs) < 3 or any(shape is None for shape in shapes):
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    q, k = shapes[0] or (), shapes[1] or ()
    heads = (
        (q[1] or 1, k[1] or 1)
        if len(q) == 4
        else (integer(node, "q_num_heads", 1), integer(node, "kv_num_heads", 1))
    )
    _couple(flow, node, inputs, heads, caches=(4, 5), bias=3)
    return None


def rewrite_attention(surgeon: Surgeon, node: ir.Node) -> None:
    """Head counts shrink with the hidden axes."""
    for index, name in ((0, "q_num_heads"), (1, "kv_num_heads")):
        _rewrite_count(surgeon, node, node.inputs[index], name)


def _rewrite_count(surgeon: Surgeon, node: ir.Node, value: ir.Value | None, name: str) -> None:
    axis = len(surgeon.shape(value)) - 1
    kept = surgeon.kept(value, axis)
    if name in node.attributes and kept is not None:
        count = integer(node, name, 1)
        surgeon.set_integer(node, name, int(kept.sum()) * count // kept.size)


def couple_multi_head(flow: Flow, node: ir.Node) -> None:
    """com.microsoft MultiHeadAttention with separate queries, keys and values; one joint bias."""
    inputs = [value for value in node.inputs[:3] if value is not None]
    if len(inputs) < 3 or any(flow.rank(value) not in (3, 4) for value in inputs):
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", "packed queries, keys and values")
    count = integer(node, "num_heads", 1)
    _join_bias(flow, node, operand(node, 3), inputs)
    _couple(flow, node, inputs, (count, count), caches=(6, 7), bias=5)
    return None


def _join_bias(
    flow: Flow, node: ir.Node, bias: ir.Value | None, inputs: Sequence[ir.Value]
) -> None:
    if bias is not None and all(flow.rank(value) == 3 for value in inputs):
        hidden = np.concatenate([_line(flow, value, 2) for value in inputs])
        flow.join(node, hidden, _line(flow, bias, 0))


def couple_packed(flow: Flow, node: ir.Node) -> None:
    """com.microsoft Attention: X (batch, sequence, I) · W (I, q + k + v) + B, then heads."""
    _couple_packed(flow, node, past=4, bias=5, vectors=(2,))


def couple_packed_quantised(flow: Flow, node: ir.Node) -> None:
    """QAttention: as Attention, with scales and zero points."""
    _couple_packed(flow, node, past=8, bias=None, vectors=(2, 4, 7))


def _couple_packed(
    flow: Flow, node: ir.Node, past: int, bias: int | None, vectors: Sequence[int]
) -> None:
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or flow.rank(x) != 3:
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    count = integer(node, "num_heads", 1)
    flow.freeze_axis(x, 0, node, "BATCH", "the batch")
    flow.freeze_axis(x, 1, node, "SEQUENCE", "the sequence")
    flow.join(node, _line(flow, x, 2), _line(flow, weight, 0))
    flow.contract(node, 0, 2)
    columns = _line(flow, weight, 1)
    for index in vectors:
        vector = operand(node, index)
        if vector is not None and flow.shape(vector) == columns.shape:
            flow.join(node, columns, _line(flow, vector, 0))
    sizes = integers(node, "qkv_hidden_sizes") or [columns.size // 3] * 3
    parts = [p.reshape(count, -1) for p in np.split(columns, np.cumsum(sizes)[:2])]
    heads, _ = couple_heads(flow, node, *parts)
    cache = operand(node, past)
    if cache is not None:  # (keys and values, batch, heads, sequence, head size)
        flow.join(node, _line(flow, cache, 2), heads)
    if bias is not None:
        _add_to_scores(flow, node, operand(node, bias), heads)
    output, *present = node.outputs
    flow.set(output, single(2, np.repeat(heads, parts[2].shape[1])))
    for value in present:  # as the cache
        flow.set(value, single(2, heads))
    return None


def rewrite_packed(surgeon: Surgeon, node: ir.Node) -> None:
    """num_heads and qkv_hidden_sizes count what stays."""
    kept = surgeon.kept(node.inputs[1], 1)
    if kept is None:
        return
    sizes = integers(node, "qkv_hidden_sizes")
    bounds = np.cumsum(sizes or [kept.size // 3] * 3)[:2]
    left = [int(part.sum()) for part in np.split(kept, bounds)]
    old = sizes or [kept.size // 3] * 3
    surgeon.set_integer(node, "num_heads", integer(node, "num_heads", 1) * left[0] // old[0])
    if sizes:
        surgeon.set_integers(node, "qkv_hidden_sizes", left)


def rewrite_multi_head(surgeon: Surgeon, node: ir.Node) -> None:
    """num_heads counts what stays."""
    _rewrite_count(surgeon, node, node.inputs[0], "num_heads")


def couple_grouped_query(flow: Flow, node: ir.Node) -> None:
    """com.microsoft GroupQueryAttention with separate queries, keys and values."""
    inputs = [value for value in node.inputs[:3] if value is not None]
    if len(inputs) < 3 or any(flow.rank(value) != 3 for value in inputs):
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", "packed queries, keys and values")
    heads = (integer(node, "num_heads", 1), integer(node, "kv_num_heads", 1))
    query_heads = _couple(flow, node, inputs, heads, caches=(3, 4), bias=10)
    sink = operand(node, 11)
    if sink is not None:  # one score for each head, of a position that has no value
        flow.join(node, query_heads, _line(flow, sink, 0))
    return None


def rewrite_grouped_query(surgeon: Surgeon, node: ir.Node) -> None:
    """Both head counts shrink with the hidden axes."""
    _rewrite_count(surgeon, node, node.inputs[0], "num_heads")
    _rewrite_count(surgeon, node, node.inputs[1], "kv_num_heads")


def couple_rotary(flow: Flow, node: ir.Node) -> None:
    """Rotary position embedding turns pairs inside each head: heads pass whole."""
    value, size = node.inputs[0], flow.rank(node.inputs[0])
    if value is None or size not in (3, 4):
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    if size == 4:
        flow.freeze_axis(value, 3, node, "HEAD_SIZE", "positions are turned in pairs")
        return flow.set(node.outputs[0], flow.blocks(value))
    count = integer(node, "num_heads", 0)
    if not count:
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", "the number of heads is not given")
    rows = _line(flow, value, 2).reshape(count, -1)
    flow.join_rows(node, rows)
    flow.heads.append(rows[:, 0])
    return flow.set(node.outputs[0], single(2, rows.reshape(-1)))


def macs_attention(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Q·Kᵀ and P·V: each query hidden position meets every key position."""
    query, key = node.inputs[0], operand(node, 1)
    if query is None or key is None or flow.rank(key) not in (3, 4):
        return []
    steps: Axis = (str(key.name), 1 if flow.rank(key) == 3 else 2)
    return [(*all_axes(flow, query), steps), (*all_axes(flow, node.outputs[0]), steps)]


def macs_packed(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """The projection, and Q·Kᵀ and P·V of the same size as the output."""
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None:
        return []
    rows = ((str(x.name), 0), (str(x.name), 1))
    product: tuple[Axis, ...] = (*all_axes(flow, node.outputs[0]), (str(x.name), 1))
    return [(*rows, (str(weight.name), 0), (str(weight.name), 1)), product, product]


register(
    "Attention",
    "attention",
    couple_attention,
    rewrite=rewrite_attention,
    macs=macs_attention,
    reads=(0, 1, 2, 3, 4, 5),
    since=23,
)
register("RotaryEmbedding", "attention", couple_rotary, rewrite=rewrite_multi_head, reads=(0,))
register(
    "RotaryEmbedding",
    "attention",
    couple_rotary,
    rewrite=rewrite_multi_head,
    reads=(0,),
    domain=CONTRIB,
)
register(
    "MultiHeadAttention",
    "attention",
    couple_multi_head,
    rewrite=rewrite_multi_head,
    macs=macs_attention,
    reads=(0, 1, 2, 3, 5, 6, 7),
    domain=CONTRIB,
)
register(
    "Attention",
    "attention",
    couple_packed,
    rewrite=rewrite_packed,
    macs=macs_packed,
    reads=(0, 1, 2, 4, 5),
    domain=CONTRIB,
)
register(
    "QAttention",
    "attention",
    couple_packed_quantised,
    rewrite=rewrite_packed,
    macs=macs_packed,
    reads=(0, 1, 2, 4, 7, 8),
    domain=CONTRIB,
)
register(
    "GroupQueryAttention",
    "attention",
    couple_grouped_query,
    rewrite=rewrite_grouped_query,
    macs=macs_attention,
    reads=(0, 1, 2, 3, 4, 10, 11),
    domain=CONTRIB,
)
