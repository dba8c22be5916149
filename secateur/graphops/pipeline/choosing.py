"""What goes: regions, ranks and units, chosen under one budget or read in a plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import Samples
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.criteria import CRITERIA, Context
from secateur.graphops.criteria.routing import routing
from secateur.graphops.pipeline.analysed import Analysed, shapes_of
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.records import factored_record, removal_record
from secateur.graphops.pipeline.trial import Trial
from secateur.graphops.planning import cost, division, planner, ranks, removal, replay, sensitivity
from secateur.graphops.planning.drift import Answers
from secateur.graphops.planning.planner import unreachable
from secateur.graphops.planning.removal import Offer
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Mask, Scores
from secateur.graphops.profile import measure
from secateur.graphops.repair.repair import repair
from secateur.graphops.surgery.bypass import bypass
from secateur.graphops.surgery.cut import cut
from secateur.graphops.surgery.split import split
from secateur.plan import FactoredProduct, Plan, RemovedRegion
from secateur.recipe import Recipe
from secateur.report import Division, Factored, Removal, Stage

_DIVISION_SAMPLES = 128  # that a division of the budget is judged on


def offer_of(analysed: Analysed, recipe: Recipe) -> Offer:
    """The regions of a model."""
    return Offer.of(
        analysed.graph, analysed.coupling, analysed.copies, analysed.params, recipe.ignore
    )


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays, and what was seen on the way to it."""

    keep: Mask
    observed: Observed | None
    curves: Mapping[int, Curve] | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """A model without the regions that go and with the products split that are, analysed anew.

    Attributes:
        rest: itself.
        removed, factored: what a plan says of both.
        removals, losses: what the report says of both.
    """

    rest: Analysed
    removed: tuple[RemovedRegion, ...] = ()
    factored: tuple[FactoredProduct, ...] = ()
    removals: tuple[Removal, ...] = ()
    losses: tuple[Factored, ...] = ()

    def without(
        self,
        offer: Offer,
        going: Sequence[removal.Removal],
        samples: Samples | None,
        recipe: Recipe,
    ) -> Structure:
        """Leaves regions out."""
        if not going:
            return self
        entries = removal.entries(one.region for one in going)
        rest = self._again(bypass(self.rest.opened.model, entries), samples, recipe)
        removed = tuple(
            RemovedRegion(entry=r.entry, exit=r.exit, nodes=offer.names(r))
            for r in (one.region for one in going)
        )
        removals = tuple(removal_record(offer, one) for one in going)
        return replace(self, rest=rest, removed=removed, removals=removals)

    def split(
        self,
        offered: Sequence[ranks.Candidate],
        chosen: ranks.Ranks,
        samples: Samples | None,
        recipe: Recipe,
    ) -> Structure:
        """Splits products."""
        if not chosen:
            return self
        going = [one for one in offered if one.name in chosen]
        factors = {one.name: one.factors(chosen[one.name]) for one in going}
        rest = self._again(split(self.rest.opened.model, factors), samples, recipe)
        factored = tuple(FactoredProduct(output=o.name, rank=chosen[o.name]) for o in going)
        losses = tuple(factored_record(one, chosen[one.name]) for one in going)
        return replace(self, rest=rest, factored=factored, losses=losses)

    def _again(self, model: ir.Model, samples: Samples | None, recipe: Recipe) -> Analysed:
        opened = replace(self.rest.opened, model=model)
        coupling = couple(model, shapes_of(opened, samples), recipe)
        return replace(self.rest, opened=opened, coupling=coupling)


@dataclass(frozen=True, slots=True)
class Choice:
    """What goes, and what was weighed for it."""

    structure: Structure
    decision: Decision
    divisions: tuple[Division, ...] = ()
    absent: tuple[str, ...] = ()  # kinds asked for of which the model has nothing that may go


def choose(
    analysed: Analysed,
    recipe: Recipe,
    samples: Samples | None,
    plan: Plan | None,
    clock: Clock,
    memory_meter: measure.MemoryMeter,
) -> Choice:
    """Which regions go, what is split, and which units of the rest go; or what a plan says."""
    if plan is None and {"layer", "rank"} & set(recipe.granularity):
        return _choose_structure(analysed, recipe, samples, clock)
    structure = Structure(analysed)
    if plan is not None and plan.removed:
        offer = offer_of(analysed, recipe)
        regions = replay.regions_removed(plan, offer, analysed.opened.sha256)
        going = [removal.Removal(region) for region in regions]
        structure = structure.without(offer, going, samples, recipe)
    if plan is not None and plan.factored:
        offered = _candidates(structure.rest, recipe, samples)
        chosen = replay.products_factored(plan, offered, analysed.opened.sha256)
        structure = structure.split(offered, chosen, samples, recipe)
    return Choice(structure, decide(structure.rest, recipe, samples, plan, clock, memory_meter))


