"""Tells how far a job is, and takes the time of its stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from secateur.report import Progress, ProgressCallback, Stage

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


@dataclass(slots=True)
class Clock:
    """Tells progress and takes the time of each stage."""

    progress: ProgressCallback | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, stage: Stage, message: str) -> Iterator[None]:
        """Adds to the time of a stage what the block takes."""
        if self.progress is not None:
            self.progress(Progress(stage=stage, fraction=_BEGINS[stage], message=message))
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self.seconds[stage.value] = round(self.seconds.get(stage.value, 0.0) + taken, 4)

    def tell(self, stage: Stage, share: float) -> None:
        """Progress inside a stage."""
        if self.progress is not None:
            ends = min([begin for begin in _BEGINS.values() if begin > _BEGINS[stage]], default=1.0)
            fraction = _BEGINS[stage] + share * (ends - _BEGINS[stage])
            self.progress(Progress(stage=stage, fraction=round(fraction, 4)))

    def done(self) -> None:
        """The end of the job."""
        if self.progress is not None:
            self.progress(Progress(stage=Stage.PROFILE, fraction=1.0, message="done"))
