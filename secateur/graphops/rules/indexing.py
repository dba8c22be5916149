"""Operators that take, cut and join ranges of an axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling import void
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import (
    BARE,
    Block,
    Blocks,
    Labels,
    rows_along,
    simplify,
    single,
)
from secateur.graphops.model import arithmetic
from secateur.graphops.model.attributes import (
    KnowsValues,
    integer,
    integers,
    integers_at,
    operand,
    text,
)
from secateur.graphops.rules import movement
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon

# -- Slice -------------------------------------------------------------------------------------


def _ranges(node: ir.Node, inputs: arithmetic.Inputs, size: int) -> tuple[slice, ...] | None:
    """The range of each axis; None where it is not known beforehand."""
    try:
        return arithmetic.slices(node, inputs, size)
    except (ValueError, IndexError, TypeError):
        return None


def couple_slice(flow: Flow, node: ir.Node) -> None:
    """The same slice of the labels; each range must keep at least one position."""
    value, shape = node.inputs[0], flow.shape(node.inputs[0])
    blocks = flow.blocks(value)
    if not blocks or value is None:
        return None
    if shape is None:
        return flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
    inputs = [None, *(flow.value(item) for item in node.inputs[1:])]
    index = _ranges(node, inputs, len(shape))
    if index is None:
        axes = integers_at(flow, node, 3, "axes")
        for axis in range(len(shape)) if axes is None else [a % len(shape) for a in axes]:
            flow.freeze_axis(value, axis, node, "INDEXED", "a range not known beforehand")
        return flow.set(node.outputs[0], flow.blocks(value))
    for axis in _follow_inputs(flow, node, index):
        flow.freeze_axis(value, axis, node, "INDEXED", "the range follows the inputs' sizes")
    for axis, part in enumerate(index):
        if _takes_one_of_each(part, shape[axis]):
            _join_turns(flow, node, axis, part.step)
        elif part.step not in (None, 1):
            # Survivors need not be evenly spaced, and what lies between them keeps the stride.
            flow.freeze_axis(value, axis, node, "UNSUPPORTED_FORM", "a strided range of channels")
    result = []
    for block in flow.blocks(value):
        cut = tuple(index[axis] for axis in block.axes)
        labels = block.labels[cut]
        if labels.shape == (1,) and block.labels.size > 1:
            flow.take(node, node.outputs[0], int(labels[0]), *block.axes)
            continue
        if labels.size != block.labels.size:
            flow.keep(labels)
        result.append(Block(block.axes, labels))
    return flow.set(node.outputs[0], tuple(result))


def _follow_inputs(flow: Flow, node: ir.Node, index: Sequence[slice]) -> list[int]:
    """Axes of which a range is taken (of a table of positions, as many as there are tokens), where
    not all bounds are the model's own: the bounds can then not be written down."""
    shapes, bounds = flow.shapes, [str(value.name) for value in node.inputs[1:3] if value]
    if all(map(shapes.is_fixed_value, bounds)):
        return []
    name = str(node.inputs[0].name) if node.inputs[0] is not None else ""
    values = [None if v is None else shapes.second_values.get(v.name or "") for v in node.inputs]
    ways = (
        (index, shapes.first[name]),
        (_ranges(node, [None, *values[1:]], len(index)), shapes.second.get(name)),
    )
    return [
        axis
        for axis in range(len(index))
        if not all(part and sizes and _is_whole(part[axis], sizes[axis]) for part, sizes in ways)
    ]


def _is_whole(part: slice, size: int | None) -> bool:
    return size is not None and range(*part.indices(size)) == range(size)


def _takes_one_of_each(part: slice, size: int | None) -> bool:
    """Whether a stride takes one position out of each of the equal parts of a whole axis."""
    step = part.step or 1
    if size is None or step < 2 or size % step:
        return False
    taken = range(*part.indices(size))
    return len(taken) == size // step and taken.start < step


