"""Splits matrix products in two: y = W·x becomes y = U·(V·x), with few channels between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.moments import tensor_of
from secateur.graphops.model.constants import add_initializer
from secateur.graphops.model.unread import drop_unread, unread
from secateur.graphops.rules.linear import Convolution, LinearMap

# What a 1×1 convolution does to the grid; the first of the two does it.
_GRID = ("auto_pad", "dilations", "pads", "strides")


@dataclass(frozen=True, slots=True)
class Factors:
    """What takes the place of one weight.

    Attributes:
        view: the node, in the model that was analysed.
        inner: V, (rank, in).
        outer: U, (out, rank).
    """

    view: LinearMap
    inner: npt.NDArray[np.float64]
    outer: npt.NDArray[np.float64]


def split(model: ir.Model, factors: Mapping[str, Factors]) -> ir.Model:
    """A new model with some products split; the one given is not touched.

    The second product keeps the node's name, output and bias.

    Args:
        model: that the factors were found for.
        factors: by the name of the node's output.
    """
    result = model.clone()
    for node in list(result.graph):
        found = factors.get(str(node.outputs[0].name))
        if found is not None:
            _split(result.graph, node, found)
    drop_unread(result.graph, unread(model.graph))
    return result


def _split(graph: ir.Graph, node: ir.Node, factors: Factors) -> None:
    """Puts a node for V before `node`, which becomes the one for U."""
    view, output = factors.view, node.outputs[0]
    old = tensor_of(view)
    assert old is not None
    out, rank = factors.outer.shape
    ones = (1,) * (len(old.shape) - 2)
    outer_shape = (out, rank, *ones) if isinstance(view, Convolution) else (rank, out)
    outer = view.tensor(factors.outer[None], outer_shape)
    inner = factors.inner.T
    attributes: list[ir.Attr] = []
    if isinstance(view, Convolution):
        inner = factors.inner.reshape(rank, -1, *ones)
        attributes = list(node.attributes.values())
        for name in _GRID:
            node.attributes.pop(name, None)
    x, op_type = node.inputs[0], "Conv" if isinstance(view, Convolution) else "MatMul"
    weight = _constant(graph, f"{output.name}_inner", inner, old.dtype)
    first = ir.Node("", op_type, [x, weight], attributes, name=f"{output.name}__inner")
    between = first.outputs[0]
    between.name, between.type = f"{output.name}__between", output.type
    graph.insert_before(node, first)
    node.replace_input_with(0, between)
    node.replace_input_with(view.weight, _constant(graph, f"{output.name}_outer", outer, old.dtype))


def _constant(
    graph: ir.Graph, name: str, array: npt.NDArray[np.floating], dtype: ir.DataType
) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array.astype(dtype.numpy())), dtype=dtype, name=name)
    return add_initializer(graph, tensor)
