"""How much each unit matters. A criterion is a function from what is known of a model to one
score per unit; higher stays longer. One file each, with the paper and the formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from secateur.graphops.criteria import activation, bn_scale, magnitude, random, reconstruction
from secateur.graphops.criteria.context import Context

Scores = npt.NDArray[np.float64]

CRITERIA: dict[str, Callable[[Context], Scores]] = {
    "l1": magnitude.l1,
    "l2": magnitude.l2,
    "random": random.random,
    "bn_scale": bn_scale.bn_scale,
    "activation": activation.activation,
    "reconstruction": reconstruction.reconstruction,
}

__all__ = ["CRITERIA", "Context", "Scores"]
