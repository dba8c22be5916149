"""One map from exceptions to gRPC statuses, for every method.

Refused          the status that `_wire.STATUS_OF_CODE` names, with the refusal as a detail
CallError        its own status: something about the call, not about the model
anything else    INTERNAL with a request id; the traceback goes to the log and nowhere else
"""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.rpc import status_pb2

from secateur import _trace, _wire
from secateur.errors import Refused
from secateur.service import logs, telemetry
from secateur.service.calls import rebuilt

log = logging.getLogger("secateur.service")

# health maps its own errors
_OURS = ("/secateur.", "/google.bytestream.", "/google.longrunning.", "/grpc.reflection.")


class CallError(Exception):
    """The call cannot be served, for a reason that says nothing about the model.

    Args:
        code: the gRPC status.
        reason: stable name, the `reason` of the status' google.rpc.ErrorInfo.
        text: one sentence for people.
        retry_s: seconds after which the same call may succeed; None: nothing is known of that.
    """

    def __init__(
        self, code: grpc.StatusCode, reason: str, text: str, retry_s: float | None = None
    ) -> None:
        super().__init__(text)
        self.code = code
        self.reason = reason
        self.retry_s = retry_s


def status_of(error: Exception, request_id: str) -> status_pb2.Status:
    """The status that ends a call on `error`."""
    if isinstance(error, Refused):
        return _wire.refusal_to_status(error.refusal, request_id)
    if isinstance(error, CallError):
        return _wire.failure_to_status(
            error.code, str(error), error.reason, request_id, retry_s=error.retry_s
        )
    text = f"internal error; the server's log has more under request {request_id}"
    return _wire.failure_to_status(grpc.StatusCode.INTERNAL, text, "INTERNAL", request_id)


def reason_of(error: Exception) -> str:
    """The stable name of what `error` says: the `reason` of its status' google.rpc.ErrorInfo."""
    if isinstance(error, Refused):
        return error.refusal.code
    return error.reason if isinstance(error, CallError) else "INTERNAL"


class ErrorMap(grpc.aio.ServerInterceptor):
    """Ends calls that raise with the status of what they raise, and logs one line per call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith(_OURS):
            return handler
        return rebuilt(
            handler, functools.partial(_single, method), functools.partial(_streaming, method)
        )


async def _single(method: str, behaviour: Any, request: Any, context: Any) -> Any:
    async with _Call(method, context) as call:
        try:
            return await behaviour(request, context)
        except Exception as error:
            await call.abort(error)


async def _streaming(method: str, behaviour: Any, request: Any, context: Any) -> AsyncIterator[Any]:
    async with _Call(method, context) as call:
        try:
            async for response in behaviour(request, context):
                yield response
        except Exception as error:
            await call.abort(error)


class _Call:
    """One call: its id, its end, its line in the log."""

    def __init__(self, method: str, context: Any) -> None:
        self._method = method
        self._context = context
        self._id = uuid.uuid4().hex
        self._start = time.monotonic()
        self._outcome = "OK"
        self._span = _trace.start(
            method.strip("/"), kind="SERVER", parent=context.invocation_metadata() or ()
        )
        self._span.set(request=self._id)
        self._span.enter()  # for good: each call has a task of its own
        logs.add_ids(request=self._id)
        telemetry.CALLS_RUNNING.labels(method).inc()

    async def __aenter__(self) -> _Call:
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            self._outcome = "CANCELLED"  # by the client, by its deadline, or by a stop
        seconds = time.monotonic() - self._start
        extra = logs.fields(method=self._method, code=self._outcome, seconds=round(seconds, 6))
        log.info("call ended", extra=extra)
        telemetry.CALLS_RUNNING.labels(self._method).dec()
        telemetry.CALLS.labels(self._method, self._outcome).inc()
        telemetry.CALL_SECONDS.labels(self._method).observe(seconds)
        self._span.end("" if self._outcome == "OK" else self._outcome)

    async def abort(self, error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        status = status_of(error, self._id)
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        self._outcome = code.name
        telemetry.REFUSALS.labels(reason_of(error)).inc()
        if isinstance(error, CallError):
            level = logging.WARNING if code is grpc.StatusCode.INTERNAL else logging.DEBUG
            log.log(level, "%s: %s", self._method, error)
        elif not isinstance(error, Refused):
            log.error("%s failed", self._method, exc_info=error)
        details = (
            (_wire.STATUS_KEY, status.SerializeToString()),
            (_wire.REQUEST_ID_KEY, self._id),
        )
        await self._context.abort(code, status.message, details)
        raise AssertionError("abort returned")
