"""The calls of both clients, written once.

`Calls` says what is sent and in which order, and knows nothing of how: a `Transport` does that.
The asyncio client's transport awaits; the sync client's never suspends, so that `run` can drive the
same coroutines to their end without an event loop (grpcio's sync stack also moves bytes faster).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pathlib
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import IO, Any, Protocol, TypeVar

import grpc
import pydantic
from google.longrunning import operations_pb2, operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secateur import _trace, _wire
from secateur._chunks import joined, parted
from secateur._inputs import Source, model_source, samples_sources
from secateur.errors import ServerError
from secateur.operation import Operation
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Inspection, Profile, Progress, ProgressCallback, Report
from secateur.result import Result, WeightsFile
from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc, pruning_pb2, pruning_pb2_grpc

_T = TypeVar("_T")

TRANSFER_ATTEMPTS = 4  # each goes on where the one before broke off
_RESUMABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,  # more of the broken attempt was stored after we asked how much
)
FIRST_PAUSE = 0.2  # seconds before the second attempt; doubles
LOOK = 1.0  # seconds between two looks at an operation's progress
HOLD = 60.0  # seconds for which one call waits for an operation to end
ANSWER = 30.0  # seconds that a server may take to say that it is still running


class Transport(Protocol):
    """How messages reach the server. `timeout` is in seconds; None waits without limit."""

    target: str

    async def unary(self, method: str, request: Any, timeout: float | None) -> Any:
        """One message there, one back. Raises grpc.RpcError, as all methods here."""

    def stream(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        """One message there, many back. Closing the iterator cancels the call."""

    async def write(self, requests: Iterator[bytes], timeout: float | None) -> Any:
        """ByteStream.Write: many messages, serialised, there, one back."""

    async def blocking(self, function: Callable[..., _T], *args: Any) -> _T:
        """Runs what would block an event loop."""

    async def sleep(self, seconds: float) -> None:
        """Waits."""


def methods(channel: Any) -> dict[str, Any]:
    """What calls each RPC over a channel of either kind, by the RPC's name."""
    stubs = {
        "Prune Inspect Profile StartPrune": pruning_pb2_grpc.PruningStub,
        "GetOperation ListOperations WaitOperation CancelOperation DeleteOperation": (
            operations_pb2_grpc.OperationsStub
        ),
        "QueryWriteStatus": bytestream_pb2_grpc.ByteStreamStub,
        "Check": health_pb2_grpc.HealthStub,
    }
    found = {
        name: getattr(stub, name)
        for names, make in stubs.items()
        for stub in (make(channel),)
        for name in names.split()
    }
    found["Write"] = channel.stream_unary(  # takes messages that are serialised
        "/google.bytestream.ByteStream/Write",
        response_deserializer=bytestream_pb2.WriteResponse.FromString,
    )
    found["Read"] = channel.unary_stream(  # gives content, as views
        "/google.bytestream.ByteStream/Read",
        request_serializer=bytestream_pb2.ReadRequest.SerializeToString,
        response_deserializer=lambda content: parted(bytestream_pb2.ReadResponse, content)[1],
    )
    return found


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError("a sync transport must not suspend")


