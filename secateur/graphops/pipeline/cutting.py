"""The stages up to the pruned model: opening, coupling, planning, surgery, repair, writing."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import CalibrationSource, Feeds, Samples, open_calibration
from secateur.graphops.calibration.labelled import open_labels
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.aside import model_beside
from secateur.graphops.model.opening import ModelSource, OpenedModel
from secateur.graphops.model.runtime import one_blas_thread
from secateur.graphops.model.writing import Serialised, serialise
from secateur.graphops.pipeline.analysed import (
    Analysed,
    Opener,
    analyse,
    examples,
    one_sample,
    other_sizes,
    runnable,
    shapes_of,
)
from secateur.graphops.pipeline.carrying_out import carry_out
from secateur.graphops.pipeline.choosing import choose
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.records import (
    frozen_records,
    group_record,
    sensitivity_records,
    too_wide,
    unrepaired,
    with_zeros,
)
from secateur.graphops.pipeline.rotating import turn
from secateur.graphops.planning import cost
from secateur.graphops.profile import measure
from secateur.graphops.quantise.quantise import check_loads, quantise
from secateur.graphops.sparsity.storage import store_sparse
from secateur.graphops.surgery import vocabulary
from secateur.graphops.surgery.vocabulary import Vocabulary
from secateur.graphops.verify.accuracy import Scored
from secateur.graphops.verify.verify import Axes, run_original
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Cost, Report, Stage
from secateur.result import WeightsFile


@dataclass(frozen=True, slots=True)
class Given:
    """What callers give beside a model."""

    calibration: CalibrationSource | None
    labels: CalibrationSource | None

    def open(self, model: ModelSource, opened: OpenedModel) -> tuple[Samples | None, Scored | None]:
        """Samples for the stages that need them, and the original's accuracy."""
        given = opened.model
        data = None if self.calibration is None else open_calibration(self.calibration, given)
        samples = None if data is None else data.draw()
        if self.labels is None:
            return samples, None
        labelled = open_labels(self.labels, given, data, samples)
        # before the work is done: labels that do not fit are refused here
        return samples, Scored.of(runnable(model, opened), labelled)


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned model that nothing has run yet.

    It does not hold the graphs it came from: their weights go before ONNX Runtime's come.

    Attributes:
        source: the original, as ONNX Runtime takes it.
        aside: a file that the source refers to.
        known: the tokens that are kept; `feeds` are in their new ids.
        serialised: the result.
        unquantised: the result before quantisation, if it was quantised.
        before, after: what needs no run to be known of their costs.
        evidence: the report, but for what running both models tells.
        warnings: for the report.
        feeds: to run both models by.
        perhaps: of other sizes, to run both by if the original takes them.
        by_data: axes of outputs whose sizes the data decide.
        held_back: whether no fit has seen the feeds.
        sample: one sample of them.
        scored: the original's accuracy.
    """

    source: bytes | str
    aside: WeightsFile | None
    known: Vocabulary | None
    serialised: Serialised
    unquantised: Serialised | None
    plan: Plan
    before: Cost
    after: Cost
    evidence: functools.partial[Report]
    warnings: tuple[str, ...]
    feeds: Sequence[Feeds]
    perhaps: Feeds | None
    by_data: Axes
    held_back: bool
    sample: Feeds
    scored: Scored | None


def prune_unverified(
    model: ModelSource,
    recipe: Recipe,
    given: Given,
    plan: Plan | None,
    opener: Opener,
    memory_meter: measure.MemoryMeter,
    clock: Clock,
) -> Pruned:
    """From a model and a recipe, or a plan, to a pruned model. For errors see `prune`."""
    with clock.stage(Stage.LOAD, "opening the model"):
        opened = opener(model)
        samples, scored = given.open(model, opened)
    asked, recipe = recipe, recipe.settled(samples is not None)
    with clock.stage(Stage.COUPLING, f"{len(opened.model.graph)} nodes"):
        analysed = analyse(opened, samples, recipe)
        known = None
        if recipe.vocabulary is not None:
            if scored is not None:
                raise _labels_count_tokens()
            known, analysed, samples = _keep_tokens(analysed, recipe, samples)
    feeds = examples(analysed) if samples is None else samples.judged
    with one_blas_thread():
        turned = turn(analysed, samples, recipe, plan, clock)
        analysed = turned.analysed
        try:
            choices = choose(analysed, recipe, samples, plan, clock, memory_meter)
        except Refused as refused:
            if refused.refusal.code is Code.NOTHING_TO_PRUNE:  # a model that fails is told first
                run_original(_source(model, opened), feeds[:1], samples is not None)
            raise
        done = carry_out(analysed, choices, samples, recipe, asked, clock)
    unquantised, serialised, sparse_weights = None, serialise(done.model), done.sparse_weights
    if recipe.sparse_initializers:
        serialised, sparse_weights = store_sparse(serialised, sparse_weights)
    if recipe.quantize is not None:
        with clock.stage(Stage.QUANTIZE, recipe.quantize):
            unquantised = serialised
            serialised = quantise(serialised, recipe.quantize, samples.seen if samples else ())
            check_loads(serialised, recipe.quantize)
    if plan is None:
        _check_size(serialised.size, opened.size, recipe)
    choice = done.choice
    structure, keep = choice.structure, choice.decision.keep
    coupling = structure.rest.coupling
    before = Cost(macs=analysed.macs, params=analysed.params, bytes=opened.size)
    after = Cost(
        macs=cost.macs(coupling).of(keep),
        params=cost.count_params(done.model),
        bytes=serialised.size,
    )
    if sparse_weights:
        as_given = runnable(model, opened)
        whole = as_given if isinstance(as_given, bytes) else pathlib.Path(as_given)
        beside = () if serialised.weights is None else (serialised.weights.path,)
        before = with_zeros(before, analysed.nonzero, whole)
        after = with_zeros(after, cost.count_nonzero(done.model), serialised.model, *beside)
    evidence = functools.partial(
        Report,
        groups=tuple(group_record(group, coupling, keep) for group in coupling.groups),
        frozen=frozen_records(coupling),
        removed=structure.removals,
        rotated=turned.rotated,
        factored=structure.losses,
        vocabulary=() if known is None else tuple(known.ids.tolist()),
        divisions=choice.divisions,
        sensitivity=sensitivity_records(coupling, choice.decision.curves or {}),
        repair=done.repair,
        folded=done.folded,
        sparse_weights=sparse_weights,
    )
    return Pruned(
        source=_source(model, opened),
        aside=opened.aside,
        known=known,
        serialised=serialised,
        unquantised=unquantised,
        plan=Plan(
            source=opened.sha256,
            recipe=asked,
            rotated=turned.groups,
            removed=structure.removed,
            factored=structure.factored,
            kept=done.kept,
        ),
        before=before,
        after=after,
        evidence=evidence,
        warnings=(
            *(f"the model has no {kind} that may go" for kind in choice.absent),
            *turned.warnings,
            *choice.decision.warnings,
            *unrepaired(done.left, samples is not None),
            *too_wide(sparse_weights, recipe),
        ),
        feeds=feeds,
        perhaps=other_sizes(analysed) if known is None else None,
        by_data={
            str(value.name): analysed.coupling.shapes.axes_by_data(str(value.name))
            for value in analysed.graph.outputs
        },
        held_back=samples is not None and samples.held_back,
        sample=one_sample(analysed, feeds[0]),
        scored=scored,
    )


def _source(model: ModelSource, opened: OpenedModel) -> bytes | str:
    """The original as ONNX Runtime takes it, with the weights that were put aside."""
    return runnable(model, opened) if opened.aside is None else str(model_beside(opened.aside))


def _keep_tokens(
    analysed: Analysed, recipe: Recipe, samples: Samples | None
) -> tuple[Vocabulary, Analysed, Samples | None]:
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
    coupling = couple(opened.model, shapes_of(opened, samples), recipe)
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
