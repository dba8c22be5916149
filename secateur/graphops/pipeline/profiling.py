"""What a model costs, beside another."""

from __future__ import annotations

import functools
import pathlib
from dataclasses import dataclass, replace

import onnxruntime as ort

from secateur.graphops.calibration import Feeds
from secateur.graphops.model.opening import ModelSource, open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.pipeline.analysed import Analysed, Opener, analyse, one_sample, runnable
from secateur.graphops.pipeline.records import with_zeros
from secateur.graphops.planning import cost
from secateur.graphops.profile import measure
from secateur.graphops.verify import verify as checks
from secateur.graphops.verify.examples import example_feeds
from secateur.recipe import Recipe
from secateur.report import Cost, Latency, Profile

_SPARSE = 0.9  # share of weights that are not zero, above which nobody has taken any out


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

    analysed: Analysed
    source: bytes | str
    session: ort.InferenceSession
    feeds: Feeds

    @classmethod
    def open(cls, model: ModelSource, opener: Opener) -> _Measured:
        opened = opener(model)
        nonzero = cost.count_nonzero(opened.model)
        analysed = replace(analyse(opened, None, Recipe()), nonzero=nonzero)
        source = runnable(model, opened)
        feeds = one_sample(analysed, example_feeds(opened.model.graph, analysed.coupling.shapes))
        checks.run_original(source, [feeds], from_calibration=False)  # refuses what does not run
        return cls(analysed, source, open_session(source), feeds)

    def cost(self, latency: Latency, memory_meter: measure.MemoryMeter) -> Cost:
        opened = self.analysed.opened
        found = Cost(
            macs=self.analysed.macs,
            params=self.analysed.params,
            bytes=opened.size,
            latency=latency,
            peak_memory_bytes=measure.memory_of(self.source, self.feeds, memory_meter),
        )
        nonzero = self.analysed.nonzero
        if nonzero is None or nonzero > _SPARSE * found.params:
            return found
        source = self.source
        return with_zeros(
            found, nonzero, source if isinstance(source, bytes) else pathlib.Path(source)
        )
