"""How far a changed model's outputs are from the original's, on calibration samples.

D = Σ ‖y′ − y‖² / Σ ‖y − ȳ‖²        over samples and outputs
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secateur.graphops.calibration.data import Array, first_batches
from secateur.graphops.calibration.network import Network, Piece
from secateur.graphops.calibration.observed import Observed


class Answers:
    """The original's outputs on samples that no compensation has seen.

    Args:
        observed: the original and its batches.
        samples: to run, at least; whole batches are. None: all.

    Attributes:
        batches: those that are run.
        network: the original on them.
        outputs: names.
    """

    def __init__(self, observed: Observed, samples: int | None = None) -> None:
        judges = observed.judges
        self.batches = judges if samples is None else first_batches(judges, samples)
        self.network = Network(observed.model, self.batches)
        self.outputs = [str(value.name) for value in observed.model.graph.outputs]
        piece = self.network.piece(self.outputs)
        self._wanted = [piece.run(place) for place in range(len(self.batches))]
        self._variance = max(sum(map(_spread, self._wanted)), 1e-30)

    def drift(self, changed: Piece) -> float:
        """D of a piece that gives the outputs; 1e9 where they are not finite."""
        error = 0.0
        for place, wanted in enumerate(self._wanted):
            found = changed.run(place)
            error += sum(
                float(((found[name].astype(np.float64) - array) ** 2).sum())
                for name, array in wanted.items()
                if _counts(array)
            )
        return error / self._variance if np.isfinite(error) else 1e9


def _spread(values: Mapping[str, Array]) -> float:
    """Σ ‖y − ȳ‖², the mean taken per position of the last axis."""
    total = 0.0
    for array in values.values():
        if _counts(array):
            rows = array.reshape(-1, array.shape[-1] if array.ndim else 1).astype(np.float64)
            total += float(((rows - rows.mean(axis=0)) ** 2).sum())
    return total


def _counts(array: Array) -> bool:
    return array.dtype.kind == "f"
