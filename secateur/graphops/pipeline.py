"""The stages in order: from a model and a recipe to a verified result."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from secateur.graphops.calibration import (
    Calibration,
    CalibrationSource,
    Feeds,
    open_calibration,
    sample_count,
)
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.coupling.units import Coupling, UnitGroup
from secateur.graphops.criteria import CRITERIA, Context
from secateur.graphops.model.normalise import unshare
from secateur.graphops.model.opening import ModelSource, OpenedModel, open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.model.writing import Serialised, serialise
from secateur.graphops.planning import cost, planner, replay
from secateur.graphops.profile import measure
from secateur.graphops.surgery.cut import cut
from secateur.graphops.verify import verify as checks
from secateur.graphops.verify.examples import example_feeds
from secateur.graphops.verify.runtime import open_session
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import (
    Cost,
    Frozen,
    Group,
    Inspection,
    Latency,
    Profile,
    Progress,
    ProgressCallback,
    Report,
    Stage,
)
from secateur.result import Result

# Share of the whole job that is done when a stage begins; latency and verification take most.
_BEGINS = {
    Stage.LOAD: 0.0,
    Stage.COUPLING: 0.1,
    Stage.CRITERIA: 0.2,
    Stage.PLANNING: 0.4,
    Stage.SURGERY: 0.5,
    Stage.VERIFY: 0.6,
    Stage.PROFILE: 0.8,
}
_CALIBRATION_SAMPLES = 256  # at most that many are run for verification
_LATENCY_SECONDS = 0.4
# Sessions of larger models are opened one at a time: ONNX Runtime takes up to three times a
# model's size for its weights in their blocked layouts.
_TOGETHER = 32 << 20
_Opener = Callable[[ModelSource], OpenedModel]
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

    def done(self) -> None:
        if self.progress is not None:
            self.progress(Progress(stage=Stage.PROFILE, fraction=1.0, message="done"))


@dataclass(frozen=True, slots=True)
class _Analysed:
    """An opened model with everything that does not depend on a target."""

    opened: OpenedModel
    copies: dict[str, str]
    coupling: Coupling
    calibration: Calibration | None
    params: int

    @property
    def graph(self) -> ir.Graph:
        return self.opened.model.graph


def prune(
    model: ModelSource,
    recipe: Recipe | None = None,
    *,
    calibration: CalibrationSource | None = None,
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
        plan: replay this decision instead of making one; its recipe is taken.
        progress: called with each step forward.
        external_data: whether weights may lie in files beside the model.
        measure_latency: whether to time original and result in ONNX Runtime.
        max_nodes: how many nodes the model may have, functions inlined; None: any number.

    Returns:
        the pruned model, the plan and the report.

    Raises:
        Refused: the model, the recipe, the calibration data or the plan cannot be honoured.
        VerificationFailed: the result did not pass its checks.
    """
    clock = _Clock(progress)
    recipe = plan.recipe if plan is not None else recipe or Recipe()
    opener = functools.partial(open_model, external_data=external_data, max_nodes=max_nodes)
    done = _cut(model, recipe, calibration, plan, opener, clock)
    before, after = done.before, done.after
    _collect(before.bytes)
    with clock.stage(Stage.VERIFY, "running original and result in ONNX Runtime"):
        samples = checks.run_original(done.source, done.feeds, calibration is not None)
        verification = checks.verify(done.serialised.runnable, samples)
        del samples
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
        verification=verification,
        warnings=_warnings(before, after),
        seconds=clock.seconds,
    )
    return Result(done.serialised.model, done.plan, report, done.serialised.weights)


@dataclass(frozen=True, slots=True)
class _Done:
    """A cut, without the models it came from: their weights go before ONNX Runtime's come."""

    source: bytes | str
    serialised: Serialised
    plan: Plan
    before: Cost
    after: Cost
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    feeds: list[Feeds]
    sample: Feeds


def _cut(
    model: ModelSource,
    recipe: Recipe,
    calibration: CalibrationSource | None,
    plan: Plan | None,
    opener: _Opener,
    clock: _Clock,
) -> _Done:
    """The stages up to the pruned model, and everything that running it needs."""
    with clock.stage(Stage.LOAD, "opening the model"):
        opened = opener(model)
        data = None if calibration is None else open_calibration(calibration, opened.model.graph)
    with clock.stage(Stage.COUPLING, f"{len(opened.model.graph)} nodes"):
        analysed = _analyse(opened, data, recipe)
    coupling = analysed.coupling
    scores = np.zeros(coupling.count + 1, np.float64)
    with clock.stage(Stage.CRITERIA, f"{recipe.criterion} over {coupling.count} units"):
        if plan is None and coupling.groups:
            context = Context(opened.model, coupling, data, recipe.seed)
            scores = CRITERIA[recipe.criterion](context)
    with clock.stage(Stage.PLANNING, ", ".join(f"{k}={v:g}" for k, v in recipe.target.items())):
        if plan is None:
            keep = planner.choose(coupling, scores, recipe, analysed.params)
        else:
            keep = replay.units_kept(plan, coupling, analysed.copies, opened.sha256)
    with clock.stage(Stage.SURGERY, f"{int((~keep).sum())} units go"):
        pruned, kept = cut(opened.model, coupling, keep, analysed.copies)
        serialised = serialise(pruned)
        params = cost.count_params(pruned)
    feeds = _feeds(analysed)
    macs = cost.macs(coupling)
    return _Done(
        source=_runnable(model, opened),
        serialised=serialised,
        plan=Plan(source=opened.sha256, recipe=recipe, kept=kept),
        before=Cost(macs=macs.of(np.ones_like(keep)), params=analysed.params, bytes=opened.size),
        after=Cost(macs=macs.of(keep), params=params, bytes=serialised.size),
        groups=tuple(_group(group, keep) for group in coupling.groups),
        frozen=_frozen(coupling),
        feeds=feeds,
        sample=_one_sample(analysed, feeds[0]),
    )


