"""APoZ: how seldom a unit is zero, over calibration data.

    s(u) = Σ over consumers' inputs x and positions p of u:  1 − APoZ,     APoZ = share of x[p] = 0

Hu, Peng, Tai, Tang: Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
Architectures, 2016. It tells units apart after a Relu; without exact zeros all score the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper

from secateur.graphops.criteria.context import Context
from secateur.graphops.criteria.means import channel_means


def apoz(context: Context) -> npt.NDArray[np.float64]:
    """Share of the positions and samples where a unit is not zero.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    return context.reduce(channel_means(context, "apoz", _is_not_zero))


def _is_not_zero(x: str, y: str) -> Sequence[NodeProto]:
    return [
        helper.make_node("Cast", [x], [f"{y}_bool"], to=TensorProto.BOOL),
        helper.make_node("Cast", [f"{y}_bool"], [y], to=TensorProto.FLOAT),
    ]
