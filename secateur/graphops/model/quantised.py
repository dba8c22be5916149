"""What the integers of quantised weights stand for: (q − zero point) · scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.model.attributes import integer, operand
from secateur.graphops.model.graph import constant_of

# Operator → inputs that hold integers, their scale (None: it is applied later) and zero point.
_READERS: dict[str, tuple[int, int | None, int]] = {
    "DequantizeLinear": (0, 1, 2),
    "ConvInteger": (1, None, 3),
    "MatMulInteger": (1, None, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "QAttention": (1, 4, 7),
}


_REFITTED = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Scale and zero point of one constant.

    Attributes:
        axis: that they run along where they are vectors.
        scale, zero: one number, or one per position of the axis.
    """

    axis: int
    scale: npt.NDArray[Any]
    zero: npt.NDArray[Any]

    def suits(self, shape: Sequence[int]) -> bool:
        """Whether there is one number, or one per position of the axis."""
        wide = shape[self.axis] if -len(shape) <= self.axis < len(shape) else 1
        return {self.scale.size, self.zero.size} <= {1, wide}

    def real(self, integers: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """What integers stand for, in their shape."""
        scale, zero = self.along(integers.ndim)
        real: npt.NDArray[np.float32] = (integers.astype(np.float32) - zero.astype(np.float32)) * (
            scale.astype(np.float32)
        )
        return real

    def along(self, rank: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Scale and zero point in shapes that meet a tensor of that rank."""
        shape, one = [1] * rank, [1] * rank
        shape[self.axis] = -1
        scale, zero = (a.reshape(shape if a.size > 1 else one) for a in (self.scale, self.zero))
        return scale, zero


def reach(scale: npt.NDArray[Any], zero: npt.NDArray[Any]) -> tuple[float, float] | None:
    """What the least and the most of the integers stand for; None where scale and zero point are
    not one number each, or the zero point is no integer of NumPy's."""
    if scale.size != 1 or zero.size != 1 or zero.dtype.kind not in "iu":
        return None
    limits, start, step = np.iinfo(zero.dtype), float(zero.item()), float(scale.item())
    return (limits.min - start) * step, (limits.max - start) * step


def scaled_constants(graph: ir.Graph) -> dict[str, Scaled]:
    """Constants of integers that operators read as scaled numbers, by name."""
    found = {}
    for node in graph.all_nodes():
        if node.op_type not in _READERS or integer(node, "block_size", 0):
            continue
        place, *others = _READERS[node.op_type]
        tensor = constant_of(operand(node, place))
        scale, zero = (
            None if index is None else constant_of(operand(node, index)) for index in others
        )
        if tensor is None or (scale is None and others[0] is not None):
            continue
        scaled = Scaled(
            _axis(node, len(tensor.shape)),
            np.ones(1) if scale is None else scale.numpy(),
            np.zeros(1) if zero is None else zero.numpy(),
        )
        if scaled.suits(tensor.shape.numpy()):
            found[str(node.inputs[place].name)] = scaled  # type: ignore[union-attr]
    return found


def dequantiser(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes a tensor of constants for one reader; None for any other.

    Blocks of scales, and integers of other than 8 or 32 bits, are left to others.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(value.uses()) > 1:  # type: ignore[union-attr]
        return None
    integers, scale, zero = (constant_of(operand(node, index)) for index in range(3))
    if integers is None or scale is None or integer(node, "block_size", 0):
        return None
    if zero is None and operand(node, 2) is not None:
        return None
    fits = integers.dtype in _REFITTED and scaled_by(node).suits(integers.shape.numpy())
    return node if fits else None


def real_tensor(node: ir.Node) -> ir.TensorProtocol:
    """What a `dequantiser` puts out, computed when its numbers are asked for."""
    integers, scale = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    assert integers is not None and scale is not None

    def compute() -> ir.TensorProtocol:
        real = scaled_by(node).real(integers.numpy())
        return ir.Tensor(real.astype(scale.dtype.numpy()), dtype=scale.dtype)

    return ir.LazyTensor(compute, scale.dtype, ir.Shape(integers.shape.numpy()))


def scaled_by(node: ir.Node) -> Scaled:
    """Scale and zero point of a `dequantiser`."""
    integers, scale, zero = (constant_of(operand(node, index)) for index in range(3))
    assert integers is not None and scale is not None
    axis = _axis(node, len(integers.shape)) % max(len(integers.shape), 1)
    return Scaled(axis, scale.numpy(), np.zeros(1) if zero is None else zero.numpy())


def _axis(node: ir.Node, rank: int) -> int:
    """Along which vectors of scales run: of output channels, if the operator does not say."""
    if node.op_type == "DequantizeLinear":
        return integer(node, "axis", 1)
    return 0 if node.op_type == "ConvInteger" else rank - 1
