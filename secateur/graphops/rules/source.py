"""Operators that make tensors from nothing or from shapes."""

from __future__ import annotations

import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import BARE, Blocks, single
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon


def couple_constant(flow: Flow, node: ir.Node) -> None:
    """A constant gets its labels when it is first read."""


def couple_nothing(flow: Flow, node: ir.Node) -> None:
    """The result says something about sizes, not about channels: no labels."""
    flow.set(node.outputs[0], BARE)


def couple_constant_of_shape(flow: Flow, node: ir.Node) -> None:
    """Every position is alike: axes of fixed size are the node's own to shorten. Where the shape
    is another tensor's and not known whole, the result follows that tensor."""
    output, like = node.outputs[0], node.inputs[0].producer() if node.inputs[0] else None
    if like is not None and flow.value(node.inputs[0]) is None:
        whole = like.op_type == "Shape" and not {"start", "end"} & set(like.attributes)
        return flow.set(output, flow.blocks(like.inputs[0]) if whole else BARE)
    blocks: Blocks = BARE
    for axis, size in enumerate(flow.shape(output) or ()):
        if size is not None and size > 1 and flow.shapes.is_fixed(str(output.name), axis):
            blocks += single(axis, flow.loose(size))
    return flow.set(output, blocks)


def rewrite_constant_of_shape(surgeon: Surgeon, node: ir.Node) -> None:
    """The shape input names sizes."""
    surgeon.resize_shape_input(node, 0, copies=False)


register("Constant", "source", couple_constant)
register("Shape Size Range RandomNormal RandomUniform EyeLike", "source", couple_nothing)
register(
    "ConstantOfShape",
    "source",
    couple_constant_of_shape,
    rewrite=rewrite_constant_of_shape,
    reads=(),
)
