"""Variance: how much what a unit feeds to its consumers varies, over calibration data.

    s(u) = Σ over consumers y = W·x and entries j of u:  Var(x_j)

Polyak, Wolf: Channel-Level Acceleration of Deep Face Representations, IEEE Access 2015: a channel
that hardly varies carries little information. A convolution sees a channel once per position of
its kernel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.graphops.criteria.consumers import by_consumers, variances
from secateur.graphops.criteria.context import Context


def variance(context: Context) -> npt.NDArray[np.float64]:
    """Variance of the activation per unit.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    return by_consumers(context, "variance", lambda weight, moments: variances(moments))
