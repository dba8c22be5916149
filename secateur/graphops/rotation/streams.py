"""Finds streams: channels that only matrix products write and read, with sums in between.

    x = Σ over producers of W·a + b        y = V·x at every reader

Nothing sees one channel of x apart from the others, so that for any invertible T the model with
T·W, T·b and V·T⁻¹ computes what it did (Ashkboos et al.: SliceGPT, ICLR 2024, call it
computational invariance). The residual streams of networks with linear bottlenecks are such
(Sandler et al.: MobileNetV2, CVPR 2018). No name and no pattern is consulted: coupling says where
the channels run, the rules say what each operator on the way does to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops import rules
from secateur.graphops.calibration.moments import linear_maps
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.attributes import operand
from secateur.graphops.model.graph import constant_of, walk
from secateur.graphops.rules.linear import LinearMap

_REAL = (ir.DataType.FLOAT, ir.DataType.DOUBLE)

# Axis of a tensor → the group of units that lies along it, all of them and in the group's order.
Lies = Mapping[int, int]


@dataclass(slots=True)
class Stream:
    """Channels for which any basis will do.

    Attributes:
        group: index of the group of units.
        producers: products that write them.
        readers: products that read them.
        added: constants that are added to them, by name, and the axis along which they lie.
    """

    group: int
    producers: list[LinearMap] = field(default_factory=list)
    readers: list[LinearMap] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)


def find(
    model: ir.Model, coupling: Coupling, joined: Iterable[tuple[str, str]] = ()
) -> list[Stream]:
    """The streams of a model, by group.

    Args:
        model: normalised; read only.
        coupling: of that model.
        joined: pairs of tensors of which one may come to be read in the other's place.
    """
    search = _Search(model, coupling)
    for node in walk(model.graph):
        search.visit(node)
    for entry, end in joined:
        search.join(entry, end)
    return [
        stream
        for group, stream in sorted(search.streams.items())
        if group not in search.spoiled and stream.producers and stream.readers
    ]


class _Search:
    """Streams found so far, and the groups that are none."""

    def __init__(self, model: ir.Model, coupling: Coupling) -> None:
        self.streams: dict[int, Stream] = {}
        self.spoiled: set[int] = set()
        self._graph, self._opsets = model.graph, dict(model.opset_imports)
        self._views = {view.node: view for view in linear_maps(model, coupling.shapes)}
        self._coupling = coupling
        self._group_of = np.full(coupling.count + 1, -1)
        for index, group in enumerate(coupling.groups):
            if group.kind == "channel" and not group.normalised_by:
                self._group_of[group.units] = index
        self._order: dict[int, npt.NDArray[np.int32]] = {}
        self._known: dict[str, Lies] = {}

    def visit(self, node: ir.Node) -> None:
        """Notes what a node does to the streams that it reads or writes."""
        if node.op_type == "Constant" and node.domain == "":
            return  # what reads it says what it does
        read = {index: self._lies(value) for index, value in enumerate(node.inputs)}
        written = [self._lies(value) for value in node.outputs]
        touched = {group for lies in (*read.values(), *written) for group in lies.values()}
        if not touched:
            return
        rule, view = rules.of(node, self._opsets), self._views.get(node)
        passed: Iterator[int] = iter(())
        if view is not None:
            passed = self._product(view, read, written[0])
        elif rule is not None and node.graph is self._graph and (rule.additive or rule.moves):
            indices = (0,) if rule.moves else rule.reads or tuple(read)
            passed = self._sum(node, indices, read, written)
        self.spoiled |= touched - set(passed)

    def join(self, entry: str, end: str) -> None:
        """Leaves alone what runs along one of two tensors and not along the other."""
        first, second = (self._known.get(name, {}) for name in (entry, end))
        self.spoiled |= {group for _, group in first.items() ^ second.items()}

    def _product(self, view: LinearMap, read: Mapping[int, Lies], written: Lies) -> Iterator[int]:
        """The groups that are summed over, or that are channels of the output."""
        weight = view.node.inputs[view.weight]
        if view.groups != 1 or not self._ours(weight):
            return
        along = set(read[view.weight].values())
        others = {
            group
            for index, lies in read.items()
            if index not in (0, view.weight, view.bias)
            for group in lies.values()
        }
        inner, outer = read[0].get(view.x_axis), written.get(view.y_axis)
        if inner is not None and inner in along - others and _once(inner, read[0]):
            self._stream(inner).readers.append(view)
            yield inner
        if outer is not None and outer in along - others:
            bias = None if view.bias is None else operand(view.node, view.bias)
            if bias is None or self._added(outer, bias):
                self._stream(outer).producers.append(view)
                yield outer

    def _sum(
        self,
        node: ir.Node,
        indices: Sequence[int],
        read: Mapping[int, Lies],
        written: Sequence[Lies],
    ) -> Iterator[int]:
        """The groups that run through every operand and output, each once."""
        for group in set(read[0].values()):
            sides = [*(read[index] for index in indices), *written]
            if not all(_once(group, lies) for lies in sides):
                continue
            operands = [node.inputs[index] for index in indices]
            if all(
                value is None or constant_of(value) is None or self._added(group, value)
                for value in operands
            ):
                yield group

    def _stream(self, group: int) -> Stream:
        return self.streams.setdefault(group, Stream(group))

    def _added(self, group: int, value: ir.Value) -> bool:
        """Notes a constant that is added; whether it can be."""
        axes = [axis for axis, one in self._lies(value).items() if one == group]
        if len(axes) != 1 or not self._ours(value):
            return False
        self._stream(group).added[str(value.name)] = axes[0]
        return True

    def _ours(self, value: ir.Value | None) -> bool:
        """Whether it is a constant of real numbers that one node reads and no caller sets."""
        tensor = constant_of(value)
        if value is None or tensor is None or tensor.dtype not in _REAL:
            return False
        return len(value.uses()) == 1 and not value.is_graph_input()

    def _lies(self, value: ir.Value | None) -> Lies:
        """Which groups lie along a tensor; one that does not lie there whole is spoiled."""
        if value is None or not value.name:
            return {}
        known = self._known.get(value.name)
        if known is None:
            known = self._known[value.name] = {
                axis: group
                for axis, units in self._coupling.axes(value.name).items()
                if (group := self._group(units)) is not None
            }
        return known

    def _group(self, units: npt.NDArray[np.int32]) -> int | None:
        group = int(self._group_of[units[0]])
        whole = group >= 0 and units.size == self._coupling.groups[group].units.size
        if whole and np.array_equal(units, self._order.setdefault(group, units)):
            return group
        self.spoiled |= set(self._group_of[units].tolist()) - {-1}
        return None


def _once(group: int, lies: Lies) -> bool:
    """Whether a group lies along exactly one axis of a tensor."""
    return list(lies.values()).count(group) == 1
