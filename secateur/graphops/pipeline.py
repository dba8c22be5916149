"""The stages in order: from a model and a recipe to a verified result."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import (
    CalibrationSource,
    Feeds,
    Samples,
    open_calibration,
)
from secateur.graphops.calibration.labelled import open_labels
from secateur.graphops.calibration.moments import WIDEST
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.coupling.units import Coupling, UnitGroup
from secateur.graphops.criteria import CRITERIA, Context
from secateur.graphops.model.aside import LARGE, model_beside
from secateur.graphops.model.normalise import unshare
from secateur.graphops.model.opening import ModelSource, OpenedModel, node_label, open_model
from secateur.graphops.model.shapes import Shapes, infer_shapes
from secateur.graphops.model.writing import Serialised, serialise
from secateur.graphops.planning import (
    cost,
    division,
    planner,
    ranks,
    removal,
    replay,
    sensitivity,
)
from secateur.graphops.planning.drift import Answers
from secateur.graphops.planning.removal import Offer
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Mask, Scores
from secateur.graphops.profile import measure
from secateur.graphops.profile.size import compressed
from secateur.graphops.quantise.quantise import quantise
from secateur.graphops.regions import find as found
from secateur.graphops.repair.expectation import fold
from secateur.graphops.repair.repair import make_room, quantised, repair
from secateur.graphops.sparsity.sparsify import sparsify
from secateur.graphops.sparsity.storage import store_sparse
from secateur.graphops.surgery import vocabulary
from secateur.graphops.surgery.bypass import bypass
from secateur.graphops.surgery.cut import cut
from secateur.graphops.surgery.split import split
from secateur.graphops.surgery.vocabulary import Vocabulary
from secateur.graphops.verify import verify as checks
from secateur.graphops.verify.accuracy import Scored
from secateur.graphops.verify.examples import example_feeds
from secateur.graphops.verify.runtime import one_blas_thread, open_session
from secateur.plan import FactoredProduct, Plan, RemovedRegion
from secateur.recipe import Recipe
from secateur.report import (
    Cost,
    Division,
    Factored,
    Folded,
    Frozen,
    Group,
    Inspection,
    Latency,
    Profile,
    Progress,
    ProgressCallback,
    Region,
    Removal,
    RepairStep,
    Report,
    Sensitivity,
    SparseWeight,
    Stage,
    StageDrift,
    Verification,
)
from secateur.result import Result, WeightsFile

# Share of the whole job that is done when a stage begins; latency and verification take most.
_BEGINS = {
    Stage.LOAD: 0.0,
    Stage.COUPLING: 0.1,
    Stage.CRITERIA: 0.2,
    Stage.PLANNING: 0.35,
    Stage.SURGERY: 0.6,
    Stage.REPAIR: 0.65,
    Stage.SPARSITY: 0.8,
    Stage.QUANTIZE: 0.87,
    Stage.VERIFY: 0.9,
    Stage.PROFILE: 0.95,
}
_LATENCY_SECONDS = 0.4
_DIVISION_SAMPLES = 128  # that a division of the budget is judged on
_Opener = Callable[[ModelSource], OpenedModel]
_SPARSE = 0.9  # share of weights that are not zero, above which nobody has taken any out
_SLOWER = 1.05  # a latency ratio above it is called slower; below, it is noise


@dataclass(slots=True)
class _Clock:
    """Tells progress and takes the time of each stage."""

    progress: ProgressCallback | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, stage: Stage, message: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(Progress(stage=stage, fraction=_BEGINS[stage], message=message))
        start = time.perf_counter()
        yield
        self.seconds[stage.value] = round(time.perf_counter() - start, 4)

    def tell(self, stage: Stage, share: float) -> None:
        """Progress inside a stage."""
        if self.progress is not None:
            ends = min([begin for begin in _BEGINS.values() if begin > _BEGINS[stage]], default=1.0)
            fraction = _BEGINS[stage] + share * (ends - _BEGINS[stage])
            self.progress(Progress(stage=stage, fraction=round(fraction, 4)))

    def done(self) -> None:
        if self.progress is not None:
            self.progress(Progress(stage=Stage.PROFILE, fraction=1.0, message="done"))


@dataclass(frozen=True, slots=True)
class _Analysed:
    """An opened model with everything that does not depend on a target.

    Where regions or tokens have gone, `params`, `macs` and `nonzero` are still of the original.
    """

    opened: OpenedModel
    copies: dict[str, str]
    coupling: Coupling
    params: int
    macs: int
    nonzero: int | None

    @property
    def graph(self) -> ir.Graph:
        return self.opened.model.graph

    @property
    def costs(self) -> dict[str, float]:
        """Of the original, by budget."""
        return {"macs": float(self.macs), "params": float(self.params)}


def prune(
    model: ModelSource,
    recipe: Recipe | None = None,
    *,
    calibration: CalibrationSource | None = None,
    labels: CalibrationSource | None = None,
    plan: Plan | None = None,
    progress: ProgressCallback | None = None,
    external_data: bool = True,
    measure_latency: bool = True,
    max_nodes: int | None = None,
) -> Result:
    """Prunes a model and proves that the result runs.

    Args:
        model: a path, serialised bytes, `onnx.ModelProto`, `onnx_ir.Model` or `gs.Graph`; it is
            never modified.
        recipe: what to prune and how far; half of the channels of every group by default.
        calibration: unlabelled samples: an `.npz` (one array per input, samples along axis 0),
            a folder of them, or arrays by input name.
        labels: class numbers in arrays named after outputs: of all calibration samples, in their
            order, or of samples of their own, in the model's inputs beside them. Original and
            result are scored by them; nothing else reads them.
        plan: replay this decision instead of making one; its recipe is taken.
        progress: called with each step forward.
        external_data: whether weights may lie in files beside the model.
        measure_latency: whether to time original and result in ONNX Runtime.
        max_nodes: how many nodes the model may have, functions inlined; None: any number.

    Returns:
        the pruned model, the plan and the report.

    Raises:
        Refused: the model, the recipe, calibration data, labels or plan cannot be honoured.
        VerificationFailed: the result did not pass its checks.
    """
    clock = _Clock(progress)
    recipe = plan.recipe if plan is not None else recipe or Recipe()
    opener = functools.partial(open_model, external_data=external_data, max_nodes=max_nodes)
    done = _cut(model, recipe, _Data(calibration, labels), plan, opener, clock)
    before, after = done.before, done.after
    _collect(before.bytes)
    with clock.stage(Stage.VERIFY, "running original and result in ONNX Runtime"):
        feeds = done.feeds if done.known is None else [done.known.old(f) for f in done.feeds]
        samples = checks.run_original(done.source, feeds, calibration is not None)
        if done.known is not None:
            samples = checks.without_tokens(samples, done.known)
        verification = checks.verify(done.serialised.runnable, samples, done.held_back)
        stages = _stage_drift(done, samples, verification)
        del samples
        scored = () if done.scored is None else done.scored.against(done.serialised.runnable)
    with clock.stage(Stage.PROFILE, "timing original and result in turns"):
        if measure_latency:
            first, second = _latencies(done)
            before = before.model_copy(update={"latency": first})
            after = after.model_copy(update={"latency": second})
    clock.done()
    report = Report(
        before=before,
        after=after,
        groups=done.groups,
        frozen=done.frozen,
        removed=done.removed,
        factored=done.factored,
        vocabulary=() if done.known is None else tuple(done.known.ids.tolist()),
        divisions=done.divisions,
        sensitivity=done.sensitivity,
        repair=done.repair,
        folded=done.folded,
        sparse_weights=done.sparse_weights,
        stage_drift=stages,
        verification=verification,
        accuracy=scored,
        warnings=(
            *_warnings(before, after),
            *_unrepaired(done.quantised),
            *_too_wide(done.sparse_weights, recipe.settled(calibration is not None)),
        ),
        seconds=clock.seconds,
    )
    return Result(done.serialised.model, done.plan, report, done.serialised.weights)


@dataclass(frozen=True, slots=True)
class _Done:
    """A cut, without the models it came from: their weights go before ONNX Runtime's come."""

    source: bytes | str
    aside: WeightsFile | None  # the source refers to it
    known: Vocabulary | None  # the tokens that are kept; feeds are in their new ids
    serialised: Serialised
    unquantised: Serialised | None
    plan: Plan
    before: Cost
    after: Cost
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    removed: tuple[Removal, ...]
    factored: tuple[Factored, ...]
    divisions: tuple[Division, ...]
    sensitivity: tuple[Sensitivity, ...]
    repair: tuple[RepairStep, ...]
    folded: tuple[Folded, ...]
    quantised: int
    sparse_weights: tuple[SparseWeight, ...]
    feeds: Sequence[Feeds]
    held_back: bool
    sample: Feeds
    scored: Scored | None


