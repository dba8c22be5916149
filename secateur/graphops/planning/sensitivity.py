"""What a cut of each group does to the outputs, measured: trial cuts, run in ONNX Runtime.

For every group and a few shares, the units that matter least go, their consumers are compensated,
and the result runs on calibration samples that the compensation has not seen. Everything else (the
other shares, the budget) follows from the drift of the outputs at these few points. The trials of
one group start where it first shows, on values that the original has left there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import UnitGroup
from secateur.graphops.model.graph import walk
from secateur.graphops.planning.drift import Answers
from secateur.graphops.repair.compensate import compensate
from secateur.graphops.surgery.cut import cut

Scores = npt.NDArray[np.float64]

SHARES = {4: (0.125, 0.25, 0.5, 0.75), 3: (0.25, 0.5, 0.75), 2: (0.25, 0.625), 1: (0.5,)}
_TRIALS = 160  # cuts to try at most; with more groups than that, only the costliest
_MACS = 2e12  # of all trials together: about a minute on two cores
_SAMPLES = (8, 64)  # that each trial runs on, at least and at most


@dataclass(frozen=True, slots=True)
class Curve:
    """Drift of the outputs against units gone from one group, each the least important.

    Attributes:
        gone: numbers of units, ascending, starting with 0.
        drift: at each of them.
    """

    gone: tuple[int, ...]
    drift: tuple[float, ...]


def measure(
    observed: Observed,
    scores: Scores,
    groups: Sequence[int],
    copies: Mapping[str, str],
    macs: int,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[int, Curve]:
    """Curves by index of the group.

    Args:
        observed: the original.
        scores: per unit; low goes first.
        groups: indices of those to try, the ones that matter most for the budget first.
        copies: that normalising made.
        macs: of the original, for one sample: costly models are tried on fewer samples.
        tell: told the share that is done.
    """
    shares = SHARES[max(1, min(4, _TRIALS // max(len(groups), 1)))]
    tried = list(groups)[:_TRIALS]
    wanted = int(_MACS / max(macs * len(shares) * len(tried), 1))
    trials = _Trials(observed, copies, min(max(wanted, _SAMPLES[0]), _SAMPLES[1]))
    tried.sort(key=lambda index: trials.begins(observed.coupling.groups[index]))
    curves = {}
    for place, index in enumerate(tried):
        group = observed.coupling.groups[index]
        order = group.units[np.lexsort((group.units, scores[group.units]))]
        counts = sorted({min(max(round(s * order.size), 1), order.size - 1) for s in shares})
        drifts = [trials.drift(group, order[:count]) for count in counts]
        risen = np.maximum.accumulate(drifts)  # a larger cut that helps is luck
        curves[index] = Curve((0, *counts), (0.0, *(float(d) for d in risen)))
        tell((place + 1) / len(tried))
    return curves


class _Trials:
    """Cuts that are tried and thrown away."""

    def __init__(self, observed: Observed, copies: Mapping[str, str], samples: int) -> None:
        self._observed, self._copies = observed, copies
        self._answers = Answers(observed, samples)
        self._nodes = list(observed.model.graph)
        coupling = observed.coupling
        self._first = np.full(coupling.count + 1, len(self._nodes) - 1)  # by unit
        for place, node in reversed(list(enumerate(self._nodes))):
            for value in (v for one in walk([node]) for v in (*one.inputs, *one.outputs)):
                for units in coupling.axes(str(value.name) if value else "").values():
                    self._first[units] = place

    def begins(self, group: UnitGroup) -> int:
        """Where the first node stands that a cut of the group changes: one with its weights, or
        one before that makes a tensor of that size (a state to start from)."""
        return int(self._first[group.units].min())

    def drift(self, group: UnitGroup, units: npt.NDArray[np.int32]) -> float:
        """Of the outputs, when units of a group go."""
        observed = self._observed
        keep = np.ones(observed.coupling.count + 1, np.bool_)
        keep[units] = False
        pruned, _ = cut(observed.model, observed.coupling, keep, self._copies)
        compensate(pruned, observed, keep)
        network = self._answers.network
        network.advance(self._nodes[self.begins(group)])
        return self._answers.drift(network.beside(pruned).piece(self._answers.outputs))
