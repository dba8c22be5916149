"""RMS: the root mean square of what a unit feeds to its consumers, over calibration data.

    r(u) = √( Σ over consumers' inputs x and positions p of u:  mean x[p]² )

Mean activation (Molchanov et al., ICLR 2017) with the Euclidean norm for the absolute value: what
is large seldom counts for more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import helper

from secateur.graphops.criteria.context import Context
from secateur.graphops.criteria.means import channel_means


def rms(context: Context) -> npt.NDArray[np.float64]:
    """Root mean square of the activation per unit.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    parts = channel_means(context, "rms", lambda x, y: [helper.make_node("Mul", [x, x], [y])])
    return np.sqrt(context.reduce(parts))
