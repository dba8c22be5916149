"""Spans of OpenTelemetry, where that is installed; else all of this does nothing.

Both ends use it: a span of the client's travels in a call's metadata (W3C Trace Context) and is the
parent of the server's. A program that uses the client sets OpenTelemetry up as it likes; the server
does it by `set_up`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

log = logging.getLogger("secateur.trace")

Headers = tuple[tuple[str, str], ...]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@functools.cache
def _api() -> Any:
    """The package `opentelemetry`, or None."""
    try:
        import opentelemetry.context
        import opentelemetry.propagate
        import opentelemetry.trace
    except ImportError:
        return None
    return opentelemetry


class Span:
    """A stretch of time with a name; `end` has to be called."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def child(self, name: str) -> Span:
        """A span within this one."""
        if self._span is None:
            return self
        trace = _api().trace
        return Span(_tracer().start_span(name, trace.set_span_in_context(self._span)))

    def enter(self) -> Any:
        """Makes this the parent of what follows in this task; `leave` with what is returned."""
        if self._span is None:
            return None
        return _api().context.attach(_api().trace.set_span_in_context(self._span))

    def leave(self, entered: Any) -> None:
        """Makes what was the parent before `enter` the parent again."""
        if entered is not None:
            _api().context.detach(entered)

    def set(self, **attributes: str | int | float) -> None:
        """Adds attributes, named `secateur.` and the keyword."""
        if self._span is not None:
            for name, value in attributes.items():
                self._span.set_attribute(f"secateur.{name}", value)

    def end(self, problem: str = "") -> None:
        """Ends it, with what went wrong."""
        if self._span is not None:
            if problem:
                self._span.set_status(_api().trace.StatusCode.ERROR, problem)
            self._span.end()


def start(
    name: str, *, kind: str = "INTERNAL", parent: Iterable[tuple[str, Any]] | None = None
) -> Span:
    """A span that starts now.

    Args:
        name: what it shows.
        kind: INTERNAL, CLIENT or SERVER.
        parent: metadata of a call that may name it; None: whatever this task is in.
    """
    if _api() is None:
        return Span(None)
    context = None
    if parent is not None:
        carrier = {key: value for key, value in parent if isinstance(value, str)}
        context = _api().propagate.extract(carrier)
    return Span(_tracer().start_span(name, context, kind=_api().trace.SpanKind[kind]))


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A client's span around a block; exceptions mark it as failed and pass."""
    made = start(name, kind="CLIENT")
    entered = made.enter()
    problem = ""
    try:
        yield
    except BaseException as error:
        problem = type(error).__name__
        raise
    finally:
        made.leave(entered)
        made.end(problem)


def headers() -> Headers:
    """Metadata that names the span this task is in."""
    if _api() is None:
        return ()
    carrier: dict[str, str] = {}
    _api().propagate.inject(carrier)
    return tuple(carrier.items())


def set_up(service: str) -> Callable[[], None]:
    """Exports this process' spans by OTLP over HTTP, if OpenTelemetry's own variables say where to.

    Returns:
        What sends the last of them, to be called at the end.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return lambda: None
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no traces, for want of the extra secateur[otel]: %s", error)
        return lambda: None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service)})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    log.info("traces go where %s says", " or ".join(ENDPOINTS))
    return provider.shutdown


def _tracer() -> Any:
    return _api().trace.get_tracer("secateur")
