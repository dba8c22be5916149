"""The stages of a prune in order: from a model and a recipe to a verified result."""

from __future__ import annotations

import functools
import gc
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import CalibrationSource, Feeds, Samples, open_calibration
from secateur.graphops.calibration.labelled import open_labels
from secateur.graphops.calibration.mirrored import mirror, mirror_axis
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.aside import LARGE, model_beside
from secateur.graphops.model.opening import ModelSource, OpenedModel, open_model
from secateur.graphops.model.runtime import one_blas_thread, open_session
from secateur.graphops.model.writing import Serialised, serialise
from secateur.graphops.pipeline.analysed import (
    Analysed,
    Opener,
    analyse,
    examples,
    one_sample,
    runnable,
    shapes_of,
)
from secateur.graphops.pipeline.choosing import choose
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.records import (
    frozen_records,
    group_record,
    sensitivity_records,
    too_wide,
    unrepaired,
    warnings_of,
    with_zeros,
)
from secateur.graphops.planning import cost
from secateur.graphops.planning.steps import Mask
from secateur.graphops.profile import measure
from secateur.graphops.quantise.quantise import quantise
from secateur.graphops.repair.expectation import fold
from secateur.graphops.repair.joint import refit_together
from secateur.graphops.repair.repair import quantised, repair
from secateur.graphops.sparsity.sparsify import sparsify
from secateur.graphops.sparsity.storage import store_sparse
from secateur.graphops.surgery import vocabulary
from secateur.graphops.surgery.cut import cut
from secateur.graphops.surgery.vocabulary import Vocabulary
from secateur.graphops.verify import verify as checks
from secateur.graphops.verify.accuracy import Scored
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import (
    Cost,
    Division,
    Factored,
    Folded,
    Frozen,
    Group,
    Latency,
    ProgressCallback,
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

_LATENCY_SECONDS = 0.4


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
    sha256: str | None = None,
    memory_meter: measure.MemoryMeter = measure.peak_memory,
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
        sha256: hex digest of the serialised model, for whoever knows it; None: it is computed.
        memory_meter: how memory is measured, for callers that may not start processes.

    Returns:
        the pruned model, the plan and the report.

    Raises:
        Refused: the model, the recipe, calibration data, labels or plan cannot be honoured.
        VerificationFailed: the result did not pass its checks.
    """
    clock = Clock(progress)
    recipe = plan.recipe if plan is not None else recipe or Recipe()
    opener = functools.partial(
        open_model, external_data=external_data, max_nodes=max_nodes, sha256=sha256
    )
    done = _cut(model, recipe, _Data(calibration, labels), plan, opener, memory_meter, clock)
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
        if "memory" in recipe.target:
            before, after = (
                cost.model_copy(
                    update={
                        "peak_memory_bytes": measure.memory_of(model, done.sample, memory_meter)
                    }
                )
                for cost, model in ((before, done.source), (after, done.serialised.runnable))
            )
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
            *warnings_of(before, after, recipe.target),
            *done.absent,
            *unrepaired(done.quantised),
            *too_wide(done.sparse_weights, recipe.settled(calibration is not None)),
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
    absent: tuple[str, ...]
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
        return samples, Scored.of(runnable(model, opened), labelled)


def _cut(
    model: ModelSource,
    recipe: Recipe,
    given: _Data,
    plan: Plan | None,
    opener: Opener,
    memory_meter: measure.MemoryMeter,
    clock: Clock,
) -> _Done:
    """The stages up to the pruned model, and everything that running it needs."""
    with clock.stage(Stage.LOAD, "opening the model"):
        opened = opener(model)
        samples, scored = given.open(model, opened)
    recipe_asked, recipe = recipe, recipe.settled(samples is not None)
    with clock.stage(Stage.COUPLING, f"{len(opened.model.graph)} nodes"):
        analysed = analyse(opened, samples, recipe)
        known = None
        if recipe.vocabulary is not None:
            known, analysed, samples = _keep_tokens(analysed, recipe, samples)
            if scored is not None:
                raise _labels_count_tokens()
    with one_blas_thread():
        choice = choose(analysed, recipe, samples, plan, clock, memory_meter)
        structure, decision = choice.structure, choice.decision
        rest = structure.rest
        with clock.stage(Stage.SURGERY, f"{int((~decision.keep).sum())} units go"):
            pruned, kept = cut(rest.opened.model, rest.coupling, decision.keep, analysed.copies)
        steps: tuple[RepairStep, ...] = ()
        if recipe.repair and decision.observed is not None:
            batches = decision.observed.batches
            steps = _repair(analysed, rest, pruned, decision.keep, batches, recipe, clock)
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
    feeds, aside = examples(analysed) if samples is None else samples.judged, opened.aside
    fitted_by = None if samples is None else rest.coupling.shapes
    before = Cost(macs=analysed.macs, params=analysed.params, bytes=opened.size)
    after = Cost(
        macs=cost.macs(rest.coupling).of(decision.keep),
        params=cost.count_params(pruned),
        bytes=serialised.size,
    )
    if sparse_weights:
        as_given = runnable(model, opened)
        whole = as_given if isinstance(as_given, bytes) else pathlib.Path(as_given)
        beside = () if serialised.weights is None else (serialised.weights.path,)
        before = with_zeros(before, analysed.nonzero, whole)
        after = with_zeros(after, cost.count_nonzero(pruned), serialised.model, *beside)
    return _Done(
        source=runnable(model, opened) if aside is None else str(model_beside(aside)),
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
        groups=tuple(group_record(g, rest.coupling, decision.keep) for g in rest.coupling.groups),
        frozen=frozen_records(rest.coupling),
        removed=structure.removals,
        factored=structure.losses,
        divisions=choice.divisions,
        absent=tuple(f"the model has no {kind} that may go" for kind in choice.absent),
        sensitivity=sensitivity_records(rest.coupling, decision.curves or {}),
        repair=steps,
        folded=folded,
        quantised=quantised(pruned, fitted_by) if recipe.repair and kept else 0,
        sparse_weights=sparse_weights,
        feeds=feeds,
        held_back=samples is not None and samples.held_back,
        sample=one_sample(analysed, feeds[0]),
        scored=scored,
    )


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


def _repair(
    analysed: Analysed,
    rest: Analysed,
    pruned: ir.Model,
    keep: Mask,
    batches: Sequence[Feeds],
    recipe: Recipe,
    clock: Clock,
) -> tuple[RepairStep, ...]:
    """Refits what is left by calibration data, layer by layer and then block by block."""
    with clock.stage(Stage.REPAIR, "refitting what is left"):
        axis = mirror_axis(analysed.opened.model, batches)
        if axis is not None:
            batches = [one for batch in batches for one in (batch, mirror(batch, axis))]
        original = Observed(
            analysed.opened.model,
            rest.coupling,
            batches,
            recipe.seed,
            alike=1 if axis is None else 2,
        )
        given = pruned, original, keep, recipe.seed
        alone = repair(*given, lambda share: clock.tell(Stage.REPAIR, share / 2))
        together = refit_together(*given, lambda share: clock.tell(Stage.REPAIR, (1 + share) / 2))
    return alone + together


def _fold(analysed: Analysed, pruned: ir.Model, keep: Mask, recipe: Recipe) -> tuple[Folded, ...]:
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


def _collect(size: int) -> None:
    """Frees the weights of graphs that are no longer needed, where they are worth it: the nodes of
    a graph refer to one another, and would wait for a collection that comes too late."""
    if size > LARGE:
        gc.collect()


def _stage_drift(
    done: _Done, samples: checks.Answered, verification: Verification
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
