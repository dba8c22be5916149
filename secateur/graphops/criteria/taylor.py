"""Taylor: the first-order change of a loss when a unit goes.

    taylor(u) = mean over samples  |∂L/∂g(u)|        L = ½ ‖y − ȳ‖²

Molchanov, Tyree, Karras, Aila, Kautz: Pruning Convolutional Neural Networks for Resource Efficient
Inference, ICLR 2017; gates as in Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for
Neural Network Pruning, CVPR 2019. There the loss is that of the labels. Calibration data have
none, so L is what the outputs y tell of a sample, their distance from the mean ȳ over samples: its
change is that of the evidence. (The distance from the original's own outputs has no first-order
change: it is least there; see `fisher`.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.errors import Code, refuse
from secateur.graphops.criteria.context import Context
from secateur.graphops.criteria.gradients import Gates


def taylor(context: Context) -> npt.NDArray[np.float64]:
    """Mean absolute derivative of the loss by the unit's gate. Reductions do not apply: the gates
    of a unit move together, and its derivative is their sum.

    Raises:
        Refused: `INVALID_CALIBRATION` without two samples of one shape, `INVALID_RECIPE` where
            derivatives cannot be taken.
    """
    gates = Gates(context, "taylor")
    samples = len(gates.outputs)
    if samples < 2:
        raise refuse(
            Code.INVALID_CALIBRATION,
            "criterion taylor compares samples of one shape with their mean",
            expected="at least 2",
            found=samples,
        )
    centres = [np.mean(arrays, axis=0) for arrays in zip(*gates.outputs, strict=True)]
    gradients = gates.gradients(
        lambda sample: [
            array - centre for array, centre in zip(gates.outputs[sample], centres, strict=True)
        ]
    )
    total = context.zeros()
    for gradient in gradients:
        total += np.abs(gradient)
    return total / samples