@dataclass(frozen=True, slots=True)
class _Data:
    """What callers give beside a model."""

    calibration: CalibrationSource | None
    labels: CalibrationSource | None

    def open(self, model: ModelSource, opened: OpenedModel) -> tuple[Samples | None, Scored | None]:
        """Samples for the stages that need them, and the original's accuracy."""
        graph = opened.model.graph
        data = None if self.calibration is None else open_calibration(self.calibration, graph)
        samples = None if data is None else data.draw()
        if self.labels is None:
            return samples, None
        labelled = open_labels(self.labels, graph, data, samples)
        # before the work is done: labels that do not fit are refused here
        return samples, Scored.of(_runnable(model, opened), labelled)


def _cut(
    model: ModelSource,
    recipe: Recipe,
    given: _Data,
    plan: Plan | None,
    opener: _Opener,
    clock: _Clock,
) -> _Done:
    """The stages up to the pruned model, and everything that running it needs."""
    with clock.stage(Stage.LOAD, "opening the model"):
        opened = opener(model)
        samples, scored = given.open(model, opened)
    recipe_asked, recipe = recipe, recipe.settled(samples is not None)
    with clock.stage(Stage.COUPLING, f"{len(opened.model.graph)} nodes"):
        analysed = _analyse(opened, samples, recipe)
        known = None
        if recipe.vocabulary is not None:
            known, analysed, samples = _keep_tokens(analysed, recipe, samples)
            if scored is not None:
                raise _labels_count_tokens()
    with one_blas_thread():
        choice = _choose(analysed, recipe, samples, plan, clock)
        structure, decision = choice.structure, choice.decision
        rest = structure.rest
        with clock.stage(Stage.SURGERY, f"{int((~decision.keep).sum())} units go"):
            pruned, kept = cut(rest.opened.model, rest.coupling, decision.keep, analysed.copies)
        steps: tuple[RepairStep, ...] = ()
        if recipe.repair and decision.observed is not None:
            with clock.stage(Stage.REPAIR, "refitting what is left"):
                tell = functools.partial(clock.tell, Stage.REPAIR)
                batches = decision.observed.batches
                original = Observed(analysed.opened.model, rest.coupling, batches, recipe.seed)
                steps = repair(pruned, original, decision.keep, recipe.seed, tell)
        folded: tuple[Folded, ...] = ()
        if recipe.repair and samples is None:
            with clock.stage(Stage.REPAIR, "moving means into biases"):
                folded = _fold(rest, pruned, decision.keep, recipe_asked)
        sparse_weights: tuple[SparseWeight, ...] = ()
        if recipe.sparsity is not None:
            with clock.stage(Stage.SPARSITY, f"{recipe.sparsity} by {recipe.weight_criterion}"):
                seen = () if samples is None else samples.seen
                tell = functools.partial(clock.tell, Stage.SPARSITY)
                sparse_weights = sparsify(pruned, rest.coupling.shapes, recipe, seen, tell)
    unquantised, serialised = None, serialise(pruned)
    if recipe.sparse_initializers:
        serialised, sparse_weights = store_sparse(serialised, sparse_weights)
    if recipe.quantize is not None:
        with clock.stage(Stage.QUANTIZE, recipe.quantize):
            unquantised = serialised
            serialised = quantise(serialised, recipe.quantize, samples.seen if samples else ())
    if plan is None:
        _check_size(serialised.size, opened.size, recipe)
    feeds, aside = _examples(analysed) if samples is None else samples.judged, opened.aside
    before = Cost(macs=analysed.macs, params=analysed.params, bytes=opened.size)
    after = Cost(
        macs=cost.macs(rest.coupling).of(decision.keep),
        params=cost.count_params(pruned),
        bytes=serialised.size,
    )
    if sparse_weights:
        as_given = _runnable(model, opened)
        whole = as_given if isinstance(as_given, bytes) else pathlib.Path(as_given)
        beside = () if serialised.weights is None else (serialised.weights.path,)
        before = _with_zeros(before, analysed.nonzero, whole)
        after = _with_zeros(after, cost.count_nonzero(pruned), serialised.model, *beside)
    return _Done(
        source=_runnable(model, opened) if aside is None else str(model_beside(aside)),
        aside=aside,
        known=known,
        serialised=serialised,
        unquantised=unquantised,
        plan=Plan(
            source=opened.sha256,
            recipe=recipe_asked,
            removed=structure.removed,
            factored=structure.factored,
            kept=kept,
        ),
        before=before,
        after=after,
        groups=tuple(_group(group, decision.keep) for group in rest.coupling.groups),
        frozen=_frozen(rest.coupling),
        removed=structure.removals,
        factored=structure.losses,
        divisions=choice.divisions,
        sensitivity=_sensitivities(rest.coupling, decision.curves or {}),
        repair=steps,
        folded=folded,
        quantised=quantised(pruned) if recipe.repair and kept else 0,
        sparse_weights=sparse_weights,
        feeds=feeds,
        held_back=samples is not None and samples.held_back,
        sample=_one_sample(analysed, feeds[0]),
        scored=scored,
    )


