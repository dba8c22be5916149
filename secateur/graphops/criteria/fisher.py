"""Fisher: the second-order change of a loss when a unit goes.

    fisher(u) = ½ mean over samples  (vᵀ ∂y/∂g(u))²        v = ±1, drawn anew for each

Theis, Korshunova, Tejani, Huszár: Faster gaze prediction with dense networks and Fisher pruning,
2018: ½ Σ (∂L/∂g)² is half the diagonal of the Fisher information, with labels. Calibration data
have none, so the loss is self-distillation, L = ½ ‖y(g) − y(1)‖²: its gradient is zero at the
original, and its Hessian there JᵀJ, J = ∂y/∂g, of which E[(vᵀJ)²] is the diagonal (Hutchinson,
1990).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.graphops.criteria.context import Context
from secateur.graphops.criteria.gradients import Gates


def fisher(context: Context) -> npt.NDArray[np.float64]:
    """Half the mean squared derivative of the outputs by the unit's gate. Reductions do not apply:
    the gates of a unit move together, and its derivative is their sum.

    Raises:
        Refused: `INVALID_CALIBRATION` without calibration data, `INVALID_RECIPE` where derivatives
            cannot be taken.
    """
    gates = Gates(context, "fisher")
    total = context.zeros()
    for gradient in gates.draws():
        total += gradient**2
    return total / (2 * len(gates.outputs))