def _collect(size: int) -> None:
    """Frees the weights of graphs that are no longer needed, where they are worth it: the nodes of
    a graph refer to one another, and would wait for a collection that comes too late."""
    if size > _TOGETHER:
        gc.collect()


def _latencies(done: _Done) -> list[Latency]:
    """Latency of original and result, in turns."""
    openers = [
        functools.partial(open_session, runnable)
        for runnable in (done.source, done.serialised.runnable)
    ]
    together = done.before.bytes <= _TOGETHER
    return measure.alternate(openers, done.sample, seconds=_LATENCY_SECONDS, together=together)


def inspect(
    model: ModelSource,
    recipe: Recipe | None = None,
    *,
    external_data: bool = True,
    max_nodes: int | None = None,
) -> Inspection:
    """What can be cut from a model, what must stay, and why. Nothing is run.

    Args:
        model: as for `prune`.
        recipe: its `ignore` is honoured.
        external_data, max_nodes: as for `prune`.

    Raises:
        Refused: the model cannot be opened, or an ignore glob matches nothing.
    """
    opened = open_model(model, external_data=external_data, max_nodes=max_nodes)
    analysed = _analyse(opened, None, recipe or Recipe())
    keep = np.ones(analysed.coupling.count + 1, np.bool_)
    return Inspection(
        groups=tuple(_group(group, keep) for group in analysed.coupling.groups),
        frozen=_frozen(analysed.coupling),
        cost=Cost(
            macs=cost.macs(analysed.coupling).of(keep), params=analysed.params, bytes=opened.size
        ),
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
        analysed = _analyse(opened, None, Recipe())
        source = _runnable(model, opened)
        feeds = _one_sample(analysed, example_feeds(opened.model.graph, analysed.coupling.shapes))
        checks.run_original(source, [feeds], from_calibration=False)  # refuses what does not run
        return cls(analysed, source, open_session(source), feeds)

    def cost(self, latency: Latency, memory_meter: measure.MemoryMeter) -> Cost:
        coupling = self.analysed.coupling
        return Cost(
            macs=cost.macs(coupling).of(np.ones(coupling.count + 1, np.bool_)),
            params=self.analysed.params,
            bytes=self.analysed.opened.size,
            latency=latency,
            peak_memory_bytes=self._peak_memory(memory_meter),
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


def _analyse(opened: OpenedModel, data: Calibration | None, recipe: Recipe) -> _Analysed:
    params = cost.count_params(opened.model)
    copies = dict(unshare(opened.model))
    given = None
    if data is not None:
        first = next(iter(data.batches()))
        given = {name: array.shape for name, array in first.items()}
    shapes = infer_shapes(opened.model, given)
    coupling = couple(opened.model, shapes, recipe)
    return _Analysed(opened, copies, coupling, data, params)


def _feeds(analysed: _Analysed) -> list[Feeds]:
    """What verification runs: calibration samples, or random inputs of two batch sizes."""
    if analysed.calibration is not None:
        feeds, samples = [], 0
        for batch in analysed.calibration.batches():
            feeds.append(batch)
            samples += sample_count(batch)
            if samples >= _CALIBRATION_SAMPLES:
                break
        return feeds
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


def _group(group: UnitGroup, keep: planner.Mask) -> Group:
    return Group(
        id=group.id,
        kind=group.kind,
        units=int(group.units.size),
        kept=int(keep[group.units].sum()),
        channels_per_unit=max(group.axes.values()),
        tensors=tuple(f"{name}[{axis}]" for name, axis in group.axes),
        normalised_by=group.normalised_by,
    )


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


def _warnings(before: Cost, after: Cost) -> tuple[str, ...]:
    warnings = []
    if before.latency is not None and after.latency is not None:
        ratio = after.latency.p50_ms / before.latency.p50_ms
        if ratio > _SLOWER:
            warnings.append(
                f"the result is slower: {after.latency.p50_ms:.3f} ms against "
                f"{before.latency.p50_ms:.3f} ms (p50), whatever its MACs say"
            )
    if after.bytes > before.bytes:
        warnings.append(f"the file grew from {before.bytes} to {after.bytes} bytes")
    return tuple(warnings)
