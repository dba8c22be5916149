"""Operators that change which axis is which: the same NumPy operation on the labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling import labels as lab
from secateur.graphops.coupling.facts import Choice
from secateur.graphops.coupling.flow import MAX_BLOCK, MAX_FRESH, Flow
from secateur.graphops.coupling.labels import BARE, Block, Blocks
from secateur.graphops.coupling.void import of_first
from secateur.graphops.model.attributes import integer, integers, integers_at
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon


def couple_transpose(flow: Flow, node: ir.Node) -> None:
    """Axes permuted."""
    size = flow.rank(node.inputs[0])
    perm = integers(node, "perm") or list(reversed(range(size or 0)))
    flow.set(node.outputs[0], lab.transpose(flow.blocks(node.inputs[0]), perm))


def couple_squeeze(flow: Flow, node: ir.Node) -> None:
    """Axes of size 1 dropped; all of them when none is named."""
    shape = flow.shape(node.inputs[0])
    axes = integers_at(flow, node, 1, "axes")
    if shape is None:
        return _lose(flow, node)
    if axes is None:
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    return flow.set(node.outputs[0], lab.remove_axes(flow.blocks(node.inputs[0]), axes, len(shape)))


def couple_unsqueeze(flow: Flow, node: ir.Node) -> None:
    """Axes of size 1 inserted."""
    axes, size = integers_at(flow, node, 1, "axes"), flow.rank(node.outputs[0])
    if axes is None or size is None:
        return _lose(flow, node)
    return flow.set(node.outputs[0], lab.insert_axes(flow.blocks(node.inputs[0]), axes, size))


def _lose(flow: Flow, node: ir.Node) -> None:
    flow.freeze_value(node.inputs[0], node, "UNKNOWN_SHAPE", "the shape is not known")


# -- Reshape -----------------------------------------------------------------------------------


def couple_reshape(flow: Flow, node: ir.Node) -> None:
    """Axes merged and split.

    The reshape is factored into the smallest independent ones. Labels are spread over all axes
    of the factors they touch, reshaped as the tensor is, and freed of the axes along which they
    do not change: flattening (C, H, W) repeats each label H·W times, splitting C into heads
    leaves a joint block.
    """
    value = node.inputs[0]
    blocks = flow.blocks(value)
    if not blocks or value is None:
        return None
    before, after = flow.shape(value), flow.shape(node.outputs[0])
    if before is None or after is None:
        return _lose(flow, node)
    sizes = _complete(before), _complete(after)
    try:
        factors = lab.factor(*sizes)
    except ValueError:
        return _lose(flow, node)
    result: Blocks = BARE
    for merged, touched in _merged(flow, node, blocks, [sources for sources, _ in factors]):
        result += _reshape_block(flow, value, merged, [factors[i] for i in touched], sizes)
    return flow.set(node.outputs[0], result)


def _merged(
    flow: Flow, node: ir.Node, blocks: Blocks, factors: Sequence[Sequence[int]]
) -> list[tuple[Block, list[int]]]:
    """Blocks with the factors they touch, one block to a factor.

    Where a factor merges blocks they become their product. Copies that a node can leave out stay:
    what they are copies of is cut instead.
    """
    found: list[tuple[Block, list[int]]] = []
    # From the right, so that of three merged axes the last two are one before the first joins.
    for block in sorted(
        blocks, key=lambda b: (flow.is_loose(b.labels), [-axis for axis in b.axes])
    ):
        touched = [i for i, sources in enumerate(factors) if set(sources) & set(block.axes)]
        others = [one for one in found if set(one[1]) & set(touched)]
        product: Block | None = block
        for other, _ in others:
            product = _product(flow, node, product, other) if product is not None else None
        if product is None:
            flow.freeze(block.labels, node, "UNSUPPORTED_FORM", "merges two prunable axes")
            continue
        found = [one for one in found if one not in others]
        found.append((product, sorted({*touched, *(i for _, theirs in others for i in theirs)})))
    return found


def _product(flow: Flow, node: ir.Node, first: Block, second: Block) -> Block | None:
    """Two blocks of one axis: whole rows go, or whole columns. None where nobody can choose."""
    size = first.labels.size * second.labels.size
    if size > MAX_BLOCK or flow.is_loose(first.labels) or flow.is_loose(second.labels):
        return None
    matrix = flow.fresh(size).reshape(first.labels.size, -1)
    rows, columns = first.labels.reshape(-1), second.labels.reshape(-1)
    flow.choose(Choice(node, matrices=(matrix,), rows=(rows,), columns=((0, columns),)))
    axes = (*first.axes, *second.axes)
    labels = matrix.reshape(*first.labels.shape, *second.labels.shape)
    order = np.argsort(axes)
    return Block(tuple(sorted(axes)), np.transpose(labels, order))


def _complete(shape: Sequence[int | None]) -> list[int]:
    """Unknown sizes as a number that divides nothing else: they pair with one another only."""
    return [size if size is not None else 7919 for size in shape]


def _reshape_block(
    flow: Flow,
    value: ir.Value,
    block: Block,
    factors: list[tuple[list[int], list[int]]],
    sizes: tuple[list[int], list[int]],
) -> Blocks:
    sources = [axis for factor in factors for axis in factor[0]]
    targets = [axis for factor in factors for axis in factor[1]]
    full = [sizes[0][axis] for axis in sources]
    if len(block.axes) > 1 and int(np.prod(full, dtype=np.int64)) > MAX_BLOCK:
        block = flow.collapse(value, block, block.axes[0])
    if math.prod(full) > MAX_FRESH:
        raise ValueError(f"a reshape of {math.prod(full)} positions that labels reach")
    spread = block.labels.reshape([sizes[0][axis] if axis in block.axes else 1 for axis in sources])
    moved = np.broadcast_to(spread, full).reshape([sizes[1][axis] for axis in targets])
    return lab.simplify(Block(tuple(targets), moved)) if targets else BARE


def rewrite_reshape(surgeon: Surgeon, node: ir.Node) -> None:
    """Sizes written into the shape input follow the channels; 0 and -1 follow by themselves."""
    surgeon.resize_shape_input(node, 1, copies=integer(node, "allowzero", 0) == 0)


# -- Expand, Tile ------------------------------------------------------------------------------


def couple_expand(flow: Flow, node: ir.Node) -> None:
    """Broadcasting to a shape: positions made from a single one are the node's own to leave."""
    value, output = node.inputs[0], node.outputs[0]
    before, after = flow.shape(value), flow.shape(output)
    if before is None or after is None or value is None:
        return _lose(flow, node)
    offset = len(after) - len(before)
    blocks = tuple(
        Block(tuple(axis + offset for axis in block.axes), block.labels)
        for block in flow.blocks(value)
    )
    for axis, size in enumerate(after):
        old = before[axis - offset] if axis >= offset else 1
        if size is not None and size > 1 and old == 1:
            inner = axis - offset
            if inner >= 0:
                flow.freeze_axis(value, inner, node, "BARE_AXIS", "is broadcast")
            blocks = tuple(block for block in blocks if axis not in block.axes)
            if flow.shapes.is_fixed(str(output.name), axis):
                blocks += lab.single(axis, flow.loose(size))
    return flow.set(node.outputs[0], blocks)