def _keep_tokens(
    analysed: _Analysed, recipe: Recipe, samples: Samples | None
) -> tuple[Vocabulary, _Analysed, Samples | None]:
    """The model, and the samples, of the tokens that are kept."""
    opened, shapes = analysed.opened, analysed.coupling.shapes
    known = vocabulary.find(opened.model, shapes, recipe.vocabulary or (), recipe.ignore)
    if samples is not None:
        samples = replace(
            samples,
            seen=tuple(known.new(feeds) for feeds in samples.seen),
            judged=tuple(known.new(feeds) for feeds in samples.judged),
        )
    opened = replace(opened, model=known.cut(opened.model))
    coupling = couple(opened.model, _shapes(opened, samples), recipe)
    return known, replace(analysed, opened=opened, coupling=coupling), samples


def _labels_count_tokens() -> Refused:
    return refuse(
        Code.INVALID_RECIPE,
        "labels count in the original's tokens, and the vocabulary renumbers them",
        nodes=("vocabulary",),
        expected="labels or vocabulary",
        found="both",
        hint="Score the result with the id map of the report.",
    )


def _offer(analysed: _Analysed, recipe: Recipe) -> Offer:
    """The regions of a model."""
    return Offer.of(
        analysed.graph, analysed.coupling, analysed.copies, analysed.params, recipe.ignore
    )


