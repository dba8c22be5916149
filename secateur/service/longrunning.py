"""google.longrunning.Operations over a Runner."""

from __future__ import annotations

from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import empty_pb2

from secateur.operation import State
from secateur.service.auth import caller
from secateur.service.errors import CallError
from secateur.service.runner import Runner

_PAGE = 50  # operations on a page when the caller does not say
_MAX_PAGE = 1000
_MAX_WAIT_S = 600.0


class Operations(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]
    """The methods."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    async def GetOperation(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tells how an operation stands."""
        return await self._runner.get(caller(), request.name)

    async def ListOperations(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Lists operations, newest first, a page at a time."""
        if request.name not in ("", "operations"):
            raise _bad("BAD_RESOURCE_NAME", f"bad name {request.name[:200]!r}: expected operations")
        if request.page_size < 0:
            raise _bad("BAD_PAGE", f"page_size is {request.page_size}, and must not be negative")
        states, before = states_of(request.filter), _before(request.page_token)
        size = min(request.page_size or _PAGE, _MAX_PAGE)
        page, following = await self._runner.page(caller(), states, before, size)
        return operations_pb2.ListOperationsResponse(
            operations=page, next_page_token="" if following is None else str(following)
        )

    async def WaitOperation(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tells how an operation stands when it has ended, or when the time is over."""
        timeout, left = _MAX_WAIT_S, context.time_remaining()
        if request.HasField("timeout"):
            asked = request.timeout.seconds + request.timeout.nanos / 1e9
            timeout = min(timeout, max(asked, 0.0))
        if left is not None:
            timeout = min(timeout, max(left, 0.0))
        return await self._runner.wait(caller(), request.name, timeout)

    async def CancelOperation(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Ends an operation and its worker."""
        await self._runner.cancel(caller(), request.name)
        return empty_pb2.Empty()

    async def DeleteOperation(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Forgets an operation that has ended."""
        await self._runner.delete(caller(), request.name)
        return empty_pb2.Empty()


def states_of(text: str) -> list[State]:
    """The states that a filter lets through. Raises CallError INVALID_ARGUMENT.

    A filter is `state=…` or `done=true|false`, or several joined by ` AND `; nothing: all.
    """
    states = list(State)
    for term in text.split(" AND ") if text.strip() else ():
        field, _, value = (part.strip() for part in term.partition("="))
        if (field, value) in (("done", "true"), ("done", "false")):
            states = [state for state in states if state.done == (value == "true")]
        elif field == "state" and value in list(State):
            states = [state for state in states if state == value]
        else:
            known = ", ".join(State)
            raise _bad(
                "BAD_FILTER",
                f"bad filter {text[:200]!r}: expected state=S, where S is one of {known}, or "
                "done=true or done=false, joined by AND",
            )
    return states


def _before(token: str) -> int | None:
    if not token:
        return None
    if not token.isdecimal() or not token.isascii() or len(token) > 18:
        raise _bad(
            "BAD_PAGE", f"bad page_token {token[:64]!r}: expected one that a page ended with"
        )
    return int(token)


def _bad(reason: str, text: str) -> CallError:
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, reason, text)
