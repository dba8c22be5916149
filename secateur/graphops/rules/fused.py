"""Operators of com.microsoft that ONNX Runtime's optimizers emit: the plain rules, composed."""

from __future__ import annotations

import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import single
from secateur.graphops.coupling.units import Axis
from secateur.graphops.model.attributes import integer, operand
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.rules import contraction, elementwise
from secateur.graphops.rules.registry import register


def couple_skip_norm(flow: Flow, node: ir.Node) -> None:
    """LayerNorm(input + skip + bias): all run together, normalised across the last axis."""
    ranks = {index: flow.rank(value) for index, value in enumerate(node.inputs) if value}
    size = ranks[0]
    if size is None or None in ranks.values():
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    letters = list(range(size))
    operands = [(index, letters[size - (rank or 0) :]) for index, rank in ranks.items()]
    blocks = flow.meet(node, operands, letters)
    for block in blocks:
        if size - 1 in block.axes:
            flow.contract(node, 0, size - 1, exact=False)
    flow.set(node.outputs[0], blocks)
    for output in node.outputs[3:4]:  # the sum before the normalisation
        flow.set(output, blocks)
    return None


def couple_fused_matmul(flow: Flow, node: ir.Node) -> None:
    """MatMul with its operands' last two axes transposed on demand."""
    a, b = flow.rank(node.inputs[0]), flow.rank(node.inputs[1])
    moved = integer(node, "transBatchA", 0) or integer(node, "transBatchB", 0)
    if a is None or b is None or min(a, b) < 2 or moved:
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", "vectors or moved batches")
    batch = max(a, b) - 2
    left = ["k", "m"] if integer(node, "transA", 0) else ["m", "k"]
    right = ["n", "k"] if integer(node, "transB", 0) else ["k", "n"]
    numbers = list(range(batch))
    operands = [
        (0, [*numbers[batch - (a - 2) :], *left]),
        (1, [*numbers[batch - (b - 2) :], *right]),
    ]
    flow.set(node.outputs[0], flow.meet(node, operands, [*numbers, "m", "n"], heads=True))
    return None


def macs_fused_matmul(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Size of the result × length of the sum."""
    a = node.inputs[0]
    place = (flow.rank(a) or 2) - (2 if integer(node, "transA", 0) else 1)
    return [(*contraction.all_axes(flow, node.outputs[0]), (str(a.name if a else ""), place))]


def couple_embed_norm(flow: Flow, node: ir.Node) -> None:
    """Word, position and segment tables and the normalisation run along the hidden axis."""
    lines = []
    for index in (2, 3, 4, 5, 6):
        value = operand(node, index)
        if value is None:
            continue
        if index <= 4:
            flow.freeze_axis(value, 0, node, "INDEXED", "is indexed by data")
        labels = flow.axis(value, 1 if index <= 4 else 0)
        if labels is None:
            return flow.freeze_inputs(node, "BARE_AXIS", "a table cannot be cut")
        lines.append(labels)
    flow.contract(node, 2, 1, exact=False)
    for other in lines[1:]:
        flow.join(node, lines[0], other)
    for output in (node.outputs[0], *node.outputs[2:3]):
        flow.set(output, single(2, lines[0]))
    return None


register("BiasGelu FastGelu", "broadcast", elementwise.couple_broadcast, domain=CONTRIB)
register("Gelu QuickGelu", "unary", elementwise.couple_unary, reads=(0,), domain=CONTRIB)
register(
    "SkipLayerNormalization SkipSimplifiedLayerNormalization",
    "normalisation",
    couple_skip_norm,
    domain=CONTRIB,
)
register(
    "EmbedLayerNormalization QEmbedLayerNormalization",
    "normalisation",
    couple_embed_norm,
    reads=(2, 3, 4, 5, 6),
    domain=CONTRIB,
)
register(
    "FusedMatMul TransposeMatMul",  # the second is the first as it was once called
    "contraction",
    couple_fused_matmul,
    macs=macs_fused_matmul,
    domain=CONTRIB,
)
