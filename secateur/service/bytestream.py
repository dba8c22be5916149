"""google.bytestream.ByteStream over a BlobStore."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from typing import IO, Any

import grpc

from secateur import _wire
from secateur._chunks import joined, parted
from secateur.service import telemetry
from secateur.service.auth import caller
from secateur.service.blobs import BlobName, BlobStore, Upload
from secateur.service.errors import CallError
from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc

_BATCH = 8 << 20  # bytes that are read or written while as many travel


class ByteStream(bytestream_pb2_grpc.ByteStreamServicer):  # type: ignore[misc]
    """Moves blobs in and out."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def add_to(self, server: grpc.aio.Server) -> None:
        """Has a server offer the methods, as the generated function would, content apart."""
        handlers: dict[str, Any] = {
            "Read": grpc.unary_stream_rpc_method_handler(
                self.Read, bytestream_pb2.ReadRequest.FromString
            ),
            "Write": grpc.stream_unary_rpc_method_handler(
                self.Write,
                functools.partial(parted, bytestream_pb2.WriteRequest),
                bytestream_pb2.WriteResponse.SerializeToString,
            ),
            "QueryWriteStatus": grpc.unary_unary_rpc_method_handler(
                self.QueryWriteStatus,
                bytestream_pb2.QueryWriteStatusRequest.FromString,
                bytestream_pb2.QueryWriteStatusResponse.SerializeToString,
            ),
        }
        generic = grpc.method_handlers_generic_handler("google.bytestream.ByteStream", handlers)
        server.add_generic_rpc_handlers((generic,))

    async def Read(self, request: Any, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        """Sends a blob, or a part of it, in chunks."""
        blob = BlobName.parse(request.resource_name)
        if not 0 <= request.read_offset <= blob.size or request.read_limit < 0:
            text = f"offset {request.read_offset}, limit {request.read_limit} of {blob.size} bytes"
            raise CallError(grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE", text)
        left = request.read_limit or blob.size
        with await asyncio.to_thread(self._store.open, caller(), blob) as file:
            file.seek(request.read_offset)
            chunks = await asyncio.to_thread(_read, file, min(_BATCH, left))
            while chunks:
                left -= sum(len(chunk) for chunk in chunks)
                following = asyncio.ensure_future(asyncio.to_thread(_read, file, min(_BATCH, left)))
                try:
                    for chunk in chunks:
                        telemetry.BYTES.labels("sent").inc(len(chunk))
                        yield joined(bytestream_pb2.ReadResponse(), chunk)
                finally:
                    await asyncio.wait([following])  # the file must not be closed under it
                chunks = following.result()

    async def Write(self, requests: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        """Takes an upload, from its start or from where it broke off."""
        requests = aiter(requests)
        first = await anext(requests, None)
        if first is None:
            text = "the stream has no message"
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_STREAM", text)
        client, name = caller(), first[0].resource_name
        found = await asyncio.to_thread(self._store.upload, client, name, create=True)
        if isinstance(found, BlobName):
            return bytestream_pb2.WriteResponse(committed_size=found.size)
        writer, file = await asyncio.to_thread(found.open)
        try:
            await _take(found, writer, file, first, requests)
        finally:
            file.close()
        return bytestream_pb2.WriteResponse(committed_size=found.committed)

    async def QueryWriteStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tells how much of an upload has arrived."""
        client, name = caller(), request.resource_name
        found = await asyncio.to_thread(self._store.upload, client, name, create=False)
        whole = isinstance(found, BlobName)
        return bytestream_pb2.QueryWriteStatusResponse(
            committed_size=found.size if isinstance(found, BlobName) else found.committed,
            complete=whole,
        )


def _read(file: IO[bytes], size: int) -> list[bytes]:
    """The next `size` bytes, in chunks; fewer at the end of the file."""
    ends = range(0, size, _wire.CHUNK)
    chunks = [file.read(min(_wire.CHUNK, size - start)) for start in ends]
    return [chunk for chunk in chunks if chunk]


async def _take(
    upload: Upload, writer: int, file: IO[bytes], first: Any, requests: AsyncIterator[Any]
) -> None:
    """Writes some messages while the next ones travel, and has the disk keep up meanwhile."""
    name, batch, size = first[0].resource_name, [], 0
    writing, syncing = _Beside(), _Beside()
    try:
        async for request, data in _chained(first, requests):
            if request.resource_name not in ("", name):
                text = "the name changed within one stream"
                raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_RESOURCE_NAME", text)
            telemetry.BYTES.labels("received").inc(len(data))
            batch.append((request.write_offset, data))
            size += len(data)
            if request.finish_write or size >= _BATCH or not writing.busy:
                await writing.start(upload.append, writer, file, batch)
                batch, size = [], 0
                if upload.durable and not syncing.busy:
                    await syncing.start(upload.sync, file)
            if request.finish_write:
                await writing.end()
                await syncing.end()
                await asyncio.to_thread(upload.finish)
                return
        await writing.start(upload.append, writer, file, batch)
        await writing.end()
    finally:
        # the file must not be closed under the threads that use it
        await writing.settle()
        await syncing.settle()


async def _chained(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


class _Beside:
    """One function at a time, in a thread beside the event loop."""

    def __init__(self) -> None:
        self._work: asyncio.Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether it runs."""
        return self._work is not None and not self._work.done()

    async def start(self, function: Callable[..., None], *args: Any) -> None:
        """Starts a function, once the one before has ended. Raises what that one raised."""
        await self.end()
        self._work = asyncio.ensure_future(asyncio.to_thread(function, *args))

    async def end(self) -> None:
        """Waits for the function, and raises what it raised."""
        work = self._work
        if work is not None:
            await asyncio.shield(work)
            self._work = None

    async def settle(self) -> None:
        """Waits for the function, whatever becomes of it or of the call that waits."""
        if self._work is not None:
            await asyncio.wait([self._work])
            self._work.exception()  # it is known, or of a call that has failed already
