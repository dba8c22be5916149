"""Operators that work position by position.

Unary ones carry the labels of their first input. The others broadcast: axes are aligned at the
right and run together, so their labels meet.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling import void
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import BARE, Block, Labels, single
from secateur.graphops.model.attributes import KnowsValues, integer, operand, real
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.quantised import reach
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon

UNARY = "Acos Acosh BitCast BitwiseNot Cos Cosh Exp IsInf IsNaN Log Not Reciprocal Sigmoid Softplus"
ZERO_AT_ZERO = (
    "Abs Asin Asinh Atan Atanh Ceil Celu Elu Erf Floor Gelu LeakyRelu Mish Neg Round Selu "
    "Shrink Sign Sin Sinh Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
BROADCASTING = (
    "BitShift BitwiseAnd BitwiseOr BitwiseXor Greater GreaterOrEqual Less LessOrEqual Max Min Mod "
    "Or PRelu Pow Xor"
)


def couple_unary(flow: Flow, node: ir.Node) -> None:
    """Labels of the first input pass; further inputs are scalars or say only a type."""
    blocks = flow.blocks(node.inputs[0])
    for output in node.outputs:
        flow.set(output, blocks)


def couple_cast(flow: Flow, node: ir.Node) -> None:
    """Labels pass; integers that name positions do so in any width."""
    couple_unary(flow, node)
    if ir.DataType(integer(node, "to", 1)) in (ir.DataType.INT32, ir.DataType.INT64):
        flow.move_pointers(node)


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
    slope, shift = real(node, "alpha", 0.2), real(node, "beta", 0.5)
    return (-shift / slope, (1 - shift) / slope) if slope > 0 else None


def flat_clip(node: ir.Node) -> tuple[float, float] | None:
    """Its bounds, attributes before opset 11 and inputs since; None where they are computed."""
    bounds = []
    for index, name, none in ((1, "min", -math.inf), (2, "max", math.inf)):
        value = operand(node, index)
        constant = constant_of(value)
        if value is not None and (constant is None or constant.size != 1):
            return None
        if constant is not None:  # one number, which some exporters write as a vector
            bounds.append(float(constant.numpy().reshape(-1)[0]))
        else:
            bounds.append(real(node, name, none))
    return bounds[0], bounds[1]


def flat_quantize(node: ir.Node) -> tuple[float, float] | None:
    """The ends of its integers' range; None where they are not one number each, and constant."""
    scale, zero = (constant_of(operand(node, index)) for index in (1, 2))
    return None if scale is None or zero is None else reach(scale.numpy(), zero.numpy())


def couple_broadcast(flow: Flow, node: ir.Node) -> None:
    """Axes aligned at the right run together."""
    shape = flow.shape(node.outputs[0])
    ranks = {index: flow.rank(value) for index, value in enumerate(node.inputs) if value}
    if shape is None or None in ranks.values():
        flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    if _nothing_moves(flow, node):
        return
    letters = list(range(len(shape)))
    operands = [(index, letters[len(shape) - (r or 0) :]) for index, r in ranks.items()]
    _label_as_met(flow, node)
    flow.set(node.outputs[0], flow.meet(node, operands, letters))


def _label_as_met(flow: Flow, node: ir.Node) -> None:
    """A constant that nothing has labelled yet, and that spans a joint block it meets (a bias of
    groups × channels), gets a joint block of its own: its two axes alone would decide which of
    both is cut."""
    joint = [
        (value, block)
        for value in node.inputs
        if value is not None
        for block in flow.blocks_of.get(str(value.name), BARE)
        if len(block.axes) > 1
    ]
    for value in node.inputs:
        if value is None or value.name not in flow.constants or value.name in flow.blocks_of:
            continue
        shape = flow.shape(value) or ()
        for other, block in joint:
            shift = len(shape) - (flow.rank(other) or 0)
            axes = tuple(axis + shift for axis in block.axes)
            spans = min(axes) >= 0 and tuple(shape[a] for a in axes) == block.labels.shape
            if spans and all(n == 1 for a, n in enumerate(shape) if a not in axes):
                own = flow.fresh(block.labels.size).reshape(block.labels.shape)
                flow.set(value, (Block(axes, own),))
                break


def couple_equal(flow: Flow, node: ir.Node) -> None:
    """As any that broadcasts; chosen positions are compared with 0, 1, 2 … along an axis that
    then runs with the one they were chosen from (one-hot, as some exporters spell it)."""
    for index in (0, 1):
        chosen = flow.pointed(node.inputs[index])
        number = flow.value(node.inputs[1 - index])
        if chosen is not None and number is not None and number.size == 1:
            return _compare_with_one(flow, node, index, chosen, int(number.reshape(-1)[0]))
        axis = None if chosen is None else _counting(flow, node, 1 - index, chosen.size)
        one, whole = (
            (flow.shape(value) or ())[axis : (axis or 0) + 1 or None]
            for value in (node.inputs[index], node.outputs[0])
        )
        if chosen is not None and axis is not None and one in ((), (1,)) and whole == chosen.shape:
            flow.hold(node)
            flow.freeze_inputs(node, "BARE_AXIS", "is compared with numbers")
            flow.follow(node, index)
            flow.experts.append(chosen)
            flow.set(node.outputs[0], single(axis + (flow.rank(node.outputs[0]) or 0), chosen))
            return None
    return couple_broadcast(flow, node)


