"""Operators that reduce axes, or compare positions along one.

A sum over fewer positions equals a sum with zeros there. A mean, a maximum or a softmax does not:
those are the law's named exceptions, carried all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.void import summed
from secateur.graphops.model.attributes import integer, integers_at, operand
from secateur.graphops.rules.registry import register

MEANS = "ReduceMean GlobalAveragePool"  # exporters call a mean over the last of three axes a pool
EXACT = "ReduceL1 ReduceL2 ReduceSumSquare GlobalLpPool"
INEXACT = "ReduceMax ReduceMin ReduceProd ReduceLogSum ReduceLogSumExp GlobalMaxPool"


def _couple_reduce(flow: Flow, node: ir.Node, exact: bool) -> None:
    size = flow.rank(node.inputs[0])
    if not flow.blocks(node.inputs[0]):
        return
    axes = _axes(flow, node, size)
    if size is None or axes is None:
        flow.freeze_value(node.inputs[0], node, "UNKNOWN_SHAPE", "the axes are not known")
        return
    reduced = {axis % size for axis in axes}
    letters = [*range(size)]
    if integer(node, "keepdims", 1):
        result = [("kept", axis) if axis in reduced else axis for axis in letters]
    else:
        result = [axis for axis in letters if axis not in reduced]
    flow.set(node.outputs[0], flow.meet(node, [(0, letters)], result, exact=exact))


def _axes(flow: Flow, node: ir.Node, size: int | None) -> Sequence[int] | None:
    """Those that are reduced, None where that is not known."""
    if size is None:
        return None
    if node.op_type.startswith("Global"):
        return range(2, size)
    axes = integers_at(flow, node, 1, "axes")
    if axes is not None or operand(node, 1) is not None:
        return axes
    return [] if integer(node, "noop_with_empty_axes", 0) else range(size)


def couple_exact(flow: Flow, node: ir.Node) -> None:
    """Reduced axes go; zeros change nothing."""
    _couple_reduce(flow, node, exact=True)


def couple_inexact(flow: Flow, node: ir.Node) -> None:
    """Reduced axes go; a named exception of the law where they were labelled."""
    _couple_reduce(flow, node, exact=False)


def couple_softmax(flow: Flow, node: ir.Node) -> None:
    """Labels pass; along `axis` (before opset 13: from it on) positions are compared.

    Of a joint block (a kernel for each head) whole rows go, and none that stays changes.
    """
    value, size, old = node.inputs[0], flow.rank(node.inputs[0]), flow.opset(node) < 13
    if value is None or size is None:
        return flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
    axis = integer(node, "axis", 1 if old else -1) % max(size, 1)
    for other in range(axis, size if old else axis + 1):
        if any(other in block.axes and len(block.axes) > 1 for block in flow.blocks(value)):
            flow.freeze_axis(value, other, node, "ORDERED", "is compared")
        if flow.axis(value, other) is not None:
            flow.contract(node, 0, other, exact=False, chosen=0)
    return flow.set(node.outputs[0], flow.blocks(value))


def couple_index(flow: Flow, node: ir.Node) -> None:
    """ArgMax and the like choose positions: of fewer, and name them by new numbers.

    TopK needs as many as it chooses. Whoever reads the numbers decides whether the axis may be cut.
    """
    value, size = node.inputs[0], flow.rank(node.inputs[0])
    if value is None or size is None:
        return flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
    default = -1 if node.op_type == "TopK" else 0
    axis = integer(node, "axis", default) % size
    chosen = integers_at(flow, node, 1, "k") if node.op_type == "TopK" else [1]
    if chosen is None:
        flow.freeze_axis(value, axis, node, "INDEXED", "so many of them are the answer as data say")
    along = flow.axis(value, axis)
    if along is not None and chosen is not None:
        smallest = node.op_type == "ArgMin" or not integer(node, "largest", 1)
        flow.contract(node, 0, axis, exact=False, chosen=-chosen[0] if smallest else chosen[0])
        flow.keep(along, chosen[0])
        flow.point(node.outputs[-1], along, node)
    blocks = tuple(block for block in flow.blocks(value) if axis not in block.axes)
    if not integer(node, "keepdims", 1):
        blocks = tuple(type(b)(tuple(a - (a > axis) for a in b.axes), b.labels) for b in blocks)
    for output in node.outputs:
        flow.set(output, blocks)
    return None


def couple_cumsum(flow: Flow, node: ir.Node) -> None:
    """A running sum carries the other axes; its own must stay whole."""
    value, axis, size = node.inputs[0], flow.value(node.inputs[1]), flow.rank(node.inputs[0])
    if value is None or axis is None or size is None:
        return flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the axis is not known")
    flow.freeze_axis(value, int(axis.reshape(-1)[0]) % size, node, "ORDERED", "is summed in order")
    return flow.set(node.outputs[0], flow.blocks(value))


register("ReduceSum", "reduction", couple_exact, void=summed, reads=(0,), additive=True)
register(MEANS, "reduction", couple_inexact, reads=(0,), additive=True)
register(EXACT, "reduction", couple_exact, void=summed, reads=(0,))
register(INEXACT, "reduction", couple_inexact, reads=(0,))
register("Softmax LogSoftmax Hardmax", "reduction", couple_softmax, reads=(0,))
register("ArgMax ArgMin TopK", "reduction", couple_index, reads=(0,))
register("CumSum", "reduction", couple_cumsum, reads=(0,))
