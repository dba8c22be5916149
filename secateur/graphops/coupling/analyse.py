"""One pass of labels through the graph: from a model to what can be cut and what cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops import rules
from secateur.graphops.coupling import branches, units
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.units import Coupling, MacTerm
from secateur.graphops.model.attributes import MALFORMED
from secateur.graphops.model.collecting import uncollected
from secateur.graphops.model.graph import (
    captured_by,
    constants,
    node_label,
    walk,
)
from secateur.graphops.model.names import matching
from secateur.graphops.model.shapes import Shapes
from secateur.recipe import Recipe


@uncollected()
def couple(model: ir.Model, shapes: Shapes, recipe: Recipe | None = None) -> Coupling:
    """Labels every prunable position, passes the labels through all nodes, and builds the units.

    Cost is linear in nodes and labels.

    Args:
        model: normalised (see `model.normalise`).
        shapes: of its tensors.
        recipe: what it says of `ignore`, `grouped` and heads; the defaults when None.

    Raises:
        Refused: `UNMATCHED_IGNORE` when a glob matches nothing.
    """
    graph = model.graph
    recipe = recipe or Recipe()
    flow = Flow(
        shapes=shapes,
        opsets=dict(model.opset_imports),
        constants=constants(graph),
        graph=graph,
        by_dimension="head_dim" in recipe.granularity,
    )
    macs: list[MacTerm] = []
    flow.visit = lambda node: _visit(flow, node)
    for node in graph:
        flow.visit(node)
    for node in walk(graph):
        rule = rules.find(node.domain, node.op_type, flow.opset(node))
        if rule is not None and rule.macs is not None:
            with contextlib.suppress(*MALFORMED):
                macs += [MacTerm(node_label(node), axes) for axes in rule.macs(flow, node)]
    for value in graph.outputs:
        for block in flow.blocks(value):
            flow.freeze(block.labels, None, "GRAPH_OUTPUT", f"graph output {value.name!r}")
    branches.follow(flow)
    flow.freeze_held()
    flow.freeze_answers()
    _ignore(flow, graph, recipe.ignore)
    return units.build(flow, tuple(macs), recipe.grouped)


def _visit(flow: Flow, node: ir.Node) -> None:
    if _is_shape_arithmetic(flow, node):
        if node.op_type not in ("Shape", "Size"):  # those measure what is left
            _freeze_reached(flow, node, "BARE_AXIS", "becomes a size")
        for index in range(len(node.inputs)):
            flow.follow(node, index)  # what is known before anything is chosen
        return
    rule = rules.find(node.domain, node.op_type, flow.opset(node))
    if rule is None:
        for outer in captured_by(node) or ():
            flow.freeze_value(outer, node, "SUBGRAPH", "is read by a subgraph")
        detail = rules.reason(node.domain, node.op_type) or "the operator has no rule"
        _freeze_reached(flow, node, "NO_RULE", detail)
        return
    for index, value in enumerate(node.inputs):
        if rule.reads is None or index in rule.reads or value is None:
            continue
        if value.name in flow.constants:
            flow.held.setdefault(value.name, node)
        else:
            flow.freeze_value(value, node, "UNSUPPORTED_FORM", f"reaches input {index}")
    try:
        rule.couple(flow, node)
    except MALFORMED as error:
        _freeze_reached(flow, node, "UNSUPPORTED_FORM", f"{type(error).__name__}: {error}")
        for value in node.outputs:
            flow.set(value, ())
        return
    if rule.moves:
        flow.move_pointers(node)


def _is_shape_arithmetic(flow: Flow, node: ir.Node) -> bool:
    """Whether all results are integers (or scalars) known before the model runs. A truth for each
    position (a weight below a number) is no size: it goes with its position.

    A number that is repeated along two axes or more (indices of a scatter) can be repeated less
    often: the node's rule says so.
    """
    if node.op_type in ("Expand", "Tile", "ConstantOfShape") and node.domain == "":
        source, made = flow.value(node.inputs[0]), flow.shape(node.outputs[0])
        alike = node.op_type == "ConstantOfShape" or (source is not None and source.size == 1)
        if alike and made is not None and len(made) > 1:
            return False
    for value in node.outputs:
        known = flow.value(value)
        if known is None or (known.dtype.kind in "fb" and known.size > 1):
            return False
    return bool(node.outputs)


def _freeze_reached(flow: Flow, node: ir.Node, code: str, detail: str) -> None:
    """Freezes the labels that reach a node; its own constants just stay as they are."""
    flow.hold(node)
    for value in node.inputs:
        if value is not None and value.name not in flow.constants:
            flow.freeze_value(value, node, code, detail)


def _ignore(flow: Flow, graph: ir.Graph, globs: Sequence[str]) -> None:
    for glob in globs:
        matched = False
        for node in graph:
            if node.name and matching([glob], [node.name]):
                matched = True
                for value in node.outputs:
                    _keep(flow, value, glob)
        for name, value in graph.initializers.items():
            if matching([glob], [str(name)]):
                matched = True
                _keep(flow, value, glob)
        if not matched:
            raise refuse(
                Code.UNMATCHED_IGNORE,
                f"--ignore {glob!r} matches no node and no initializer",
                nodes=(glob,),
                expected="a glob over their names",
                found=f"{len(graph)} nodes, {len(graph.initializers)} initializers, none matching",
                hint="`secateur inspect` lists the names.",
            )


def _keep(flow: Flow, value: ir.Value, glob: str) -> None:
    producer = value.producer()
    names = [str(value.name), *([] if producer is None else [node_label(producer)])]
    along = [block.labels for block in flow.blocks(value)]
    for gone in (flow.parts[name] for name in names if name in flow.parts):
        if len(gone) > 1:
            flow.keep(np.array(list(gone), np.int32))
        else:
            along.append(np.array(list(gone), np.int32))
    for labels in along:
        flow.freeze(labels, None, "IGNORED", f"matches --ignore {glob!r}")
