"""Blocks: runs of nodes with several layers, whose work one tensor carries on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from secateur.graphops import rules
from secateur.graphops.calibration.moments import tensor_of
from secateur.graphops.calibration.network import last_uses, read_by
from secateur.graphops.repair.target import Repairable, Target

LAYERS = 4  # of a block at least: fewer have little to make up for


@dataclass(frozen=True, slots=True)
class Block:
    """A run of nodes.

    Attributes:
        first: its first node.
        end: the only tensor that its layers have a part in and that is read behind it.
        targets: the layers in it whose weights can be set.
    """

    first: ir.Node
    end: str
    targets: tuple[Target, ...]


def blocks(model: ir.Model, found: list[Repairable]) -> list[Block]:
    """Blocks of `LAYERS` layers or a few more, in the order of the graph.

    Each ends as early as it can, but behind the sums that its layers end in, and behind a Relu or
    what else is flat there: what is flattened need not be as it was. So the last block ends before
    a Softmax that the model ends in. Layers that are left there, too few for a block of their own,
    are of the one before.

    Args:
        model: the pruned one.
        found: what can be set in it.
    """
    layers = {one.node: one for one in found if isinstance(one, Target) and _is_real(one)}
    nodes, left, opsets = list(model.graph), len(layers), dict(model.opset_imports)
    last_use = last_uses(nodes) | {str(value.name): len(nodes) for value in model.graph.outputs}
    made: list[Block] = []
    first, mine, awaited = 0, list[Target](), set[str]()
    reached, alive = set[ir.Value](), set[ir.Value]()
    for place, node in enumerate(nodes):
        if node in layers:
            mine.append(layers[node])
            awaited.add(layers[node].end.observed)
        awaited -= {str(value.name) for value in node.outputs}
        read = read_by(node)
        if node in layers or (_passes_on(node) and not reached.isdisjoint(read)):
            reached |= set(node.outputs)
            alive |= {value for value in node.outputs if last_use.get(str(value.name), -1) > place}
        alive -= {value for value in read if last_use[str(value.name)] <= place}
        enough = len(mine) >= LAYERS or 0 < len(mine) == left
        if not enough or awaited or len(alive) != 1:
            continue
        (end,) = alive
        if _is_flattened(end, opsets) or _is_dequantised(end):
            continue
        start = nodes[first]
        if len(mine) < LAYERS and made:
            before = made.pop()
            start, mine = before.first, [*before.targets, *mine]
            left += len(before.targets)
        if len(mine) > 1:
            made.append(Block(start, str(end.name), tuple(mine)))
        left -= len(mine)
        first, mine = place + 1, []
        reached.clear()
        alive.clear()
    return made


def _is_flattened(value: ir.Value, opsets: Mapping[str, int]) -> bool:
    """Whether only a node that is flat beyond a bound reads it."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return False
    rule = rules.of(next(iter(value.uses())).node, opsets)
    return rule is not None and rule.flat is not None


def _is_dequantised(value: ir.Value) -> bool:
    """Whether it is integers that stand for real numbers."""
    return any(user.op_type == "DequantizeLinear" for user, _ in value.uses())


def _passes_on(node: ir.Node) -> bool:
    """Whether what a node puts out depends on the numbers that it reads."""
    return node.op_type not in ("Shape", "Size")


def _is_real(target: Target) -> bool:
    tensor = tensor_of(target.view)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT
