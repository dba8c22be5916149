"""What a criterion may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import Coupling


@dataclass(frozen=True, slots=True)
class Context:
    """The model, its coupling and what the caller gave.

    Attributes:
        model: unshared; read only.
        coupling: of that model.
        observed: what calibration data show of it, if there are any.
        seed: for criteria that draw.
    """

    model: ir.Model
    coupling: Coupling
    observed: Observed | None
    seed: int

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

    def add_per_unit(
        self,
        total: npt.NDArray[np.float64],
        name: str,
        axis: int,
        values: npt.NDArray[np.float64],
    ) -> None:
        """Adds one value per position of a tensor axis to the totals of the units there."""
        units = self.coupling.axes(name).get(axis)
        if units is not None:
            total += np.bincount(units, weights=values, minlength=total.size)

    def weights(self) -> Iterator[tuple[str, ir.TensorProtocol]]:
        """Constants with two or more axes of which some can be cut."""
        for name, tensor in self.coupling.constants.items():
            if len(tensor.shape) >= 2 and self.coupling.axes(name):
                yield name, tensor

    def zeros(self) -> npt.NDArray[np.float64]:
        """One total per unit; entry 0 is for what cannot be cut."""
        return np.zeros(self.coupling.count + 1, np.float64)


Criterion = Callable[[Context], npt.NDArray[np.float64]]
