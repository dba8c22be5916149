"""Operators that work position by position.

Unary ones carry the labels of their first input. The others broadcast: axes are aligned at the
right and run together, so their labels meet.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import BARE
from secateur.graphops.model.shapes import constant_of
from secateur.graphops.rules.attributes import integer, operand, rank
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Ceil Celu Cos Cosh Dropout Elu "
    "Erf Exp Floor Gelu Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Round Selu "
    "Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
BROADCASTING = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less "
    "LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
)


def couple_unary(flow: Flow, node: ir.Node) -> None:
    """Labels of the first input pass; further inputs are scalars or say only a type."""
    blocks = flow.blocks(node.inputs[0])
    for output in node.outputs:
        flow.set(output, blocks)


def rewrite_cast(surgeon: Surgeon, node: ir.Node) -> None:
    """A size that becomes a number keeps the value it had.

    Exporters compute attention's 1/√d and the divisors of means from shapes. The law compares
    with the original's arithmetic, so a number computed from a tensor that shrinks is pinned;
    one that follows the input sizes is left to follow them.
    """
    number = surgeon.value(node.outputs[0])
    if number is None or number.dtype.kind != "f" or not surgeon.is_fixed(node.outputs[0]):
        return
    if surgeon.measures_a_cut(node.inputs[0]):
        surgeon.replace_by_constant(node.outputs[0], number)


def flat_relu(node: ir.Node) -> tuple[float, float]:
    """0 below 0."""
    return 0.0, math.inf


def flat_hard_swish(node: ir.Node) -> tuple[float, float]:
    """x·max(0, min(1, x/6 + 1/2)): 0 below -3."""
    return -3.0, math.inf


def flat_hard_sigmoid(node: ir.Node) -> tuple[float, float] | None:
    """max(0, min(1, αx + β))."""
    slope, shift = (
        default if attribute is None else attribute.as_float()
        for name, default in (("alpha", 0.2), ("beta", 0.5))
        for attribute in (node.attributes.get(name),)
    )
    return (-shift / slope, (1 - shift) / slope) if slope > 0 else None


def flat_clip(node: ir.Node) -> tuple[float, float] | None:
    """Its bounds, attributes before opset 11 and inputs since; None where they are computed."""
    bounds = []
    for index, name, none in ((1, "min", -math.inf), (2, "max", math.inf)):
        value, attribute = operand(node, index), node.attributes.get(name)
        constant = constant_of(value)
        if value is not None and (constant is None or constant.size != 1):
            return None
        if constant is not None:  # one number, which some exporters write as a vector
            bounds.append(float(constant.numpy().reshape(-1)[0]))
        else:
            bounds.append(none if attribute is None else attribute.as_float())
    return bounds[0], bounds[1]


def couple_broadcast(flow: Flow, node: ir.Node) -> None:
    """Axes aligned at the right run together."""
    shape = flow.shape(node.outputs[0])
    ranks = {index: rank(flow, value) for index, value in enumerate(node.inputs) if value}
    if shape is None or None in ranks.values():
        for value in node.inputs:
            flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    if _nothing_moves(flow, node):
        return
    letters = list(range(len(shape)))
    operands = [(index, letters[len(shape) - (r or 0) :]) for index, r in ranks.items()]
    flow.set(node.outputs[0], flow.meet(node, operands, letters))


def _nothing_moves(flow: Flow, node: ir.Node) -> bool:
    """Whether an activation without labels spans the whole result, as in mask arithmetic.

    The constants it meets then stay whole.
    """
    shape = flow.shape(node.outputs[0])
    spanning = False
    for value in node.inputs:
        if value is None or value.name in flow.constants:
            continue
        if flow.blocks(value):
            return False
        spanning |= flow.shape(value) == shape
    if spanning:
        flow.hold(node)
        flow.set(node.outputs[0], BARE)
    return spanning


def couple_quantize(flow: Flow, node: ir.Node) -> None:
    """Scale and zero point run along `axis` when they are vectors (per-channel)."""
    size = rank(flow, node.inputs[0])
    scale = rank(flow, node.inputs[1])
    if size is None or scale is None or scale > 1 or integer(node, "block_size", 0):
        for value in node.inputs:
            flow.freeze_value(value, node, "UNSUPPORTED_FORM", "blocked quantisation")
        return
    axis = integer(node, "axis", 1) % max(size, 1)
    operands: list[tuple[int, list[int]]] = [(0, list(range(size)))]
    for index in (1, 2):
        if operand(node, index) is not None and rank(flow, node.inputs[index]) == 1:
            operands.append((index, [axis]))
    flow.set(node.outputs[0], flow.meet(node, operands, list(range(size))))


register(UNARY, "unary", couple_unary, reads=(0,))
register("Relu", "unary", couple_unary, reads=(0,), flat=flat_relu)
register("HardSwish", "unary", couple_unary, reads=(0,), flat=flat_hard_swish)
register("HardSigmoid", "unary", couple_unary, reads=(0,), flat=flat_hard_sigmoid)
register("Clip", "unary", couple_unary, reads=(0,), flat=flat_clip)
register("Cast", "unary", couple_unary, rewrite=rewrite_cast, reads=(0,))
register("CastLike", "unary", couple_unary)  # the second input says only a type
register(BROADCASTING, "broadcast", couple_broadcast)
register("QuantizeLinear DequantizeLinear", "broadcast", couple_quantize)
register("QuantizeLinear DequantizeLinear", "broadcast", couple_quantize, domain="com.microsoft")
