"""Fluctuation: what a bias cannot replace of what a unit gives its consumers.

    s(u) = Σ over consumers y = W·x and entries j of u:  Var(x_j) · Σ_i W_ij²

An, Zhao, Yu, Tang, Wang: Fluctuation-based Adaptive Structured Pruning for Large Language Models
(FLAP), AAAI 2024, its weighted metric: the mean of x_j goes into the bias, its variance is lost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.moments import Moments
from secateur.graphops.criteria.consumers import by_consumers, variances
from secateur.graphops.criteria.context import Context


def fluctuation(context: Context) -> npt.NDArray[np.float64]:
    """Variance that a unit brings to the outputs of its consumers.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    return by_consumers(context, "fluctuation", _value)


def _value(weight: npt.NDArray[np.float64], moments: Moments) -> npt.NDArray[np.float64]:
    product: npt.NDArray[np.float64] = variances(moments) * (weight**2).sum(axis=1)
    return product
