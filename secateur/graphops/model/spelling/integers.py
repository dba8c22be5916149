"""Operators that have the scales of what they read and give beside it: QLinearConv and its like."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from secateur.graphops.model.attributes import integer, operand, real
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.spelling.writing import (
    AXIS_SINCE,
    QUANTIZE,
    Back,
    Writer,
    become,
    extras_of,
    reader_of,
    scale_axis,
    stored_in,
    take_over,
)


@dataclass(frozen=True, slots=True)
class Form:
    """Where an operator on integers has what the one on floats reads and gives.

    Attributes:
        operator: on floats.
        count: of operands, None for any number.
        result: index of the scale of what it gives; its zero point follows.
        start: index of the first operand. Each is three inputs: integers, scale, zero point.
        passed: how many inputs come first that are as they are.
        bias: index of integers at the product of the operands' scales, None where it has none.
        axis: of the second operand that may have a scale for each position.
    """

    operator: str
    count: int | None
    result: int
    start: int = 0
    passed: int = 0
    bias: int | None = None
    axis: int | None = None


FORMS: dict[tuple[str, str], Form] = {
    ("", "QLinearConv"): Form("Conv", 2, 6, bias=8, axis=0),
    ("", "QLinearMatMul"): Form("MatMul", 2, 6, axis=-1),
    (CONTRIB, "QLinearConv"): Form("Conv", 2, 6, bias=8, axis=0),
    (CONTRIB, "QGemm"): Form("Gemm", 2, 7, bias=6, axis=1),
    (CONTRIB, "QLinearAdd"): Form("Add", 2, 6),
    (CONTRIB, "QLinearMul"): Form("Mul", 2, 6),
    (CONTRIB, "QLinearSigmoid"): Form("Sigmoid", 1, 3),
    (CONTRIB, "QLinearLeakyRelu"): Form("LeakyRelu", 1, 3),
    (CONTRIB, "QLinearAveragePool"): Form("AveragePool", 1, 3),
    (CONTRIB, "QLinearGlobalAveragePool"): Form("GlobalAveragePool", 1, 3),
    (CONTRIB, "QLinearSoftmax"): Form("Softmax", 1, 3),
    (CONTRIB, "QLinearConcat"): Form("Concat", None, 0, start=2),
    (CONTRIB, "QLinearWhere"): Form("Where", 2, 7, start=1, passed=1),
}
_MAY_GIVE_FLOATS = "QGemm"


def spell(writer: Writer, node: ir.Node) -> Back | None:
    """Spells an operator of `FORMS`. It is left where its scales are not as they are mostly given,
    or an attribute says what the one on floats cannot."""
    given, form = (node.domain, node.op_type), FORMS[node.domain, node.op_type]
    end = len(node.inputs) if form.count is None else form.start + 3 * form.count
    places = range(form.start, end, 3)
    operands = [[operand(node, place + i) for i in range(3)] for place in places]
    along = 0 if integer(node, "transB", 0) else form.axis
    axes = [scale_axis(one, along if place == 1 else None) for place, one in enumerate(operands)]
    scale, zero = (operand(node, form.result + i) for i in range(2))
    rounded = scale is not None or node.op_type != _MAY_GIVE_FLOATS
    extras = _extras(node, form, writer.opset)
    if extras is None or None in axes or (rounded and (scale is None or zero is None)):
        return None
    bias = None if form.bias is None else operand(node, form.bias)
    if bias is not None:
        bias_scale = _bias_scale(writer, node, [one[1] for one in operands])
        if bias_scale is None:
            return None
        operands.append([bias, bias_scale])
        axes.append(0)
    inputs = [
        writer.dequantise(node, one, axis or 0) for one, axis in zip(operands, axes, strict=True)
    ]
    for extra in extras:
        del node.attributes[extra.name]
    become(node, "", form.operator, [*node.inputs[: form.passed], *inputs])
    if rounded:
        writer.quantise(node, scale, zero)
    return functools.partial(_spell_back, given=given, extras=extras, rounded=rounded)


def _extras(node: ir.Node, form: Form, opset: int) -> tuple[ir.Attr, ...] | None:
    """Attributes that the operator on floats does not have; None where it says something else."""
    extras = extras_of(node, form.operator)
    for one in extras:
        first = one.name == "channels_last" and not one.as_int()
        same = one.name == "opset" and (one.as_int() < AXIS_SINCE) == (opset < AXIS_SINCE)
        if not (first or same):
            return None
    return extras


def _bias_scale(
    writer: Writer, node: ir.Node, scales: Sequence[ir.Value | None]
) -> ir.Value | None:
    """The product of the operands' scales, cut with the one that is a vector; None where one is
    not known."""
    product = np.asarray(real(node, "alpha", 1.0), np.float32)
    vector = None
    for scale in scales:
        tensor = constant_of(scale)
        if scale is None or tensor is None:
            return None
        product = product * tensor.numpy()
        vector = scale if tensor.size > 1 else vector
    name = writer.name(f"{node.outputs[0].name}_bias_scale")
    if vector is not None:
        writer.tied[name] = str(vector.name)
    content = product.reshape(() if vector is None else -1)
    return writer.constant(node, ir.tensor(content, name=name))


def _spell_back(
    node: ir.Node, given: tuple[str, str], extras: Sequence[ir.Attr], rounded: bool
) -> bool:
    form = FORMS[given]
    stored = [stored_in(value) for value in node.inputs[form.passed :]]
    rounding = reader_of(node.outputs[0], QUANTIZE) if rounded else None
    if node.op_type != form.operator or (rounded and rounding is None):
        return False
    inputs = dict(enumerate(node.inputs[: form.passed]))
    for place, one in enumerate(stored):
        if one is None:
            return False
        if form.bias is not None and place == form.count:
            inputs[form.bias] = one[0]
        else:
            inputs.update(enumerate(one, form.start + 3 * place))
    if rounding is not None:
        inputs.update(enumerate(rounding.inputs[1:3], form.result))
        take_over(node.outputs[0], rounding)
    for extra in extras:
        node.attributes[extra.name] = extra
    become(node, *given, [inputs.get(index) for index in range(max(inputs) + 1)])
    return True
