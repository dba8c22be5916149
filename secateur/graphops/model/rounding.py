"""A quantised model without the rounding of what it computes.

The law is seen exactly in it: sums over fewer terms may end in another last bit, and where that
makes the one of two neighbouring steps the other, the layers after can make anything of it. And it
has derivatives: those of what is not rounded, wherever that stays within the integers' range
(Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons, 2013).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from secateur.graphops.model.graph import opset_of
from secateur.graphops.model.quantised import reach

Array = npt.NDArray[Any]

_CLIPS = 12  # the opset from which Clip has bounds of any type of floats
_IN_FLOATS = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}


def leave_rounding_out(model: onnx.ModelProto) -> bool:
    """Lets numbers pass by the pairs of QuantizeLinear and DequantizeLinear, and multiplies in
    floats what DynamicQuantizeLinear would round; in place.

    Returns:
        whether there was any of it.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    quantised = {n.output[0]: n for n in model.graph.node if n.op_type == "QuantizeLinear"}
    pairs = [
        (node, quantised[node.input[0]])
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised
    ]
    clips = opset_of(model) >= _CLIPS
    for node, source in pairs:
        bounds = _bounds(source, tensors) if clips else []
        names = [f"{node.output[0]}_bound_{place}" for place in range(len(bounds))]
        for name, bound in zip(names, bounds, strict=True):
            model.graph.initializer.append(onnx.numpy_helper.from_array(bound, name))
        passes = onnx.helper.make_node(
            "Clip" if names else "Identity", [source.input[0], *names], node.output
        )
        node.CopyFrom(passes)
    return _multiply_in_floats(model) or bool(pairs)


def _bounds(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> list[Array]:
    """The least and the most that a QuantizeLinear lets through: exporters leave a Relu to it.
    Nothing, where they are not one number each, and constant."""
    names = list(node.input[1:3])
    if len(names) < 2 or not all(name in tensors for name in names):
        return []
    scale, zero = (onnx.numpy_helper.to_array(tensors[name]) for name in names)
    return [np.asarray(bound, scale.dtype) for bound in reach(scale, zero) or ()]


def _multiply_in_floats(model: onnx.ModelProto) -> bool:
    """Whether all that DynamicQuantizeLinear makes goes into products, with constants or another
    of its kind; in floats then."""
    nodes = list(model.graph.node)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dynamic = {n.output[2] for n in nodes if n.op_type == "DynamicQuantizeLinear"}
    products = [n for n in nodes if dynamic & set(n.input) and n.op_type != "Where"]
    if not products:
        return False
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
    return True


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
