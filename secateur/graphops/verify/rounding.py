"""A quantised model without the rounding of what it computes, for the law to be seen exactly.

Sums over fewer terms may end in another last bit. Where that makes the one of two neighbouring
steps the other, the layers after can make anything of it.
"""

from __future__ import annotations

import numpy as np
import onnx

_IN_FLOATS = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}


def leave_rounding_out(model: onnx.ModelProto) -> bool:
    """Lets numbers pass by the pairs of QuantizeLinear and DequantizeLinear, and multiplies in
    floats what DynamicQuantizeLinear would round; in place.

    Returns:
        whether there was any of it.
    """
    quantised = {n.output[0]: n for n in model.graph.node if n.op_type == "QuantizeLinear"}
    pairs = [
        (node, quantised[node.input[0]])
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised
    ]
    for node, source in pairs:
        node.CopyFrom(onnx.helper.make_node("Identity", source.input[:1], node.output))
    return _multiply_in_floats(model) or bool(pairs)


def _multiply_in_floats(model: onnx.ModelProto) -> bool:
    """Whether all that DynamicQuantizeLinear makes goes into products, with constants or another
    of its kind; in floats then."""
    nodes = list(model.graph.node)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dynamic = {n.output[2] for n in nodes if n.op_type == "DynamicQuantizeLinear"}
    products = [n for n in nodes if dynamic & set(n.input) and n.op_type != "Where"]
    for node in products:
        known = [_zero_point(node, i) in dynamic or node.input[i] in tensors for i in (0, 1)]
        if node.op_type not in _IN_FLOATS or not all(known):
            return False
    for node in products:
        for place in (0, 1):
            if _zero_point(node, place) not in dynamic:
                constant = _floats(node, place, tensors)
                model.graph.initializer.append(constant)
                node.input[place] = constant.name
        node.op_type = _IN_FLOATS[node.op_type]
        del node.input[2:]
    del model.graph.node[:], model.graph.value_info[:]
    for node in nodes:
        steps = _in_steps(node) if node.op_type == "DynamicQuantizeLinear" else [node]
        model.graph.node.extend(steps)
    return bool(products)


def _zero_point(product: onnx.NodeProto, place: int) -> str:
    """That of an operand; empty where it has none."""
    return product.input[place + 2] if len(product.input) > place + 2 else ""


def _floats(
    product: onnx.NodeProto, place: int, tensors: dict[str, onnx.TensorProto]
) -> onnx.TensorProto:
    """A constant operand without its zero point."""
    array = onnx.numpy_helper.to_array(tensors[product.input[place]]).astype(np.float32)
    if name := _zero_point(product, place):
        zero = onnx.numpy_helper.to_array(tensors[name]).astype(np.float32)
        if product.op_type == "ConvInteger":
            zero = zero.reshape(-1, *[1] * (array.ndim - 1))
        array -= zero
    return onnx.numpy_helper.from_array(array, f"{product.output[0]}_floats_{place}")


def _in_steps(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x in the steps that a DynamicQuantizeLinear finds, not rounded; 0 stands for zero."""
    make, (y, scale, zero) = onnx.helper.make_node, node.output
    nothing = onnx.numpy_helper.from_array(np.zeros((), np.float32))
    return [
        make(node.op_type, node.input, [f"{y}_rounded", scale, f"{zero}_rounded"]),
        make("Div", [node.input[0], scale], [y]),
        make("Constant", [], [zero], value=nothing),
    ]
