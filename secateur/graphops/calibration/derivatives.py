"""Derivatives of a graph in reverse mode, as another graph (onnx-ad); of fixed shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ad

from secateur.graphops.calibration.data import Array, Feeds

PREFIX = "adj_"  # onnx-ad's


class NoDerivative(Exception):
    """Some operator has none, or shapes cannot be known; the message says which."""


def freeze(proto: onnx.ModelProto, feeds: Feeds) -> None:
    """Gives inputs the shapes of feeds, and every tensor the one that follows; in place.

    Raises:
        NoDerivative: shapes cannot be inferred.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    for value in inputs:
        if value.name in feeds:
            kind, shape = value.type.tensor_type.elem_type, feeds[value.name].shape
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        proto.CopyFrom(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    except Exception as error:
        raise NoDerivative(f"shapes cannot be inferred: {error}") from error
    _replace_strides(proto)


def reverse(
    proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """A model that gives `PREFIX` + name of each input, and takes the same of each output.

    Raises:
        NoDerivative: onnx-ad has no rule for an operator on the way.
    """
    try:
        derived: onnx.ModelProto = onnx_ad.reverse(
            proto, inputs=list(inputs), outputs=list(outputs), layout="onnx"
        )
    except Exception as error:
        raise NoDerivative(str(error)) from error
    return derived


def _replace_strides(proto: onnx.ModelProto) -> None:
    """Makes strided slices Gathers, in place: onnx-ad has a derivative of those only."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.value_info, *proto.graph.input)
    }
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
        bounds = [constants[name] for name in node.input[1:] if name in constants]
        if node.op_type == "Slice" and len(bounds) == 4 and (bounds[3] != 1).any():
            nodes += _gathers(proto, node, bounds, shapes[node.input[0]])
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _gathers(
    proto: onnx.ModelProto, node: onnx.NodeProto, bounds: list[Array], shape: list[int]
) -> Iterator[onnx.NodeProto]:
    """A Slice, one axis after another; its indices become initializers.

    Args:
        bounds: starts, ends, axes, steps.
        shape: of its input.
    """
    x = node.input[0]
    rows = list(zip(*(bound.tolist() for bound in bounds), strict=True))
    for place, (start, end, axis, step) in enumerate(rows):
        output = node.output[0] if place == len(rows) - 1 else f"{node.output[0]}_{place}"
        indices = np.arange(shape[axis])[start:end:step]
        constant = onnx.numpy_helper.from_array(indices, f"{output}_indices")
        proto.graph.initializer.append(constant)
        yield onnx.helper.make_node("Gather", [x, constant.name], [output], axis=axis)
        x = output
