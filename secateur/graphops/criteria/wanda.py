"""Wanda: weights times what they are multiplied with.

    wanda(u) = Σ over consumers y = W·x and entries j of u:  ‖x_j‖ · Σ_i |W_ij|

with ‖x_j‖ the root mean square over calibration data. Sun, Liu, Bair, Kolter: A Simple and
Effective Pruning Approach for Large Language Models, ICLR 2024, there for single weights; here
summed over everything that a unit feeds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.moments import Moments
from secateur.graphops.criteria.consumers import by_consumers
from secateur.graphops.criteria.context import Context


def wanda(context: Context) -> npt.NDArray[np.float64]:
    """Absolute weights of the consumers times the norm of what they read, per unit.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    return by_consumers(context, "wanda", _value)


def _value(weight: npt.NDArray[np.float64], moments: Moments) -> npt.NDArray[np.float64]:
    squares = np.diagonal(moments.second, axis1=1, axis2=2) / moments.count
    product: npt.NDArray[np.float64] = np.sqrt(squares) * np.abs(weight).sum(axis=1)
    return product
