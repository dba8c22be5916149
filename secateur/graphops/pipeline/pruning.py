"""The stages of a prune in order: from a model and a recipe to a verified result."""

from __future__ import annotations

import functools
import gc

from secateur.errors import VerificationFailed
from secateur.graphops.calibration import CalibrationSource
from secateur.graphops.model.aside import LARGE
from secateur.graphops.model.opening import ModelSource, open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.cutting import Given, Pruned, prune_unverified
from secateur.graphops.pipeline.records import unusual_outputs, warnings_of
from secateur.graphops.profile import measure
from secateur.graphops.quantise.quantise import does_not_hold
from secateur.graphops.verify import verify as checks
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Latency, ProgressCallback, Stage, StageDrift, Verification
from secateur.result import Result

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
    given = Given(calibration, labels)
    done = prune_unverified(model, recipe, given, plan, opener, memory_meter, clock)
    before, after = done.before, done.after
    _collect(before.bytes)
    with clock.stage(Stage.VERIFY, "running original and result in ONNX Runtime"):
        feeds = done.feeds if done.known is None else [done.known.old(f) for f in done.feeds]
        samples = checks.run_original(
            done.source, feeds, calibration is not None, done.perhaps, done.by_data
        )
        if done.known is not None:
            samples = checks.without_tokens(samples, done.known)
        verification, stages = _verify(done, samples, recipe)
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
    report = done.evidence(
        before=before,
        after=after,
        stage_drift=stages,
        verification=verification,
        accuracy=scored,
        warnings=(
            *warnings_of(before, after, recipe.target),
            *unusual_outputs(verification),
            *done.warnings,
        ),
        seconds=clock.seconds,
    )
    return Result(done.serialised.model, done.plan, report, done.serialised.weights)


def _collect(size: int) -> None:
    """Frees the weights of graphs that are no longer needed, where they are worth it: the nodes of
    a graph refer to one another, and would wait for a collection that comes too late."""
    if size > LARGE:
        gc.collect()


def _verify(
    done: Pruned, samples: checks.Answered, recipe: Recipe
) -> tuple[Verification, tuple[StageDrift, ...]]:
    """Of the result; and drift before quantisation and after it, nothing where there was none."""
    if done.unquantised is None or recipe.quantize is None:
        return checks.verify(done.serialised.runnable, samples, done.held_back), ()
    first = checks.verify(done.unquantised.runnable, samples, done.held_back)
    try:
        second = checks.verify(done.serialised.runnable, samples, done.held_back)
    except VerificationFailed as failed:  # pruning has done no harm
        raise does_not_hold(recipe.quantize, failed) from None
    return second, (
        StageDrift(stage="pruning", drift=first.drift),
        StageDrift(stage="quantisation", drift=second.drift),
    )


def _latencies(done: Pruned) -> list[Latency]:
    """Latency of original and result, in turns."""
    openers = [
        functools.partial(open_session, runnable)
        for runnable in (done.source, done.serialised.runnable)
    ]
    # ONNX Runtime takes up to three times a model's size for its weights in their blocked layouts
    together = done.before.bytes <= LARGE
    return measure.alternate(openers, done.sample, seconds=_LATENCY_SECONDS, together=together)
