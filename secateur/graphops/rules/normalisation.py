"""Operators that normalise.

BatchNormalization and InstanceNormalization treat each channel alone: exact. LayerNormalization
and its kin normalise across channels: the law's named exceptions.
"""

from __future__ import annotations

import onnx_ir as ir

from secateur.graphops.coupling.facts import Choice
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import Block, rows_along, thin
from secateur.graphops.model.attributes import integer, integers, operand
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon


def couple_per_channel(flow: Flow, node: ir.Node) -> None:
    """Scale, bias, mean and variance run with axis 1."""
    size = flow.rank(node.inputs[0])
    if size is None:
        flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
        return None
    inexact = node.op_type == "InstanceNormalization" or bool(integer(node, "training_mode", 0))
    joint = next((b for b in flow.blocks(node.inputs[0]) if len(b.axes) > 1 and 1 in b.axes), None)
    if joint is not None:
        return _couple_joint(flow, node, joint, inexact)
    letters = list(range(size))
    operands: list[tuple[int, list[int]]] = [(0, letters)]
    operands += [(index, [1]) for index, value in enumerate(node.inputs) if index and value]
    blocks = flow.meet(node, operands, letters)
    if inexact:  # statistics of the input itself, over everything but the channels
        _mark_inexact(flow, node, [axis for axis in letters if axis != 1])
    return flow.set(node.outputs[0], blocks)


def _couple_joint(flow: Flow, node: ir.Node, joint: Block, inexact: bool) -> None:
    """Axis 1 is part of a joint block: GroupNormalization as exporters spell it.

    Channels (C) are reshaped to (groups, C / groups · space) and normalised as if the groups were
    channels. Whole groups may go, or the same channels of each.
    """
    place = joint.axes.index(1)
    matrix = thin(rows_along(joint.labels, place))
    if matrix.shape[0] != joint.labels.shape[place]:
        raise ValueError("groups that share channels")
    vectors = [flow.axis(value, 0) for value in node.inputs[1:] if value is not None]
    rows = tuple(vector for vector in vectors if vector is not None)
    flow.choose(Choice(node, (matrix,), rows))
    if inexact:
        _mark_inexact(flow, node, [axis for axis in joint.axes if axis != 1])
    flow.set(node.outputs[0], flow.blocks(node.inputs[0]))


def couple_across(flow: Flow, node: ir.Node) -> None:
    """Scale and bias are aligned at the right; axes from `axis` on are normalised together."""
    value, size = node.inputs[0], flow.rank(node.inputs[0])
    if value is None or size is None:
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    letters = list(range(size))
    operands: list[tuple[int, list[int]]] = [(0, letters)]
    for index in (1, 2):
        if operand(node, index) is not None:
            wide = flow.rank(node.inputs[index])
            if wide is None:
                return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
            operands.append((index, letters[size - wide :]))
    blocks = flow.meet(node, operands, letters)
    flow.set(node.outputs[0], blocks)
    return _mark_inexact(flow, node, list(range(integer(node, "axis", -1) % size, size)))


def couple_group(flow: Flow, node: ir.Node) -> None:
    """Whole groups, or the same channels of each, with scale and bias (one each per group before
    opset 21)."""
    value, groups = node.inputs[0], integer(node, "num_groups", 1)
    along = flow.axis(value, 1) if value is not None else None
    if along is None:
        flow.freeze_inputs(node, "BARE_AXIS", "the channels cannot be cut")
        return
    rows = []
    for parameter in node.inputs[1:3]:
        vector = flow.axis(parameter, 0) if parameter is not None else None
        if vector is not None and vector.size == along.size:
            flow.join(node, along, vector)
        elif vector is not None:
            rows.append(vector)
    matrix = along.reshape(groups, -1)
    flow.choose(Choice(node, (matrix,), tuple(rows), contraction=(0, 1, False)))
    flow.set(node.outputs[0], flow.blocks(value))


def rewrite_group(surgeon: Surgeon, node: ir.Node) -> None:
    """The number of groups shrinks where whole ones went."""
    value = node.inputs[0]
    kept = surgeon.kept(value, 1) if value is not None else None
    if kept is not None:
        groups = kept.reshape(integer(node, "num_groups", 1), -1)
        surgeon.set_integer(node, "num_groups", int(groups.any(axis=1).sum()))


def couple_mean_variance(flow: Flow, node: ir.Node) -> None:
    """Normalises over `axes` (by default batch and space): channels alone unless listed."""
    given = integers(node, "axes")
    axes = [0, 2, 3] if given is None else given
    size = flow.rank(node.inputs[0]) or 1
    _mark_inexact(flow, node, [axis % size for axis in axes])
    flow.set(node.outputs[0], flow.blocks(node.inputs[0]))


def couple_lp(flow: Flow, node: ir.Node) -> None:
    """Divides by the norm along `axis`; zeros do not change the norm."""
    value, size = node.inputs[0], flow.rank(node.inputs[0]) or 1
    axis = integer(node, "axis", -1) % size
    if value is not None and flow.axis(value, axis) is not None:
        flow.contract(node, 0, axis)
    flow.set(node.outputs[0], flow.blocks(value))


def couple_lrn(flow: Flow, node: ir.Node) -> None:
    """Divides by the energy of neighbouring channels; a cut changes who is a neighbour."""
    _mark_inexact(flow, node, [1])
    flow.set(node.outputs[0], flow.blocks(node.inputs[0]))


def _mark_inexact(flow: Flow, node: ir.Node, axes: list[int]) -> None:
    """Records the labelled axes that the node normalises over."""
    for block in flow.blocks(node.inputs[0]):
        for axis in block.axes:
            if axis in axes:
                flow.contract(node, 0, axis, exact=False)


register(
    "BatchNormalization",
    "normalisation",
    couple_per_channel,
    affine=1,
    roles={1: "scale", 2: "bias", 3: "mean", 4: "variance"},
)
register(
    "InstanceNormalization",
    "normalisation",
    couple_per_channel,
    affine=1,
    roles={1: "scale", 2: "bias"},
)
register(
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization",
    "normalisation",
    couple_across,
    affine=-1,
    roles={1: "scale", 2: "bias"},
)
register(
    "GroupNormalization",
    "normalisation",
    couple_group,
    rewrite=rewrite_group,
    affine=1,
    roles={1: "scale", 2: "bias"},
)
register("MeanVarianceNormalization", "normalisation", couple_mean_variance)
register("LpNormalization", "normalisation", couple_lp)
register("LRN", "normalisation", couple_lrn)
