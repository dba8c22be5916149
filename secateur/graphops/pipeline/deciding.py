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
from secateur.graphops.pipeline.records import underived
from secateur.graphops.pipeline.structure import meets
from secateur.graphops.pipeline.trial import Trial
from secateur.graphops.planning import cost, planner, replay, sensitivity
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Mask, Scores
from secateur.graphops.profile import measure
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Stage

# Measured curves by id and number of units of a group.
Curves = dict[tuple[str, int], Curve]


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays, and what was seen on the way to it.

    Attributes:
        warnings: for the report.
    """

    keep: Mask
    observed: Observed | None
    curves: Mapping[int, Curve] | None = None
    warnings: tuple[str, ...] = ()


def decide(
    analysed: Analysed,
    recipe: Recipe,
    samples: Samples | None,
    plan: Plan | None,
    clock: Clock,
    memory_meter: measure.MemoryMeter = measure.peak_memory,
    known: Curves | None = None,
) -> Decision:
    """Scores, measures and plans; or reads a plan.

    Args:
        analysed: the model, maybe without regions that have gone.
        recipe: settled.
        samples: to learn from.
        plan: to read; None to decide.
        clock: told of the stages.
        memory_meter: how memory is measured.
        known: curves that need not be measured again; those that are measured join them.
    """
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
    warnings: tuple[str, ...] = ()
    with clock.stage(Stage.CRITERIA, f"{recipe.criterion} over {coupling.count} units"):
        if coupling.groups:
            context = Context(
                analysed.opened.model, coupling, observed, recipe.seed, recipe.reduction
            )
            scores = routing(context, CRITERIA[recipe.criterion or "l2"](context))
            if recipe.criterion == "reconstruction" and observed is not None:
                warnings = underived(observed.curvature)
    curves = None
    with clock.stage(Stage.PLANNING, ", ".join(f"{k}={v:g}" for k, v in recipe.target.items())):
        if recipe.scope == "measured" and observed is not None:
            curves = _measure(analysed, observed, scores, recipe, clock, known)
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
    return Decision(keep, observed, curves, warnings)


def _measure(
    analysed: Analysed,
    observed: Observed,
    scores: Scores,
    recipe: Recipe,
    clock: Clock,
    known: Curves | None,
) -> Mapping[int, Curve]:
    """Trial cuts of the groups that may go, those that cost most first."""
    known = {} if known is None else known
    groups, macs = analysed.coupling.groups, cost.macs(analysed.coupling)
    everything = np.ones(analysed.coupling.count + 1, np.bool_)
    left, found = {}, {}
    for index, group in enumerate(groups):
        if group.kind not in recipe.granularity or group.units.size < 2:
            continue
        if curve := known.get((group.id, group.units.size)):
            found[index] = curve
            continue
        keep = everything.copy()
        keep[group.units] = False
        left[index] = macs.of(keep)
    if left:
        order = sorted(left, key=lambda index: (left[index], index))
        tell = functools.partial(clock.tell, Stage.PLANNING)
        whole = macs.of(everything)
        found |= sensitivity.measure(observed, scores, order, analysed.copies, whole, tell)
    known.update({(groups[i].id, groups[i].units.size): curve for i, curve in found.items()})
    return found
