"""The asyncio client: `secateur.aio.Client`, the same calls as `secateur.Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import grpc
import grpc.aio

from secateur import _trace, _wire
from secateur._calls import Calls, methods
from secateur._connect import Metadata, Tls, headers
from secateur.operation import Operation
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Inspection, Profile, ProgressCallback
from secateur.result import Result

_T = TypeVar("_T")


class Client:
    """Talks to a Secateur server from an event loop; arguments as `secateur.Client`.

    Cancelling a task that awaits a call cancels the call and ends its work on the server.
    """

    def __init__(
        self,
        target: str,
        timeout: float | None = None,
        *,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        metadata = headers(target, tls, token)
        options = _wire.channel_options(target)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, tls.credentials(), options=options)
        self._calls = Calls(_Transport(self._channel, target, metadata), timeout)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; running calls end as cancelled."""
        await self._channel.close()

    async def prune(
        self,
        model: Any,
        recipe: Recipe | None = None,
        calibration: Any = None,
        plan: Plan | None = None,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
        *,
        labels: Any = None,
    ) -> Result:
        """Prunes a model on the server; `progress` is called in the event loop. See `Client`."""
        return await self._calls.prune(model, recipe, calibration, labels, plan, progress, timeout)

    async def inspect(
        self,
        model: Any,
        recipe: Recipe | None = None,
        calibration: Any = None,
        timeout: float | None = None,
    ) -> Inspection:
        """Tells what can go in a model, what must stay and why. See `secateur.Client.inspect`."""
        return await self._calls.inspect(model, recipe, calibration, timeout)

    async def profile(
        self, model: Any, against: Any = None, timeout: float | None = None
    ) -> Profile:
        """Measures a model, and `against` alternately with it. See `secateur.Client.profile`."""
        return await self._calls.profile(model, against, timeout)

    # ---- operations ----

    async def start_prune(
        self,
        model: Any,
        recipe: Recipe | None = None,
        calibration: Any = None,
        plan: Plan | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        *,
        labels: Any = None,
    ) -> Operation:
        """Starts a prune that outlives this call. See `secateur.Client.start_prune`."""
        return await self._calls.start_prune(
            model, recipe, calibration, labels, plan, request_id, timeout
        )

    async def get_operation(
        self, operation: Operation | str, timeout: float | None = None
    ) -> Operation:
        """How an operation stands now. See `secateur.Client.get_operation`."""
        return await self._calls.get_operation(operation, timeout)

    async def list_operations(
        self,
        filter: str = "",  # noqa: A002
        limit: int | None = None,
        timeout: float | None = None,
    ) -> list[Operation]:
        """Operations of this client, newest first. See `secateur.Client.list_operations`."""
        return await self._calls.list_operations(filter, limit, timeout)

    async def wait_operation(
        self,
        operation: Operation | str,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> Operation:
        """How an operation stands when it has ended. See `secateur.Client.wait_operation`."""
        return await self._calls.wait_operation(operation, progress, timeout)

    async def cancel_operation(
        self, operation: Operation | str, timeout: float | None = None
    ) -> None:
        """Ends an operation and its work. See `secateur.Client.cancel_operation`."""
        await self._calls.cancel_operation(operation, timeout)

    async def delete_operation(
        self, operation: Operation | str, timeout: float | None = None
    ) -> None:
        """Has the server forget an operation. See `secateur.Client.delete_operation`."""
        await self._calls.delete_operation(operation, timeout)

    async def operation_result(
        self, operation: Operation | str, timeout: float | None = None
    ) -> Result:
        """What an operation that has ended gave. See `secateur.Client.operation_result`."""
        return await self._calls.operation_result(operation, timeout)

    async def health(self, timeout: float | None = None) -> bool:
        """Whether the server takes calls now (`timeout` in seconds). Raises ServerError."""
        return await self._calls.health(timeout)


class _Transport:
    """Awaits. Cancelling the awaiting task cancels the call."""

    def __init__(self, channel: grpc.aio.Channel, target: str, metadata: Metadata) -> None:
        self.target = target
        self._methods = methods(channel)
        self._metadata = metadata

    def _headers(self) -> Metadata:
        return (*self._metadata, *_trace.headers())

    async def unary(self, method: str, request: Any, timeout: float | None) -> Any:
        return await self._methods[method](request, timeout=timeout, metadata=self._headers())

    async def stream(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        call = self._methods[method](request, timeout=timeout, metadata=self._headers())
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()

    async def write(self, requests: Iterator[bytes], timeout: float | None) -> Any:
        async def read_aside() -> AsyncIterator[bytes]:
            while (request := await asyncio.to_thread(next, requests, None)) is not None:
                yield request

        return await self._methods["Write"](read_aside(), timeout=timeout, metadata=self._headers())

    async def blocking(self, function: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.to_thread(function, *args)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