def _join_turns(flow: Flow, node: ir.Node, axis: int, step: int) -> None:
    """`step` positions in a row (a value and its gate) go together: the stride stays right."""
    for block in flow.blocks(node.inputs[0]):
        if axis in block.axes:
            along = rows_along(block.labels, block.axes.index(axis))
            turns = along.reshape(len(along) // step, step, -1)
            flow.join_rows(node, turns.transpose(0, 2, 1).reshape(-1, step))


def rewrite_slice(surgeon: Surgeon, node: ir.Node) -> None:
    """Starts and ends count only the positions that stay."""
    value = node.inputs[0]
    if value is None or not surgeon.changed(value):
        return
    shape = surgeon.shape(value)
    if not shape:
        return
    inputs = [None, *(surgeon.value(item) for item in node.inputs[1:])]
    index = _ranges(node, inputs, len(shape))
    if index is None:
        return  # a range not known beforehand: its axes stay whole
    axes_given = integers_at(surgeon, node, 3, "axes")
    starts, ends = integers_at(surgeon, node, 1, "starts"), integers_at(surgeon, node, 2, "ends")
    if starts is None or ends is None:
        return
    axes = [axis % len(shape) for axis in axes_given or range(len(starts))]
    moved = False
    for place, axis in enumerate(axes):
        kept = surgeon.kept(value, axis)
        if kept is None or _is_whole(index[axis], kept.size):
            continue
        start, stop, step = index[axis].indices(kept.size)
        if step > 1:  # of every `step` positions in a row all stay, or none
            starts[place], ends[place] = start, int(kept.sum())
        else:
            starts[place], ends[place] = int(kept[:start].sum()), int(kept[:stop].sum())
        moved = True
    if moved:
        surgeon.set_integers_at(node, 1, "starts", starts)
        surgeon.set_integers_at(node, 2, "ends", ends)


# -- Split, Concat -----------------------------------------------------------------------------


def couple_split(flow: Flow, node: ir.Node) -> None:
    """Each output takes its range of the labels."""
    value = node.inputs[0]
    size = flow.rank(value)
    if value is None or not flow.blocks(value):
        return
    axis = integer(node, "axis", 0) % (size or 1)
    bounds = np.cumsum([(flow.shape(output) or {axis: None})[axis] or 0 for output in node.outputs])
    total = (flow.shape(value) or {axis: None})[axis]
    if size is None:
        flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    if not total or bounds[-1] != total:
        flow.freeze_axis(value, axis, node, "UNKNOWN_SHAPE", "the sizes are not known")
        for output in node.outputs:
            flow.set(output, tuple(b for b in flow.blocks(value) if axis not in b.axes))
        return
    if not all(flow.shapes.is_fixed(str(output.name), axis) for output in node.outputs):
        flow.freeze_axis(value, axis, node, "INDEXED", "the ranges follow the inputs' sizes")
    for output, start, stop in zip(node.outputs, [0, *bounds[:-1]], bounds, strict=True):
        result: Blocks = BARE
        for block in flow.blocks(value):
            if axis not in block.axes:
                result += (block,)
                continue
            part = block.labels.take(range(start, stop), axis=block.axes.index(axis))
            if part.shape == (1,) and block.labels.size > 1:
                flow.take(node, output, int(part[0]), axis)
                continue
            flow.keep(part)
            # A range of one head of a joint block leaves a plain axis of head positions.
            result += simplify(Block(block.axes, part)) if part.ndim > 1 else single(axis, part)
        flow.set(output, result)


def rewrite_split(surgeon: Surgeon, node: ir.Node) -> None:
    """Sizes are said explicitly, an attribute before opset 13 and an input since."""
    value = node.inputs[0]
    if value is None or not surgeon.changed(value):
        return
    axis = integer(node, "axis", 0) % len(surgeon.shape(value))
    kept = surgeon.kept(value, axis)
    if kept is None:
        return
    bounds = np.cumsum([surgeon.shape(output)[axis] or 0 for output in node.outputs])
    sizes = [int(part.sum()) for part in np.split(kept, bounds[:-1])]
    if surgeon.opset(node) >= 18:
        surgeon.drop_attribute(node, "num_outputs")
    if surgeon.opset(node) >= 13:
        surgeon.set_input(node, 1, sizes)
    else:
        surgeon.set_integers(node, "split", sizes)


def couple_concat(flow: Flow, node: ir.Node) -> None:
    """Labels one after another along the axis; along the others the operands run together."""
    shape = flow.shape(node.outputs[0])
    values = [value for value in node.inputs if value]
    moving = [value for value in values if value.name not in flow.constants]
    if moving and not any(flow.blocks(value) for value in moving):
        flow.hold(node)
        return
    if shape is None:
        for value in values:
            flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    axis = integer(node, "axis", 1) % len(shape)
    joint = _concat_joint(flow, values, axis)
    if joint is not None:
        flow.set(node.outputs[0], joint)
        return
    if _puts_beside(flow, node, axis):
        flow.put_beside(node, axis)
    sizes = [(flow.shape(value) or {axis: None})[axis] for value in values]
    letters = [None if other == axis else other for other in range(len(shape))]
    if None in sizes:
        for value in values:
            flow.freeze_axis(value, axis, node, "UNKNOWN_SHAPE", "a size is not known")
        flow.set(node.outputs[0], _meet_without(flow, node, letters, axis))
        return
    parts: list[Labels] = []
    for value, size in zip(values, sizes, strict=True):
        if any(axis in block.axes and len(block.axes) > 1 for block in flow.blocks(value)):
            flow.freeze_axis(
                value, axis, node, "UNSUPPORTED_FORM", "one of its joint axes is joined"
            )
        parts.append(flow.line(value, axis, size or 0))
    joined = np.concatenate(parts)
    others = _meet_without(flow, node, letters, axis)
    flow.set(node.outputs[0], others + single(axis, joined))


def _puts_beside(flow: Flow, node: ir.Node, axis: int) -> bool:
    """Whether all operands are computed, and one position wide that cannot be cut by itself."""
    return len(node.inputs) > 1 and all(
        value is not None
        and value.name not in flow.constants
        and (flow.shape(value) or {axis: None})[axis] == 1
        and not any(axis in block.axes for block in flow.blocks(value))
        for value in node.inputs
    )


def _concat_joint(flow: Flow, values: Sequence[ir.Value], axis: int) -> Blocks | None:
    """Operands that all carry one joint block over the same axes, `axis` among them: the halves
    of rotary embeddings (heads × head size). None where that is not so."""
    carried = [flow.blocks(value) for value in values]
    if any(len(blocks) != 1 or axis not in blocks[0].axes for blocks in carried):
        return None
    axes = carried[0][0].axes
    if len(axes) < 2 or any(blocks[0].axes != axes for blocks in carried):
        return None
    labels = np.concatenate([blocks[0].labels for blocks in carried], axis=axes.index(axis))
    return (Block(axes, labels),)


def _meet_without(flow: Flow, node: ir.Node, letters: list[int | None], axis: int) -> Blocks:
    """What holds along the axes that are not joined end to end."""
    present = [(index, value) for index, value in enumerate(node.inputs) if value is not None]
    saved = {str(value.name): flow.blocks(value) for _, value in present}
    for name, blocks in saved.items():
        flow.blocks_of[name] = tuple(block for block in blocks if axis not in block.axes)
    operands = [(index, letters) for index, _ in present]
    result = flow.meet(node, operands, [-1 if x is None else x for x in letters])
    flow.blocks_of.update(saved)
    return result


# -- Gather ------------------------------------------------------------------------------------


def couple_gather(flow: Flow, node: ir.Node) -> None:
    """Known indices take the same labels, chosen ones run with what they were chosen from.
    Others (an embedding) freeze the indexed axis."""
    data, indices = node.inputs[0], node.inputs[1]
    size, wide = flow.rank(data), flow.rank(indices)
    chosen = flow.pointed(indices)
    if data is None or (not flow.blocks(data) and chosen is None):
        return None
    if size is None or wide is None:
        return flow.freeze_value(data, node, "UNKNOWN_SHAPE", "the shape is not known")
    axis = integer(node, "axis", 0) % size
    if _is_reshape(flow, node):
        return movement.couple_reshape(flow, node)
    known = flow.value(indices)
    if chosen is not None:
        flow.choose_from(node, 1, axis)
    elif not flow.shapes.is_fixed_value(str(indices.name if indices is not None else "")):
        flow.freeze_axis(data, axis, node, "INDEXED", "is indexed by data")
        known = None
    result: Blocks = BARE
    for block in flow.blocks(data):
        places = [a if a < axis else a + wide - 1 for a in block.axes if a != axis]
        if axis not in block.axes:
            result += (Block(tuple(places), block.labels),)
        elif known is not None:
            result += _gather_block(flow, node, block, axis, known, places)
    return flow.set(node.outputs[0], result)


def _is_reshape(flow: Flow, node: ir.Node) -> bool:
    """Whether all positions of a vector are taken in order, as strided views are exported, in a
    shape of which at most one size follows the inputs."""
    data, indices, output = node.inputs[0], node.inputs[1], node.outputs[0]
    shape, name = flow.shape(output), str(indices.name if indices is not None else "")
    if flow.rank(data) != 1 or shape is None or flow.opset(node) < 5:
        return False
    for values in (flow.shapes.values, flow.shapes.second_values):
        known = values.get(name)
        if known is None or not np.array_equal(known.reshape(-1), np.arange(known.size)):
            return False
    free = [a for a in range(len(shape)) if not flow.shapes.is_fixed(str(output.name), a)]
    return flow.shapes.values[name].size == (flow.shape(data) or (0,))[0] and len(free) <= 1


def _gather_block(
    flow: Flow, node: ir.Node, block: Block, axis: int, known: np.ndarray, places: list[int]
) -> Blocks:
    place = block.axes.index(axis)
    labels = block.labels.take(known.astype(np.int64), axis=place)
    if known.size == 1 and block.labels.ndim == 1 and block.labels.size > 1:
        flow.take(node, node.outputs[0], int(labels.reshape(-1)[0]), axis)
        return BARE
    flow.keep(labels)
    taken = list(range(axis, axis + known.ndim))
    axes = sorted([*places, *taken])
    if axes != [*places[:place], *taken, *places[place:]]:
        flow.freeze(block.labels, node, "UNSUPPORTED_FORM", "indices between joint axes")
        return BARE
    return simplify(Block(tuple(axes), labels))


def rewrite_gather(surgeon: Surgeon, node: ir.Node) -> None:
    """Indices are renumbered to the positions that stay; those of cut positions go."""
    data, indices = node.inputs[0], node.inputs[1]
    if data is None or not surgeon.changed(data):
        return
    axis = integer(node, "axis", 0) % len(surgeon.shape(data))
    kept, known = surgeon.kept(data, axis), surgeon.value(indices)
    if kept is None or known is None or indices is None:
        return
    if not surgeon.is_fixed(indices):  # they count all positions of a free size: `_is_reshape`
        surgeon.become_reshape(node)
        return
    renumbered = np.cumsum(kept) - 1
    wanted = known.astype(np.int64) % kept.size
    for taken in range(known.ndim):
        stay = surgeon.kept(node.outputs[0], axis + taken)
        if stay is not None:
            wanted = wanted.compress(stay, axis=taken)
    surgeon.set_input(node, 1, renumbered[wanted], like=known.dtype)


def couple_gather_nd(flow: Flow, node: ir.Node) -> None:
    """Axes that the indices do not reach follow the indices' own. A single index, of chosen
    positions, reaches an axis that runs with what they were chosen from."""
    data, size = node.inputs[0], flow.rank(node.inputs[0])
    indices = flow.shape(node.inputs[1])
    chosen = flow.pointed(node.inputs[1])
    if data is None or (not flow.blocks(data) and chosen is None):
        return None
    if size is None or not indices or indices[-1] is None:
        return flow.freeze_value(data, node, "UNKNOWN_SHAPE", "the shape is not known")
    indexed = integer(node, "batch_dims", 0) + indices[-1]
    alone = chosen is not None and indices[-1] == 1
    if alone:
        flow.choose_from(node, 1, indexed - 1)
    for axis in range(indexed - 1 if alone else indexed):
        flow.freeze_axis(data, axis, node, "INDEXED", "is indexed by data")
    shift = len(indices) - 1 - indexed
    rest = (block for block in flow.blocks(data) if min(block.axes) >= indexed)
    flow.set(
        node.outputs[0], tuple(Block(tuple(a + shift for a in b.axes), b.labels) for b in rest)
    )
    return None


def couple_scatter_nd(flow: Flow, node: ir.Node) -> None:
    """Axes that the indices do not reach run together in data, updates and result."""
    data, updates = node.inputs[0], node.inputs[2]
    size, indices = flow.rank(data), flow.shape(node.inputs[1])
    if data is None or size is None or not indices or indices[-1] is None:
        for value in (data, updates):
            flow.freeze_value(value, node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    if not flow.blocks(data) and not flow.blocks(updates):
        return
    tail = list(range(indices[-1], size))
    operands = [(0, [*([None] * indices[-1]), *tail]), (2, [*([None] * (len(indices) - 1)), *tail])]
    flow.set(node.outputs[0], flow.meet(node, operands, list(range(size))))


# -- Pad ---------------------------------------------------------------------------------------


def couple_pad(flow: Flow, node: ir.Node) -> None:
    """Constant padding of a labelled axis makes positions that the node can leave out again."""
    value, shape = node.inputs[0], flow.shape(node.inputs[0])
    blocks = flow.blocks(value)
    if not blocks or value is None:
        return
    pads = _pads(flow, node, len(shape or ()))
    result: Blocks = BARE
    for axis in {axis for block in blocks for axis in block.axes}:
        front, back = (None, None) if pads is None else (pads[0][axis], pads[1][axis])
        if front == 0 and back == 0:
            continue
        if (
            front is None
            or back is None
            or front < 0
            or back < 0
            or text(node, "mode", "constant") != "constant"
        ):
            flow.freeze_axis(
                value, axis, node, "UNSUPPORTED_FORM", "is padded in a way that moves channels"
            )
            continue
        along = flow.axis(value, axis)
        assert along is not None
        result += single(axis, np.concatenate([flow.loose(front), along, flow.loose(back)]))
    padded = {block.axes[0] for block in result}
    frozen_or_whole = tuple(
        block
        for block in flow.blocks(value)
        if not padded & set(block.axes)
        and (pads is not None)
        and all(pads[0][a] == 0 and pads[1][a] == 0 for a in block.axes)
    )
    flow.set(node.outputs[0], frozen_or_whole + result)


def _pads(known_by: KnowsValues, node: ir.Node, size: int) -> tuple[list[int], list[int]] | None:
    """Front and back padding of every axis."""
    given = integers_at(known_by, node, 1, "pads") or integers(node, "paddings")
    if given is None:
        return None
    axes = integers_at(known_by, node, 3, "axes") if operand(node, 3) is not None else None
    if operand(node, 3) is not None and axes is None:
        return None
    places = [axis % size for axis in axes] if axes is not None else list(range(size))
    front, back = [0] * size, [0] * size
    for index, axis in enumerate(places):
        front[axis], back[axis] = given[index], given[index + len(places)]
    return front, back


def rewrite_pad(surgeon: Surgeon, node: ir.Node) -> None:
    """Padding of a channel axis shrinks to what stays of it."""
    value, output = node.inputs[0], node.outputs[0]
    if value is None or not surgeon.changed(output):
        return
    size = len(surgeon.shape(value))
    pads = _pads(surgeon, node, size)
    if pads is None:
        return
    front, back = pads
    moved = False
    for axis in range(size):
        kept = surgeon.kept(output, axis)
        if kept is not None and (front[axis] or back[axis]):
            total = kept.size
            moved = True
            front[axis], back[axis] = (
                int(kept[: front[axis]].sum()),
                int(kept[total - back[axis] :].sum()),
            )
    if not moved:
        return
    if surgeon.opset(node) < 11:
        surgeon.set_integers(node, "pads" if surgeon.opset(node) > 1 else "paddings", front + back)
        return
    axes = integers_at(surgeon, node, 3, "axes")
    places = list(range(size)) if axes is None else [axis % size for axis in axes]
    surgeon.set_input(node, 1, [front[a] for a in places] + [back[a] for a in places])


register(
    "Slice",
    "indexing",
    couple_slice,
    rewrite=rewrite_slice,
    void=void.of_first,
    reads=(0,),
    moves=True,
)
register(
    "Split",
    "indexing",
    couple_split,
    rewrite=rewrite_split,
    void=void.of_first,
    reads=(0,),
    moves=True,
)
register("Concat", "indexing", couple_concat, void=void.of_all, additive=True)
register(
    "Gather",
    "indexing",
    couple_gather,
    rewrite=rewrite_gather,
    void=void.taken,
    reads=(0,),
    moves=True,
)
register("GatherND", "indexing", couple_gather_nd, void=void.taken, reads=(0,))
register("ScatterND", "indexing", couple_scatter_nd, void=void.written, reads=(0, 2))
register("Pad", "indexing", couple_pad, rewrite=rewrite_pad, reads=(0,))