@dataclass(frozen=True, slots=True)
class _Decision:
    """What stays, and what was seen on the way to it."""

    keep: Mask
    observed: Observed | None
    curves: Mapping[int, Curve] | None = None


@dataclass(frozen=True, slots=True)
class _Structure:
    """A model without the regions that go and with the products split that are, analysed anew.

    Attributes:
        rest: itself.
        removed, factored: what a plan says of both.
        removals, losses: what the report says of both.
    """

    rest: _Analysed
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
    ) -> _Structure:
        """Leaves regions out."""
        if not going:
            return self
        entries = removal.entries(one.region for one in going)
        rest = self._again(bypass(self.rest.opened.model, entries), samples, recipe)
        removed = tuple(
            RemovedRegion(entry=r.entry, exit=r.exit, nodes=offer.names(r))
            for r in (one.region for one in going)
        )
        removals = tuple(_removal(offer, one) for one in going)
        return replace(self, rest=rest, removed=removed, removals=removals)

    def split(
        self,
        offered: Sequence[ranks.Candidate],
        chosen: ranks.Ranks,
        samples: Samples | None,
        recipe: Recipe,
    ) -> _Structure:
        """Splits products."""
        if not chosen:
            return self
        going = [one for one in offered if one.name in chosen]
        factors = {one.name: one.factors(chosen[one.name]) for one in going}
        rest = self._again(split(self.rest.opened.model, factors), samples, recipe)
        factored = tuple(FactoredProduct(output=o.name, rank=chosen[o.name]) for o in going)
        losses = tuple(_factored(one, chosen[one.name]) for one in going)
        return replace(self, rest=rest, factored=factored, losses=losses)

    def _again(self, model: ir.Model, samples: Samples | None, recipe: Recipe) -> _Analysed:
        opened = replace(self.rest.opened, model=model)
        coupling = couple(model, _shapes(opened, samples), recipe)
        return replace(self.rest, opened=opened, coupling=coupling)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What goes, and what was weighed for it."""

    structure: _Structure
    decision: _Decision
    divisions: tuple[Division, ...] = ()


def _choose(
    analysed: _Analysed,
    recipe: Recipe,
    samples: Samples | None,
    plan: Plan | None,
    clock: _Clock,
) -> _Choice:
    """Which regions go, what is split, and which units of the rest go; or what a plan says."""
    if plan is None and {"layer", "rank"} & set(recipe.granularity):
        return _choose_structure(analysed, recipe, samples, clock)
    structure = _Structure(analysed)
    if plan is not None and plan.removed:
        offer = _offer(analysed, recipe)
        regions = replay.regions_removed(plan, offer, analysed.opened.sha256)
        going = [removal.Removal(region) for region in regions]
        structure = structure.without(offer, going, samples, recipe)
    if plan is not None and plan.factored:
        offered = _candidates(structure.rest, recipe, samples)
        chosen = replay.products_factored(plan, offered, analysed.opened.sha256)
        structure = structure.split(offered, chosen, samples, recipe)
    return _Choice(structure, _decide(structure.rest, recipe, samples, plan, clock))


def _choose_structure(
    analysed: _Analysed, recipe: Recipe, samples: Samples | None, clock: _Clock
) -> _Choice:
    layers = "layer" in recipe.granularity
    if samples is None and (layers or recipe.units):
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
    structure = _Structure(analysed)
    with clock.stage(Stage.PLANNING, ", ".join(f"{k}={v:g}" for k, v in recipe.target.items())):
        tell = functools.partial(clock.tell, Stage.PLANNING)
        if recipe.units:
            assert samples is not None
            return _Divide(structure, samples, recipe, tell).run()
        if layers:
            assert samples is not None
            offer, observed = _offer(analysed, recipe), _observed(analysed, samples, recipe)
            going = removal.choose(observed, offer, recipe.target, tell)
            structure = structure.without(offer, going, samples, recipe)
        else:
            offered = _candidates(analysed, recipe, samples)
            seen = None if samples is None else _observed(analysed, samples, recipe)
            path = ranks.path(
                analysed.opened.model,
                analysed.coupling,
                offered,
                ranks.goals(analysed.coupling, offered, recipe, analysed.costs),
                recipe,
                seen,
                tell,
            )
            structure = structure.split(offered, path[-1], samples, recipe)
    return _Choice(structure, _decide(structure.rest, recipe, samples, None, clock))


def _observed(analysed: _Analysed, samples: Samples, recipe: Recipe) -> Observed:
    return Observed(analysed.opened.model, analysed.coupling, samples.seen, recipe.seed)


def _candidates(
    analysed: _Analysed, recipe: Recipe, samples: Samples | None
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

    First the regions, units making up the rest; then, of what they leave, the ranks.
    """

    def __init__(
        self,
        structure: _Structure,
        samples: Samples,
        recipe: Recipe,
        tell: Callable[[float], None],
    ) -> None:
        self._original, self._samples, self._recipe = structure, samples, recipe
        self._observed = _observed(structure.rest, samples, recipe)
        self._answers = Answers(self._observed, _DIVISION_SAMPLES)
        self._tell = tell
        self._refused: Refused | None = None
        self._tried: list[tuple[_Structure, float]] = []
        self._best: tuple[float, _Choice] | None = None

    def run(self) -> _Choice:
        """The choice that drifts least.

        Raises:
            Refused: the targets are out of reach for every division.
        """
        structure, kinds = self._original, self._recipe.granularity
        if "layer" in kinds:
            structure = self._regions(structure)
        if "rank" in kinds:
            self._ranks(structure)
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
        return replace(best, divisions=divisions)

    def _regions(self, structure: _Structure) -> _Structure:
        """Tries numbers of regions; returns what is best, or nearest to the targets."""
        offer = _offer(structure.rest, self._recipe)
        path = removal.path(
            self._observed, offer, self._recipe.target, lambda share: self._tell(share / 4)
        )

        def drift(place: int) -> float:
            return self._drift(structure.without(offer, path[place], self._samples, self._recipe))

        found = division.search(len(path) - 1, drift, lambda share: self._tell(0.25 + share / 4))
        going = path[division.best(found) if self._best else -1]
        return structure.without(offer, going, self._samples, self._recipe)

    def _ranks(self, structure: _Structure) -> None:
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

    def _drift(self, structure: _Structure) -> float:
        """Of the outputs on batches that no fit has seen; infinite where targets are not met."""
        recipe, rest = self._recipe, structure.rest
        drift = math.inf
        try:
            decision = _decide(rest, recipe, self._samples, None, _Clock(None))
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
                self._best = drift, _Choice(structure, decision)
        self._tried.append((structure, drift))
        return drift


