"""Operators on quantised integers: the plain rules, with scales and zero points beside.

A scale or zero point is one number, or one per output channel of the weight; then it is cut with
them. Zero points shift integers, so a zero of the law is a zero of the real value.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow, Letter
from secateur.graphops.coupling.units import Axis
from secateur.graphops.rules import contraction, spatial
from secateur.graphops.rules.attributes import integer, operand, rank
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon

CONTRIB = "com.microsoft"

Operands = list[tuple[int, Sequence[Letter | None]]]


def _vectors(flow: Flow, node: ir.Node, indices: Sequence[int], letter: Letter) -> Operands:
    """Scales and zero points given per channel."""
    return [
        (index, [letter])
        for index in indices
        if operand(node, index) is not None and rank(flow, node.inputs[index]) == 1
    ]


def couple_matmul(flow: Flow, node: ir.Node) -> None:
    """QLinearMatMul: a, its scale and zero point, b and its own, then the result's."""
    _couple_product(flow, node, 0, 3, [4, 5])


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
    left, right = rank(flow, node.inputs[a]), rank(flow, node.inputs[b])
    if left is None or right is None or min(left, right) < 2:
        return contraction.freeze_all(flow, node, "UNKNOWN_SHAPE", "the shape is not known")
    batch = max(left, right) - 2
    numbers = list(range(batch))
    operands: Operands = [
        (a, [*numbers[batch - (left - 2) :], "m", "k"]),
        (b, [*numbers[batch - (right - 2) :], "k", "n"]),
        *_vectors(flow, node, vectors, "n"),
    ]
    flow.set(node.outputs[0], flow.meet(node, operands, [*numbers, "m", "n"], heads=True))
    return None


def couple_gemm(flow: Flow, node: ir.Node) -> None:
    """QGemm: A, B and C with scales and zero points between."""
    left = ["k", "m"] if integer(node, "transA", 0) else ["m", "k"]
    right = ["n", "k"] if integer(node, "transB", 0) else ["k", "n"]
    operands: Operands = [(0, left), (3, right), *_vectors(flow, node, [4, 5], "n")]
    if operand(node, 6) is not None:
        operands.append((6, ["m", "n"][2 - (rank(flow, node.inputs[6]) or 0) :]))
    flow.set(node.outputs[0], flow.meet(node, operands, ["m", "n"]))


def couple_conv(flow: Flow, node: ir.Node) -> None:
    """QLinearConv: x and w with scales and zero points, then a bias."""
    contraction.couple_convolution(flow, node, weight=3, bias=8, vectors=(4, 5))


def couple_conv_integer(flow: Flow, node: ir.Node) -> None:
    """ConvInteger: x, w and their zero points."""
    contraction.couple_convolution(flow, node, weight=1, bias=None, vectors=(3,))


def rewrite_conv(surgeon: Surgeon, node: ir.Node) -> None:
    """As Conv, with the weight at input 3."""
    contraction.rewrite_groups(surgeon, node, weight=3)


def macs_conv(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """As Conv, with the weight at input 3."""
    return contraction.macs_convolution(flow, node, weight=3)


def macs_matmul(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Size of the result × length of the sum."""
    return contraction.macs_matmul(flow, node)


def couple_binary(flow: Flow, node: ir.Node) -> None:
    """QLinearAdd and QLinearMul: operands 0 and 3, aligned at the right."""
    size = rank(flow, node.outputs[0])
    ranks = [rank(flow, node.inputs[index]) for index in (0, 3)]
    if size is None or None in ranks:
        return contraction.freeze_all(flow, node, "UNKNOWN_SHAPE", "the shape is not known")
    letters = list(range(size))
    operands: Operands = [
        (index, letters[size - (r or 0) :]) for index, r in zip((0, 3), ranks, strict=True)
    ]
    flow.set(node.outputs[0], flow.meet(node, operands, letters))
    return None


def couple_unary(flow: Flow, node: ir.Node) -> None:
    """QLinearSigmoid and the like: scales are single numbers."""
    flow.set(node.outputs[0], flow.blocks(node.inputs[0]))


def couple_dynamic_quantise(flow: Flow, node: ir.Node) -> None:
    """DynamicQuantizeLinear finds its scale in the data: an exception of the law on every axis."""
    for block in flow.blocks(node.inputs[0]):
        for axis in block.axes:
            flow.contract(node, 0, axis, exact=False)
    flow.set(node.outputs[0], flow.blocks(node.inputs[0]))


register("QLinearMatMul", "quantised", couple_matmul, macs=macs_matmul, reads=(0, 3, 4, 5))
register("MatMulInteger", "quantised", couple_matmul_integer, macs=macs_matmul, reads=(0, 1, 3))
register(
    "QLinearConv",
    "quantised",
    couple_conv,
    rewrite=rewrite_conv,
    macs=macs_conv,
    reads=(0, 3, 4, 5, 8),
)
register(
    "ConvInteger",
    "quantised",
    couple_conv_integer,
    rewrite=contraction.rewrite_conv,
    macs=contraction.macs_conv,
    reads=(0, 1, 3),
)
register("DynamicQuantizeLinear", "quantised", couple_dynamic_quantise)
register(
    "MatMulIntegerToFloat",
    "quantised",
    couple_matmul_to_float,
    macs=macs_matmul,
    reads=(0, 1, 3, 5, 6),
    domain=CONTRIB,
)
register(
    "DynamicQuantizeMatMul",
    "quantised",
    couple_dynamic_matmul,
    macs=macs_matmul,
    reads=(0, 1, 2, 3, 4),
    domain=CONTRIB,
)
register(
    "QGemm",
    "quantised",
    couple_gemm,
    macs=contraction.macs_gemm,
    reads=(0, 3, 4, 5, 6),
    domain=CONTRIB,
)
register("QLinearAdd QLinearMul", "quantised", couple_binary, reads=(0, 3), domain=CONTRIB)
register("QLinearSigmoid QLinearLeakyRelu", "quantised", couple_unary, reads=(0,), domain=CONTRIB)
register(
    "QLinearAveragePool QLinearGlobalAveragePool",
    "quantised",
    spatial.couple_pool,
    reads=(0,),
    domain=CONTRIB,
)
