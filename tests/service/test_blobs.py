"""ByteStream: resumable, checked, and safe against names and lies."""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from conftest import Server, wait_for

import secateur
from secateur import _wire
from secateur._calls import TRANSFER_ATTEMPTS, Calls, run
from secateur._inputs import Source
from secateur.service.blobs import BlobStore, Upload
from secateur.service.errors import CallError
from secateur.service.operations import Repository
from secateur.service.remote import RemoteBlobs
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
    with pytest.raises(secateur.Refused) as caught, calls._call("upload"):
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

    async def breaking(messages: Iterator[bytes], timeout: float | None) -> Any:
        first = next(messages)
        offsets.append(bytestream_pb2.WriteRequest.FromString(first).write_offset)
        if len(offsets) == TRANSFER_ATTEMPTS:
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


@dataclass
class Stored:
    """A store at a path, with its repository; opened again it stands for the next server."""

    folder: pathlib.Path
    quota: int = 1 << 30
    ttl_s: float = 60.0
    remote: str | None = None
    store: BlobStore = field(init=False)
    repository: Repository = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.repository = Repository(self.folder / "state", durable=True, ttl_s=60.0)
        self.store = BlobStore(
            self.folder,
            self.repository,
            max_bytes=1 << 50,
            quota=self.quota,
            ttl_s=self.ttl_s,
            durable=True,
            remote=RemoteBlobs(self.remote) if self.remote else None,
        )

    def again(self) -> Stored:
        self.repository.close()
        return Stored(self.folder, self.quota, self.ttl_s, self.remote)

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "blobs").rglob("*") if path.is_file()}


def reason(call: Callable[[], Any]) -> str:
    with pytest.raises(CallError) as caught:
        call()
    return caught.value.reason


def test_sweep_removes_what_nobody_used_but_not_from_jobs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Stored(tmp_path / "store")
    store, now = made.store, made.repository.now()
    old, kept = store.adopt_bytes("", b"old"), store.adopt_bytes("", b"needed")
    made.repository.add("", "k", b"request", b"", [kept.sha256])
    job = store.new_job()
    store.link("", old, job / "model.onnx")
    upload = store.upload("", f"uploads/{uuid.uuid4()}/blobs/{'a' * 64}/9", create=True)
    assert isinstance(upload, Upload)
    upload.open()[1].close()
    monkeypatch.setattr(made.repository, "now", lambda: now + 50.0)
    new = store.adopt_bytes("", b"new")
    store.sweep()
    assert made.files() == {old.sha256, kept.sha256, new.sha256}
    monkeypatch.setattr(made.repository, "now", lambda: now + 100.0)
    store.sweep()
    assert made.files() == {kept.sha256, new.sha256}
    assert list((made.folder / "uploads").iterdir()) == []
    assert store.find("", old) is None and store.find("", new) is not None
    assert (job / "model.onnx").read_bytes() == b"old"
    store.end_job(job)
    assert not job.exists()


def test_uploads_of_the_server_before_age_too(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Stored(tmp_path / "store")
    upload = made.store.upload("", name_of(CONTENT), create=True)
    assert isinstance(upload, Upload)
    upload.open()[1].close()
    made = made.again()
    for wait, left in ((0.0, 1), (50.0, 1), (100.0, 0)):
        now = time.time() + wait
        monkeypatch.setattr(made.repository, "now", lambda now=now: now)
        made.store.sweep()
        assert len(list((made.folder / "uploads").iterdir())) == left


def test_a_new_writer_ends_the_one_before(tmp_path: pathlib.Path) -> None:
    store = Stored(tmp_path).store
    content = b"0123456789"
    upload = store.upload("", name_of(content), create=True)
    assert isinstance(upload, Upload)
    first, file = upload.open()
    upload.append(first, file, [(0, content[:4])])
    second, other = upload.open()
    with file, other:
        with pytest.raises(CallError):
            upload.append(first, file, [(4, content[4:])])
        upload.append(second, other, [(4, content[4:6]), (6, content[6:])])
    upload.finish()
    assert store.get("", upload.blob).read_bytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="room is found as it is written")
def test_the_room_of_an_upload_is_found_at_its_start(tmp_path: pathlib.Path) -> None:
    made = Stored(tmp_path, quota=1 << 50)
    upload = made.store.upload("", name_of(CONTENT), create=True)
    assert isinstance(upload, Upload)
    with upload.open()[1] as file:
        found = os.fstat(file.fileno())
        assert found.st_size == 0
        assert found.st_blocks * 512 >= len(CONTENT)
    large = made.store.upload("", name_of(b"", size=1 << 45), create=True)
    assert isinstance(large, Upload)
    assert reason(large.open) == "STORAGE"
    assert len(list((made.folder / "uploads").iterdir())) == 1


