"""From equalities to units and groups.

Equal labels form connected components. A *unit* is the smallest set of slices that must go
together: a component that slices at least one constant and contains nothing frozen. Units that
slice the same constants on the same axes, equally often, form a *group* and are ranked against
one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.coupling.facts import BranchEnd, Contraction, Reason
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.grouping import components, decide, frozen_components
from secateur.graphops.coupling.labels import FIXED, Blocks, Labels, rows_along, thin
from secateur.graphops.model.graph import node_label
from secateur.graphops.model.shapes import Shapes
from secateur.recipe import Grouped

Units = npt.NDArray[np.int32]  # unit of each position; FIXED (0) where nothing can be cut
Axis = tuple[str, int]  # (tensor name, axis)

# Reasons that are no news to anybody: kernel positions, and the part of a grouped weight that
# its other axis already decides.
STRUCTURAL = ("KERNEL", "GROUPS")


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Interchangeable units.

    Attributes:
        id: of the first constant axis the units slice; stable within one model.
        kind: `channel`, `head`, `head_dim` or `expert`.
        units: their numbers, in the order in which they lie along the first constant's axis.
        axes: (constant, axis) → how many positions one unit takes there.
        normalised_by: nodes that normalise or reduce inexactly across them.
    """

    id: str
    kind: str
    units: Units
    axes: Mapping[Axis, int]
    normalised_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FrozenReason:
    """A reason, with the number of weight positions it keeps (first reason counted)."""

    reason: Reason
    channels: int


@dataclass(frozen=True, slots=True)
class MacTerm:
    """Multiply-accumulates of one node: the product of the sizes of `axes`."""

    node: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Coupling:
    """What the analysis knows of a model; everything later reads it and nothing changes it.

    Attributes:
        shapes: of every tensor.
        constants: tensors that hold weights, by name.
        groups: of units that may go.
        frozen: why others may not.
        count: units are numbered 1 … count; 0 means "stays".
        segments: sets of units, and how many positions of each must stay.
        contractions: operand axes that nodes sum over.
        macs: cost of the nodes that multiply and accumulate.
        branch_ends: where branches end that go with units.
        parts: what such branches hold: names of constants and labels of nodes → the units with
            all of which they go.
        routed: labels of nodes that work on what chose their branch, and would choose another.
        numbers: tensors that name positions of an axis → the unit of each of those.
    """

    shapes: Shapes
    constants: Mapping[str, ir.TensorProtocol]
    groups: tuple[UnitGroup, ...]
    frozen: tuple[FrozenReason, ...]
    count: int
    segments: tuple[tuple[Units, int], ...]
    contractions: tuple[Contraction, ...]
    macs: tuple[MacTerm, ...]
    branch_ends: tuple[BranchEnd, ...]
    parts: Mapping[str, Units]
    routed: Set[str]
    numbers: Mapping[str, Units]
    _blocks: Mapping[str, Blocks]
    _unit_of: Units  # by label
    _cache: dict[str, dict[int, Units]] = field(default_factory=dict)

    def axes(self, name: str) -> Mapping[int, Units]:
        """For a tensor: axis → the unit of each position. Axes that stay whole are not listed."""
        known = self._cache.get(name)
        if known is None:
            known = {}
            for block in self._blocks.get(name, ()):
                place, units = _varying_line(block.labels, self._unit_of)
                if units.any():
                    known[block.axes[place]] = units
            self._cache[name] = known
        return known

    def gone(self, name: str, keep: npt.NDArray[np.bool_]) -> bool:
        """Whether a constant, or a node by its label, goes whole with units that do."""
        return name in self.parts and not keep[self.parts[name]].any()


def _varying_line(labels: Labels, unit_of: Units) -> tuple[int, Units]:
    """The axis of a block along which its units differ, and the units along it.

    The resolution made it one axis, so that a line along each says which; the positions of a joint
    block of channels and space are too many to look at for every tensor.
    """
    for place in reversed(range(labels.ndim)):
        index: list[int | slice] = [0] * labels.ndim
        index[place] = slice(None)
        units = unit_of[labels[tuple(index)]]
        if labels.ndim == 1 or (units != units[0]).any():
            return place, units
    return 0, units  # all one


def _constant_along(array: npt.NDArray[np.int32], place: int) -> bool:
    return bool((array == array.take([0], axis=place)).all())


