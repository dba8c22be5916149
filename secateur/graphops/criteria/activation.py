"""Activation: the mean absolute value that a unit feeds to its consumers, over calibration data.

    a(u) = Σ over consumers' inputs x and positions p of u:  mean |x[p]|

The mean activation of Molchanov, Tyree, Karras, Aila, Kautz: Pruning Convolutional Neural Networks
for Resource Efficient Inference, ICLR 2017, section 2.2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import helper

from secateur.graphops.criteria.context import Context
from secateur.graphops.criteria.means import channel_means


def activation(context: Context) -> npt.NDArray[np.float64]:
    """Mean absolute activation per unit.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    parts = channel_means(context, "activation", lambda x, y: [helper.make_node("Abs", [x], [y])])
    return context.reduce(parts)
