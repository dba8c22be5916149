"""Convolutions, of any number of spatial axes.

    Conv:          X (N, g·c, …), W (g·o, c, k…), B (g·o)  →  Y (N, g·o, …)
    ConvTranspose: X (N, g·c, …), W (g·c, o, k…), B (g·o)  →  Y (N, g·o, …)

With g > 1 the axes are matrices (g, c) and (g, o) of labels, and whole groups or the same part of
each may go: see `coupling.grouping`. A depthwise convolution has only whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from secateur.graphops.coupling.facts import Choice
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import Block, Labels
from secateur.graphops.coupling.units import Axis
from secateur.graphops.model.attributes import integer, operand
from secateur.graphops.rules.contraction import all_axes
from secateur.graphops.rules.linear import linear_conv, linear_conv_transpose
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon


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
    bias: int | None = 2,
    vectors: Sequence[int] = (),
    out_axis: int = 0,
) -> None:
    """Any convolution of input 0.

    Args:
        flow: to state it in.
        node: the convolution.
        bias: index of B, if the operator has one.
        vectors: indices of further inputs that may hold one number per output channel.
        out_axis: axis of W that holds output channels.
    """
    x, w = node.inputs[:2]
    shape = flow.shape(w)
    if x is None or w is None or shape is None or None in shape[:2]:
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape of the weight is not known")
    groups = integer(node, "group", 1)
    if groups < 1:
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", f"{groups} groups")
    for axis in range(2, len(shape)):
        flow.freeze_axis(w, axis, node, "KERNEL", "a position of the kernel")
    for axis in range(2, len(shape)):
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
        if vector is not None and flow.shape(vector) not in ((), (1,)):
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
    groups = integer(node, "group", 1)
    x, w = node.inputs[:2]
    if groups == 1 or x is None or w is None or not surgeon.changed(x):
        return
    left = surgeon.size(x, 1) // surgeon.size(w, 1)
    if left != groups:
        surgeon.set_integer(node, "group", left)


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


def macs_conv(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Result positions × the whole weight (Cout × Cin/groups × kernel)."""
    w = node.inputs[1]
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
