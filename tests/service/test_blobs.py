"""ByteStream: resumable, checked, and safe against names and lies."""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from conftest import Server, wait_for

import secateur
from secateur import _wire
from secateur._calls import UPLOAD_ATTEMPTS, Calls, run
from secateur._inputs import Source
from secateur.service.blobs import BlobName, BlobStore, Upload
from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc

CONTENT = random.Random(1).randbytes((3 << 20) + 17)


@pytest.fixture
def stub(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield bytestream_pb2_grpc.ByteStreamStub(channel)


def name_of(content: bytes, *, sha256: str | None = None, size: int | None = None) -> str:
    digest = sha256 or hashlib.sha256(content).hexdigest()
    return _wire.upload_name(str(uuid.uuid4()), digest, len(content) if size is None else size)


def requests(name: str, content: bytes, start: int = 0, stop: int | None = None) -> Iterator[Any]:
    stop = len(content) if stop is None else stop
    for offset in range(start, stop, 1 << 20):
        data = content[offset : min(offset + (1 << 20), stop)]
        yield bytestream_pb2.WriteRequest(
            resource_name=name,
            write_offset=offset,
            data=data,
            finish_write=offset + len(data) == len(content),
        )


def status(stub: Any, name: str) -> tuple[int, bool]:
    answer = stub.QueryWriteStatus(bytestream_pb2.QueryWriteStatusRequest(resource_name=name))
    return answer.committed_size, answer.complete


def read(stub: Any, blob: str, offset: int = 0, limit: int = 0) -> bytes:
    request = bytestream_pb2.ReadRequest(resource_name=blob, read_offset=offset, read_limit=limit)
    return b"".join(chunk.data for chunk in stub.Read(request))


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_upload_goes_on_where_it_broke_off(stub: Any) -> None:
    content = CONTENT + b"resumed"
    name = name_of(content)
    assert code_of(lambda: status(stub, name)) is grpc.StatusCode.NOT_FOUND
    stub.Write(requests(name, content, stop=2 << 20))
    assert status(stub, name) == (2 << 20, False)
    assert stub.Write(requests(name, content, start=2 << 20)).committed_size == len(content)
    assert status(stub, name) == (len(content), True)
    blob = name.partition("/blobs/")[2]
    assert read(stub, f"blobs/{blob}") == content
    assert read(stub, f"blobs/{blob}", offset=5, limit=7) == content[5:12]
    assert read(stub, f"blobs/{blob}", offset=len(content)) == b""


def test_upload_goes_on_after_its_call_was_cut(stub: Any) -> None:
    content = CONTENT + b"cut"
    name = name_of(content)

    def arrived() -> int:
        try:
            return status(stub, name)[0]
        except grpc.RpcError:
            return 0

    def then_break() -> Iterator[Any]:
        yield from requests(name, content, stop=1 << 20)
        wait_for(lambda: arrived() == 1 << 20)
        raise ConnectionError("the client died")

    with pytest.raises(grpc.RpcError):
        stub.Write(then_break())
    assert status(stub, name) == (1 << 20, False)
    stub.Write(requests(name, content, start=1 << 20))
    assert status(stub, name)[1]


def test_upload_goes_on_under_the_next_server(
    own_server: Callable[..., Server], tmp_path: pathlib.Path
) -> None:
    content = CONTENT + b"restart"
    name = name_of(content)
    for stop, signal_number in ((1 << 20, signal.SIGKILL), (len(content), signal.SIGTERM)):
        server = own_server()
        with grpc.insecure_channel(server.address) as channel:
            stub = bytestream_pb2_grpc.ByteStreamStub(channel)
            start = 0 if stop == 1 << 20 else status(stub, name)[0]
            assert start == (0 if stop == 1 << 20 else 1 << 20)
            stub.Write(requests(name, content, start=start, stop=stop))
        server.stop(signal_number)
    stored = [path for path in (tmp_path / "server" / "blobs").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in stored] == [content]


def test_a_blob_that_is_there_is_not_sent_again(stub: Any) -> None:
    stub.Write(requests(name_of(CONTENT), CONTENT))
    again = name_of(CONTENT)
    assert status(stub, again) == (len(CONTENT), True)
    assert stub.Write(requests(again, CONTENT, stop=1 << 20)).committed_size == len(CONTENT)


def test_wrong_digest_and_size_are_refused(stub: Any) -> None:
    content = CONTENT + b"wrong"
    wrong = [
        name_of(content, sha256="0" * 64),
        name_of(content, size=len(content) + 1),
        name_of(content, size=len(content) - 1),
    ]
    for name in wrong:
        code = code_of(lambda n=name: stub.Write(requests(n, content)))  # type: ignore[misc]
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(lambda n=name: status(stub, n)) is grpc.StatusCode.NOT_FOUND  # type: ignore[misc]
        blob = "blobs/" + name.partition("/blobs/")[2]
        assert code_of(lambda b=blob: read(stub, b)) is grpc.StatusCode.NOT_FOUND  # type: ignore[misc]


def test_wrong_offset_is_aborted_and_loses_nothing(stub: Any) -> None:
    content = CONTENT + b"offset"
    name = name_of(content)
    stub.Write(requests(name, content, stop=1 << 20))
    for start in (0, 2 << 20):
        code = code_of(lambda s=start: stub.Write(requests(name, content, start=s)))  # type: ignore[misc]
        assert code is grpc.StatusCode.ABORTED
    assert status(stub, name) == (1 << 20, False)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nonsense",
        "uploads/x/blobs/" + "a" * 64 + "/1",
        "uploads/../../../../../../etc/cron.d/x/blobs/" + "a" * 64 + "/1",
        f"uploads/{uuid.uuid4()}/blobs/{'A' * 64}/1",
        f"uploads/{uuid.uuid4()}/blobs/{'a' * 64}/-1",
        f"uploads/{uuid.uuid4()}/blobs/{'a' * 64}/01",
    ],
)
def test_bad_names_are_refused(stub: Any, name: str) -> None:
    write = bytestream_pb2.WriteRequest(resource_name=name, data=b"x", finish_write=True)
    assert code_of(lambda: stub.Write(iter([write]))) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(lambda: status(stub, name)) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(lambda: read(stub, name)) is grpc.StatusCode.INVALID_ARGUMENT