class _Budget:
    """What is left of one call: time, and room in its message for payloads.

    Args:
        timeout: of the whole call, in seconds; None: no limit.
    """

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout
        self._room = _wire.INLINE_TOTAL

    def left(self) -> float | None:
        """Seconds; None: no limit."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    def takes(self, size: int) -> bool:
        """Whether a payload of `size` bytes goes inline; its room is then taken."""
        if size > min(_wire.INLINE_LIMIT, self._room):
            return False
        self._room -= size
        return True


class Calls:
    """The calls, over one transport.

    Args:
        transport: how messages travel.
        timeout: of a call, in seconds, unless the call says otherwise; None: no limit.
    """

    def __init__(self, transport: Transport, timeout: float | None) -> None:
        self._transport = transport
        self._timeout = timeout

    async def prune(
        self,
        model: Any,
        recipe: Recipe | None,
        calibration: Any,
        labels: Any,
        plan: Plan | None,
        progress: ProgressCallback | None,
        timeout: float | None,
    ) -> Result:
        """See `Client.prune`."""
        with self._call("prune"):
            budget = self._budget(timeout)
            request = pruning_pb2.PruneRequest()
            await self._fill(request, model, recipe, calibration, labels, plan, budget)
            return await self._result(await self._events(request, progress, budget), budget)

    async def inspect(
        self, model: Any, recipe: Recipe | None, calibration: Any, timeout: float | None
    ) -> Inspection:
        """See `Client.inspect`."""
        with self._call("inspect"):
            budget = self._budget(timeout)
            request = pruning_pb2.InspectRequest(model=await self._send_model(model, budget))
            if recipe is not None:
                request.recipe.CopyFrom(_wire.recipe_to_wire(recipe))
            await self._send_samples(request, "calibration", calibration, budget)
            response = await self._transport.unary("Inspect", request, budget.left())
            return _wire.from_wire(response.inspection, Inspection)

    async def profile(self, model: Any, against: Any, timeout: float | None) -> Profile:
        """See `Client.profile`."""
        with self._call("profile"):
            budget = self._budget(timeout)
            request = pruning_pb2.ProfileRequest(model=await self._send_model(model, budget))
            if against is not None:
                request.against.CopyFrom(await self._send_model(against, budget))
            response = await self._transport.unary("Profile", request, budget.left())
            return _wire.from_wire(response.profile, Profile)

    # ---- operations ----

    async def start_prune(
        self,
        model: Any,
        recipe: Recipe | None,
        calibration: Any,
        labels: Any,
        plan: Plan | None,
        request_id: str | None,
        timeout: float | None,
    ) -> Operation:
        """See `Client.start_prune`."""
        with self._call("start_prune"):
            budget = self._budget(timeout)
            request = pruning_pb2.StartPruneRequest(request_id=request_id or str(uuid.uuid4()))
            await self._fill(request, model, recipe, calibration, labels, plan, budget)
            return await self._operation("StartPrune", request, budget)

    async def get_operation(self, operation: Operation | str, timeout: float | None) -> Operation:
        """See `Client.get_operation`."""
        with self._call("get_operation"):
            request = operations_pb2.GetOperationRequest(name=_name(operation))
            return await self._operation("GetOperation", request, self._budget(timeout))

    async def list_operations(
        self,
        filter: str,  # noqa: A002
        limit: int | None,
        timeout: float | None,
    ) -> list[Operation]:
        """See `Client.list_operations`."""
        with self._call("list_operations"):
            budget = self._budget(timeout)
            request = operations_pb2.ListOperationsRequest(filter=filter)
            found: list[Operation] = []
            while limit is None or len(found) < limit:
                page = await self._transport.unary("ListOperations", request, budget.left())
                found += [_wire.operation_from_wire(message) for message in page.operations]
                request.page_token = page.next_page_token
                if not page.next_page_token:
                    break
            return found[:limit]

    async def wait_operation(
        self,
        operation: Operation | str,
        progress: ProgressCallback | None,
        timeout: float | None,
    ) -> Operation:
        """See `Client.wait_operation`."""
        with self._call("wait_operation"):
            end = _Budget(timeout)
            step = LOOK if progress is not None else HOLD
            request = operations_pb2.WaitOperationRequest(name=_name(operation))
            while True:
                left = end.left()
                pause = step if left is None else min(step, left)
                request.timeout.FromMilliseconds(round(pause * 1000))
                # the server answers when its time is over: the deadline is for one that does not
                found = await self._operation("WaitOperation", request, _Budget(pause + ANSWER))
                if progress is not None and found.progress is not None:
                    progress(found.progress)
                if found.done or left == 0.0:
                    return found

    async def cancel_operation(self, operation: Operation | str, timeout: float | None) -> None:
        """See `Client.cancel_operation`."""
        with self._call("cancel_operation"):
            request = operations_pb2.CancelOperationRequest(name=_name(operation))
            await self._transport.unary("CancelOperation", request, self._budget(timeout).left())

    async def delete_operation(self, operation: Operation | str, timeout: float | None) -> None:
        """See `Client.delete_operation`."""
        with self._call("delete_operation"):
            request = operations_pb2.DeleteOperationRequest(name=_name(operation))
            await self._transport.unary("DeleteOperation", request, self._budget(timeout).left())

    async def operation_result(self, operation: Operation | str, timeout: float | None) -> Result:
        """See `Client.operation_result`."""
        with self._call("operation_result"):
            budget = self._budget(timeout)
            request = operations_pb2.GetOperationRequest(name=_name(operation))
            message = await self._transport.unary("GetOperation", request, budget.left())
            failure = _wire.operation_from_wire(message).failure
            if failure is not None:
                raise failure
            result = pruning_pb2.PruneResult()
            if not message.response.Unpack(result):
                text = f"{message.name} has not ended"
                raise ServerError(f"{self._transport.target}: {text}")
            return await self._result(result, budget)

    async def _operation(self, method: str, request: Any, budget: _Budget) -> Operation:
        message = await self._transport.unary(method, request, budget.left())
        return _wire.operation_from_wire(message)

    # ---- requests and results ----

    async def _fill(
        self,
        request: Any,
        model: Any,
        recipe: Recipe | None,
        calibration: Any,
        labels: Any,
        plan: Plan | None,
        budget: _Budget,
    ) -> None:
        """Puts into a PruneRequest or a StartPruneRequest what is to be pruned, and how."""
        request.model.CopyFrom(await self._send_model(model, budget))
        if recipe is not None:
            request.recipe.CopyFrom(_wire.recipe_to_wire(recipe))
        await self._send_samples(request, "calibration", calibration, budget)
        await self._send_samples(request, "labels", labels, budget)
        if plan is not None:
            text = Source(plan.to_json().encode())
            request.plan.CopyFrom(await self._send(text, budget))

    async def _send_samples(self, request: Any, kind: str, samples: Any, budget: _Budget) -> None:
        """Puts samples into the field `kind` of a request: `calibration` or `labels`."""
        if samples is None:
            return
        field = getattr(request, kind)
        field.SetInParent()  # an empty folder is not the same as none
        for name, source in await self._transport.blocking(samples_sources, samples, kind):
            field.parts.add(name=name, content=await self._send(source, budget))

    async def _result(self, result: Any, budget: _Budget) -> Result:
        weights = None
        for file in result.model.external_data:
            weights = WeightsFile.new()
            await self._download_file(file.content, weights.path, budget)
        return Result(
            model=await self._receive(result.model, budget),
            plan=Plan.from_json(await self._receive(result.plan, budget)),
            report=_wire.from_wire(result.report, Report),
            weights=weights,
        )

    async def health(self, timeout: float | None) -> bool:
        """See `Client.health`."""
        with self._call("health"):
            budget = self._budget(timeout)
            request = health_pb2.HealthCheckRequest()
            response = await self._transport.unary("Check", request, budget.left())
            return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def _events(
        self, request: Any, progress: ProgressCallback | None, budget: _Budget
    ) -> Any:
        """The result in the stream of events; progress goes to the callback on the way."""
        result = None
        events = self._transport.stream("Prune", request, budget.left())
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if event.HasField("result"):
                    result = event.result
                elif progress is not None:
                    # a stage that only a newer server knows is no reason to fail
                    with contextlib.suppress(pydantic.ValidationError):
                        step = _wire.from_wire(event.progress, Progress)
                        progress(step)
        if result is None:
            raise ServerError(f"{self._transport.target}: the stream ended without a result")
        return result

    # ---- payloads ----

    async def _send_model(self, model: Any, budget: _Budget) -> Any:
        source, files = await self._transport.blocking(model_source, model)
        payload = await self._send(source, budget)
        for name, content in files:
            payload.external_data.add(name=name, content=await self._send(content, budget))
        return payload

    async def _send(self, source: Source, budget: _Budget) -> Any:
        if budget.takes(source.size):
            return pruning_pb2.Payload(inline=await self._transport.blocking(source.read))
        digest = await self._transport.blocking(source.sha256)
        await self._upload(source, digest, budget)
        blob = pruning_pb2.Blob(sha256=digest, size_bytes=source.size)
        return pruning_pb2.Payload(blob=blob)

    async def _upload(self, source: Source, digest: str, budget: _Budget) -> None:
        name = _wire.upload_name(str(uuid.uuid4()), digest, source.size)

        async def go_on() -> None:
            offset = await self._committed(name, budget)
            if offset is not None:
                await self._transport.write(_write_requests(source, name, offset), budget.left())

        await self._resumed(go_on)

    async def _committed(self, name: str, budget: _Budget) -> int | None:
        """Bytes of an upload that the server has; None when it has the whole blob."""
        request = bytestream_pb2.QueryWriteStatusRequest(resource_name=name)
        try:
            status = await self._transport.unary("QueryWriteStatus", request, budget.left())
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return 0
            raise
        return None if status.complete else int(status.committed_size)

    async def _receive(self, payload: Any, budget: _Budget) -> bytes:
        if payload.WhichOneof("content") == "inline":
            return bytes(payload.inline)
        content = io.BytesIO()
        await self._download(payload.blob, content, budget)
        return content.getvalue()

    async def _download_file(self, payload: Any, path: pathlib.Path, budget: _Budget) -> None:
        with path.open("wb") as file:
            if payload.WhichOneof("content") == "inline":
                file.write(payload.inline)
            else:
                await self._download(payload.blob, file, budget)

    async def _download(self, blob: Any, target: IO[bytes], budget: _Budget) -> None:
        name, digest = _wire.blob_name(blob.sha256, blob.size_bytes), hashlib.sha256()

        async def go_on() -> None:
            offset = target.tell()
            request = bytestream_pb2.ReadRequest(resource_name=name, read_offset=offset)
            chunks = self._transport.stream("Read", request, budget.left())
            async with contextlib.aclosing(chunks):  # type: ignore[type-var]
                async for chunk in chunks:
                    digest.update(chunk)
                    target.write(chunk)

        await self._resumed(go_on)
        if digest.hexdigest() != blob.sha256:
            raise ServerError(f"{self._transport.target}: a blob arrived damaged")

    async def _resumed(self, go_on: Callable[[], Awaitable[None]]) -> None:
        """Has a transfer go on until it is whole, as long as only connections break."""
        for attempt in range(TRANSFER_ATTEMPTS):
            try:
                return await go_on()
            except grpc.RpcError as error:
                if error.code() not in _RESUMABLE or attempt == TRANSFER_ATTEMPTS - 1:
                    raise
                # spread, so that clients of a server that restarts do not come all at once
                await self._transport.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.8, 1.2))
        return None

    # ---- time and errors ----

    def _budget(self, timeout: float | None) -> _Budget:
        return _Budget(self._timeout if timeout is None else timeout)

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        try:
            with _trace.span(f"secateur.{name}"):
                yield
        except grpc.RpcError as error:
            raise _wire.error_of(error, self._transport.target) from None
        except pydantic.ValidationError as error:
            text = f"{self._transport.target}: the answer is not understood: {error}"
            raise ServerError(text) from None


def _name(operation: Operation | str) -> str:
    return operation if isinstance(operation, str) else operation.name


def _write_requests(source: Source, name: str, offset: int) -> Iterator[bytes]:
    def request(chunk: bytes) -> bytes:
        message = bytestream_pb2.WriteRequest(
            resource_name=name,
            write_offset=offset,
            finish_write=offset + len(chunk) == source.size,
        )
        return joined(message, chunk)

    if offset == source.size:  # all has arrived, but the end was not said
        yield request(b"")
    for chunk in source.chunks(offset, _wire.CHUNK):
        yield request(chunk)
        offset += len(chunk)