def test_clients_have_their_own_blobs_and_share_content(tmp_path: pathlib.Path) -> None:
    made = Stored(tmp_path)
    blob = made.store.adopt_bytes("a", b"content")
    assert reason(lambda: made.store.get("b", blob)) == "BLOB_NOT_FOUND"
    assert made.store.adopt_bytes("b", b"content") == blob
    assert made.store.get("b", blob) == made.store.get("a", blob)
    assert made.files() == {blob.sha256}
    resource = name_of(CONTENT)
    upload = made.store.upload("a", resource, create=True)
    assert isinstance(upload, Upload)
    upload.open()[1].close()
    assert reason(lambda: made.store.upload("b", resource, create=False)) == "UPLOAD_NOT_FOUND"


def test_the_next_server_has_the_blobs_and_no_others(tmp_path: pathlib.Path) -> None:
    made = Stored(tmp_path)
    blob = made.store.adopt_bytes("", b"content")
    stray = tmp_path / "blobs" / "ab" / ("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"named, but killed before its row was written")
    made = made.again()
    assert made.files() == {blob.sha256}
    assert made.store.get("", blob).read_bytes() == b"content"


def test_above_the_quota_the_longest_unused_go(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Stored(tmp_path, quota=100)
    start, blobs = time.time(), []
    for step in range(3):
        monkeypatch.setattr(made.repository, "now", lambda step=step: start + 100 * step)
        blobs.append(made.store.adopt_bytes("", bytes([step]) * 30))
    made.repository.add("", "k", b"request", b"", [blobs[0].sha256])
    more = made.store.adopt_bytes("", b"x" * 30)
    assert made.files() == {blob.sha256 for blob in (blobs[0], blobs[2], more)}
    upload = made.store.upload("", name_of(b"y" * 60), create=True)
    assert isinstance(upload, Upload)  # has a claim on its room from its start
    assert made.files() == {blobs[0].sha256}
    assert reason(lambda: made.store.adopt_bytes("", b"z" * 30)) == "DISK_QUOTA"
    assert reason(lambda: made.store.upload("", name_of(CONTENT), create=True)) == "DISK_QUOTA"
    made.store.forget(upload)
    assert made.store.adopt_bytes("", b"z" * 30).size == 30


def test_a_folder_as_object_store_keeps_what_the_server_lost(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("obstore")
    url = f"file://{tmp_path}/shared"
    blob = Stored(tmp_path / "one", remote=url).store.adopt_bytes("a", CONTENT)
    other = Stored(tmp_path / "two", remote=url)
    assert other.store.get("a", blob).read_bytes() == CONTENT
    assert other.repository.use_blob("a", blob.sha256) == len(CONTENT)
    assert reason(lambda: other.store.get("b", blob)) == "BLOB_NOT_FOUND"
    (stored,) = (path for path in (tmp_path / "shared").rglob("*") if path.is_file())
    stored.write_bytes(b"x" * len(CONTENT))  # damaged
    third = Stored(tmp_path / "three", remote=url)
    assert reason(lambda: third.store.get("a", blob)) == "BLOB_NOT_FOUND"
    assert third.files() == set()


def test_blobs_in_s3(bucket: str, tmp_path: pathlib.Path) -> None:
    content = random.Random(2).randbytes((20 << 20) + 5)  # in several parts
    blob = Stored(tmp_path / "one", remote=bucket).store.adopt_bytes("a", content)
    other = Stored(tmp_path / "two", remote=bucket)
    assert reason(lambda: other.store.get("b", blob)) == "BLOB_NOT_FOUND"
    assert other.store.get("a", blob).read_bytes() == content
    assert other.store.adopt_bytes("a", content) == blob
    small = other.store.adopt_bytes("a", b"")
    assert Stored(tmp_path / "three", remote=bucket).store.get("a", small).read_bytes() == b""


def test_an_object_store_out_of_reach_is_an_error(
    bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    made = Stored(tmp_path, remote="s3://no-such-bucket/prefix")
    with pytest.raises(CallError) as caught:
        made.store.adopt_bytes("a", b"content")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert caught.value.retry_s is not None
    assert made.files() == set()
    with pytest.raises(ValueError, match="nonsense"):
        RemoteBlobs("nonsense://x")
