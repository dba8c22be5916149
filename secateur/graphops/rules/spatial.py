"""Operators that work on space: channels pass, positions in space stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import BARE, Labels, single
from secateur.graphops.model.attributes import integer, integers, integers_at, operand, text
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon


def couple_pool(flow: Flow, node: ir.Node) -> None:
    """Axis 1 passes; axes in space, and the batch, must stay whole, unless they hold channels."""
    value, size = node.inputs[0], flow.rank(node.inputs[0])
    if value is None or not flow.blocks(value):
        return None
    if size is None:
        return flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
    windows: dict[int, Labels] = {}
    for axis in (0, *range(2, size)):
        centres = _centres(flow, node, axis) if axis else None
        if centres is None:
            flow.freeze_axis(value, axis, node, "SPATIAL", "is pooled")
        else:
            windows[axis] = centres
    result = tuple(block for block in flow.blocks(value) if not windows.keys() & set(block.axes))
    for axis, centres in windows.items():
        result += single(axis, centres)
    flow.set(node.outputs[0], result)
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        # The second output names positions in the flattened tensor, channels included.
        flow.freeze_value(value, node, "INDEXED", "its positions are the answer")
        flow.set(node.outputs[0], BARE)
    return None


def _centres(flow: Flow, node: ir.Node, axis: int) -> Labels | None:
    """Labels of the windows that slide over an axis in space which holds channels; None where
    they may not be cut.

    Windows end to end go whole, as a maxout's. Overlapping ones, one for each channel, are the
    neighbours of a local normalisation: after a cut those that stay are neighbours, a named
    exception of the law as in LRN. The padding that makes it one for each stays.
    """
    value = node.inputs[0]
    before, after = flow.shape(value), flow.shape(node.outputs[0])
    kernel, strides = integers(node, "kernel_shape"), integers(node, "strides")
    along = next((b.labels for b in flow.blocks(value) if b.axes == (axis,)), None)
    if along is None or kernel is None or after is None or before is None:
        return None
    place, ones = axis - 2, [1] * len(kernel)
    width, stride, count = kernel[place], (strides or ones)[place], after[axis]
    plain = not any(integers(node, "pads") or ()) and (integers(node, "dilations") or ones) == ones
    if count is not None and plain and stride == width and stride * count == along.size:
        rows = along.reshape(count, width)
        flow.join_rows(node, rows)
        return rows[:, 0].copy()
    if stride != 1 or count is None:
        return None
    front = back = 0
    if count < along.size:
        front, back = flow.padding(along)
    if along.size - front - back != count:
        return None
    for end in (along[:front], along[along.size - back :]):
        flow.freeze(end, node, "SPATIAL", "fills the first and the last window")
    flow.contract(node, 0, axis, exact=False)
    return along[front : front + count]


def couple_resize(flow: Flow, node: ir.Node) -> None:
    """Axes that keep their size pass; resized ones must stay whole."""
    value = node.inputs[0]
    before, after = flow.shape(value), flow.shape(node.outputs[0])
    if value is None or not flow.blocks(value):
        return None
    if before is None or after is None:
        return flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new or not flow.shapes.is_fixed(str(value.name), axis):
            flow.freeze_axis(value, axis, node, "SPATIAL", "is resized")
    return flow.set(node.outputs[0], flow.blocks(value))


def rewrite_resize(surgeon: Surgeon, node: ir.Node) -> None:
    """Sizes, where given, name the channels too."""
    if operand(node, 3) is None or integers_at(surgeon, node, 3, "") is None:
        return
    surgeon.resize_shape_input(node, 3, copies=False, axes=integers(node, "axes"))


def rewrite_center_crop_pad(surgeon: Surgeon, node: ir.Node) -> None:
    """The shape input names sizes, of `axes` only where that is given."""
    axes = integers(node, "axes")
    places = None
    if axes is not None:
        size = len(surgeon.shape(node.outputs[0]))
        places = [axis % size for axis in axes] if size else None
    surgeon.resize_shape_input(node, 1, copies=False, axes=places)


def couple_depth_to_space(flow: Flow, node: ir.Node) -> None:
    """b² input channels make one output channel: they go together."""
    value, square = node.inputs[0], integer(node, "blocksize", 1) ** 2
    along = flow.axis(value, 1) if value is not None else None
    if along is None:
        return
    # DCR reads the channel axis as (b, b, C), CRD as (C, b, b).
    columns = text(node, "mode", "DCR") == "DCR"
    rows = along.reshape(square, -1).T if columns else along.reshape(-1, square)
    flow.join_rows(node, rows)
    flow.set(node.outputs[0], single(1, rows[:, 0].copy()))


def couple_space_to_depth(flow: Flow, node: ir.Node) -> None:
    """One input channel makes b² output channels, the channel axis read as (b, b, C)."""
    value, square = node.inputs[0], integer(node, "blocksize", 1) ** 2
    along = flow.axis(value, 1) if value is not None else None
    if along is not None:
        flow.set(node.outputs[0], single(1, np.tile(along, square)))


def couple_grid_sample(flow: Flow, node: ir.Node) -> None:
    """Channels of the image pass; the grid must stay whole."""
    flow.freeze_value(node.inputs[1], node, "SPATIAL", "is a grid of positions")
    couple_pool(flow, node)


def couple_roi(flow: Flow, node: ir.Node) -> None:
    """Channels of the image pass; the regions must stay whole."""
    for value in node.inputs[1:]:
        flow.freeze_value(value, node, "SPATIAL", "names regions")
    couple_pool(flow, node)


register("LpPool MaxPool", "spatial", couple_pool, reads=(0,))
register("AveragePool", "spatial", couple_pool, reads=(0,), additive=True)
register("Resize Upsample", "spatial", couple_resize, rewrite=rewrite_resize, reads=(0,))
register("DepthToSpace", "spatial", couple_depth_to_space)
register("SpaceToDepth", "spatial", couple_space_to_depth)
register("GridSample", "spatial", couple_grid_sample)
register("RoiAlign MaxRoiPool", "spatial", couple_roi)
register("CenterCropPad", "spatial", couple_resize, rewrite=rewrite_center_crop_pad, reads=(0,))