def _choose_structure(
    analysed: Analysed, recipe: Recipe, samples: Samples | None, clock: Clock
) -> Choice:
    offer = offer_of(analysed, recipe) if "layer" in recipe.granularity else None
    layers, absent = offer is not None, _absent(analysed, recipe, offer)
    units = not set(recipe.units) <= set(absent)
    if samples is None and (layers or (units and "rank" not in absent)):
        raise refuse(
            Code.INVALID_CALIBRATION,
            "granularity=layer needs calibration data: weights do not say what a layer does"
            if layers
            else "granularity=rank beside units needs calibration data, to weigh one against the "
            "other",
            expected="--calibration PATH",
            found="none",
            hint="Give a few hundred unlabelled samples.",
        )
    structure = Structure(analysed)
    with clock.stage(Stage.PLANNING, ", ".join(f"{k}={v:g}" for k, v in recipe.target.items())):
        tell = functools.partial(clock.tell, Stage.PLANNING)
        if samples is not None and (recipe.units or {"layer", "rank"} <= set(recipe.granularity)):
            return _Divide(structure, samples, recipe, offer, absent, tell).run()
        if offer is not None:
            assert samples is not None
            observed = _observed(analysed, samples, recipe)
            going = removal.choose(observed, offer, recipe.target, tell)
            structure = structure.without(offer, going, samples, recipe)
        elif not units:
            structure = _by_ranks(structure, samples, recipe, tell)
    return Choice(structure, decide(structure.rest, recipe, samples, None, clock), absent=absent)


def _by_ranks(
    structure: Structure,
    samples: Samples | None,
    recipe: Recipe,
    tell: Callable[[float], None] = lambda share: None,
) -> Structure:
    """Splits products until the targets are met. Raises Refused: `UNREACHABLE_TARGET`."""
    rest = structure.rest
    offered = _candidates(rest, recipe, samples)
    path = ranks.path(
        rest.opened.model,
        rest.coupling,
        offered,
        ranks.goals(rest.coupling, offered, recipe, rest.costs),
        recipe,
        None if samples is None else _observed(rest, samples, recipe),
        tell,
    )
    return structure.split(offered, path[-1], samples, recipe)


def _absent(analysed: Analysed, recipe: Recipe, offer: Offer | None) -> tuple[str, ...]:
    """The kinds that a recipe asks for and the model has none of that may go."""
    coupling = analysed.coupling
    kinds = {group.kind for group in coupling.groups if group.units.size > 1} | {"weight"}
    if offer is not None and offer.regions:
        kinds.add("layer")
    if ranks.splittable(analysed.opened.model, coupling, analysed.copies, recipe.ignore):
        kinds.add("rank")
    return tuple(kind for kind in recipe.granularity if kind not in kinds)


def _observed(analysed: Analysed, samples: Samples, recipe: Recipe) -> Observed:
    return Observed(analysed.opened.model, analysed.coupling, samples.seen, recipe.seed)


def _candidates(
    analysed: Analysed, recipe: Recipe, samples: Samples | None
) -> list[ranks.Candidate]:
    """Products that may be split."""
    learnt = () if samples is None else _observed(analysed, samples, recipe).learnt
    return ranks.candidates(
        analysed.opened.model,
        analysed.coupling,
        analysed.copies,
        recipe.ignore,
        learnt,
        recipe.seed,
    )


