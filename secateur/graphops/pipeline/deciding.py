"""Which units go: scored, measured and planned, or read in a plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from secateur.graphops.calibration import Samples
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.criteria import CRITERIA, Context
from secateur.graphops.criteria.routing import routing
from secateur.graphops.pipeline.analysed import Analysed
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.structure import meets
from secateur.graphops.pipeline.trial import Trial
from secateur.graphops.planning import cost, planner, replay, sensitivity
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Mask, Scores
from secateur.graphops.profile import measure
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Stage


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays, and what was seen on the way to it."""

    keep: Mask
    observed: Observed | None
    curves: Mapping[int, Curve] | None = None


def decide(
    analysed: Analysed,
    recipe: Recipe,
    samples: Samples | None,
    plan: Plan | None,
    clock: Clock,
    memory_meter: measure.MemoryMeter = measure.peak_memory,
) -> Decision:
    """Scores, measures and plans; or reads a plan."""
    coupling, observed = analysed.coupling, None
    if samples is not None and recipe.target:
        tell = functools.partial(clock.tell, Stage.CRITERIA)
        observed = Observed(analysed.opened.model, coupling, samples.seen, recipe.seed, tell)
    if plan is not None:
        with clock.stage(Stage.PLANNING, "replaying a plan"):
            keep = replay.units_kept(plan, coupling, analysed.copies, analysed.opened.sha256)
        return Decision(keep, observed)
    if not recipe.target:  # single weights alone
        return Decision(np.ones(coupling.count + 1, np.bool_), None)
    keep = np.ones(coupling.count + 1, np.bool_)
    structural = {"layer", "rank"} & set(recipe.granularity)
    if structural and (not recipe.units or meets(analysed, recipe)):
        return Decision(keep, observed)
    scores = np.zeros(coupling.count + 1, np.float64)
    with clock.stage(Stage.CRITERIA, f"{recipe.criterion} over {coupling.count} units"):
        if coupling.groups:
            context = Context(
                analysed.opened.model, coupling, observed, recipe.seed, recipe.reduction
            )
            scores = routing(context, CRITERIA[recipe.criterion or "l2"](context))
    curves = None
    with clock.stage(Stage.PLANNING, ", ".join(f"{k}={v:g}" for k, v in recipe.target.items())):
        if recipe.scope == "measured" and observed is not None:
            curves = _measure(analysed, observed, scores, recipe, clock)
        given: dict[str, planner.Measure] = {}
        if "macs" in recipe.target:
            given["macs"] = cost.macs(coupling).of, float(analysed.macs)
        tell = functools.partial(clock.tell, Stage.PLANNING)
        trial = Trial(analysed, recipe, samples, memory_meter, tell)
        if "size" in recipe.target:
            given["size"] = trial.size, float(analysed.opened.size)
        if "latency" in recipe.target:
            given["latency"] = trial.latency, 1.0
        if "memory" in recipe.target:
            given["memory"] = trial.memory, float(trial.memory_before)
        keep = planner.choose(coupling, scores, recipe, analysed.params, curves, given)
    return Decision(keep, observed, curves)


def _measure(
    analysed: Analysed, observed: Observed, scores: Scores, recipe: Recipe, clock: Clock
) -> Mapping[int, Curve]:
    """Trial cuts of the groups that may go, those that cost most first."""
    macs, count = cost.macs(analysed.coupling), analysed.coupling.count + 1
    saved = {}
    for index, group in enumerate(analysed.coupling.groups):
        if group.kind in recipe.granularity and group.units.size > 1:
            keep = np.ones(count, np.bool_)
            keep[group.units] = False
            saved[index] = macs.of(keep)
    order = sorted(saved, key=lambda index: (saved[index], index))
    tell = functools.partial(clock.tell, Stage.PLANNING)
    whole = macs.of(np.ones(count, np.bool_))
    return sensitivity.measure(observed, scores, order, analysed.copies, whole, tell)
