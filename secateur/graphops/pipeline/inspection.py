"""What can be cut from a model, without cutting it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secateur.graphops.calibration import CalibrationSource, open_calibration
from secateur.graphops.model.opening import ModelSource, open_model
from secateur.graphops.model.runtime import one_blas_thread
from secateur.graphops.pipeline.analysed import analyse
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.deciding import decide
from secateur.graphops.pipeline.records import (
    frozen_records,
    group_record,
    region_records,
    sensitivity_records,
)
from secateur.graphops.pipeline.rotating import turn
from secateur.graphops.pipeline.structure import offer_of
from secateur.graphops.planning.sensitivity import Curve
from secateur.recipe import UNITS, Recipe
from secateur.report import Cost, Inspection


def inspect(
    model: ModelSource,
    recipe: Recipe | None = None,
    *,
    calibration: CalibrationSource | None = None,
    external_data: bool = True,
    max_nodes: int | None = None,
) -> Inspection:
    """What can be cut from a model, what must stay, and why.

    Args:
        model: as for `prune`.
        recipe: what it ignores, and which kinds may go.
        calibration: as for `prune`; with it, what a cut of each group does to the outputs is
            measured. Without it nothing is run.
        external_data, max_nodes: as for `prune`.

    Raises:
        Refused: the model cannot be opened, or an ignore glob matches nothing.
    """
    clock = Clock(None)
    opened = open_model(model, external_data=external_data, max_nodes=max_nodes)
    samples = None
    if calibration is not None:
        samples = open_calibration(calibration, opened.model).draw()
    recipe = (recipe or Recipe()).model_copy(update={"target": {"macs": 1.0}, "scope": None})
    units = recipe.units or UNITS
    recipe = recipe.model_copy(update={"granularity": units}).settled(samples is not None)
    analysed = analyse(opened, samples, recipe)
    keep = np.ones(analysed.coupling.count + 1, np.bool_)
    curves: Mapping[int, Curve] = {}
    if samples is not None:
        with one_blas_thread():
            turned = turn(analysed, samples, recipe, None, clock)
            curves = decide(turned.analysed, recipe, samples, None, clock).curves or {}
    coupling = analysed.coupling
    return Inspection(
        groups=tuple(group_record(group, coupling, keep) for group in coupling.groups),
        frozen=frozen_records(coupling),
        cost=Cost(macs=analysed.macs, params=analysed.params, bytes=opened.size),
        sensitivity=sensitivity_records(coupling, curves),
        regions=region_records(offer_of(analysed, recipe)),
    )