def _compare_with_one(flow: Flow, node: ir.Node, index: int, chosen: Labels, number: int) -> None:
    """The result says where one position was chosen: false everywhere once that is gone."""
    flow.hold(node)
    flow.freeze_inputs(node, "BARE_AXIS", "is compared with a number")
    if 0 <= number < chosen.size:
        flow.follow(node, index)
        flow.experts.append(chosen)
        flow.take(node, node.outputs[0], int(chosen[number]), None)
    flow.set(node.outputs[0], BARE)


def _counting(known_by: KnowsValues, node: ir.Node, index: int, size: int) -> int | None:
    """The axis of the output along which input `index` counts 0 … size - 1, None if none."""
    numbers = known_by.value(node.inputs[index])
    if (
        numbers is None
        or numbers.size != size
        or not np.array_equal(numbers.reshape(-1), np.arange(size))
    ):
        return None
    return numbers.shape.index(size) - numbers.ndim


def rewrite_equal(surgeon: Surgeon, node: ir.Node) -> None:
    """Numbers count the positions that stay; one alone is the new number of its position."""
    for index in (0, 1):
        stay, number = surgeon.numbered(node.inputs[index]), surgeon.value(node.inputs[1 - index])
        if stay is not None and number is not None and number.size == 1 and not stay.all():
            left = np.full_like(number, int(stay[: int(number.reshape(-1)[0])].sum()))
            surgeon.set_input(node, 1 - index, left, like=number.dtype)
    size = len(surgeon.shape(node.outputs[0]))
    for axis in surgeon.changed_sizes(node.outputs[0]):
        for index in (0, 1):
            whole = int(surgeon.shape(node.outputs[0])[axis] or 0)
            place = _counting(surgeon, node, index, whole)
            numbers = surgeon.value(node.inputs[index])
            cut = surgeon.changed(node.inputs[index])  # as any constant: they stay what they are
            if numbers is not None and place is not None and place % size == axis and not cut:
                left = np.arange(surgeon.size(node.outputs[0], axis))
                shape = [left.size if n == whole else 1 for n in numbers.shape]
                surgeon.set_input(node, index, left.reshape(shape), like=numbers.dtype)


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
    size = flow.rank(node.inputs[0])
    scale = flow.rank(node.inputs[1])
    if size is None or scale is None or scale > 1 or integer(node, "block_size", 0):
        flow.freeze_inputs(node, "UNSUPPORTED_FORM", "blocked quantisation")
        return
    axis = integer(node, "axis", 1) % max(size, 1)
    operands: list[tuple[int, list[int]]] = [(0, list(range(size)))]
    for index in (1, 2):
        if operand(node, index) is not None and flow.rank(node.inputs[index]) == 1:
            operands.append((index, [axis]))
    flow.set(node.outputs[0], flow.meet(node, operands, list(range(size))))


_unary = functools.partial(register, family="unary", couple=couple_unary, reads=(0,))
_unary(UNARY, void=void.of_empty)
_unary("Dropout", void=void.of_empty, additive=True)  # where nothing is trained, its input
_unary(ZERO_AT_ZERO, void=void.of_first)
_unary("Identity", void=void.of_first, moves=True)
_unary("Relu", void=void.of_first, flat=flat_relu)
_unary("HardSwish", void=void.of_first, flat=flat_hard_swish)
_unary("HardSigmoid", void=void.of_empty, flat=flat_hard_sigmoid)
_unary("Clip", void=void.of_empty, flat=flat_clip)
_unary("Cast", void=void.of_first, couple=couple_cast, rewrite=rewrite_cast)
_unary("CastLike", void=void.of_first, reads=None)  # the second input says only a type
_broadcast = functools.partial(register, family="broadcast", couple=couple_broadcast)
_broadcast(BROADCASTING, void=void.of_empty)
_broadcast("Mean Sum", void=void.of_empty, additive=True)
_broadcast("Mul And", void=void.of_any)
_broadcast("Div", void=void.of_first)
_broadcast("Add", void=void.added, additive=True)
_broadcast("Sub", void=void.subtracted, additive=True)
_broadcast("Where", void=void.chosen)
_broadcast("Equal", couple=couple_equal, rewrite=rewrite_equal, void=void.of_empty)
for _domain in ("", CONTRIB):
    register("QuantizeLinear", "broadcast", couple_quantize, flat=flat_quantize, domain=_domain)
    register("DequantizeLinear", "broadcast", couple_quantize, domain=_domain)
