"""If, Loop and Scan: labels pass through the bodies as through any nodes.

Both branches of an If give the same outputs in turn, and what a loop carries comes back to where
it came from: those tensors are one, so their labels meet. Values that a body reads from outside
are the outer tensors themselves and need nothing.
"""

from __future__ import annotations

import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import BARE, Block, Blocks
from secateur.graphops.model.attributes import integers
from secateur.graphops.model.graph import bodies, body_inputs, body_outputs, live_branch
from secateur.graphops.rules.registry import register


def couple_if(flow: Flow, node: ir.Node) -> None:
    """Outputs of the two branches are one, unless only one is ever taken."""
    branches = list(bodies(node).values())
    for branch in branches:
        for inner in branch:
            flow.visit(inner)
    condition = flow.value(node.inputs[0])
    own = flow.shapes.is_fixed_value(str(node.inputs[0].name if node.inputs[0] else ""))
    live = live_branch(node, condition) if own else None
    if live is not None:
        branches = [live]
    for index, output in enumerate(node.outputs):
        first, *others = [branch.outputs[index] for branch in branches]
        blocks = flow.blocks(first)
        for other in others:
            blocks = flow.unite(node, first, other)
        flow.set(output, blocks)


def couple_loop(flow: Flow, node: ir.Node) -> None:
    """What is carried enters the body, leaves it, and is one tensor in every turn."""
    (body,) = bodies(node).values()
    fed = body_inputs(node, body)
    for inner, outer, scanned in fed:
        blocks = BARE if outer is None else flow.blocks(outer)
        flow.set(inner, _slice(flow, node, outer, blocks) if scanned else blocks)
    for inner_node in body:
        flow.visit(inner_node)
    carried = [inner for inner, outer, scanned in fed if outer is not None and not scanned]
    for index, (output, inner, gathered) in enumerate(body_outputs(node, body)):
        if gathered:
            stacked = (Block(tuple(a + 1 for a in b.axes), b.labels) for b in flow.blocks(inner))
            flow.set(output, tuple(stacked))
        else:
            flow.set(output, flow.unite(node, carried[index], inner))


def _slice(flow: Flow, node: ir.Node, outer: ir.Value | None, blocks: Blocks) -> Blocks:
    """One turn's slice along axis 0, which must stay whole."""
    if outer is None:
        return blocks
    flow.freeze_axis(outer, 0, node, "SEQUENCE", "is scanned")
    return tuple(Block(tuple(a - 1 for a in b.axes), b.labels) for b in flow.blocks(outer))


def couple_scan(flow: Flow, node: ir.Node) -> None:
    """As Loop, with inputs taken slice by slice; other axes than the first are not supported."""
    for name in ("scan_input_axes", "scan_output_axes"):
        if any(integers(node, name) or ()):
            raise ValueError(f"{name} other than 0")
    couple_loop(flow, node)


register("If", "control", couple_if)
register("Loop", "control", couple_loop)
register("Scan", "control", couple_scan, since=9)
