"""What a criterion may look at, and how what it finds becomes one score per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.quantised import scaled_constants
from secateur.recipe import Reduction

Scores = npt.NDArray[np.float64]
# What one axis of one tensor says: (tensor, axis, a value ≥ 0 per position). Without an axis, what
# the whole of it says of the branch that it is part of.
Part = tuple[str, int | None, npt.NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Context:
    """The model, its coupling and what the caller gave.

    Attributes:
        model: normalised; read only.
        coupling: of that model.
        observed: what calibration data show of it, if there are any.
        seed: for criteria that draw.
        reduction: of what the tensors that a unit runs through say of it.
    """

    model: ir.Model
    coupling: Coupling
    observed: Observed | None
    seed: int
    reduction: Reduction = "sum"

    def seen(self, criterion: str) -> Observed:
        """What calibration data show.

        Raises:
            Refused: `INVALID_CALIBRATION` when none were given.
        """
        if self.observed is None:
            raise refuse(
                Code.INVALID_CALIBRATION,
                f"criterion {criterion} needs calibration data",
                expected="--calibration PATH",
                found="none",
                hint="Give a few hundred unlabelled samples, or use l2.",
            )
        return self.observed

    def reduce(self, parts: Iterable[Part]) -> Scores:
        """One score per unit: its positions on one axis are summed, its axes are reduced.

        Args:
            parts: in the order of the graph, which decides what `first` means. Axes on which
                nothing can be cut are passed over.
        """
        total, axes = self.zeros(), np.zeros(self.coupling.count + 1, np.int64)
        for name, axis, values in parts:
            coupling = self.coupling
            units = coupling.parts.get(name) if axis is None else coupling.axes(name).get(axis)
            if units is None:
                continue
            if self.reduction == "sum":
                np.add.at(total, units, values)
                continue
            part = np.bincount(units, weights=values, minlength=total.size)
            if self.reduction == "max":
                np.maximum(total, part, out=total)
            elif self.reduction == "first":
                np.copyto(total, part, where=axes == 0)
            else:
                total += part
            axes += np.bincount(units, minlength=total.size) > 0
        return total / np.maximum(axes, 1) if self.reduction == "mean" else total

    def weights(self) -> Iterator[tuple[str, ir.TensorProtocol]]:
        """Constants with two or more axes of which some can be cut, or that go with a branch.

        Integers come as what they stand for: per channel they fill their range, and only their
        scales tell channels apart.
        """
        scaled = scaled_constants(self.model.graph)
        for name, tensor in self.coupling.constants.items():
            if len(tensor.shape) >= 2 and (name in self.coupling.parts or self.coupling.axes(name)):
                found = scaled.get(name)
                yield name, tensor if found is None else ir.tensor(found.real(tensor.numpy()))

    def zeros(self) -> Scores:
        """One total per unit; entry 0 is for what cannot be cut."""
        return np.zeros(self.coupling.count + 1, np.float64)


Criterion = Callable[[Context], Scores]


def places_of(
    line: npt.NDArray[np.int32], units: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64] | None:
    """The positions of each unit along an axis, shape (units, positions per unit).

    Args:
        line: unit of each position.
        units: of one group, ascending.

    Returns:
        None where the units are not on the axis, or not equally often.
    """
    order = np.argsort(line, kind="stable")
    first = np.searchsorted(line[order], units)
    times = np.searchsorted(line[order], units, "right") - first
    if not times[0] or (times != times[0]).any():
        return None
    places: npt.NDArray[np.int64] = order[first[:, None] + np.arange(times[0])]
    return places
