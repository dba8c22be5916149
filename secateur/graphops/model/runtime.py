"""ONNX Runtime sessions, as everything here opens them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import threadpoolctl

from secateur.errors import Code, Refused, refuse
from secateur.graphops.model import maps

RUN_SECONDS = 600.0
"""What one run of a model may take: a loop may count to 2**62."""

_LOOK = 0.5  # seconds between two looks at what runs


class Session(ort.InferenceSession):  # type: ignore[misc]
    """A session that gives a run up after `RUN_SECONDS`, and answers maps as arrays."""

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        """As that of ONNX Runtime. Raises Refused: `MODEL_DOES_NOT_RUN` with its message."""
        options = run_options or ort.RunOptions()
        with _WATCH.over(options):
            try:
                return [maps.as_array(o) for o in super().run(output_names, input_feed, options)]
            except Exception as caught:
                late = TimeoutError(f"a run took more than {RUN_SECONDS:g} s")
                error = late if options.terminate else caught
                raise does_not_run(error, input_feed) from error


class _Watch:
    """Looks at what runs, in one thread, which is there only while something does."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[float, ort.RunOptions]] = {}  # when to end each
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def over(self, options: ort.RunOptions) -> Iterator[None]:
        """Within it a run with these options goes on, for as long as it may."""
        with self._lock:
            self._runs[id(options)] = time.monotonic() + RUN_SECONDS, options
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                del self._runs[id(options)]

    def _look(self) -> None:
        while True:
            time.sleep(min(_LOOK, RUN_SECONDS))
            with self._lock:
                if not self._runs:
                    self._thread = None
                    return
                for end, options in self._runs.values():
                    if time.monotonic() > end:
                        options.terminate = True


_WATCH = _Watch()


def open_session(
    model: bytes | str, *, lean: bool = False, spin: bool = True, saturating: bool = True
) -> Session:
    """A CPU session.

    Args:
        model: serialised, or a path (for external data).
        lean: spend less memory and start sooner (no arena, no prepacked weights), run slower.
        spin: let threads wait for work by spinning: faster alone, much slower beside other work.
        saturating: let products of integers saturate, as they do on processors without VNNI where
            one factor is signed; exact ones are slower.

    Raises:
        Exception: whatever ONNX Runtime raises; callers say what it means.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lean:
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not saturating:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.x64quantprecision", "1")
    return Session(model, options, providers=["CPUExecutionProvider"])


def one_blas_thread() -> contextlib.AbstractContextManager[object]:
    """Within it NumPy's and SciPy's products take one thread.

    Beside other work, threads that wait for one another are ten times slower than one alone; and
    sums that are split as cores happen to be free would not give the same bytes twice.
    """
    limits: contextlib.AbstractContextManager[object] = threadpoolctl.threadpool_limits(1, "blas")
    return limits


def does_not_run(error: Exception, feeds: Mapping[str, npt.NDArray[Any]]) -> Refused:
    """The refusal of a model that ONNX Runtime cannot load, or run on those inputs."""
    shapes = {name: list(np.shape(array)) for name, array in feeds.items()}
    return refuse(
        Code.MODEL_DOES_NOT_RUN,
        f"ONNX Runtime cannot run the model as it was given: {first_line(error)}",
        expected="a run",
        found=f"a failure with inputs {shapes}",
        hint="If only the input sizes do not suit it, give calibration data that do.",
    )


def first_line(error: BaseException) -> str:
    """What ONNX Runtime says first; the rest is where in its sources."""
    return str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