def test_bad_ranges_are_refused(stub: Any) -> None:
    stub.Write(requests(name_of(CONTENT), CONTENT))
    blob = _wire.blob_name(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    for offset, limit in ((-1, 0), (len(CONTENT) + 1, 0), (0, -1)):
        code = code_of(lambda o=offset, m=limit: read(stub, blob, o, m))  # type: ignore[misc]
        assert code is grpc.StatusCode.OUT_OF_RANGE


def test_a_blob_that_is_too_large_is_refused_at_its_name(
    server: Server, client: secateur.Client
) -> None:
    class Huge(Source):
        def __init__(self) -> None:
            self.size = 5 << 30

        def sha256(self) -> str:
            return "a" * 64

    calls: Calls = client._calls
    with pytest.raises(secateur.Refused) as caught, calls._errors():
        run(calls._send(Huge(), calls._budget(10)))
    assert caught.value.refusal.code is secateur.Code.LIMIT_EXCEEDED


def test_client_resumes_an_upload_by_itself(
    client: secateur.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempts break after a chunk; each next one starts where the server stands."""
    transport: Any = client._calls._transport
    content, offsets = CONTENT + b"again", []
    write = transport.write

    class Broken(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    async def breaking(messages: Iterator[Any], timeout: float | None) -> Any:
        first = next(messages)
        offsets.append(first.write_offset)
        if len(offsets) == UPLOAD_ATTEMPTS:
            return await write(iter([first, *messages]), timeout)
        await write(iter([first]), timeout)
        raise Broken

    monkeypatch.setattr(transport, "write", breaking)
    monkeypatch.setattr("secateur._calls.FIRST_PAUSE", 0.01)
    payload = run(client._calls._send(Source(content), client._calls._budget(30)))
    assert offsets == [0, 1 << 20, 2 << 20, 3 << 20]
    assert run(client._calls._receive(payload, client._calls._budget(30))) == content


def test_many_small_files_do_not_outgrow_a_message(
    client: secateur.Client, cnn: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    for number in range(10):
        content = random.Random(number).randbytes(3 << 19)
        (tmp_path / f"{number}.npz").write_bytes(content)
    sent: list[Any] = []
    stream = client._calls._transport.stream

    def watched(method: str, request: Any, timeout: float | None) -> Any:
        sent.append(request)
        return stream(method, request, timeout)

    monkeypatch.setattr(client._calls._transport, "stream", watched)
    with pytest.raises(secateur.Refused) as caught:
        client.prune(cnn, calibration=tmp_path)
    assert caught.value.refusal.code is secateur.Code.INVALID_CALIBRATION
    kinds = [part.content.WhichOneof("content") for part in sent[0].calibration.parts]
    assert set(kinds) == {"inline", "blob"}
    assert sent[0].ByteSize() < _wire.MAX_MESSAGE


# ---- the store itself --------------------------------------------------------------------------


def store_at(folder: pathlib.Path, ttl_s: float = 60.0) -> BlobStore:
    return BlobStore(folder, max_bytes=1 << 30, ttl_s=ttl_s, durable=True)


def adopt(store: BlobStore, folder: pathlib.Path, content: bytes) -> BlobName:
    path = folder / "file"
    path.write_bytes(content)
    return store.adopt(path)


def test_sweep_removes_what_nobody_used_but_not_from_jobs(tmp_path: pathlib.Path) -> None:
    store = store_at(tmp_path / "store")
    old, new = adopt(store, tmp_path, b"old"), adopt(store, tmp_path, b"new")
    job = store.new_job()
    store.link(old, job / "model.onnx")
    upload = store.upload(f"uploads/{uuid.uuid4()}/blobs/{'a' * 64}/9", create=True)
    assert isinstance(upload, Upload)
    path = store.get(old)
    past = time.time() - 1000
    os.utime(path, (past, past))
    upload.touched = past
    store.sweep()
    assert store.find(old) is None
    assert store.find(new) is not None
    assert (job / "model.onnx").read_bytes() == b"old"
    store.end_job(job)
    assert not job.exists()


def test_a_new_writer_ends_the_one_before(tmp_path: pathlib.Path) -> None:
    store = store_at(tmp_path)
    content = b"0123456789"
    upload = store.upload(name_of(content), create=True)
    assert isinstance(upload, Upload)
    first, file = upload.open()
    upload.append(first, file, 0, content[:4])
    second, other = upload.open()
    with file, other:
        with pytest.raises(secateur.service.errors.CallError):
            upload.append(first, file, 4, content[4:])
        upload.append(second, other, 4, content[4:])
    upload.finish()
    assert store.get(upload.blob).read_bytes() == content
