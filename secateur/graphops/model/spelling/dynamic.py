"""What quantisers write that have no data: scales of activations are found as the model runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.model.attributes import operand
from secateur.graphops.model.constants import set_constant
from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.spelling.writing import (
    DEQUANTIZE,
    Back,
    Writer,
    become,
    reader_of,
    scale_axis,
    stored_in,
    take_over,
    type_by,
)

_PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
_STORED_IN = (ir.DataType.INT8, ir.DataType.UINT8)


def spell_product(writer: Writer, node: ir.Node) -> Back | None:
    """Spells Mul(Cast(product of x and w), Mul(scale of x, scale of w))."""
    chain = _scaling(node)
    if chain is None:
        return None
    cast, scaling, scales = chain
    (x, w), (first, second) = node.inputs[:2], scales.inputs
    maker = None if x is None else x.producer()
    if constant_of(first) is not None or (maker and second and second.producer() is maker):
        first, second = second, first
    operands = [x, first, operand(node, 2)], [w, second, operand(node, 3)]
    given = node.op_type
    axis = scale_axis(operands[1], -1 if given == "MatMulInteger" else None)
    if scale_axis(operands[0], None) is None or axis is None:
        return None
    names = tuple(str(one.outputs[0].name) for one in (node, cast, scales))
    inputs = [writer.dequantise(node, operands[0]), writer.dequantise(node, operands[1], axis)]
    become(node, "", _PRODUCTS[given], inputs)
    take_over(node.outputs[0], scaling)
    return functools.partial(_product_back, given=given, names=names)


def _scaling(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """The Cast of a product of integers, the Mul by its scale, and the Mul that makes that one."""
    cast = reader_of(node.outputs[0], "Cast")
    scaling = None if cast is None else reader_of(cast.outputs[0], "Mul")
    if cast is None or scaling is None:
        return None
    scale = next((one for one in scaling.inputs if one is not cast.outputs[0]), None)
    scales = None if scale is None else scale.producer()
    return (cast, scaling, scales) if scales is not None and scales.op_type == "Mul" else None


def _product_back(node: ir.Node, given: str, names: Sequence[str]) -> bool:
    x, w = (stored_in(value) for value in node.inputs[:2])
    if node.op_type != _PRODUCTS[given] or x is None or w is None:
        return False
    y, graph = node.outputs[0], node.graph
    assert graph is not None
    name, kind = str(y.name), type_by(w[1]) or y.type
    to = ir.AttrInt64("to", ir.DataType.FLOAT if kind is None else kind.dtype)
    scales = ir.Node("", "Mul", [x[1], w[1]], name=f"{name}_scales")
    cast = ir.Node("", "Cast", [None], [to], name=f"{name}_cast")
    scaling = ir.Node("", "Mul", [cast.outputs[0], scales.outputs[0]], name=f"{name}_scaling")
    y.replace_all_uses_with(scaling.outputs[0], replace_graph_outputs=True)
    cast.replace_input_with(0, y)
    y.name, y.type = names[0], ir.TensorType(ir.DataType.INT32)
    for made, called in ((cast, names[1]), (scales, names[2]), (scaling, name)):
        made.outputs[0].name, made.outputs[0].type = called, kind
    cast.outputs[0].shape = scaling.outputs[0].shape = y.shape
    graph.insert_after(node, [scales, cast, scaling])
    become(node, "", given, [x[0], w[0], x[2], w[2]])
    return True


def spell_weight(writer: Writer, node: ir.Node) -> Back | None:
    """Spells Mul(Cast(w), scale), w and scale constants: one scale, or one along axis 0."""
    for value, scale in zip(node.inputs, reversed(node.inputs), strict=True):
        cast = None if value is None else value.producer()
        stored = None if cast is None or cast.op_type != "Cast" else constant_of(cast.inputs[0])
        steps = constant_of(scale)
        if cast is None or stored is None or scale is None or steps is None:
            continue
        shape = tuple(steps.shape.numpy())
        fits = steps.size == 1 or (len(shape) == len(stored.shape) and steps.size == shape[0])
        alone = scale.is_initializer() and len(scale.uses()) == 1 and not scale.is_graph_output()
        if stored.dtype not in _STORED_IN or not fits or not alone:
            continue
        _reshape(scale, () if steps.size == 1 else (-1,))
        become(node, writer.domain, DEQUANTIZE, [cast.inputs[0], scale])
        node.attributes["axis"] = ir.AttrInt64("axis", 0)
        return functools.partial(_weight_back, name=str(cast.outputs[0].name), shape=shape)
    return None


def _weight_back(node: ir.Node, name: str, shape: Sequence[int]) -> bool:
    if node.op_type != DEQUANTIZE:
        return False
    stored, scale = node.inputs
    steps = constant_of(scale)
    assert scale is not None
    assert steps is not None
    assert node.graph is not None
    cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", steps.dtype)], name=f"{name}_cast")
    cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(steps.dtype)
    node.graph.insert_before(node, cast)
    _reshape(scale, (-1, *shape[1:]) if shape else ())
    del node.attributes["axis"]
    become(node, "", "Mul", [cast.outputs[0], scale])
    return True


def _reshape(value: ir.Value, shape: Sequence[int]) -> None:
    """Gives an initializer another shape."""
    tensor = constant_of(value)
    assert tensor is not None
    array = np.reshape(tensor.numpy(), shape)
    set_constant(value, ir.Tensor(array, tensor.dtype, name=value.name))
    value.shape = ir.Shape(array.shape)