def _decide(
    analysed: _Analysed, recipe: Recipe, samples: Samples | None, plan: Plan | None, clock: _Clock
) -> _Decision:
    """Scores, measures and plans; or reads a plan."""
    coupling, observed = analysed.coupling, None
    if samples is not None and recipe.target:
        tell = functools.partial(clock.tell, Stage.CRITERIA)
        observed = Observed(analysed.opened.model, coupling, samples.seen, recipe.seed, tell)
    if plan is not None:
        with clock.stage(Stage.PLANNING, "replaying a plan"):
            keep = replay.units_kept(plan, coupling, analysed.copies, analysed.opened.sha256)
        return _Decision(keep, observed)
    if not recipe.target:  # single weights alone
        return _Decision(np.ones(coupling.count + 1, np.bool_), None)
    keep = np.ones(coupling.count + 1, np.bool_)
    structural = {"layer", "rank"} & set(recipe.granularity)
    if structural and (not recipe.units or _met(analysed, recipe)):
        return _Decision(keep, observed)
    scores = np.zeros(coupling.count + 1, np.float64)
    with clock.stage(Stage.CRITERIA, f"{recipe.criterion} over {coupling.count} units"):
        if coupling.groups:
            context = Context(
                analysed.opened.model, coupling, observed, recipe.seed, recipe.reduction
            )
            scores = CRITERIA[recipe.criterion or "l2"](context)
    curves = None
    with clock.stage(Stage.PLANNING, ", ".join(f"{k}={v:g}" for k, v in recipe.target.items())):
        if recipe.scope == "measured" and observed is not None:
            curves = _measure(analysed, observed, scores, recipe, clock)
        given: dict[str, planner.Measure] = {
            "macs": (cost.macs(coupling).of, float(analysed.macs)),
            "size": (
                functools.partial(_written, analysed, recipe, samples),
                float(analysed.opened.size),
            ),
        }
        keep = planner.choose(coupling, scores, recipe, analysed.params, curves, given)
    return _Decision(keep, observed, curves)


