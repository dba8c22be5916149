"""What nothing in a graph reads, and its removal."""

from __future__ import annotations

import onnx_ir as ir

from secateur.graphops.model.graph import walk


def unread(graph: ir.Graph) -> set[str]:
    """Initializers, and first outputs of nodes, that nothing reads."""
    nodes = {
        str(node.outputs[0].name)
        for node in graph
        if not any(output.uses() or output.is_graph_output() for output in node.outputs)
    }
    return nodes | {str(name) for name, value in graph.initializers.items() if not value.uses()}


def drop_unread(graph: ir.Graph, before: set[str], *, listed: bool = False) -> None:
    """Removes what lost its readers (branches, shape arithmetic); what was dead before stays.

    Args:
        graph: of the result.
        before: names of what nothing read in the original.
        listed: whether initializers go that the graph lists among its inputs (old IR).
    """
    for node in reversed(list(graph)):
        dead = not any(output.uses() or output.is_graph_output() for output in node.outputs)
        if dead and str(node.outputs[0].name) not in before:
            discard(node)
    for name, value in list(graph.initializers.items()):
        if value.uses() or value.is_graph_output() or name in before:
            continue
        if value.is_graph_input():
            if not listed:
                continue
            graph.inputs.remove(value)
        del graph.initializers[name]


def discard(node: ir.Node) -> None:
    """Removes a node that nothing reads; its bodies let go of what they read from outside."""
    assert node.graph is not None
    for inner in walk([node]):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)
    node.graph.remove(node, safe=True)
