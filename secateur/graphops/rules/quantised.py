"""Operators on quantised integers: the plain rules, with scales and zero points beside.

Those that say the same as one on floats, QLinearConv and its like, are spelt as that one before
any rule is asked (`model.spelling`).

A scale or zero point is one number, or one per output channel of the weight; then it is cut with
them. Zero points shift integers, so a zero of the law is a zero of the real value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow, Letter
from secateur.graphops.coupling.labels import single
from secateur.graphops.model.attributes import integer, operand
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.rules import contraction, convolution
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon

Operands = list[tuple[int, Sequence[Letter | None]]]


def _vectors(flow: Flow, node: ir.Node, indices: Sequence[int], letter: Letter) -> Operands:
    """Scales and zero points given per channel."""
    return [
        (index, [letter])
        for index in indices
        if operand(node, index) is not None and flow.rank(node.inputs[index]) == 1
    ]


def couple_matmul_integer(flow: Flow, node: ir.Node) -> None:
    """MatMulInteger: a, b and their zero points."""
    _couple_product(flow, node, 0, 1, [3])


def couple_matmul_to_float(flow: Flow, node: ir.Node) -> None:
    """MatMulIntegerToFloat: a, b, scales, zero points, bias."""
    _couple_product(flow, node, 0, 1, [3, 5, 6])


def couple_dynamic_matmul(flow: Flow, node: ir.Node) -> None:
    """DynamicQuantizeMatMul: a in floats, b quantised, its scale and zero point, bias."""
    _couple_product(flow, node, 0, 1, [2, 3, 4])


def _couple_product(flow: Flow, node: ir.Node, a: int, b: int, vectors: Sequence[int]) -> None:
    left, right = flow.rank(node.inputs[a]), flow.rank(node.inputs[b])
    if left is None or right is None or min(left, right) < 2:
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    batch = max(left, right) - 2
    numbers = list(range(batch))
    operands: Operands = [
        (a, [*numbers[batch - (left - 2) :], "m", "k"]),
        (b, [*numbers[batch - (right - 2) :], "k", "n"]),
        *_vectors(flow, node, vectors, "n"),
    ]
    flow.set(node.outputs[0], flow.meet(node, operands, [*numbers, "m", "n"], heads=True))
    return None


def couple_conv_integer(flow: Flow, node: ir.Node) -> None:
    """ConvInteger: x, w and their zero points."""
    convolution.couple_convolution(flow, node, bias=None, vectors=(3,))


# MatMulNBits multiplies by B (N, K) whose numbers are packed in blocks along K, each block with a
# scale (and a zero point) of its own:
#
#     B (N, K / block, bytes of a block), scales and zero points (N, K / block) or flat, bias (N)


def couple_n_bits(flow: Flow, node: ir.Node) -> None:
    """Columns go one by one. What is summed over goes in whole blocks, or in as many as have their
    zero points in one byte."""
    x, b, scales = node.inputs[:3]
    size, shape = flow.rank(x), flow.shape(b)
    if x is None or b is None or scales is None or not size or shape is None or len(shape) != 3:
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    if integer(node, "weight_prepacked", 0) or operand(node, 4) is not None:
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", "a weight in another order")
    columns, blocks = shape[0] or 0, shape[1] or 0
    own = flow.line(b, 0, columns)
    for index in (2, 3, 5):
        vector = operand(node, index)
        if vector is not None:
            wide = (flow.shape(vector) or (0,))[0] or 0
            line = flow.line(vector, 0, wide).reshape(columns, -1)
            flow.join(node, line, np.broadcast_to(own[:, None], line.shape))
    flow.freeze_axis(b, 2, node, "BLOCK", "the numbers of one block")
    last = size - 1
    along = flow.line(x, last, integer(node, "K", 0))
    bytes_of_zeros = blocks * integer(node, "bits", 4) // 8
    parts = [(b, blocks), (scales, blocks), (operand(node, 3), bytes_of_zeros)]
    present = [(part, count) for part, count in parts if part is not None]
    filled = along.size == blocks * integer(node, "block_size", 0)
    if filled and all((flow.shape(part) or ())[1:2] == (count,) for part, count in present):
        for part, count in present:
            rows = along.reshape(count, -1)
            line = flow.line(part, 1, count)
            flow.join(node, rows, np.broadcast_to(line[:, None], rows.shape))
        flow.contract(node, 0, last)
    else:
        for value, axis in ((x, last), *((part, 1) for part, _ in present)):
            flow.freeze_axis(value, axis, node, "BLOCK", "blocks that do not fill an axis")
    others = tuple(block for block in flow.blocks(x) if last not in block.axes)
    return flow.set(node.outputs[0], others + single(last, own))


def rewrite_n_bits(surgeon: Surgeon, node: ir.Node) -> None:
    """N and K say the sizes."""
    for name, value in (("K", node.inputs[0]), ("N", node.outputs[0])):
        if surgeon.changed(value):
            surgeon.set_integer(node, name, surgeon.size(value, len(surgeon.shape(value)) - 1))


def couple_dynamic_quantise(flow: Flow, node: ir.Node) -> None:
    """DynamicQuantizeLinear finds its scale in the data: an exception of the law on every axis."""
    for block in flow.blocks(node.inputs[0]):
        for axis in block.axes:
            flow.contract(node, 0, axis, exact=False)
    flow.set(node.outputs[0], flow.blocks(node.inputs[0]))


register(
    "MatMulInteger",
    "quantised",
    couple_matmul_integer,
    macs=contraction.macs_matmul,
    reads=(0, 1, 3),
)
register(
    "ConvInteger",
    "quantised",
    couple_conv_integer,
    rewrite=convolution.rewrite_conv,
    macs=convolution.macs_conv,
    reads=(0, 1, 3),
)
register("DynamicQuantizeLinear", "quantised", couple_dynamic_quantise)
register(
    "MatMulIntegerToFloat",
    "quantised",
    couple_matmul_to_float,
    macs=contraction.macs_matmul,
    reads=(0, 1, 3, 5, 6),
    domain=CONTRIB,
)
register(
    "DynamicQuantizeMatMul",
    "quantised",
    couple_dynamic_matmul,
    macs=contraction.macs_matmul,
    reads=(0, 1, 2, 3, 4),
    domain=CONTRIB,
)
register(
    "MatMulNBits",
    "quantised",
    couple_n_bits,
    rewrite=rewrite_n_bits,
    macs=contraction.macs_matmul,
    domain=CONTRIB,
)
