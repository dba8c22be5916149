"""Products that ONNX Runtime has joined to the sum and the activation behind them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.model.attributes import operand, text
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.model.spelling.writing import (
    Back,
    Writer,
    become,
    extras_of,
    reader_of,
    take_over,
)

OPERATORS = {(CONTRIB, "FusedConv"): "Conv", (CONTRIB, "FusedGemm"): "Gemm"}
_ADDED = 3  # index of what is added before the activation
_BOUNDS_SINCE = 11  # the opset from which Clip has its bounds among its inputs
# Activation → the attributes that hold its numbers.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "": (),
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "Clip": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}


def spell(writer: Writer, node: ir.Node) -> Back | None:
    """Spells activation(product + z)."""
    given, activation = (node.domain, node.op_type), text(node, "activation", "")
    extras = extras_of(node, OPERATORS[given])
    if activation not in _ACTIVATIONS or (activation == "Clip" and writer.opset < _BOUNDS_SINCE):
        return None
    numbers = _numbers(extras)
    z = operand(node, _ADDED)
    for extra in extras:
        del node.attributes[extra.name]
    become(node, "", OPERATORS[given], node.inputs[:_ADDED])
    last = node
    if z is not None:
        last = writer.follow(last, "", "Add", [None, z])
    if activation == "Clip":
        tensors = [
            ir.tensor(np.float32(number), name=writer.name(f"{node.outputs[0].name}_bound"))
            for number in numbers
        ]
        bounds = [writer.constant(node, tensor) for tensor in tensors]
        writer.follow(last, "", activation, [None, *bounds])
    elif activation:
        last = writer.follow(last, "", activation, [None])
        for name, number in zip(_ACTIVATIONS[activation], numbers, strict=False):
            last.attributes[name] = ir.AttrFloat32(name, number)
    return functools.partial(
        _spell_back, given=given, extras=extras, adds=z is not None, activation=activation
    )


def _numbers(extras: Sequence[ir.Attr]) -> list[float]:
    """Those of the activation: in one attribute, or in attributes of their own."""
    found: list[float] = []
    for one in sorted(extras, key=lambda item: item.name):
        if one.name == "activation_params":
            found += one.as_floats()
        elif one.type == ir.AttributeType.FLOAT:
            found.append(one.as_float())
    return found


def _spell_back(
    node: ir.Node,
    given: tuple[str, str],
    extras: Sequence[ir.Attr],
    adds: bool,
    activation: str,
) -> bool:
    y, inputs = node.outputs[0], list(node.inputs)
    adder = reader_of(y, "Add") if adds else None
    last = y if adder is None else adder.outputs[0]
    follower = reader_of(last, activation) if activation else None
    if node.op_type != OPERATORS[given] or adds != (adder is not None):
        return False
    if activation and follower is None:
        return False
    if adder is not None:
        inputs += [None] * (_ADDED - len(inputs))
        inputs.append(next((one for one in adder.inputs if one is not y), None))
        take_over(y, adder)
    if follower is not None:
        take_over(y, follower)
    for extra in extras:
        node.attributes[extra.name] = extra
    become(node, *given, inputs)
    return True
