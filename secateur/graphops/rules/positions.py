"""Operators to which positions along one or two axes mean something, and that carry the others."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling import void
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import Block, single
from secateur.graphops.model.attributes import integer, operand
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon


def _carry_others(flow: Flow, node: ir.Node, whole: Collection[int], detail: str) -> None:
    """Freezes the axes in `whole` of the first input; labels of the others pass as they are."""
    value, size = node.inputs[0], flow.rank(node.inputs[0])
    if value is None or not flow.blocks(value):
        return
    if not size:
        flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    places = {axis % size for axis in whole}
    for axis in places:
        flow.freeze_axis(value, axis, node, "ORDERED", detail)
    passing = tuple(b for b in flow.blocks(value) if not places & set(b.axes))
    flow.set(node.outputs[0], passing)


def couple_reverse_sequence(flow: Flow, node: ir.Node) -> None:
    """Time is reversed, per batch entry up to its own length."""
    axes = (integer(node, "batch_axis", 1), integer(node, "time_axis", 0))
    _carry_others(flow, node, axes, "is reversed up to each entry's length")


def couple_trilu(flow: Flow, node: ir.Node) -> None:
    """Which entries of the last two axes are zeroed depends on where they lie."""
    _carry_others(flow, node, (-2, -1), "is cut to a triangle")


def couple_cumulative(flow: Flow, node: ir.Node) -> None:
    """A running product carries the other axes."""
    axis = flow.value(node.inputs[1])
    if axis is None:
        flow.freeze_value(node.inputs[0], node, "UNKNOWN_SHAPE", "the axis is not known")
        return
    _carry_others(flow, node, [int(axis.reshape(-1)[0])], "is multiplied in order")


def couple_dft(flow: Flow, node: ir.Node) -> None:
    """Frequencies mix all positions of one axis; the last axis holds real and imaginary part.

    The axis is an attribute before opset 20 and input 2 since.
    """
    axis = integer(node, "axis", 1)
    if flow.opset(node) >= 20:
        axis = -2
        if operand(node, 2) is not None:
            known = flow.value(node.inputs[2])
            if known is None:
                flow.freeze_value(node.inputs[0], node, "UNKNOWN_SHAPE", "the axis is not known")
                return
            axis = int(known.reshape(-1)[0])
    _carry_others(flow, node, (axis, -1), "is transformed to frequencies")


def couple_compress(flow: Flow, node: ir.Node) -> None:
    """A mask chooses positions of `axis`; without it, of the flattened tensor."""
    if "axis" not in node.attributes:
        flow.freeze_value(node.inputs[0], node, "INDEXED", "is flattened and chosen from")
        return
    _carry_others(flow, node, [integer(node, "axis", 0)], "is chosen from by a mask")


def couple_one_hot(flow: Flow, node: ir.Node) -> None:
    """Each index becomes a row along a new axis; the axes of the indices stay what they are.

    The new axis runs with the one that the indices were chosen from.
    """
    size = flow.rank(node.outputs[0])
    if not size:
        flow.freeze_value(node.inputs[0], node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    new = integer(node, "axis", -1) % size
    blocks = flow.blocks(node.inputs[0])
    moved = tuple(Block(tuple(a + (a >= new) for a in b.axes), b.labels) for b in blocks)
    chosen, depth = flow.pointed(node.inputs[0]), flow.value(node.inputs[1])
    if chosen is not None and depth is not None and chosen.size == int(depth.reshape(-1)[0]):
        flow.follow(node, 0)
        flow.experts.append(chosen)
        moved += single(new, chosen)
    flow.set(node.outputs[0], moved)


def rewrite_one_hot(surgeon: Surgeon, node: ir.Node) -> None:
    """The depth is the number of positions that stay."""
    size = len(surgeon.shape(node.outputs[0]))
    if not size:
        return  # of an unknown shape: nothing was cut
    new = integer(node, "axis", -1) % size
    depth = surgeon.value(node.inputs[1])
    if depth is not None and surgeon.kept(node.outputs[0], new) is not None:
        left = surgeon.size(node.outputs[0], new)
        surgeon.set_input(node, 1, np.full_like(depth, left), like=depth.dtype)


def couple_elements(flow: Flow, node: ir.Node) -> None:
    """GatherElements and ScatterElements: data, indices (and updates) run together on all axes
    but the indexed one, as far as they are equally long there. The indexed one runs with what the
    indices were chosen from."""
    shapes = [flow.shape(value) for value in node.inputs]
    sizes = shapes[0]
    if not sizes or any(shape is None or len(shape) != len(sizes) for shape in shapes):
        flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    axis = integer(node, "axis", 0) % len(sizes)
    letters: list[Hashable | None] = [
        None if place == axis or any(s is None or s[place] != size for s in shapes) else place
        for place, size in enumerate(sizes)
    ]
    operands = [(index, letters) for index in range(len(node.inputs))]
    result = [-1 - place if letter is None else letter for place, letter in enumerate(letters)]
    if flow.pointed(node.inputs[1]) is not None and integer(node, "axis", 0) >= -len(sizes):
        flow.choose_from(node, 1, axis)
        operands[0] = (0, [axis if place == axis else x for place, x in enumerate(letters)])
        if len(shapes) > 2:  # what is scattered to keeps its positions
            result[axis] = axis
    flow.set(node.outputs[0], flow.meet(node, operands, result))


def couple_tensor_scatter(flow: Flow, node: ir.Node) -> None:
    """Cache and update run together but for the batch, which has indices, and the sequence."""
    size = flow.rank(node.inputs[0])
    if not size:
        flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    whole = (0, integer(node, "axis", -2) % size)
    letters = [None if axis in whole else axis for axis in range(size)]
    result = [-1 - axis if axis in whole else axis for axis in range(size)]
    flow.set(node.outputs[0], flow.meet(node, [(0, letters), (1, letters)], result))


def couple_nonzero(flow: Flow, node: ir.Node) -> None:
    """Its answers are positions by their numbers."""
    flow.freeze_value(node.inputs[0], node, "INDEXED", "its positions are the answer")


def couple_columns(flow: Flow, node: ir.Node) -> None:
    """Col2Im reads axis 1 as (channels, block): a channel goes with its whole block."""
    value, block = node.inputs[0], flow.value(node.inputs[2])
    if value is None or not flow.blocks(value):
        return
    if block is None:
        flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the block is not known")
        return
    for axis in (0, 2):
        flow.freeze_axis(value, axis, node, "SPATIAL", "is put together to images")
    along = flow.axis(value, 1)
    if along is None:
        return
    rows = along.reshape(-1, int(np.prod(block)))
    flow.join_rows(node, rows)
    flow.set(node.outputs[0], (Block((1,), rows[:, 0].copy()),))


register("ReverseSequence", "positions", couple_reverse_sequence, reads=(0,))
register("Trilu", "positions", couple_trilu, reads=(0,))
register("CumProd", "positions", couple_cumulative, reads=(0,))
register("DFT", "positions", couple_dft, reads=(0,))
register("Compress", "positions", couple_compress, reads=(0,))
register("OneHot", "positions", couple_one_hot, rewrite=rewrite_one_hot, reads=(0,))
register("GatherElements", "positions", couple_elements, void=void.taken)
register("Scatter ScatterElements", "positions", couple_elements, void=void.written)
register("NonZero", "positions", couple_nonzero, void=void.found)
register("TensorScatter", "positions", couple_tensor_scatter, reads=(0, 1))
register("Col2Im", "positions", couple_columns, reads=(0,))
