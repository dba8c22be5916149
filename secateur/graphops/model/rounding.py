"""A quantised model without the rounding of what it computes.

The law is seen exactly in it: sums over fewer terms may end in another last bit, and where that
makes the one of two neighbouring steps the other, the layers after can make anything of it. And it
has derivatives: those of what is not rounded, wherever that stays within the integers' range
(Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons, 2013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from secateur.graphops.model.graph import opset_of
from secateur.graphops.model.quantised import reach

Array = npt.NDArray[Any]

_CLIPS = 12  # the opset from which Clip has bounds of any type of floats
# Operators that put numbers elsewhere, or leave some out, and change none.
_MOVES = {
    *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad"),
    *("Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose"),
    "Unsqueeze",
}


def leave_rounding_out(model: onnx.ModelProto) -> bool:
    """Lets numbers pass by QuantizeLinear and DequantizeLinear, and what lies between the two and
    moves integers; in place.

    Returns:
        whether there was any of it.
    """
    passing = _Passing(model)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        passing.visit(model.graph.node[-1])
    return passing.any


class _Passing:
    """One pass over a graph, whose nodes are written as they are visited.

    Attributes:
        any: whether numbers pass by anything.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.any = False
        self._nodes, self._initializers = model.graph.node, model.graph.initializer
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._clips = opset_of(model) >= _CLIPS
        # integers → what they would be if they were not rounded, their scale and zero point
        self._real: dict[str, tuple[str, str, str]] = {}

    def visit(self, node: onnx.NodeProto) -> None:
        """The node that has been written last."""
        zero = node.input[2] if len(node.input) > 2 else ""
        first = self._real.get(node.input[0]) if node.input else None
        if node.op_type == "QuantizeLinear":
            self._real[node.output[0]] = self._unrounded(node), node.input[1], zero
        elif node.op_type == "DynamicQuantizeLinear":
            y, scale, zero = node.output
            self._real[y] = node.input[0], scale, zero
        elif first is None:
            return
        elif node.op_type == "DequantizeLinear" and self._alike(first[1:], (node.input[1], zero)):
            node.CopyFrom(onnx.helper.make_node("Identity", first[:1], node.output))
            self.any = True
        elif node.op_type in _MOVES:
            self._move(node, first)

    def _unrounded(self, node: onnx.NodeProto) -> str:
        """What a QuantizeLinear would put out if it did not round, by another node."""
        bounds = _bounds(node, self._tensors) if self._clips else []
        name = f"{node.output[0]}_unrounded"
        names = [f"{name}_bound_{place}" for place in range(len(bounds))]
        self._initializers.extend(map(onnx.numpy_helper.from_array, bounds, names))
        clip = "Clip" if names else "Identity"
        self._nodes.append(onnx.helper.make_node(clip, [node.input[0], *names], [name], name))
        return name

    def _move(self, node: onnx.NodeProto, first: tuple[str, str, str]) -> None:
        """Moves the numbers by another node, as integers are moved by this one."""
        moved = onnx.NodeProto()
        moved.CopyFrom(node)
        if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
            if not self._alike(node.input[2:3], first[2:]):
                return
            moved.input[2] = ""  # the integer for zero
        several = len(node.input) if node.op_type == "Concat" else 1
        for index, name in enumerate(node.input[:several]):
            real = self._real.get(name)
            if real is None or not self._alike(real[1:], first[1:]):
                return
            moved.input[index] = real[0]
        del moved.output[:]
        for name in node.output:
            moved.output.append(f"{name}_unrounded" if name else "")
            if name:
                self._real[name] = f"{name}_unrounded", *first[1:]
        moved.name = f"{node.name}_unrounded"
        self._nodes.append(moved)

    def _alike(self, names: Sequence[str], others: Sequence[str]) -> bool:
        """Whether tensors are the same ones, or constants of the same numbers."""
        pairs = zip(names, others, strict=True)
        return all(one == other or self._equal(one, other) for one, other in pairs)

    def _equal(self, name: str, other: str) -> bool:
        one, two = self._tensors.get(name), self._tensors.get(other)
        return one is not None and two is not None and np.array_equal(_array(one), _array(two))


def _bounds(node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]) -> list[Array]:
    """The least and the most that a QuantizeLinear lets through: exporters leave a Relu to it.
    Nothing, where they are not one number each, and constant."""
    names = list(node.input[1:3])
    if len(names) < 2 or not all(name in tensors for name in names):
        return []
    scale, zero = (_array(tensors[name]) for name in names)
    return [np.asarray(bound, scale.dtype) for bound in reach(scale, zero) or ()]


def _array(tensor: onnx.TensorProto) -> Array:
    return onnx.numpy_helper.to_array(tensor)
