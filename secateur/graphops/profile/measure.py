"""Latency and memory in ONNX Runtime.

Machines are noisy, so original and result take turns: whatever slows one run slows its
neighbour too, and the ratio stands even where the milliseconds do not.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort

from secateur.graphops.calibration import Feeds
from secateur.report import Latency

Opener = Callable[[], ort.InferenceSession]

_MOST_RUNS = 200  # of each model


def alternate(
    openers: Sequence[Opener],
    feeds: Feeds,
    *,
    seconds: float,
    together: bool = True,
) -> list[Latency]:
    """Latency of several models on the same inputs, run in turns.

    Args:
        openers: one per model, each opens its session.
        feeds: for each of them.
        seconds: to spend on runs altogether; at least three of each are timed, `_MOST_RUNS` at
            most.
        together: hold all sessions at once and change after every run; else one session at a
            time, which needs the memory of one: the last, those before it, then it again.
    """
    times: list[list[float]] = [[] for _ in openers]
    if together:
        _time([opener() for opener in openers], times, feeds, seconds)
    else:
        turns = [*zip(openers, times, strict=True)]
        for opener, taken in (turns[-1], *turns):
            _time([opener()], [taken], feeds, seconds / (1 + len(turns)))
    return [
        Latency(
            p50_ms=round(float(np.percentile(taken, 50)), 4),
            p95_ms=round(float(np.percentile(taken, 95)), 4),
            runs=len(taken),
        )
        for taken in times
    ]


def _time(
    sessions: Sequence[ort.InferenceSession],
    times: Sequence[list[float]],
    feeds: Feeds,
    seconds: float,
) -> None:
    for session in sessions:
        session.run(None, feeds)  # first runs allocate
    unwatched = ort.InferenceSession.run  # to look after a run takes as long as a tiny model
    deadline = time.perf_counter() + seconds
    turns = 0
    while turns < _MOST_RUNS and (turns < 3 or time.perf_counter() < deadline):
        turns += 1
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            unwatched(session, None, feeds)
            taken.append((time.perf_counter() - start) * 1e3)


_PEAK = pathlib.Path(__file__).with_name("peak.py")

MemoryMeter = Callable[[str, str], int | None]
"""As `peak_memory`."""


def peak_memory(path: str, feeds_path: str) -> int | None:
    """Bytes by which a fresh process grows while it loads and runs a model.

    Args:
        path: of the model.
        feeds_path: `.npz` with its inputs.

    Returns:
        None where the process fails or the platform does not tell.
    """
    done = subprocess.run(
        [sys.executable, "-P", str(_PEAK), path, feeds_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def memory_of(model: bytes | str, feeds: Feeds, meter: MemoryMeter) -> int | None:
    """As `peak_memory`, of a model that is serialised or a path, on inputs that are held."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = model
        if isinstance(path, bytes):
            path = str(pathlib.Path(folder, "model.onnx"))
            pathlib.Path(path).write_bytes(model)  # type: ignore[arg-type]
        place = pathlib.Path(folder, "feeds.npz")
        np.savez(place, **feeds)  # type: ignore[arg-type]
        return meter(path, str(place))
