"""The graph as regions see it: nodes that pass data, and what every path from them must cross.

Constants and the arithmetic on them, and integers that are known before the model runs (shape
arithmetic), are no data. Of what is, a *condition* is computed without a matrix product with
weights: masks, positions, tables of angles. Every layer may read it beside its entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from secateur.graphops.calibration.network import read_by
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.graph import node_label
from secateur.graphops.model.names import matching

END = -1  # the place behind all nodes, where every path ends


@dataclass(frozen=True, slots=True)
class Segment:
    """What lies between a value, or a node, and the next node that all its paths cross.

    Attributes:
        stop: that node's place, itself part of the segment; `END` where the paths only meet at
            the graph's outputs.
        nodes: places.
    """

    stop: int
    nodes: frozenset[int]


class FlowGraph:
    """Who reads what in the main graph, by names of values and places of nodes.

    Args:
        graph: of the model.
        coupling: of that model.
        ignore: globs; a node that matches, or reads an initializer that does, stays.
    """

    def __init__(self, graph: ir.Graph, coupling: Coupling, ignore: Sequence[str] = ()) -> None:
        self.nodes = list(graph)
        self.coupling = coupling
        self.outputs = {str(value.name) for value in graph.outputs}
        self.reads = [tuple({str(v.name): None for v in read_by(node)}) for node in self.nodes]
        self.writes = [tuple(str(v.name) for v in n.outputs if v.name) for n in self.nodes]
        self.producer = {name: p for p, names in enumerate(self.writes) for name in names}
        self.readers: dict[str, list[int]] = {}
        for place, names in enumerate(self.reads):
            for name in names:
                self.readers.setdefault(name, []).append(place)
        self.fixed = {str(name) for name in graph.initializers}
        self.aside: set[int] = set()  # nodes that pass no data
        self.layers: set[int] = set()  # matrix products with weights
        self.conditions: set[str] = set()
        self.kept: set[int] = set()  # nodes that match `ignore`
        self._classify(graph, ignore)
        self._stop, self._depth = self._post_dominators()

    def _classify(self, graph: ir.Graph, ignore: Sequence[str]) -> None:
        costly = {term.node for term in self.coupling.macs}
        self.conditions |= {str(value.name) for value in graph.inputs} - self.fixed
        for place, node in enumerate(self.nodes):
            reads, writes = self.reads[place], self.writes[place]
            if all(name in self.fixed for name in reads):
                self.fixed.update(writes)
                self.aside.add(place)
            elif all(self._is_shape_arithmetic(name) for name in writes):
                self.aside.add(place)
            elif node_label(node) in costly and any(map(self._is_weight, reads)):
                self.layers.add(place)
            elif all(self.is_known(name) for name in reads):
                self.conditions.update(writes)
            names = [node.name or "", *(name for name in reads if name in graph.initializers)]
            if matching(ignore, names) is not None:
                self.kept.add(place)

    def _is_shape_arithmetic(self, name: str) -> bool:
        known = self.coupling.shapes.values.get(name)
        return known is not None and (known.dtype.kind != "f" or known.size <= 1)

    def _is_weight(self, name: str) -> bool:
        """Whether a value is a constant matrix: two axes and more that are longer than 1."""
        shape = self.coupling.shapes.of(name) or ()
        return name in self.fixed and sum(size != 1 for size in shape) >= 2

    def is_known(self, name: str) -> bool:
        """Whether a value is a constant, shape arithmetic or a condition."""
        place = self.producer.get(name)
        return name in self.fixed or name in self.conditions or place in self.aside

    def data_readers(self, name: str) -> Iterator[int]:
        """Places of the nodes to which a value passes data."""
        return (place for place in self.readers.get(name, ()) if place not in self.aside)

    def used_outputs(self, place: int) -> list[str]:
        """Outputs of a node that carry data to somebody."""
        return [
            name
            for name in self.writes[place]
            if name in self.outputs or any(True for _ in self.data_readers(name))
        ]

    # -- what every path crosses -----------------------------------------------------------------

    def _post_dominators(self) -> tuple[dict[int, int], dict[int, int]]:
        """For each node, the next one that every path to an output crosses; and its depth."""
        self._stop, self._depth = {}, {END: 0}
        for place in range(len(self.nodes) - 1, -1, -1):
            if place in self.aside:
                continue
            stop = self._meeting(self.used_outputs(place))
            if stop is not None:
                self._stop[place], self._depth[place] = stop, self._depth[stop] + 1
        return self._stop, self._depth

    def _meeting(self, names: Sequence[str]) -> int | None:
        """The first node that every path from the values crosses; None where none goes on."""
        meeting: int | None = None
        for name in names:
            ways = [place for place in self.data_readers(name) if place in self._depth]
            for way in [*ways, END] if name in self.outputs else ways:
                meeting = way if meeting is None else self._common(meeting, way)
        return meeting

    def _common(self, one: int, other: int) -> int:
        while one != other:
            if self._depth[one] >= self._depth[other]:
                one = self._stop[one]
            else:
                other = self._stop[other]
        return one

    def segment(self, names: Sequence[str]) -> Segment | None:
        """From values to the node where all their paths meet; None where none goes on."""
        stop = self._meeting(names)
        if stop is None:
            return None
        frontier, found = list(names), set[int]()
        while frontier and stop != END:
            for place in self.data_readers(frontier.pop()):
                if place not in found:
                    found.add(place)
                    if place != stop:
                        frontier.extend(self.writes[place])
        return Segment(stop, frozenset(found))

    # -- what goes -------------------------------------------------------------------------------

    def gone(self, entries: Mapping[str, str]) -> frozenset[int]:
        """Nodes that nothing needs any more when readers of each exit read its entry.

        Args:
            entries: exit → entry.
        """
        gone: set[int] = set()
        needed = set(entries.values()) - set(entries)
        frontier = [self.producer[name] for name in entries if name in self.producer]
        while frontier:
            place = frontier.pop()
            if place in gone or not all(
                name in entries
                or (
                    name not in self.outputs
                    and name not in needed
                    and gone.issuperset(self.readers.get(name, ()))
                )
                for name in self.writes[place]
            ):
                continue
            gone.add(place)
            frontier += [self.producer[n] for n in self.reads[place] if n in self.producer]
        return frozenset(gone)

    def same_kind(self, one: str, other: str) -> bool:
        """Whether two values have one element type, and one shape under both bindings."""
        shapes = self.coupling.shapes
        for known in (shapes.first, shapes.second):
            shape = known.get(one)
            if shape is None or None in shape or shape != known.get(other):
                return False
        kinds = (shapes.elements.get(one), shapes.elements.get(other))
        return kinds[0] is not None and kinds[0] == kinds[1]
