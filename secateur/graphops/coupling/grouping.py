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

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.csgraph

from secateur.graphops.coupling.flow import Choice, Flow
from secateur.graphops.coupling.labels import FIXED, Labels
from secateur.recipe import Grouped

Components = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

_FINE = 8  # units from which on a balanced cut is fine enough
_TURNS = 64  # choices of one cluster that are decided one by one; each costs two passes


def components(flow: Flow) -> tuple[int, Components]:
    """Connected components of the labels under the equalities stated so far."""
    if flow.equal:
        first = np.concatenate([pair[0].reshape(-1) for pair in flow.equal])
        second = np.concatenate([pair[1].reshape(-1) for pair in flow.equal])
        moving = (first != FIXED) & (second != FIXED)
        first, second = first[moving], second[moving]
    else:
        first = second = np.zeros(0, np.int32)
    graph = scipy.sparse.coo_array(
        (np.ones(first.size, np.bool_), (first, second)), shape=(flow.labels, flow.labels)
    )
    count, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return int(count), component


def frozen_components(flow: Flow, count: int, component: Components) -> Mask:
    """Per component whether something in it must stay."""
    frozen = np.zeros(count, np.bool_)
    frozen[component[FIXED]] = True
    for labels, _ in flow.frozen:
        frozen[component[labels]] = True
    return frozen


def decide(flow: Flow, grouped: Grouped) -> None:
    """States the equalities of one of the two cuts for every choice of the flow."""
    if not flow.choices:
        return
    whole = [grouped == "whole"] * len(flow.choices)
    if grouped == "auto":
        whole = _best(flow)
    for choice, rows in zip(flow.choices, whole, strict=True):
        _state(flow, choice, rows)
        if not rows and choice.contraction is not None:
            flow.contract(choice.node, *choice.contraction)


def _best(flow: Flow) -> list[bool]:
    """Per choice whether whole groups go: if possible one answer for all that share channels."""
    everything = [(choice, rows) for choice in flow.choices for rows in (True, False)]
    _, shared = _trial(flow, everything)
    clusters: dict[int, list[int]] = {}
    for index, choice in enumerate(flow.choices):
        clusters.setdefault(int(shared[_anchor(choice)]), []).append(index)
    members = list(clusters.values())
    ways = [_tell(flow, members, [rows] * len(flow.choices)) for rows in (True, False)]
    result = [False] * len(flow.choices)
    stuck = []
    for cluster, whole, balanced in zip(members, *ways, strict=True):
        rows = _prefer_whole(whole, balanced)
        for index in cluster:
            result[index] = rows
        if len(cluster) > 1 and (whole if rows else balanced)[1] < 2:
            stuck.append(cluster)
    for turn in range(min(_TURNS, max(map(len, stuck), default=0))):
        _take_turns(flow, stuck, turn, result)
    return result


def _take_turns(flow: Flow, clusters: list[list[int]], turn: int, result: list[bool]) -> None:
    """Decides the next choice of each cluster given those before it; edits `result`.

    A shuffle between grouped convolutions makes the groups of one the columns of the other, and
    then the same answer for both leaves a single unit.
    """
    so_far = [cluster[: turn + 1] for cluster in clusters if turn < len(cluster)]
    ways = []
    for rows in (True, False):
        for cluster in so_far:
            result[cluster[-1]] = rows
        ways.append(_tell(flow, so_far, result))
    for cluster, whole, balanced in zip(so_far, *ways, strict=True):
        result[cluster[-1]] = _prefer_whole(whole, balanced)


def _prefer_whole(whole: tuple[int, int], balanced: tuple[int, int]) -> bool:
    """Given (positions that may go, units) of the two cuts."""
    if whole[0] != balanced[0]:
        return whole[0] > balanced[0]
    return balanced[1] < min(_FINE, whole[1] + 1)


def _tell(flow: Flow, clusters: list[list[int]], whole: Sequence[bool]) -> list[tuple[int, int]]:
    """Positions that may go, and fewest units of a matrix, of each cluster for these answers."""
    asked = [index for cluster in clusters for index in cluster]
    frozen, component = _trial(flow, [(flow.choices[index], whole[index]) for index in asked])
    free = {index: _free(flow.choices[index], frozen, component) for index in asked}
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


def _trial(flow: Flow, answers: Sequence[tuple[Choice, bool]]) -> tuple[Mask, Components]:
    """(frozen, component) under these answers; the flow stays as it is."""
    equal, frozen = len(flow.equal), len(flow.frozen)
    for choice, rows in answers:
        _state(flow, choice, rows)
    count, component = components(flow)
    mask = frozen_components(flow, count, component)
    del flow.equal[equal:], flow.frozen[frozen:]
    return mask, component


def _free(choice: Choice, frozen: Mask, component: Components) -> tuple[int, int]:
    """Positions that may go, and the fewest units in which those of one matrix do."""
    positions, units = 0, []
    for matrix in choice.matrices:
        parts = component[matrix]
        free = parts[~frozen[parts]]
        positions += free.size
        units.append(np.unique(free).size)
    return positions, min(units)


def _state(flow: Flow, choice: Choice, rows: bool) -> None:
    node = choice.node
    if rows:
        columns = [*choice.matrices, *(vector[:, None] for vector in choice.rows)]
        _equate(flow, choice, np.concatenate(columns, axis=1))
        for _, vector in choice.columns:
            flow.freeze(vector, node, "GROUPS", "whole groups go")
        return
    for matrix in choice.matrices:
        _equate(flow, choice, matrix.T)
    for index, vector in choice.columns:
        flow.join(
            node, choice.matrices[index], np.broadcast_to(vector, choice.matrices[index].shape)
        )
    for vector in choice.rows:
        flow.freeze(vector, node, "GROUPS", "every group stays")


def _equate(flow: Flow, choice: Choice, matrix: Labels) -> None:
    """Makes the labels of each row equal."""
    if matrix.shape[1] > 1:
        first = np.repeat(matrix[:, :1], matrix.shape[1] - 1, axis=1)
        flow.join(choice.node, first, matrix[:, 1:])