def rewrite_expand(surgeon: Surgeon, node: ir.Node) -> None:
    """The shape input names sizes."""
    surgeon.resize_shape_input(node, 1, copies=False)


def couple_tile(flow: Flow, node: ir.Node) -> None:
    """Labels repeat as the tensor does; copies of a single position are the node's own to leave."""
    value, output, repeats = node.inputs[0], node.outputs[0], flow.value(node.inputs[1])
    before = flow.shape(value)
    if repeats is None or before is None:
        return _lose(flow, node)
    blocks = []
    for block in flow.blocks(value):
        labels = np.tile(block.labels, [int(repeats[axis]) for axis in block.axes])
        blocks.append(Block(block.axes, labels))
    own = flow.shapes.is_fixed_value(str(node.inputs[1].name))  # type: ignore[union-attr]
    for axis, size in enumerate(before):
        if size == 1 and repeats[axis] > 1 and own:
            blocks = [block for block in blocks if axis not in block.axes]
            blocks += lab.single(axis, flow.loose(int(repeats[axis])))
    return flow.set(output, tuple(blocks))


def rewrite_tile(surgeon: Surgeon, node: ir.Node) -> None:
    """A single position is repeated as often as its copies stay."""
    repeats, before = surgeon.value(node.inputs[1]), surgeon.shape(node.inputs[0])
    sizes = surgeon.changed_sizes(node.outputs[0])
    single = {axis: size for axis, size in sizes.items() if before[axis] == 1}
    if repeats is not None and single:
        written = [single.get(axis, int(often)) for axis, often in enumerate(repeats)]
        surgeon.set_input(node, 1, written)


_move = functools.partial(register, family="movement", void=of_first, reads=(0,), moves=True)
_move("Transpose", couple=couple_transpose)
_move("Squeeze", couple=couple_squeeze)
_move("Unsqueeze", couple=couple_unsqueeze)
_move("Flatten", couple=couple_reshape)
_move("Reshape", couple=couple_reshape, rewrite=rewrite_reshape, since=5)
_move("Expand", couple=couple_expand, rewrite=rewrite_expand)
_move("Tile", couple=couple_tile, rewrite=rewrite_tile)
