"""A store's life, ended at each of its writes: run by test_faults.py in a process of its own.

    python faults.py kill|full|shared FOLDER

What a server does to its storage is done in a forked child. A hook counts everything that writes
(files by Python's audit events, SQL by SQLite's trace) and, at number N, ends the child on the spot
(`kill`) or says that the disk is full (`full`). `shared` is `kill` where the state is shared: there
what is counted is before and after each write to the object store. Then the next server opens what
is left, and must find everything that the one before told of, and nothing half. N goes from 1 until
the child gets through. Prints one JSON document: how many points there were, and what was wrong at
which.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import Any

from secateur.operation import State
from secateur.service import shared
from secateur.service.blobs import BlobName, BlobStore, Upload
from secateur.service.errors import CallError
from secateur.service.operations import Repository
from secateur.service.shared import SharedRepository

CONTENT = bytes(range(256)) * 40
HALF = 9000  # bytes
NAME = BlobName(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
RESOURCE = f"uploads/{'0' * 8}-0000-4000-8000-{'0' * 12}/blobs/{NAME.sha256}/{NAME.size}"
WRITES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
KILLED = 9

Tell = Callable[..., None]


def opened(folder: pathlib.Path, mode: str) -> tuple[Repository, BlobStore]:
    folder.mkdir(exist_ok=True)
    if mode == "shared":
        url = f"file://{folder}/shared"
        repository: Repository = SharedRepository(url, ttl_s=1000.0, lease_s=0.0)
    else:
        repository = Repository(folder / "state", durable=False, ttl_s=1000.0)
    store = BlobStore(
        folder, repository, max_bytes=1 << 20, quota=1 << 20, ttl_s=1000.0, durable=False
    )
    return repository, store


def live(repository: Repository, store: BlobStore, tell: Tell) -> None:
    """A server's life; `tell` is what it answers, or sets out to do."""
    upload = store.upload("", RESOURCE, create=True)
    if isinstance(upload, Upload):
        writer, file = upload.open()
        with file:
            if upload.committed < HALF:
                upload.append(writer, file, [(upload.committed, CONTENT[upload.committed : HALF])])
            tell("arrived")
            upload.append(writer, file, [(upload.committed, CONTENT[upload.committed :])])
        upload.finish()
    tell("blob", NAME.sha256)
    small = store.adopt_bytes("", b"small")
    tell("blob", small.sha256)
    repository.recover(max_attempts=99, error=b"")
    first = repository.add("", "k", b"request", b"", [NAME.sha256, small.sha256], "r1")
    tell("operation", first.id, "QUEUED")
    second = repository.add("", "l", b"request", b"", [NAME.sha256], "r2")
    tell("operation", second.id, "QUEUED")
    job = store.new_job()
    store.link("", NAME, job / "model.onnx")
    while (running := repository.claim()) is not None:
        (job / "result").write_bytes(b"result " + running.id.encode())
        result = store.adopt("", job / "result")
        repository.remember("", running.key, result.sha256.encode(), [result.sha256])
        response, needs = result.sha256.encode(), [result.sha256]
        if repository.finish(running.id, State.SUCCEEDED, response=response, needs=needs):
            tell("operation", running.id, "SUCCEEDED")
    store.end_job(job)
    repository.finish(second.id, State.CANCELLED)  # too late
    tell("deleting", second.id)
    repository.delete("", second.id)
    tell("deleted", second.id)
    tell("evicting")
    store._evict()
    store.sweep()
    repository.close()


def problems(folder: pathlib.Path, mode: str, told: list[list[Any]]) -> list[str]:
    """What the next server misses, or finds half."""
    repository, store = opened(folder, mode)
    records = {record.id: record for record in repository.page("", State, None, 99)}
    found = []
    for name, state in [line[1:] for line in told if line[0] == "operation"]:
        if name not in records:
            found += [] if ["deleting", name] in told else [f"operation {name} is lost"]
        elif state == "SUCCEEDED" != records[name].state:
            found.append(f"operation {name} was done and is {records[name].state}")
    gone = {line[1] for line in told if line[0] == "deleted"}
    found += [f"operation {name} is back" for name in gone & records.keys()]
    if ["evicting"] not in told:
        for sha256 in [line[1] for line in told if line[0] == "blob"]:
            if repository.use_blob("", sha256) is None:
                found.append(f"blob {sha256} is lost")
        if ["arrived"] in told and mode != "full":  # on a full disk, its end makes room
            upload = store.upload("", RESOURCE, create=False)
            if isinstance(upload, Upload) and upload.committed < HALF:
                found.append(f"of the upload, {upload.committed} bytes are left")
    files = {path.name: path for path in (folder / "blobs").glob("*/*")}
    found += [f"file {name} belongs to nobody" for name in files.keys() - repository.blobs()]
    for name in repository.blobs():
        if name not in files:
            found.append(f"blob {name} has no file")
        elif hashlib.sha256(files[name].read_bytes()).hexdigest() != name:
            found.append(f"blob {name} is half")
    for record in records.values():
        if record.response is not None and record.response.decode() not in repository.blobs():
            found.append(f"the result of {record.id} is lost")
    live(repository, store, lambda *line: None)  # and it can go on
    return found


def run_child(mode: str, folder: pathlib.Path, point: int, out: int) -> None:
    """One life, disturbed at write number `point`. Never returns."""
    count = 0

    def disturb() -> None:
        nonlocal count
        count += 1
        if count == point:
            if mode != "full":
                os._exit(KILLED)
            raise OSError(errno.ENOSPC, "No space left on device")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if event in WRITES or writes:
            disturb()

    def disturbed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            disturb()
            result = method(*args)
            disturb()
            return result

        return call

    repository, store = opened(folder, mode)
    if isinstance(repository, SharedRepository):
        repository._put = disturbed(repository._put)  # type: ignore[method-assign]
        repository._remove = disturbed(repository._remove)  # type: ignore[method-assign]
    elif mode == "kill":
        repository._connection.set_trace_callback(lambda statement: disturb())
    if mode != "shared":
        sys.addaudithook(hook)
    try:
        live(repository, store, lambda *line: tell(out, line))
    except (OSError, CallError) as error:
        code = getattr(error, "reason", None) or errno.errorcode[error.errno]
        os._exit(0 if mode == "full" and code in ("STORAGE", "ENOSPC") else 1)
    os._exit(2 if count < point else 0)


def tell(out: int, *lines: Any) -> None:
    for line in lines:
        os.write(out, json.dumps(line).encode() + b"\n")


def forked(function: Callable[[int], None]) -> tuple[list[Any], int]:
    """What a function tells in a child of its own, and the child's exit code."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            function(writing)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = [json.loads(line) for line in pipe]
    _, status = os.waitpid(pid, 0)
    return told, os.waitstatus_to_exitcode(status)


def main() -> None:
    mode, home = sys.argv[1], pathlib.Path(sys.argv[2])
    shared._EVERY = 4  # snapshots come, and old transactions go, several times in one life
    wrong, point = {}, 0
    while True:
        point += 1
        folder = home / str(point)
        told, code = forked(lambda out: run_child(mode, folder, point, out))  # noqa: B023
        if code == 2:
            break
        # in a child as well: what the object store's client starts here would not survive a fork
        found, ended = forked(lambda out: tell(out, *problems(folder, mode, told)))  # noqa: B023
        if ended:
            found.append(f"the next server ended with {ended}")
        if code not in (0, KILLED):
            found.append(f"ended with {code}")
        if found:
            wrong[point] = found
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps({"points": point - 1, "wrong": wrong}))


if __name__ == "__main__":
    main()