def _fold(analysed: _Analysed, pruned: ir.Model, keep: Mask, recipe: Recipe) -> tuple[Folded, ...]:
    """Repair without data; refused where it was asked for and there is nothing to go by."""
    found = fold(analysed.opened.model, analysed.coupling, pruned, keep, recipe.seed)
    if recipe.repair and not keep.all() and not any(one.folded for one in found):
        raise refuse(
            Code.INVALID_CALIBRATION,
            "no BatchNormalization tells the mean of anything that went, to repair by without data",
            nodes=tuple(one.node for one in found),
            expected="--calibration PATH",
            found="none",
            hint="Give a few hundred unlabelled samples, or leave out --repair.",
        )
    return found


def _written(analysed: _Analysed, recipe: Recipe, samples: Samples | None, keep: Mask) -> int:
    """Bytes of the file for a choice of units, at most: as written in the end, but the numbers.

    Weights go by magnitude and scales come from one batch, which changes no count of either.
    """
    pruned, _ = cut(analysed.opened.model, analysed.coupling, keep, analysed.copies)
    if recipe.repair and samples is not None:
        make_room(pruned, analysed.coupling)
    elif recipe.repair:
        fold(analysed.opened.model, analysed.coupling, pruned, keep, recipe.seed)
    if not recipe.sparse_initializers:
        serialised = serialise(pruned)
    else:
        plain = recipe.model_copy(update={"weight_criterion": "magnitude"})
        weights = sparsify(pruned, analysed.coupling.shapes, plain, ())
        serialised, _ = store_sparse(serialise(pruned), weights)
    if recipe.quantize is not None:
        serialised = quantise(serialised, recipe.quantize, samples.seen[:1] if samples else ())
    return serialised.size


def _check_size(size: int, original: int, recipe: Recipe) -> None:
    """Raises `UNREACHABLE_TARGET` where the file is larger than asked after all."""
    asked = recipe.target.get("size", math.inf)
    limit = asked * original if asked <= 1 else asked
    if size > limit:
        raise refuse(
            Code.UNREACHABLE_TARGET,
            f"the file became larger than was foreseen for size={asked:g}",
            expected=f"at most {math.floor(limit)} bytes",
            found=f"{size} bytes",
            hint="Ask for a little less.",
        )


def _met(analysed: _Analysed, recipe: Recipe) -> bool:
    """Whether the regions that went meet the budgets without any unit."""
    coupling = analysed.coupling
    keep = np.ones(coupling.count + 1, np.bool_)
    left = {
        "macs": cost.macs(coupling).of(keep) / max(analysed.macs, 1),
        "params": cost.params(coupling).of(keep) / max(analysed.params, 1),
    }
    return all(left[budget] <= recipe.target.get(budget, 1.0) for budget in left)


