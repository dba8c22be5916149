"""What is seen of a server from outside: numbers for Prometheus, spans of jobs for OpenTelemetry.

The numbers are this process', so they are module variables, as is usual; what counts imports them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

import secateur
from secateur import _trace
from secateur.errors import Refused, ServerError

log = logging.getLogger("secateur.service")

# else twice as many series, for times that nobody asks for
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
prometheus_client.ProcessCollector(registry=REGISTRY)
_FAST = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300)
_SLOW = (0.01, 0.05, 0.2, 1, 5, 20, 60, 300, 1200, 3600)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"secateur_{name}", text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"secateur_{name}", text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(f"secateur_{name}", text, labels, buckets=buckets, registry=REGISTRY)


BUILD = _gauge("build_info", "1, with the version as a label.", "version")
BUILD.labels(secateur.__version__).set(1)
CALLS = _counter("calls", "Calls that ended, by gRPC status.", "method", "code")
CALL_SECONDS = _histogram("call_seconds", "Duration of calls.", _FAST, "method")
CALLS_RUNNING = _gauge("calls_running", "Calls that run now.", "method")
REFUSALS = _counter("refusals", "Calls and operations that were refused, by reason.", "reason")
JOBS_RUNNING = _gauge("jobs_running", "Jobs that a worker works on now.")
JOBS_WAITING = _gauge("jobs_waiting", "Jobs that wait for a worker now.")
JOB_SECONDS = _histogram("job_seconds", "Duration of jobs, waiting included.", _SLOW, "call", "end")
STAGE_SECONDS = _histogram("stage_seconds", "Duration of stages of jobs.", _SLOW, "stage")
OPERATIONS = _gauge("operations_unfinished", "Operations that wait or run now.")
BYTES = _counter("blob_bytes", "Bytes of blobs that went over the wire.", "direction")
STORED = _gauge("stored_bytes", "Bytes of all blobs here.")
CACHE = _counter("cache_lookups", "Prunes that were, or were not, done before.", "result")
WORKER_STARTS = _counter("worker_starts", "Worker processes started.")
WORKER_DEATHS = _counter("worker_deaths", "Workers that died over a job, by reason.", "reason")


@contextlib.contextmanager
def exposed(listen: str | None) -> Iterator[None]:
    """Answers `GET /metrics` on `HOST:PORT`; None: does not.

    Raises:
        ServerError: the address cannot be used.
    """
    if listen is None:
        yield
        return
    host, _, port = listen.rpartition(":")
    try:
        server, thread = prometheus_client.start_http_server(
            int(port), host.strip("[]"), registry=REGISTRY
        )
    except OSError as error:
        raise ServerError(f"cannot listen on {listen}: {error}") from None
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def watch(gauge: Gauge, value: Callable[[], float]) -> None:
    """Asks for a gauge's value when somebody looks at it, in a thread of its own."""
    gauge.set_function(value)


class JobWatch:
    """Times a job and its stages, as numbers and as spans.

    The worker has no network and so tells nobody; what it says of its progress tells enough.

    Args:
        call: prune, inspect or profile.
    """

    def __init__(self, call: str) -> None:
        self._call = call
        self._span = _trace.start(f"job {call}")
        self._start = self._stage_start = time.monotonic()
        self._stage, self._stage_span = "", self._span

    def __enter__(self) -> JobWatch:
        self.stage("WAIT")  # for a worker, and for that one to be ready
        return self

    def stage(self, name: str) -> None:
        """Says which stage the job is in; the same may be said any number of times."""
        if name != self._stage:
            self._end_stage()
            self._stage, self._stage_span = name, self._span.child(f"stage {name}")
            self._stage_start = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_stage()
        end = "done"
        if isinstance(error, Refused):
            end = "refused"
        elif error is not None:
            end = "failed" if isinstance(error, Exception) else "cancelled"
        JOB_SECONDS.labels(self._call, end).observe(time.monotonic() - self._start)
        self._span.end("" if end == "done" else end)

    def _end_stage(self) -> None:
        if self._stage:
            STAGE_SECONDS.labels(self._stage).observe(time.monotonic() - self._stage_start)
            self._stage_span.end()
