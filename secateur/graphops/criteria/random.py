"""Random: the baseline that every other criterion has to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.graphops.criteria.context import Context


def random(context: Context) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1), the same for the same seed."""
    return np.random.default_rng(context.seed).random(context.coupling.count + 1)