def _measure(
    analysed: _Analysed, observed: Observed, scores: Scores, recipe: Recipe, clock: _Clock
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


def _sensitivities(coupling: Coupling, curves: Mapping[int, Curve]) -> tuple[Sensitivity, ...]:
    return tuple(
        Sensitivity(group=coupling.groups[index].id, removed=curve.gone, drift=curve.drift)
        for index, curve in sorted(curves.items())
    )


def _collect(size: int) -> None:
    """Frees the weights of graphs that are no longer needed, where they are worth it: the nodes of
    a graph refer to one another, and would wait for a collection that comes too late."""
    if size > LARGE:
        gc.collect()


def _with_zeros(found: Cost, nonzero: int | None, *files: bytes | pathlib.Path) -> Cost:
    """The cost of a model, with what its zeros amount to; compressed where the files are all."""
    sizes = [len(file) if isinstance(file, bytes) else file.stat().st_size for file in files]
    shrunk = compressed(*files) if sum(sizes) == found.bytes else None
    return found.model_copy(update={"nonzero": nonzero, "compressed_bytes": shrunk})


def _stage_drift(
    done: _Done, samples: checks.Samples, verification: Verification
) -> tuple[StageDrift, ...]:
    """Drift before quantisation and after it; nothing where there was none."""
    if done.unquantised is None:
        return ()
    first = checks.verify(done.unquantised.runnable, samples, done.held_back)
    return (
        StageDrift(stage="pruning", drift=first.drift),
        StageDrift(stage="quantisation", drift=verification.drift),
    )


def _latencies(done: _Done) -> list[Latency]:
    """Latency of original and result, in turns."""
    openers = [
        functools.partial(open_session, runnable)
        for runnable in (done.source, done.serialised.runnable)
    ]
    # ONNX Runtime takes up to three times a model's size for its weights in their blocked layouts
    together = done.before.bytes <= LARGE
    return measure.alternate(openers, done.sample, seconds=_LATENCY_SECONDS, together=together)


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
    clock = _Clock(None)
    opened = open_model(model, external_data=external_data, max_nodes=max_nodes)
    samples = None
    if calibration is not None:
        samples = open_calibration(calibration, opened.model.graph).draw()
    recipe = (recipe or Recipe()).model_copy(update={"target": {"macs": 1.0}, "scope": None})
    units = recipe.units or ("channel", "head")
    recipe = recipe.model_copy(update={"granularity": units}).settled(samples is not None)
    analysed = _analyse(opened, samples, recipe)
    keep = np.ones(analysed.coupling.count + 1, np.bool_)
    curves: Mapping[int, Curve] = {}
    if samples is not None:
        with one_blas_thread():
            curves = _decide(analysed, recipe, samples, None, clock).curves or {}
    return Inspection(
        groups=tuple(_group(group, keep) for group in analysed.coupling.groups),
        frozen=_frozen(analysed.coupling),
        cost=Cost(macs=analysed.macs, params=analysed.params, bytes=opened.size),
        sensitivity=_sensitivities(analysed.coupling, curves),
        regions=_regions(_offer(analysed, recipe)),
    )


def profile(
    model: ModelSource,
    *,
    against: ModelSource | None = None,
    external_data: bool = True,
    max_nodes: int | None = None,
    memory_meter: measure.MemoryMeter = measure.peak_memory,
) -> Profile:
    """MACs, parameters, bytes, latency and memory; with `against`, in turns with that model.

    Args:
        model: as for `prune`.
        against: another model with the same inputs, usually the original.
        external_data, max_nodes: as for `prune`.
        memory_meter: how memory is measured, for callers that may not start processes.

    Raises:
        Refused: a model cannot be opened or run.
    """
    opener = functools.partial(open_model, external_data=external_data, max_nodes=max_nodes)
    first = _Measured.open(model, opener)
    if against is None:
        latency = measure.alternate([lambda: first.session], first.feeds, seconds=1.0)
        return Profile(model=first.cost(latency[0], memory_meter))
    second = _Measured.open(against, opener)
    wanted = checks.run_original(second.source, [first.feeds], from_calibration=False)
    found = [first.session.run(list(wanted.names), first.feeds)]
    openers = [lambda: first.session, lambda: second.session]
    latencies = measure.alternate(openers, first.feeds, seconds=2.0)
    return Profile(
        model=first.cost(latencies[0], memory_meter),
        against=second.cost(latencies[1], memory_meter),
        latency_ratio=round(latencies[0].p50_ms / latencies[1].p50_ms, 4),
        drift=checks.drift_between(wanted.names, list(wanted.outputs), found),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """A model opened for profiling."""

    analysed: _Analysed
    source: bytes | str
    session: ort.InferenceSession
    feeds: Feeds

    @classmethod
    def open(cls, model: ModelSource, opener: _Opener) -> _Measured:
        opened = opener(model)
        nonzero = cost.count_nonzero(opened.model)
        analysed = replace(_analyse(opened, None, Recipe()), nonzero=nonzero)
        source = _runnable(model, opened)
        feeds = _one_sample(analysed, example_feeds(opened.model.graph, analysed.coupling.shapes))
        checks.run_original(source, [feeds], from_calibration=False)  # refuses what does not run
        return cls(analysed, source, open_session(source), feeds)

    def cost(self, latency: Latency, memory_meter: measure.MemoryMeter) -> Cost:
        opened = self.analysed.opened
        found = Cost(
            macs=self.analysed.macs,
            params=self.analysed.params,
            bytes=opened.size,
            latency=latency,
            peak_memory_bytes=self._peak_memory(memory_meter),
        )
        nonzero = self.analysed.nonzero
        if nonzero is None or nonzero > _SPARSE * found.params:
            return found
        source = self.source
        return _with_zeros(
            found, nonzero, source if isinstance(source, bytes) else pathlib.Path(source)
        )

    def _peak_memory(self, memory_meter: measure.MemoryMeter) -> int | None:
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            path = self.source
            if isinstance(path, bytes):
                path = str(pathlib.Path(folder, "model.onnx"))
                pathlib.Path(path).write_bytes(self.source)  # type: ignore[arg-type]
            feeds = pathlib.Path(folder, "feeds.npz")
            np.savez(feeds, **self.feeds)  # type: ignore[arg-type]
            return memory_meter(path, str(feeds))


def _analyse(opened: OpenedModel, samples: Samples | None, recipe: Recipe) -> _Analysed:
    params = cost.count_params(opened.model)
    nonzero = None if recipe.sparsity is None else cost.count_nonzero(opened.model)
    copies = dict(unshare(opened.model))
    coupling = couple(opened.model, _shapes(opened, samples), recipe)
    macs = cost.macs(coupling).of(np.ones(coupling.count + 1, np.bool_))
    return _Analysed(opened, copies, coupling, params, macs, nonzero)


def _shapes(opened: OpenedModel, samples: Samples | None) -> Shapes:
    given = None
    if samples is not None:
        given = {name: array.shape for name, array in samples.seen[0].items()}
    return infer_shapes(opened.model, given)


def _examples(analysed: _Analysed) -> list[Feeds]:
    """Random inputs of two batch sizes, for want of calibration data."""
    shapes = analysed.coupling.shapes
    feeds = [example_feeds(analysed.graph, shapes, seed=0)]
    if any(first != second for first, second in shapes.inputs.values()):
        feeds.append(example_feeds(analysed.graph, shapes, seed=1, batch=1))
    return feeds


def _one_sample(analysed: _Analysed, feeds: Feeds) -> Feeds:
    """The first sample of each input whose batch is free."""
    pairs = analysed.coupling.shapes.inputs
    return {
        name: array[:1] if pairs[name][0] and pairs[name][0][0] != pairs[name][1][0] else array
        for name, array in feeds.items()
    }


def _runnable(model: ModelSource, opened: OpenedModel) -> bytes | str:
    """The original as ONNX Runtime takes it: its path where there is one."""
    if isinstance(model, str | os.PathLike):
        return str(os.fspath(model))
    if isinstance(model, bytes):
        return model
    return serialise(opened.model).runnable


def _group(group: UnitGroup, keep: Mask) -> Group:
    return Group(
        id=group.id,
        kind=group.kind,
        units=int(group.units.size),
        kept=int(keep[group.units].sum()),
        channels_per_unit=max(group.axes.values()),
        tensors=tuple(f"{name}[{axis}]" for name, axis in group.axes),
        normalised_by=group.normalised_by,
    )


def _regions(offer: Offer) -> tuple[Region, ...]:
    """What can be left out whole; then the layers that cannot."""
    places = {node_label(node): place for place, node in enumerate(offer.graph.nodes)}
    held = []
    for refusal in offer.refusals:
        alone = frozenset({places[refusal.node]})
        held.append(
            _region(offer, found.Region(refusal.entry, refusal.exit, alone, alone), refusal.detail)
        )
    return (*(_region(offer, one) for one in offer.regions), *held)


def _region(offer: Offer, one: found.Region, refused: str = "") -> Region:
    saved = offer.costs.of(one.nodes)
    return Region(
        entry=one.entry,
        exit=one.exit,
        layers=tuple(node_label(offer.graph.nodes[place]) for place in sorted(one.layers)),
        macs=round(saved["macs"]),
        params=round(saved["params"]),
        refused=refused,
    )


def _factored(one: ranks.Candidate, rank: int) -> Factored:
    outputs, inputs = one.weight.shape
    return Factored(
        node=node_label(one.view.node),
        inputs=inputs,
        outputs=outputs,
        rank=rank,
        error=float(one.losses[rank]),
    )


def _removal(offer: Offer, one: removal.Removal) -> Removal:
    return Removal(region=_region(offer, one.region), influence=one.influence, drift=one.drift)


def _frozen(coupling: Coupling) -> tuple[Frozen, ...]:
    return tuple(
        Frozen(
            code=item.reason.code,
            node=item.reason.node,
            op_type=item.reason.op_type,
            detail=item.reason.detail,
            channels=item.channels,
        )
        for item in sorted(coupling.frozen, key=lambda item: -item.channels)
    )


def _too_wide(weights: Sequence[SparseWeight], recipe: Recipe) -> tuple[str, ...]:
    """Says where single weights were not ranked as a settled recipe asks."""
    others = [one for one in weights if one.criterion not in ("", recipe.weight_criterion)]
    if not others:
        return ()
    named = ", ".join(one.node for one in others[:5])
    return (
        f"{len(others)} weight matrices are wider than {WIDEST} inputs, too wide for second "
        f"moments: their weights were ranked by magnitude ({named}"
        f"{', …' if len(others) > 5 else ''})",
    )


def _unrepaired(quantised: int) -> tuple[str, ...]:
    """What repair leaves as it is."""
    if not quantised:
        return ()
    return (
        f"{quantised} layers have quantised weights, which are not repaired: prune the model that "
        "was quantised, and quantise the result (--quantize)",
    )


def _warnings(before: Cost, after: Cost) -> tuple[str, ...]:
    warnings = []
    if before.latency is not None and after.latency is not None:
        ratio = after.latency.p50_ms / before.latency.p50_ms
        if ratio > _SLOWER:
            warnings.append(
                f"the result is slower: {after.latency.p50_ms:.3f} ms against "
                f"{before.latency.p50_ms:.3f} ms (p50), whatever its MACs say"
            )
    if after.nonzero is not None and after.compressed_bytes is not None:
        warnings.append(
            f"{after.nonzero / after.params:.1%} of the weights are not zero. ONNX Runtime's CPU "
            "kernels multiply zeros as any other number: single weights make nothing faster. The "
            f"file takes {after.bytes} bytes, and {after.compressed_bytes} compressed"
        )
    if after.bytes > before.bytes:
        warnings.append(f"the file grew from {before.bytes} to {after.bytes} bytes")
    return tuple(warnings)