def resolve_rectangles(flow: Flow) -> tuple[int, npt.NDArray[np.int32]]:
    """Makes every joint block a product again, and returns the components after that.

    A tensor is sliced axis by axis, so what goes from a joint block must be whole slices along
    one of its axes. Where the operators did not decide which, the axis that leaves more units
    does, among those that are not frozen.
    """
    while True:
        count, component = components(flow)
        frozen = frozen_components(flow, count, component)
        changed = False
        touched = np.zeros(count, np.bool_)
        # What stays is all one: no equality makes it the same component.
        part_of = np.where(frozen, component[FIXED], np.arange(count))[component]
        for labels in flow.rectangles:
            parts = part_of[labels]
            varying = [p for p in range(parts.ndim) if not _constant_along(parts, p)]
            if len(varying) < 2:
                continue
            changed = True
            if touched[parts].any():
                continue  # a neighbour has just decided for it; the next pass sees how
            touched[parts] = True
            # One axis must be chosen: the one with the most slices free of frozen members.
            free = [_free_slices(frozen[parts], place) for place in varying]
            place = varying[int(np.argmax(free))]
            flow.join_slices(labels, place)
        if not changed:
            return count, component


def _free_slices(frozen: npt.NDArray[np.bool_], place: int) -> int:
    return int((~rows_along(frozen, place).any(axis=1)).sum())


def build(flow: Flow, macs: tuple[MacTerm, ...], grouped: Grouped = "auto") -> Coupling:
    """Units and groups of a finished flow.

    Args:
        flow: finished.
        macs: cost of the nodes.
        grouped: how grouped axes are cut.
    """
    decide(flow, grouped)
    count, component = resolve_rectangles(flow)
    frozen_by = np.full(count, -1, np.int64)
    for labels, reason in reversed(flow.frozen):
        frozen_by[component[labels]] = reason
    frozen_by[component[FIXED]] = len(flow.reasons)

    positions: list[tuple[Axis, Labels]] = [
        ((name, axis), block.labels)
        for name in flow.constants
        for block in flow.blocks_of.get(name, ())
        for axis in block.axes
    ]
    slices = _slices(positions, component, count)
    usable = slices.touched & (frozen_by < 0)
    number = np.zeros(count, np.int32)
    number[usable] = np.arange(1, int(usable.sum()) + 1, dtype=np.int32)
    unit_of = number[component]
    unit_of[FIXED] = 0

    parts = {name: np.unique(unit_of[list(labels)]) for name, labels in flow.parts.items()}
    return Coupling(
        shapes=flow.shapes,
        constants=flow.constants,
        groups=_groups(flow, slices, number, unit_of),
        frozen=_frozen(flow, slices, frozen_by),
        count=int(usable.sum()),
        segments=tuple((unit_of[s.labels].reshape(-1), s.least) for s in flow.segments),
        contractions=tuple(flow.contractions),
        macs=macs,
        branch_ends=_branch_ends(flow, unit_of),
        parts={name: units for name, units in parts.items() if units[0] != FIXED},
        routed=flow.routed,
        numbers={name: unit_of[one.labels] for name, one in flow.pointers.items()},
        _blocks=flow.blocks_of,
        _unit_of=unit_of,
    )


def _branch_ends(flow: Flow, unit_of: Units) -> tuple[BranchEnd, ...]:
    """Those whose labels may all go, said in units."""
    found = []
    for end in flow.branch_ends:
        units = frozenset(unit_of[list(end.labels)].tolist())
        if FIXED not in units:
            found.append(replace(end, labels=units))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Slices:
    """Which component takes how many positions of which constant axis, as parallel arrays
    sorted by component, then axis."""

    axes: list[Axis]
    component: npt.NDArray[np.int64]
    axis: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]
    touched: npt.NDArray[np.bool_]


