"""What regions cost: multiply-accumulates, weights and layers of any set of nodes."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.graphops.model.graph import node_label
from secateur.graphops.planning import cost
from secateur.graphops.regions.flowgraph import FlowGraph


class Costs:
    """Costs by node of one model, nothing of it cut.

    Args:
        graph: of the model.
        copies: name of each copy that normalising made → name of its source.
    """

    def __init__(self, graph: FlowGraph, copies: Mapping[str, str]) -> None:
        macs = cost.macs_by_node(graph.coupling)
        self._macs = [macs.get(node_label(node), 0.0) for node in graph.nodes]
        self._layers = graph.layers
        self._sizes = cost.elements_by_constant(graph.coupling)
        self._holders: dict[str, set[int]] = {}  # nodes that read, or are, a constant
        for name in self._sizes:
            holders = self._holders.setdefault(copies.get(name, name), set())
            holders.update(graph.readers.get(name, ()))
            if name in graph.producer:
                holders.add(graph.producer[name])
        self._at: dict[int, list[str]] = {}
        for name, holders in self._holders.items():
            for place in holders:
                self._at.setdefault(place, []).append(name)

    def of(self, gone: frozenset[int]) -> dict[str, float]:
        """What goes with some nodes, by target: `macs`, `params`, `layers`."""
        names = {name for place in gone for name in self._at.get(place, ())}
        return {
            "macs": sum(self._macs[place] for place in gone),
            "params": sum(self._sizes[n] for n in names if self._holders[n] <= gone),
            "layers": len(self._layers & gone),
        }
