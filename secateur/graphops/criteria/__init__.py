"""How much each unit matters. A criterion is a function from what is known of a model to one
score per unit; higher stays longer. One file each, with the paper and the formula."""

from __future__ import annotations

from secateur.graphops.criteria import (
    activation,
    apoz,
    bn_scale,
    fisher,
    fluctuation,
    fpgm,
    lamp,
    magnitude,
    random,
    reconstruction,
    rms,
    taylor,
    variance,
    wanda,
)
from secateur.graphops.criteria.context import Context, Criterion, Scores

CRITERIA: dict[str, Criterion] = {
    "l1": magnitude.l1,
    "l2": magnitude.l2,
    "lamp": lamp.lamp,
    "fpgm": fpgm.fpgm,
    "bn_scale": bn_scale.bn_scale,
    "random": random.random,
    "activation": activation.activation,
    "rms": rms.rms,
    "apoz": apoz.apoz,
    "variance": variance.variance,
    "wanda": wanda.wanda,
    "fluctuation": fluctuation.fluctuation,
    "reconstruction": reconstruction.reconstruction,
    "taylor": taylor.taylor,
    "fisher": fisher.fisher,
}

__all__ = ["CRITERIA", "Context", "Scores"]
