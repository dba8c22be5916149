"""What a cut of each group does to the outputs, measured: trial cuts, run in ONNX Runtime.

For every group and a few shares, the units that matter least go, their consumers are compensated,
and the result runs on calibration samples that the compensation has not seen. The drift of the
outputs is

    D = Σ ‖y′ − y‖² / Σ ‖y − ȳ‖²        over samples and outputs

and everything else (the other shares, the budget) follows from these few points. The trials of
one group start where it first shows, on values that the original has left there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.data import Array, Feeds, sample_count
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import UnitGroup
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
        copies: that unsharing made.
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
        graph = observed.model.graph
        batches: list[Feeds] = []
        for batch in observed.judges:
            if sum(map(sample_count, batches)) < samples:
                batches.append(batch)
        self._network = Network(observed.model, batches)
        self._outputs = [str(value.name) for value in graph.outputs]
        piece = self._network.piece(self._outputs)
        self._wanted = [piece.run(place) for place in range(len(batches))]
        self._variance = max(sum(self._spread(values) for values in self._wanted), 1e-30)
        self._nodes = list(graph)
        self._first: dict[str, int] = {}  # tensor → where it first shows
        for place, node in enumerate(self._nodes):
            for value in (*node.inputs, *node.outputs):
                if value is not None and value.name:
                    self._first.setdefault(value.name, place)

    def begins(self, group: UnitGroup) -> int:
        """Where the first node stands that a cut of the group changes."""
        return min(self._first.get(name, 0) for name, _ in group.axes)

    def drift(self, group: UnitGroup, units: npt.NDArray[np.int32]) -> float:
        """Of the outputs, when units of a group go."""
        observed = self._observed
        keep = np.ones(observed.coupling.count + 1, np.bool_)
        keep[units] = False
        pruned, _ = cut(observed.model, observed.coupling, keep, self._copies)
        compensate(pruned, observed, keep)
        self._network.advance(self._nodes[self.begins(group)])
        piece = self._network.beside(pruned).piece(self._outputs)
        error = 0.0
        for place, wanted in enumerate(self._wanted):
            found = piece.run(place)
            error += sum(
                float(((found[name].astype(np.float64) - array) ** 2).sum())
                for name, array in wanted.items()
                if _counts(array)
            )
        return error / self._variance if np.isfinite(error) else 1e9

    def _spread(self, values: Mapping[str, Array]) -> float:
        """Σ ‖y − ȳ‖², the mean taken per position of the last axis."""
        total = 0.0
        for array in values.values():
            if _counts(array):
                rows = array.reshape(-1, array.shape[-1] if array.ndim else 1).astype(np.float64)
                total += float(((rows - rows.mean(axis=0)) ** 2).sum())
        return total


def _counts(array: Array) -> bool:
    return array.dtype.kind == "f"
