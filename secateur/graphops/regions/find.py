"""Finds regions: single-entry, single-exit parts whose removal leaves shapes and types right.

A region begins at a value, its *entry*, and ends at a value, its *exit*, which every path from the
entry to an output crosses (post-dominance). Inside it nothing else is read but constants, shape
arithmetic and conditions such as masks (dominance, those aside). Where exit and entry have one
shape and one type, whoever reads the exit can read the entry instead: `x + f(x)` becomes `x`, a
transformer block its input, a convolution with as many channels out as in nothing at all.
No name and no pattern is consulted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secateur.graphops.model.graph import node_label
from secateur.graphops.regions.flowgraph import END, FlowGraph, Segment

# A region spans at most so many smaller ones in a row (a decoder block is self-attention,
# cross-attention and feed-forward); longer runs go one by one, each choice measured.
_IN_A_ROW = 3
_MOST_LAYERS = 64  # of one region: bounds the search in graphs where no shape ever returns


@dataclass(frozen=True, slots=True)
class Region:
    """What can be left out.

    Attributes:
        entry: the value that takes the place of `exit`.
        exit: the value that goes.
        nodes: places of the nodes that nothing needs any more then.
        layers: places of those among them that are matrix products with weights.
    """

    entry: str
    exit: str
    nodes: frozenset[int]
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a layer is in no region.

    Attributes:
        node: label of the layer.
        entry, exit: of the smallest part around it that was looked at; `exit` is empty where
            paths only meet at the outputs.
        detail: one sentence.
    """

    node: str
    entry: str
    exit: str
    detail: str


def find(graph: FlowGraph) -> tuple[tuple[Region, ...], tuple[Refusal, ...]]:
    """All regions with at least one layer, in graph order, nested ones at every level.

    A layer is a matrix product with weights. One layer of the model always stays.
    """
    search = _Search(graph)
    inputs = [name for name in graph.readers if name not in graph.producer]
    written = (name for place in range(len(graph.nodes)) for name in graph.writes[place])
    for name in (*inputs, *written):
        if name not in graph.fixed and graph.producer.get(name) not in graph.aside:
            search.from_entry(name)
    held = graph.layers.difference(*(region.layers for region in search.regions))
    refusals = tuple(
        Refusal(node_label(graph.nodes[place]), *search.reasons[place][1:])
        for place in sorted(held)
        if place in search.reasons
    )
    return tuple(search.regions), refusals


@dataclass(slots=True)
class _Search:
    """Regions found so far, and for each layer the smallest part around it that is none."""

    graph: FlowGraph
    regions: list[Region] = field(default_factory=list)
    reasons: dict[int, tuple[int, str, str, str]] = field(default_factory=dict)
    _segments: dict[int, Segment | None] = field(default_factory=dict)

    def from_entry(self, entry: str) -> None:
        """Follows the nodes that every path from a value crosses."""
        graph = self.graph
        segment = graph.segment([entry])
        inside, made = set[int](), {entry}
        layers_before, in_a_row = 0, 0
        while segment is not None and segment.stop != END:
            inside |= segment.nodes
            made.update(name for place in segment.nodes for name in graph.writes[place])
            layers = graph.layers & inside
            exits = graph.used_outputs(segment.stop)
            end = exits[0] if len(exits) == 1 else ""
            foreign = self._foreign(segment, made, entry)
            if foreign is not None:
                self._note(layers, inside, entry, end, f"{foreign!r} enters beside the entry")
                return
            if len(layers) > _MOST_LAYERS:
                return
            if end and layers and self._offer(entry, end, inside, layers):
                in_a_row += len(layers) > layers_before
                layers_before = len(layers)
                if in_a_row > _IN_A_ROW:
                    self.regions.pop()
                    return
            if segment.stop not in self._segments:
                self._segments[segment.stop] = graph.segment(graph.used_outputs(segment.stop))
            segment = self._segments[segment.stop]
        readers = graph.layers.intersection(graph.data_readers(entry))
        self._note(
            readers | (graph.layers & inside),
            inside | set(range(len(graph.nodes))),
            entry,
            "",
            "what follows reaches the outputs in no shape that its entry has, or by several ways",
        )

    def _foreign(self, segment: Segment, made: set[str], entry: str) -> str | None:
        """A value from outside that is neither constant nor a condition."""
        graph = self.graph
        for place in sorted(segment.nodes):
            for name in graph.reads[place]:
                stream = not graph.is_known(name) or graph.same_kind(name, entry)
                if name not in made and name not in graph.fixed and stream:
                    return name
        return None

    def _offer(self, entry: str, end: str, inside: set[int], layers: set[int]) -> bool:
        """Adds the region, or notes why it is none."""
        graph = self.graph
        if not graph.same_kind(entry, end):
            shapes = graph.coupling.shapes
            detail = f"{shapes.of(entry)} enters and {shapes.of(end)} leaves"
        else:
            gone = graph.gone({end: entry})
            kept = sorted((graph.kept & gone) or (layers - gone))
            if graph.kept & gone:
                detail = f"node {node_label(graph.nodes[kept[0]])!r} matches --ignore"
            elif kept:
                detail = f"node {node_label(graph.nodes[kept[0]])!r} is needed outside as well"
            elif gone >= graph.layers:
                detail = "it holds every layer of the model"
            else:
                self.regions.append(Region(entry, end, gone, frozenset(graph.layers & gone)))
                return True
        self._note(layers, inside, entry, end, detail)
        return False

    def _note(self, layers: set[int], inside: set[int], entry: str, end: str, detail: str) -> None:
        for place in layers:
            if place not in self.reasons or len(inside) < self.reasons[place][0]:
                self.reasons[place] = (len(inside), entry, end, detail)
