"""Weights and biases that are stored in integers, rounded as they will be read.

    q = clip(round(w / s) + z)        s ← max(s, w / reach)        scales only grow

reach: how far from z the integers lie that were there before, above it and below, so that what
they were kept from (7 bits of 8, an end of the range) they are still. A bias is added to sums of
products of integers, whose scale is the input's times the weight's: it grows as the weight's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.quantised import Scaled, dequantiser, scaled_by
from secateur.graphops.repair.constants import replace_constant

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Rounded:
    """New integers for a DequantizeLinear.

    Attributes:
        node: it.
        integers: in their dtype.
        scaled: what they stand for.
        growth: of the scale, of its shape.
    """

    node: ir.Node
    integers: Array
    scaled: Scaled
    growth: Array

    def real(self) -> npt.NDArray[np.float32]:
        """What will be read."""
        return self.scaled.real(self.integers)

    def write(self, graph: ir.Graph, name: str, bias: ir.Node | None) -> None:
        """Puts integers and scales where the node reads them.

        Args:
            graph: that the node is in.
            name: of new tensors begins with it.
            bias: the DequantizeLinear of the bias that is added to the products.
        """
        old = constant_of(self.node.inputs[0])
        assert old is not None
        replace_constant(graph, self.node, 0, self.integers, old.dtype, f"{name}_quantized")
        _grow(graph, self.node, self.growth, f"{name}_scale")
        if bias is not None:
            _grow(graph, bias, self.growth, f"{name}_bias_scale")


def fits(weight: ir.Node, bias: ir.Value | None) -> bool:
    """Whether the scale of a bias can grow as the weight's does.

    Args:
        weight: the DequantizeLinear of the weight.
        bias: of the same node.
    """
    node = dequantiser(bias)
    return node is None or scaled_by(node).scale.size == scaled_by(weight).scale.size


def rounded(node: ir.Node, array: Array) -> Rounded:
    """What becomes of real numbers in the integers that a DequantizeLinear reads."""
    old, scaled = constant_of(node.inputs[0]), scaled_by(node)
    assert old is not None
    integers = old.numpy()
    scale, zero = (one.astype(np.float64) for one in scaled.along(array.ndim))
    others = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
    above, below = (max(float(d.max()), 1.0) for d in (integers - zero, zero - integers))
    most, least = (f(array, axis=others, keepdims=True) for f in (np.max, np.min))
    grown = np.maximum(scale, np.maximum(most / above, -least / below))
    grown = grown.astype(scaled.scale.dtype)
    limits = np.iinfo(integers.dtype)
    steps = np.clip(np.rint(array / grown), -below, above) + zero
    return Rounded(
        node,
        np.clip(steps, limits.min, limits.max).astype(integers.dtype),
        Scaled(scaled.axis, grown.reshape(scaled.scale.shape), scaled.zero),
        (grown / scale).reshape(scaled.scale.shape),
    )


def write_bias(graph: ir.Graph, node: ir.Node, bias: Array, name: str) -> None:
    """Puts b where a DequantizeLinear reads it, at its scale."""
    old, scaled = constant_of(node.inputs[0]), scaled_by(node)
    assert old is not None
    limits = np.iinfo(old.dtype.numpy())
    steps = np.rint(bias / scaled.scale.astype(np.float64)) + scaled.zero
    integers = np.clip(steps, limits.min, limits.max)
    replace_constant(graph, node, 0, integers, old.dtype, f"{name}_quantized")


def _grow(graph: ir.Graph, node: ir.Node, growth: Array, name: str) -> None:
    scale = constant_of(node.inputs[1])
    assert scale is not None
    if (growth != 1).any():
        grown = scale.numpy() * growth.reshape(scale.shape.numpy())
        replace_constant(graph, node, 1, grown, scale.dtype, name)
