"""Operators that multiply and sum: each is an einsum, said with letters.

Sliced on the summed axis, both operands lose the same positions; the result is what it would be
with zeros there. Sliced on any other axis, the result loses the same slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from secateur.graphops.coupling.flow import Choice, Flow, Letter
from secateur.graphops.coupling.labels import Block, Labels
from secateur.graphops.coupling.units import Axis
from secateur.graphops.coupling.void import multiplied
from secateur.graphops.model.attributes import integer, operand, text
from secateur.graphops.rules.linear import (
    linear_conv,
    linear_conv_transpose,
    linear_gemm,
    linear_matmul,
)
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon

# -- Gemm, MatMul, Einsum ----------------------------------------------------------------------


def couple_matmul(flow: Flow, node: ir.Node) -> None:
    """`…mk, …kn → …mn` with broadcasting; vectors lack m or n."""
    a, b = flow.rank(node.inputs[0]), flow.rank(node.inputs[1])
    if a is None or b is None or 0 in (a, b):
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    batch = max(a, b) - 2
    left = [*range(batch - (a - 2), batch), "m", "k"] if a > 1 else ["k"]
    right = [*range(batch - (b - 2), batch), "k", "n"] if b > 1 else ["k"]
    result = [*range(max(batch, 0)), *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])]
    if _couple_diagonal(flow, node, (0, left), (1, right), result):
        return None
    flow.set(node.outputs[0], flow.meet(node, [(0, left), (1, right)], result, heads=True))
    for value, axes in zip(node.inputs, (a - 2, b - 2), strict=True):
        if value is not None and value.name in flow.constants:
            flow.stacks += [b.labels for b in flow.blocks(value) if max(b.axes) < axes]
    return None


def _couple_diagonal(
    flow: Flow,
    node: ir.Node,
    data: tuple[int, Sequence[Letter]],
    stack: tuple[int, Sequence[Letter]],
    result: Sequence[Letter],
) -> bool:
    """A block-diagonal matrix, stored as its blocks: x (…, g, c), W (g, c, o) → (…, g, o).

    Channels that were split into (groups, channels of a group) meet a stack of constant matrices,
    one for each group. As of a grouped convolution, whole groups may go, or the same channels of
    each. False, and nothing stated, where a product is not like that.
    """
    (place, left), (other, right) = data, stack
    x, w = node.inputs[place], node.inputs[other]
    if x is None or w is None or w.name not in flow.constants:
        return False
    joint = [block for block in flow.blocks(x) if len(block.axes) == 2]
    lines = {right[b.axes[0]]: b.labels for b in flow.blocks(w) if len(b.axes) == 1}
    if len(joint) != 1 or len(lines) != 3:
        return False
    block = joint[0]
    shared = [letter for letter in lines if letter in left]
    column = next((letter for letter in shared if letter not in result), None)
    group = next((letter for letter in shared if letter in result), None)
    outer = next((letter for letter in lines if letter not in left), None)
    names = [left[axis] for axis in block.axes]
    if outer not in result or None in (group, column) or set(names) != {group, column}:
        return False
    assert group is not None
    assert column is not None
    if any({left[axis] for axis in b.axes} & set(right) for b in flow.blocks(x) if b is not block):
        return False
    entering = block.labels if names[0] == group else block.labels.T
    if entering.shape != (lines[group].size, lines[column].size):
        return False
    leaving = flow.fresh(lines[group].size * lines[outer].size).reshape(entering.shape[0], -1)
    flow.choose(
        Choice(
            node,
            matrices=(entering, leaving),
            rows=(lines[group],),
            columns=((0, lines[column]), (1, lines[outer])),
            contraction=(place, left.index(column), True),
        )
    )
    places = result.index(group), result.index(outer)
    own = Block(places, leaving) if places[0] < places[1] else Block(places[::-1], leaving.T)
    others = (b for b in flow.blocks(x) if b is not block)
    moved = (Block(tuple(result.index(left[a]) for a in b.axes), b.labels) for b in others)
    flow.set(node.outputs[0], (own, *moved))
    return True


def couple_gemm(flow: Flow, node: ir.Node) -> None:
    """`α·A'·B' + β·C`: `mk, kn, mn → mn`, A and B possibly transposed, C broadcast."""
    left = ["k", "m"] if integer(node, "transA", 0) else ["m", "k"]
    right = ["n", "k"] if integer(node, "transB", 0) else ["k", "n"]
    operands: list[tuple[int, list[str]]] = [(0, left), (1, right)]
    if operand(node, 2) is not None:
        bias = flow.rank(node.inputs[2])
        if bias is None:
            return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape of C is not known")
        operands.append((2, ["m", "n"][2 - bias :]))
    flow.set(node.outputs[0], flow.meet(node, operands, ["m", "n"]))
    return None


def couple_einsum(flow: Flow, node: ir.Node) -> None:
    """As the equation says; diagonals (a letter twice in one term) are frozen."""
    equation = text(node, "equation", "").replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    ranks = [flow.rank(value) for value in node.inputs]
    if (
        not arrow
        or None in ranks
        or any(len(set(t.replace("...", ""))) < len(t.replace("...", "")) for t in terms)
    ):
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", f"equation {equation!r}")
    dots = max(
        r - len(t.replace("...", "")) for r, t in zip(ranks, terms, strict=True) if r is not None
    )
    operands = [
        (index, _letters(term, (ranks[index] or 0) - len(term.replace("...", "")), dots))
        for index, term in enumerate(terms)
    ]
    letters = _letters(result, dots if "..." in result else 0, dots)
    if len(operands) == 2:
        for data, stack in (operands, operands[::-1]):
            if _couple_diagonal(flow, node, data, stack, letters):
                return None
    flow.set(node.outputs[0], flow.meet(node, operands, letters, heads=True))
    return None


def _letters(term: str, own: int, dots: int) -> list[str | int]:
    """A term's letters, an ellipsis of `own` axes becoming the last of `dots` numbers."""
    head, ellipsis, tail = term.partition("...")
    middle: list[str | int] = list(range(dots - own, dots)) if ellipsis else []
    return [*head, *middle, *tail]