def _slices(
    positions: list[tuple[Axis, Labels]], component: npt.NDArray[np.int32], count: int
) -> _Slices:
    axes = [axis for axis, _ in positions]
    if not positions:
        empty = np.zeros(0, np.int64)
        return _Slices([], empty, empty, empty, np.zeros(count, np.bool_))
    parts = np.concatenate([component[labels.reshape(-1)] for _, labels in positions])
    owner = np.repeat(np.arange(len(axes)), [labels.size for _, labels in positions])
    key, times = np.unique(parts.astype(np.int64) * len(axes) + owner, return_counts=True)
    touched = np.zeros(count, np.bool_)
    touched[parts] = True
    return _Slices(axes, key // len(axes), key % len(axes), times, touched)


def _groups(flow: Flow, slices: _Slices, number: Units, unit_of: Units) -> tuple[UnitGroup, ...]:
    usable = number[slices.component] > 0
    component, axis, times = slices.component[usable], slices.axis[usable], slices.times[usable]
    if not component.size:
        return ()
    starts = np.flatnonzero(np.r_[True, component[1:] != component[:-1]])
    ends = np.r_[starts[1:], component.size]
    # Components with the same (axis, times) pairs: by the sum of one mixed number per pair.
    signature = np.add.reduceat(_mixed(axis * (int(times.max()) + 1) + times), starts)
    heads, experts = _flags(flow.heads, unit_of, number), _experts(flow, unit_of, number)
    signature[experts[number[component[starts]]]] += np.uint64(1)
    _, first, group = np.unique(signature, return_index=True, return_inverse=True)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    kind = "head_dim" if flow.by_dimension else "head"
    order = np.argsort(first)  # groups in the order of their first units
    group_of = np.full(int(number.max()) + 1, -1)
    for rank, which in enumerate(order):
        group_of[number[component[starts[members[which]]]]] = rank
    normalised = _normalised(flow, group_of[unit_of])
    groups = []
    for rank, which in enumerate(order):
        indices = members[which]
        start, end = starts[indices[0]], ends[indices[0]]
        units = number[component[starts[indices]]]
        taken = {
            slices.axes[a]: int(t) for a, t in zip(axis[start:end], times[start:end], strict=True)
        }
        first_name, first_axis = next(iter(taken))
        groups.append(
            UnitGroup(
                id=f"{first_name}[{first_axis}]",
                kind="expert" if experts[units[0]] else kind if heads[units[0]] else "channel",
                units=units,
                axes=taken,
                normalised_by=tuple(sorted(normalised.get(rank, ()))),
            )
        )
    return _unique_ids(groups)


def _mixed(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Other numbers for other numbers, as good as random (SplitMix64; Steele, Lea, Flood: Fast
    Splittable Pseudorandom Number Generators, 2014)."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed


def _unique_ids(groups: list[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Several groups may begin with the same axis (a Concat's consumer): number them."""
    seen: dict[str, int] = {}
    result = []
    for group in groups:
        seen[group.id] = seen.get(group.id, 0) + 1
        suffix = f"#{seen[group.id]}" if seen[group.id] > 1 else ""
        result.append(replace(group, id=group.id + suffix))
    return tuple(result)


def _flags(marked: list[Labels], unit_of: Units, number: Units) -> npt.NDArray[np.bool_]:
    flags = np.zeros(int(number.max(initial=0)) + 1, np.bool_)
    for labels in marked:
        flags[unit_of[labels]] = True
    flags[0] = False
    return flags


def _experts(flow: Flow, unit_of: Units, number: Units) -> npt.NDArray[np.bool_]:
    """Units that are chosen by number, or go with matrices: of a branch, or of a stack."""
    matrices = [
        np.array(list(labels), np.int32)
        for name, labels in flow.parts.items()
        if name in flow.constants and len(flow.shapes.first[name]) > 1 and len(labels) == 1
    ]
    chosen = _flags([*flow.experts, *matrices], unit_of, number)
    return chosen | _compared_stacks(flow, unit_of, number)


def _compared_stacks(flow: Flow, unit_of: Units, number: Units) -> npt.NDArray[np.bool_]:
    """Units that hold one matrix each of a stack, and are weighed by a softmax across them."""
    stacked = _flags(flow.stacks, unit_of, number)
    if not stacked.any():
        return stacked
    weighed = [
        block.labels
        for contraction in flow.contractions
        if contraction.chosen == 0
        for block in flow.blocks(contraction.node.inputs[contraction.index])
        if contraction.axis in block.axes
    ]
    return stacked & _flags(weighed, unit_of, number)


def _normalised(flow: Flow, group_of: npt.NDArray[np.int64]) -> dict[int, set[str]]:
    """group → names of the nodes that are the law's named exceptions for it.

    Args:
        flow: finished.
        group_of: group of each label, negative for none.
    """
    result: dict[int, set[str]] = {}
    for contraction in flow.contractions:
        if contraction.exact:
            continue
        value = contraction.node.inputs[contraction.index]
        for block in flow.blocks(value):
            if contraction.axis in block.axes:
                for group in np.unique(group_of[thin(block.labels)]).tolist():
                    result.setdefault(group, set()).add(node_label(contraction.node))
    return result


def _frozen(
    flow: Flow, slices: _Slices, frozen_by: npt.NDArray[np.int64]
) -> tuple[FrozenReason, ...]:
    """Counts weight positions by the reason that keeps them."""
    weights = np.array([len(flow.shapes.first[name]) >= 2 for name, _ in slices.axes], np.bool_)
    if not weights.size:
        return ()
    reasons = frozen_by[slices.component]
    told = np.array([reason.code not in STRUCTURAL for reason in flow.reasons] + [False])
    counted = weights[slices.axis] & (reasons >= 0) & told[np.maximum(reasons, 0)]
    channels = np.bincount(
        reasons[counted], weights=slices.times[counted], minlength=len(flow.reasons)
    )
    return tuple(
        FrozenReason(reason, int(channels[index]))
        for index, reason in enumerate(flow.reasons)
        if channels[index]
    )
