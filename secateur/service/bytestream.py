"""google.bytestream.ByteStream over a BlobStore."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import IO, Any

import grpc

from secateur import _wire
from secateur.service import telemetry
from secateur.service.auth import caller
from secateur.service.blobs import BlobName, BlobStore, Upload
from secateur.service.errors import CallError
from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc


class ByteStream(bytestream_pb2_grpc.ByteStreamServicer):  # type: ignore[misc]
    """Moves blobs in and out."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def Read(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Sends a blob, or a part of it, in chunks."""
        blob = BlobName.parse(request.resource_name)
        if not 0 <= request.read_offset <= blob.size or request.read_limit < 0:
            text = f"offset {request.read_offset}, limit {request.read_limit} of {blob.size} bytes"
            raise CallError(grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE", text)
        left = request.read_limit or blob.size
        with await asyncio.to_thread(self._store.open, caller(), blob) as file:
            file.seek(request.read_offset)
            while chunk := await asyncio.to_thread(file.read, min(_wire.CHUNK, left)):
                left -= len(chunk)
                telemetry.BYTES.labels("sent").inc(len(chunk))
                yield bytestream_pb2.ReadResponse(data=chunk)

    async def Write(self, requests: AsyncIterator[Any], context: Any) -> Any:  # noqa: N802
        """Takes an upload, from its start or from where it broke off."""
        requests = aiter(requests)
        first = await anext(requests, None)
        if first is None:
            text = "the stream has no message"
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_STREAM", text)
        client, name = caller(), first.resource_name
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


async def _take(
    upload: Upload, writer: int, file: IO[bytes], first: Any, requests: AsyncIterator[Any]
) -> None:
    """Writes one message while the next one travels."""
    request = first
    while request is not None:
        if request.resource_name not in ("", first.resource_name):
            text = "the name changed within one stream"
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_RESOURCE_NAME", text)
        following = asyncio.ensure_future(anext(requests, None))
        try:
            await _unbroken(upload.append, writer, file, request.write_offset, request.data)
            telemetry.BYTES.labels("received").inc(len(request.data))
            if request.finish_write:
                await asyncio.to_thread(upload.finish)
                return
            request = await following
        finally:
            following.cancel()


async def _unbroken(function: Any, *args: Any) -> None:
    """Runs a function in a thread, and does not return before it has, cancelled or not.

    A call that ends must not close the file under the thread that writes it.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