def macs_matmul(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Size of the result × length of the sum."""
    a = node.inputs[0]
    last = (flow.rank(a) or 1) - 1
    return [(*all_axes(flow, node.outputs[0]), (str(a.name if a else ""), last))]


def macs_gemm(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Size of the result × length of the sum."""
    a = node.inputs[0]
    k = 0 if integer(node, "transA", 0) else 1
    return [(*all_axes(flow, node.outputs[0]), (str(a.name if a else ""), k))]


def macs_einsum(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Product of the sizes of all letters."""
    equation = text(node, "equation", "").replace(" ", "").partition("->")[0]
    axes: dict[str, Axis] = {}
    for term, value in zip(equation.split(","), node.inputs, strict=True):
        for axis, letter in enumerate(term.replace("...", "")):
            axes.setdefault(letter, (str(value.name if value else ""), axis))
    return [tuple(axes.values())]


def all_axes(flow: Flow, value: ir.Value) -> tuple[Axis, ...]:
    """Every axis of a tensor, as a factor of a cost."""
    return tuple((str(value.name), axis) for axis in range(flow.rank(value) or 0))


register(
    "MatMul",
    "contraction",
    couple_matmul,
    macs=macs_matmul,
    linear=linear_matmul,
    void=multiplied,
)
register(
    "Gemm",
    "contraction",
    couple_gemm,
    macs=macs_gemm,
    linear=linear_gemm,
    void=multiplied,
    roles={1: "weight", 2: "bias"},
)
register("Einsum", "contraction", couple_einsum, macs=macs_einsum)


# -- convolutions ------------------------------------------------------------------------------
#
# Conv:          X (N, g·c, …), W (g·o, c, k…), B (g·o)  →  Y (N, g·o, …)
# ConvTranspose: X (N, g·c, …), W (g·c, o, k…), B (g·o)  →  Y (N, g·o, …)
#
# With g > 1 the axes are matrices (g, c) and (g, o) of labels, and whole groups or the same part of
# each may go: see `coupling.grouping`. A depthwise convolution has only whole groups.


def couple_conv(flow: Flow, node: ir.Node) -> None:
    """Input channels meet the weight's, output channels are the weight's own."""
    couple_convolution(flow, node)


def couple_conv_transpose(flow: Flow, node: ir.Node) -> None:
    """As Conv with the weight's first two axes exchanged."""
    couple_convolution(flow, node, out_axis=1)


def couple_convolution(
    flow: Flow,
    node: ir.Node,
    *,
    weight: int = 1,
    bias: int | None = 2,
    vectors: Sequence[int] = (),
    out_axis: int = 0,
) -> None:
    """Any convolution of input 0.

    Args:
        flow: to state it in.
        node: the convolution.
        weight: index of W among its inputs.
        bias: index of B, if the operator has one.
        vectors: indices of further inputs that may hold one number per output channel.
        out_axis: axis of W that holds output channels.
    """
    x, w = node.inputs[0], node.inputs[weight]
    shape = flow.shape(w)
    if x is None or w is None or shape is None or None in shape[:2]:
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape of the weight is not known")
    groups = integer(node, "group", 1)
    if groups < 1:
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", f"{groups} groups")
    for axis in range(2, len(shape)):
        flow.freeze_axis(w, axis, node, "KERNEL", "a position of the kernel")
    for axis in range(2, flow.rank(x) or 2):
        flow.freeze_axis(x, axis, node, "SPATIAL", "a position the kernel slides over")
    flow.freeze_axis(x, 0, node, "BATCH", "the batch")
    own = flow.line(w, out_axis, shape[out_axis] or 0)
    shared = flow.line(w, 1 - out_axis, shape[1 - out_axis] or 0)
    if groups == 1:
        flow.join(node, flow.line(x, 1, shared.size), shared)
        flow.contract(node, 0, 1)
        result = own
    elif out_axis == 0:
        # W (g·o, c): its axis 0 is the result's, its axis 1 the inputs of each group.
        result = own
        inputs = flow.line(x, 1, shared.size * groups)
        if inputs.size != shared.size * groups:
            raise ValueError(f"{inputs.size} channels enter, {groups} x {shared.size} are read")
        _couple_groups(flow, node, inputs, result, groups, (0, shared))
    else:
        # W (g·c, o): its axis 0 runs with X, its axis 1 is the outputs of each group.
        flow.join(node, flow.line(x, 1, shared.size), shared)
        result = flow.loose(own.size * groups)
        _couple_groups(flow, node, shared, result, groups, (1, own))
    for index in (*([] if bias is None else [bias]), *vectors):
        vector = operand(node, index)
        if vector is not None and flow.shape(vector) == (result.size,) != (1,):
            flow.join(node, flow.line(vector, 0, result.size), result)
    if result.any():
        flow.set(node.outputs[0], (Block((1,), result),))
    return None


def _couple_groups(
    flow: Flow, node: ir.Node, x: Labels, y: Labels, groups: int, column: tuple[int, Labels]
) -> None:
    """Input labels x (g·c) and output labels y (g·o), and the axis of W that every group has."""
    flow.choose(
        Choice(
            node,
            matrices=(x.reshape(groups, -1), y.reshape(groups, -1)),
            columns=(column,),
            contraction=(0, 1, True),
        )
    )


def rewrite_conv(surgeon: Surgeon, node: ir.Node) -> None:
    """The number of groups follows from the channels that stay: C / (channels per group)."""
    rewrite_groups(surgeon, node, weight=1)


def rewrite_conv_transpose(surgeon: Surgeon, node: ir.Node) -> None:
    """The number of groups shrinks with W's axis 0 where whole groups went."""
    groups = integer(node, "group", 1)
    weight = node.inputs[1]
    if groups == 1 or weight is None or not surgeon.changed(weight):
        return
    kept = surgeon.kept(weight, 0)
    if kept is None:
        return
    per_group = kept.size // groups
    left = int(kept.reshape(groups, per_group).any(axis=1).sum())
    if left != groups:
        surgeon.set_integer(node, "group", left)


def rewrite_groups(surgeon: Surgeon, node: ir.Node, weight: int) -> None:
    """Sets `group` to the input channels divided by those of one group, W's axis 1."""
    groups = integer(node, "group", 1)
    x, w = node.inputs[0], node.inputs[weight]
    if groups == 1 or x is None or w is None or not surgeon.changed(x):
        return
    per_group = surgeon.size(w, 1)
    if surgeon.size(x, 1) // per_group != groups:
        surgeon.set_integer(node, "group", surgeon.size(x, 1) // per_group)


def macs_conv(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Result positions × the whole weight (Cout × Cin/groups × kernel)."""
    return macs_convolution(flow, node, weight=1)


def macs_convolution(flow: Flow, node: ir.Node, weight: int) -> list[tuple[Axis, ...]]:
    """Result positions × the whole weight, which is input `weight`."""
    w = node.inputs[weight]
    axes = [a for a in all_axes(flow, node.outputs[0]) if a[1] != 1]
    return [(*axes, *(all_axes(flow, w) if w else ()))]


def macs_conv_transpose(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Input positions × the whole weight (Cin × Cout/groups × kernel)."""
    x, weight = node.inputs[0], node.inputs[1]
    axes = [a for a in (all_axes(flow, x) if x else ()) if a[1] != 1]
    return [(*axes, *(all_axes(flow, weight) if weight else ()))]


_ROLES = {1: "weight", 2: "bias"}
register(
    "Conv",
    "convolution",
    couple_conv,
    rewrite=rewrite_conv,
    macs=macs_conv,
    linear=linear_conv,
    roles=_ROLES,
)
register(
    "ConvTranspose",
    "convolution",
    couple_conv_transpose,
    rewrite=rewrite_conv_transpose,
    macs=macs_conv_transpose,
    linear=linear_conv_transpose,
    roles=_ROLES,
)


def couple_deformable(flow: Flow, node: ir.Node) -> None:
    """As Conv where nothing is grouped; offsets and mask say where to look, not at what."""
    if integer(node, "group", 1) != 1 or integer(node, "offset_group", 1) != 1:
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", "a grouped deformable convolution")
    for index in (2, 4):
        flow.freeze_value(operand(node, index), node, "SPATIAL", "moves the kernel's positions")
    return couple_convolution(flow, node, bias=3)


def couple_causal_conv(flow: Flow, node: ir.Node) -> None:
    """A depthwise convolution over time: weight, bias and states run with the channels."""
    operands = [(0, [None, "c", None]), (1, ["c", None, None])]
    if operand(node, 2) is not None:
        operands.append((2, ["c"]))
    if operand(node, 3) is not None:
        operands.append((3, [None, "c", None]))
    blocks = flow.meet(node, operands, ["batch", "c", "time"])
    for output in node.outputs:
        flow.set(output, blocks)


register("DeformConv", "convolution", couple_deformable, macs=macs_conv, roles={1: "weight"})
register(
    "CausalConvWithState", "convolution", couple_causal_conv, macs=macs_conv, roles={1: "weight"}
)
