"""Leaves regions out: readers of a region's exit read its entry, and what nothing reads goes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from secateur.graphops.model.unread import drop_unread, unread


def bypass(model: ir.Model, entries: Mapping[str, str]) -> ir.Model:
    """A new model without some regions; the one given is not touched.

    Nodes that stay keep the names of their outputs. A graph output that a region ended in is
    written by an Identity.

    Args:
        model: that the regions were found in.
        entries: exit → entry of each region; an entry may be another's end.
    """
    result = model.clone()
    graph = result.graph
    values = {str(value.name): value for value in graph.inputs}
    values |= {str(v.name): v for node in graph for v in node.outputs if v.name}
    for end in entries:
        entry = end
        while entry in entries:
            entry = entries[entry]
        old, new = values[end], values[entry]
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        if old.is_graph_output():
            _write_output(graph, old, new)
    drop_unread(graph, unread(model.graph))
    return result


def _write_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Makes an Identity of `new` the graph output that `old` was, under its name and type."""
    name = str(old.name)
    old.name = f"{name}__removed"
    node = ir.Node("", "Identity", [new], name=f"{name}__identity")
    output = node.outputs[0]
    output.name, output.shape, output.type = name, old.shape, old.type
    graph.append(node)
    for place, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[place] = output