class _Divide:
    """Divides a budget between regions, ranks and units: what drifts least when carried out.

    First the regions, units making up the rest; then, of what they leave, the ranks. Where the
    recipe or the model has no units, ranks make up the rest.
    """

    def __init__(
        self,
        structure: Structure,
        samples: Samples,
        recipe: Recipe,
        offer: Offer | None,
        absent: tuple[str, ...],
        tell: Callable[[float], None],
    ) -> None:
        self._original, self._samples, self._recipe = structure, samples, recipe
        self._observed = _observed(structure.rest, samples, recipe)
        self._offer, self._absent = offer, absent
        self._units = not set(recipe.units) <= set(self._absent)
        self._answers = Answers(self._observed, _DIVISION_SAMPLES)
        self._tell = tell
        self._refused: Refused | None = None
        self._tried: list[tuple[Structure, float]] = []
        self._best: tuple[float, Choice] | None = None

    def run(self) -> Choice:
        """The choice that drifts least.

        Raises:
            Refused: the targets are out of reach for every division.
        """
        structure, kinds = self._original, {*self._recipe.granularity} - {"weight"}
        if kinds <= set(self._absent):
            raise refuse(
                Code.NOTHING_TO_PRUNE,
                "the model has nothing of these kinds that may go",
                expected=f"at least one {' or '.join(self._recipe.granularity)}",
                found="none",
                hint="`secateur inspect` lists what is frozen and why.",
            )
        if self._offer is not None:
            structure = self._regions(structure, self._offer)
        if "rank" in kinds and self._units:
            self._ranks(structure)
        elif "layer" not in kinds:
            self._drift(structure)
        if self._best is None:
            assert self._refused is not None
            raise self._refused
        best = self._best[1]
        self._tried.sort(key=lambda tried: (len(tried[0].removed), len(tried[0].factored)))
        divisions = tuple(
            Division(
                regions=len(structure.removed),
                factored=len(structure.factored),
                drift=drift if math.isfinite(drift) else None,
                chosen=structure is best.structure,
            )
            for structure, drift in self._tried
        )
        return replace(best, divisions=divisions, absent=self._absent)

    def _regions(self, structure: Structure, offer: Offer) -> Structure:
        """Tries numbers of regions; returns what is best, or nearest to the targets."""
        path = removal.path(
            self._observed, offer, self._recipe.target, lambda share: self._tell(share / 4)
        )

        def without(place: int) -> Structure:
            return structure.without(offer, path[place], self._samples, self._recipe)

        found = division.search(
            len(path) - 1,
            lambda place: self._drift(without(place)),
            lambda share: self._tell(0.25 + share / 4),
        )
        return without(division.best(found) if self._best else -1)

    def _ranks(self, structure: Structure) -> None:
        """Tries shares of the budget that go by rank."""
        recipe, rest = self._recipe, structure.rest
        offered = _candidates(rest, recipe, self._samples)
        path = ranks.path(
            rest.opened.model,
            rest.coupling,
            offered,
            ranks.missing(rest.coupling, recipe, rest.costs),
            recipe,
            _observed(rest, self._samples, recipe),
            lambda share: self._tell(0.5 + share / 4),
        )

        def drift(place: int) -> float:
            if (
                not path[place]
                and self._best
                and structure.removed == self._best[1].structure.removed
            ):
                return self._best[0]  # tried among the regions
            return self._drift(structure.split(offered, path[place], self._samples, recipe))

        division.search(len(path) - 1, drift, lambda share: self._tell(0.75 + share / 4))

    def _filled(self, structure: Structure) -> Structure:
        """Without units, ranks make up the rest.

        Raises:
            Refused: `UNREACHABLE_TARGET` with the closest value where they cannot.
        """
        recipe, rest = self._recipe, structure.rest
        if self._units or _met(rest, recipe):
            return structure
        if "rank" in recipe.granularity and "rank" not in self._absent:
            return _by_ranks(structure, self._samples, recipe)
        wanted = ranks.missing(rest.coupling, recipe, rest.costs)
        key, value = next(iter(wanted.items()))
        raise unreachable(key, recipe.target[key], recipe.target[key] + value / rest.costs[key])

    def _drift(self, structure: Structure) -> float:
        """Of the outputs on batches that no fit has seen; infinite where targets are not met."""
        recipe, rest, drift = self._recipe, structure.rest, math.inf
        try:
            structure = self._filled(structure)
            rest = structure.rest
            decision = decide(rest, recipe, self._samples, None, Clock(None))
        except Refused as refused:
            if refused.refusal.code not in (Code.UNREACHABLE_TARGET, Code.NOTHING_TO_PRUNE):
                raise
            most = max((len(tried.removed) for tried, _ in self._tried), default=0)
            if len(structure.removed) >= most:  # with more gone, targets are nearer
                self._refused = refused
        else:
            pruned, _ = cut(rest.opened.model, rest.coupling, decision.keep, rest.copies)
            if recipe.repair:
                model, learnt = self._original.rest.opened.model, self._observed.learnt
                seen = Observed(model, rest.coupling, learnt, recipe.seed)
                repair(pruned, seen, decision.keep, recipe.seed)
            network = Network(pruned, self._answers.batches)
            drift = self._answers.drift(network.piece(self._answers.outputs))
            if self._best is None or drift < self._best[0]:
                self._best = drift, Choice(structure, decision)
        self._tried.append((structure, drift))
        return drift


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
    if structural and (not recipe.units or _met(analysed, recipe)):
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


def _met(analysed: Analysed, recipe: Recipe) -> bool:
    """Whether the regions that went meet the budgets without any unit."""
    coupling = analysed.coupling
    keep = np.ones(coupling.count + 1, np.bool_)
    left = {
        "macs": cost.macs(coupling).of(keep) / max(analysed.macs, 1),
        "params": cost.params(coupling).of(keep) / max(analysed.params, 1),
    }
    return all(left[budget] <= recipe.target.get(budget, 1.0) for budget in left)


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
