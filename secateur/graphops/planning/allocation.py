"""How much each group gives up: the least drift for the budget.

Drift is taken to add up over groups, and what a step saves depends on what has gone before it (a
convolution costs inputs × outputs). Steps are therefore taken greedily, the one with the least
drift per multiply-accumulate saved first, on the lower convex hull of each group's curve.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from secateur.graphops.coupling.units import Coupling
from secateur.graphops.planning.hull import additive, lower_hull
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Mask, Scores, Steps

_BEYOND = 2.0  # how much steeper than its last part a curve is taken to be where it ends


def arrange(
    steps: Steps,
    coupling: Coupling,
    scores: Scores,
    curves: Mapping[int, Curve],
    measure: Callable[[Mask], float],
) -> Steps:
    """The steps in the order in which they go; of groups without a curve, in proportion to loss.

    Args:
        steps: of all groups; within one, those that go first leave most.
        coupling: of the model.
        scores: per unit.
        curves: by index of the group.
        measure: what the budget counts, of a choice of units.
    """
    queues: dict[int, list[int]] = {}
    for place in np.argsort(-steps.left, kind="stable").tolist():
        queues.setdefault(int(steps.groups[place]), []).append(place)
    scale = _typical(coupling, scores, curves)
    slopes = {
        index: _slopes(
            steps.left[queue],
            np.sort(scores[coupling.groups[index].units]),
            curves.get(index),
            scale,
        )
        for index, queue in queues.items()
    }
    keep = np.ones(coupling.count + 1, np.bool_)
    left = measure(keep)
    taken = dict.fromkeys(queues, 0)

    def price(index: int) -> float:
        """Drift per unit of cost of a group's next step, as things stand."""
        units = steps.of(queues[index][taken[index]])
        keep[units] = False
        saved = left - measure(keep)
        keep[units] = True
        return float(slopes[index][taken[index]] * units.size / max(saved, 1e-9))

    heap = [(price(index), index) for index in queues]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        _, index = heapq.heappop(heap)
        now = price(index)
        if heap and now > heap[0][0]:  # it has become dearer since it was priced
            heapq.heappush(heap, (now, index))
            continue
        place = queues[index][taken[index]]
        keep[steps.of(place)] = False
        left = measure(keep)
        order.append(place)
        taken[index] += 1
        if taken[index] < len(queues[index]):
            heapq.heappush(heap, (price(index), index))
    return steps.ordered(np.array(order, np.intp))


def _typical(coupling: Coupling, scores: Scores, curves: Mapping[int, Curve]) -> float:
    """Drift per loss, over the groups that were measured."""
    ratios = []
    for index, curve in curves.items():
        losses = np.sort(scores[coupling.groups[index].units])
        if losses[curve.gone[-1] - 1] > 0:
            ratios.append(curve.drift[-1] / losses[curve.gone[-1] - 1])
    return float(np.median(ratios)) if ratios else 1.0


def _slopes(
    left: npt.NDArray[np.int64], losses: Scores, curve: Curve | None, scale: float
) -> npt.NDArray[np.float64]:
    """Drift per unit at each step of a group, on the lower convex hull of its curve.

    Between measured points drift follows the loss, which is known at every unit.
    """
    gone = np.r_[0, losses.size - left]
    loss = np.concatenate([[0.0], losses[gone[1:] - 1]])
    if curve is None:
        drift = scale * loss
    else:
        known = np.concatenate([[0.0], losses[np.array(curve.gone[1:]) - 1]])
        measured = additive(curve.drift)
        drift = np.interp(loss, known, measured)
        rise = measured[-1] - measured[-2]
        steep = _BEYOND * rise / max(known[-1] - known[-2], 1e-12)
        drift = np.where(loss > known[-1], measured[-1] + steep * (loss - known[-1]), drift)
    slopes = np.zeros(left.size)
    at = 0
    for end, slope in lower_hull(gone, drift):
        slopes[at:end] = slope
        at = end
    return slopes
