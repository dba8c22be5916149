"""BatchNormalization scale: Σ |γ| over the normalisations that a unit passes.

Liu, Li, Shen, Huang, Yan, Zhang: Learning Efficient Convolutional Networks through Network
Slimming, ICCV 2017. Units that pass none (after a folded BatchNormalization) are ranked by l2
among themselves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.errors import Code, refuse
from secateur.graphops.criteria import magnitude
from secateur.graphops.criteria.context import Context, Part

_SCALE = 1  # input index of BatchNormalization's γ


def bn_scale(context: Context) -> npt.NDArray[np.float64]:
    """Sum of absolute scales per unit.

    Raises:
        Refused: `INVALID_RECIPE` when no BatchNormalization acts on anything that can be cut.
    """
    parts: list[Part] = []
    passes = np.zeros(context.coupling.count + 1, np.bool_)
    for node in context.model.graph:
        if node.op_type != "BatchNormalization":
            continue
        scale = node.inputs[_SCALE]
        name = "" if scale is None else str(scale.name)
        tensor = context.coupling.constants.get(name)
        if tensor is not None:
            parts.append((name, 0, np.abs(tensor.numpy().astype(np.float64))))
            passes[context.coupling.axes(name).get(0, 0)] = True
    passes[0] = False
    if not passes.any():
        raise refuse(
            Code.INVALID_RECIPE,
            "criterion bn_scale needs BatchNormalization nodes on channels that can be cut",
            expected="at least one",
            found="none",
            hint="Use l2, or export the model without folding BatchNormalization.",
        )
    return np.where(passes, context.reduce(parts), magnitude.l2(context))
