"""Whole groups, or the same positions of every group: decided where everything is known.

Grouped convolutions and group normalisations read a channel axis as a matrix (groups, positions of
one group). Two cuts keep the groups equal: whole groups (rows go), or the same positions of every
group (columns go; *balanced*). A tensor is sliced axis by axis, so "as many, but other positions
of each group" cannot be written down.

Half of the positions of every group leave a quarter of a convolution's weight, half of the groups
only half: balanced cuts go deeper, but a group may have few positions or be part of a layer whose
groups are others. Both are therefore tried, for all nodes that share channels together, and what
leaves more channels free is taken; among equals the balanced cut where it leaves eight units or
more, else the finer one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph

from secateur.graphops.coupling.facts import Choice
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import FIXED, Labels
from secateur.recipe import Grouped

Components = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

_FINE = 8  # units from which on a balanced cut is fine enough
_TURNS = 64  # choices of one cluster that are decided one by one; each costs two passes


def components(flow: Flow) -> tuple[int, Components]:
    """Connected components of the labels under the equalities stated so far."""
    return _connected(flow.labels, *_pairs(flow.equal))


def _pairs(equal: Sequence[tuple[Labels, Labels]]) -> tuple[Labels, Labels]:
    """The equalities between labels that can move, end to end."""
    if not equal:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    first = np.concatenate([pair[0].reshape(-1) for pair in equal])
    second = np.concatenate([pair[1].reshape(-1) for pair in equal])
    moving = (first != FIXED) & (second != FIXED)
    return first[moving], second[moving]


def _connected(count: int, first: Labels, second: Labels) -> tuple[int, Components]:
    graph = scipy.sparse.coo_array(
        (np.ones(first.size, np.bool_), (first, second)), shape=(count, count)
    )
    found, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return int(found), component


def frozen_components(flow: Flow, count: int, component: Components) -> Mask:
    """Per component whether something in it must stay."""
    frozen = np.zeros(count, np.bool_)
    frozen[component[FIXED]] = True
    for labels, _ in flow.frozen:
        frozen[component[labels]] = True
    return frozen


def decide(flow: Flow, grouped: Grouped) -> None:
    """States the equalities of one of the two cuts for every choice of the flow."""
    undecided = []
    for choice in flow.choices:
        if grouped == "auto" and not _is_depthwise(choice):
            undecided.append(choice)
        else:
            _make(flow, choice, grouped != "balanced")
    for choice, rows in zip(undecided, _best(flow, undecided), strict=True):
        _make(flow, choice, rows)


def _is_depthwise(choice: Choice) -> bool:
    """Whether groups hold one position each, so that a balanced cut would take all or nothing."""
    return all(matrix.shape[1] == 1 for matrix in choice.matrices)


def _make(flow: Flow, choice: Choice, rows: bool) -> None:
    _state(flow, choice, rows)
    if not rows and choice.contraction is not None:
        flow.contract(choice.node, *choice.contraction)


class _Base:
    """Components of what choices read before any is made: a trial only joins what they are.

    Passing all equalities, or all labels, again for every trial would cost more than all of them
    once.
    """

    def __init__(self, flow: Flow, choices: Sequence[Choice]) -> None:
        self.flow, self.choices = flow, choices
        count, component = components(flow)
        own = np.zeros(count, np.bool_)
        own[component[FIXED]] = True
        for labels in _read(choices):
            own[component[labels]] = True
        number = np.cumsum(own, dtype=np.int32) - 1
        self.component = number[component]  # right for labels that choices read
        self.frozen = frozen_components(flow, count, component)[own]
        self.free = [index for index, choice in enumerate(choices) if self._is_free(choice)]
        for index in {*range(len(choices))} - {*self.free}:
            for labels in _read([choices[index]]):
                self.frozen[self.component[labels]] = True

    def _is_free(self, choice: Choice) -> bool:
        """Whether anything of its matrices may go; otherwise all of it stays, either way."""
        return any(not self.frozen[self.component[matrix]].all() for matrix in choice.matrices)

    def trial(self, answers: Sequence[tuple[Choice, bool]]) -> tuple[Mask, Components]:
        """(frozen, joined) under these answers, of the components here; the flow stays as it is."""
        flow, component = self.flow, self.component
        equal, held = len(flow.equal), len(flow.frozen)
        for choice, rows in answers:
            _state(flow, choice, rows)
        first, second = _pairs(flow.equal[equal:])
        count, joined = _connected(self.frozen.size, component[first], component[second])
        frozen = np.zeros(count, np.bool_)
        frozen[joined[self.frozen]] = True
        for labels, _ in flow.frozen[held:]:
            frozen[joined[component[labels]]] = True
        del flow.equal[equal:], flow.frozen[held:]
        return frozen, joined


def _read(choices: Sequence[Choice]) -> Iterator[Labels]:
    """All labels that these choices say something of."""
    for choice in choices:
        yield from (*choice.matrices, *choice.rows, *(vector for _, vector in choice.columns))


def _best(flow: Flow, choices: Sequence[Choice]) -> list[bool]:
    """Per choice whether whole groups go: if possible one answer for all that share channels."""
    if not choices:
        return []
    base = _Base(flow, choices)
    everything = [(choices[index], rows) for index in base.free for rows in (True, False)]
    _, shared = base.trial(everything)
    clusters: dict[int, list[int]] = {}
    for index in base.free:
        clusters.setdefault(int(shared[base.component[_anchor(choices[index])]]), []).append(index)
    members = list(clusters.values())
    ways = [_tell(base, members, [rows] * len(choices)) for rows in (True, False)]
    result = [True] * len(choices)
    stuck = []
    for cluster, whole, balanced in zip(members, *ways, strict=True):
        rows = _prefer_whole(whole, balanced)
        for index in cluster:
            result[index] = rows
        if len(cluster) > 1 and (whole if rows else balanced)[1] < 2:
            stuck.append(cluster)
    for turn in range(min(_TURNS, max(map(len, stuck), default=0))):
        _take_turns(base, stuck, turn, result)
    return result


def _take_turns(base: _Base, clusters: list[list[int]], turn: int, result: list[bool]) -> None:
    """Decides the next choice of each cluster given those before it; edits `result`.

    A shuffle between grouped convolutions makes the groups of one the columns of the other, and
    then the same answer for both leaves a single unit.
    """
    so_far = [cluster[: turn + 1] for cluster in clusters if turn < len(cluster)]
    ways = []
    for rows in (True, False):
        for cluster in so_far:
            result[cluster[-1]] = rows
        ways.append(_tell(base, so_far, result))
    for cluster, whole, balanced in zip(so_far, *ways, strict=True):
        result[cluster[-1]] = _prefer_whole(whole, balanced)


def _prefer_whole(whole: tuple[int, int], balanced: tuple[int, int]) -> bool:
    """Given (positions that may go, units) of the two cuts."""
    if whole[0] != balanced[0]:
        return whole[0] > balanced[0]
    return balanced[1] < min(_FINE, whole[1] + 1)


def _tell(base: _Base, clusters: list[list[int]], whole: Sequence[bool]) -> list[tuple[int, int]]:
    """Positions that may go, and fewest units of a matrix, of each cluster for these answers."""
    choices = base.choices
    asked = [index for cluster in clusters for index in cluster]
    frozen, joined = base.trial([(choices[index], whole[index]) for index in asked])
    parts = ([joined[base.component[matrix]] for matrix in choices[i].matrices] for i in asked)
    free = dict(zip(asked, (_free(matrices, frozen) for matrices in parts), strict=True))
    return [
        (sum(free[i][0] for i in cluster), min(free[i][1] for i in cluster)) for cluster in clusters
    ]


def _anchor(choice: Choice) -> int:
    """A label that can move, if the choice has one."""
    for matrix in choice.matrices:
        moving = matrix[matrix != FIXED]
        if moving.size:
            return int(moving[0])
    return FIXED


def _free(matrices: Sequence[Components], frozen: Mask) -> tuple[int, int]:
    """Positions that may go, and the fewest units in which the free ones of one matrix are."""
    positions, units = 0, []
    for parts in matrices:
        free = parts[~frozen[parts]]
        count = np.unique(free).size
        if count > 1 or free.size < parts.size:  # one unit that is everything has to stay
            positions += free.size
        units.append(count)
    return positions, min(units)


def _state(flow: Flow, choice: Choice, rows: bool) -> None:
    node = choice.node
    if rows:
        columns = [*choice.matrices, *(vector[:, None] for vector in choice.rows)]
        flow.join_rows(node, np.concatenate(columns, axis=1))
        for _, vector in choice.columns:
            flow.freeze(vector, node, "GROUPS", "whole groups go")
        return
    for matrix in choice.matrices:
        flow.join_rows(node, matrix.T)
    for index, vector in choice.columns:
        flow.join(
            node, choice.matrices[index], np.broadcast_to(vector, choice.matrices[index].shape)
        )
    for vector in choice.rows:
        flow.freeze(vector, node, "GROUPS", "every group stays")
