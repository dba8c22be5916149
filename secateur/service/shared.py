"""What several servers remember together: the repository, agreed on through an object store.

    PREFIX/operations/log/00…42        the 42nd transaction: the statements that changed something
    PREFIX/operations/snapshots/00…42  the state after it, as SQLite serialises it

Each server has the whole state in memory: what the log makes of nothing. A transaction is run there
and then written as the next object of the log, on condition that there is none of that name yet
(S3's `If-None-Match`, a link in a folder); only then does it count. Who comes second takes in what
came first and runs its transaction again. So all servers see all transactions in one order, and
what was answered is in the store: state machine replication (Schneider, ACM Computing Surveys
22(4), 1990), with the store to agree by.

Every so often a server writes a snapshot, and removes what lies before the one before. To a server
that slept meanwhile the next name may look free, or hold what another one of its kind left there:
who finds itself before the last snapshot but one starts again from the last.

An operation is abandoned when its server gave no sign of life while another one's clock went on for
`lease_s`: clocks need not agree, but for when what has ended expires.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import pathlib
import sqlite3
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from secateur.operation import State
from secateur.service.blobs import sync
from secateur.service.errors import CallError
from secateur.service.operations import VERSION, Repository
from secateur.service.remote import open_store, reached

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LOG, _SNAPSHOTS = "operations/log", "operations/snapshots"
_EVERY = 256  # transactions from one snapshot to the next
_CHANGES = ("INSERT ", "UPDATE ", "DELETE ")  # how statements begin that are in the log


class _Overtaken(Exception):
    """Another server wrote the transaction of this number."""


def _certain(
    method: Callable[Concatenate[Any, _P], _T], *, fresh: bool = True
) -> Callable[Concatenate[Any, _P], _T]:
    """A method of Repository that is run again until it follows what all servers did.

    Args:
        method: it.
        fresh: whether it has to know what others did before, even if it changes nothing.
    """

    @functools.wraps(method)
    def call(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        caught_up = not fresh
        while True:
            self.thread.wrote = False
            try:
                result = method(self, *args, **kwargs)
                if caught_up or self.thread.wrote:
                    return result
            except _Overtaken:
                pass
            except CallError as error:
                if caught_up or error.reason == "OBJECT_STORE":
                    raise
            self.catch_up()
            caught_up = True

    return call


class SharedRepository(Repository):
    """The repository of all servers that were given the same URL.

    Args:
        url: of the object store; see `remote.open_store`.
        ttl_s: as Repository's.
        lease_s: seconds without a sign of life of a server after which others run what it ran.

    Attributes:
        thread: whether the method that a thread is in `wrote` a transaction.

    Raises:
        ValueError: the URL is not understood.
        CallError: the store cannot be reached. sqlite3.DatabaseError: a newer program's state.
    """

    def __init__(self, url: str, *, ttl_s: float, lease_s: float) -> None:
        self._store = open_store(url, max(lease_s, 1.0) / 4)
        self._folder = _folder(url)
        self.lease_s = lease_s
        self.thread = threading.local()
        self._number = 0  # of the last transaction that the state holds
        self._saved = 0  # of the last snapshot that was seen
        self._statements: list[tuple[str, tuple[Any, ...]]] = []
        self._seen: dict[tuple[Any, ...], float] = {}  # signs of life, and since when; monotonic
        super().__init__(":memory:", durable=False, ttl_s=ttl_s)
        self.catch_up()
        self._prepare()  # the clock goes on from what is there

    # ---- methods that follow all that others did before they began ----

    add = _certain(Repository.add)
    get = _certain(Repository.get)
    page = _certain(Repository.page)
    finish = _certain(Repository.finish)
    delete = _certain(Repository.delete)
    unfinished = _certain(Repository.unfinished)
    # these may come a little late when they find nothing to do
    claim = _certain(Repository.claim, fresh=False)
    release = _certain(Repository.release, fresh=False)
    recover = _certain(Repository.recover, fresh=False)
    beat = _certain(Repository.beat, fresh=False)
    expire = _certain(Repository.expire, fresh=False)
    add_blob = _certain(Repository.add_blob, fresh=False)
    use_blob = _certain(Repository.use_blob, fresh=False)
    evict = _certain(Repository.evict, fresh=False)
    remember = _certain(Repository.remember, fresh=False)

    def _abandoned(self, sql: Any) -> list[str]:
        """Operations whose server has given no sign of life for as long as the lease."""
        rows = sql(
            "SELECT id, attempts, beats FROM operations WHERE state = ? AND owner IS NOT ?",
            *(State.RUNNING, self._owner),
        )
        now, lease_s = time.monotonic(), self.lease_s or 0.0
        self._seen = {sign: self._seen.get(sign, now) for sign in map(tuple, rows)}
        return [sign[0] for sign, since in self._seen.items() if now - since >= lease_s]

    # ---- the log ----

    def catch_up(self) -> None:
        """Takes in what other servers did. Raises CallError, sqlite3.DatabaseError."""
        with self._lock:
            while True:
                entries: list[Any] = []
                while (entry := self._read(_LOG, self._number + 1 + len(entries))) is not None:
                    entries.append(json.loads(entry))
                if self._stands():
                    break
                self._load()
            for entry in entries:
                self._apply(entry)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        with super()._transaction() as sql:
            self._statements = []
            before, number = self._connection.total_changes, self._number
            yield sql
            if self._connection.total_changes != before:
                self._write()
        if self._number != number and self._number % _EVERY == 0:
            self._save()

    def _run(self, text: str, *values: Any) -> sqlite3.Cursor:
        if text.startswith(_CHANGES):
            self._statements.append((text, values))
        return super()._run(text, *values)

    def _write(self) -> None:
        """Makes the transaction the next of the log. Raises _Overtaken, CallError."""
        name = uuid.uuid4().hex
        entry = {"id": name, "schema": VERSION, "statements": self._statements}
        content = json.dumps(entry, default=_encoded).encode()
        if not self._put(_LOG, self._number + 1, content, "create"):
            found = self._read(_LOG, self._number + 1)
            # a client of the store that had no answer may have asked once more by itself
            if found is None or json.loads(found)["id"] != name:
                raise _Overtaken
        if not self._stands():
            raise _Overtaken
        self._number += 1
        self.thread.wrote = True

    def _apply(self, entry: dict[str, Any]) -> None:
        """Does to the state what a transaction of the log did. Raises sqlite3.DatabaseError."""
        if entry["schema"] > VERSION:
            text = f"schema {entry['schema']} of the log is newer than this program's {VERSION}"
            raise sqlite3.DatabaseError(text)
        for text, _ in entry["statements"]:
            if not text.startswith(_CHANGES):  # the store is no way into a server
                raise sqlite3.DatabaseError(f"not of a log: {text[:64]!r}")
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        for text, values in entry["statements"]:
            run(text, [_decoded(value) for value in values]).fetchall()
        run("COMMIT")
        self._number += 1

    def _stands(self) -> bool:
        """Whether nothing was removed that comes after the state; ask when what comes was read.

        Raises:
            CallError: the store has lost what was there: a folder that is not mounted, say.
        """
        kept = [0, *self._numbers(_SNAPSHOTS)]
        begun = self._number and kept == [0]  # nothing is removed before the second snapshot
        if kept[-1] < self._saved or (begun and self._read(_LOG, 1) is None):
            text = "the operations that were in the object store are not there any more"
            raise CallError(grpc.StatusCode.UNAVAILABLE, "OBJECT_STORE", text)
        self._saved = kept[-1]
        return self._number >= kept[-2:][0]

    def _load(self) -> None:
        """Starts from the last snapshot."""
        content = None
        while content is None:  # removed since, as another one came
            number = self._numbers(_SNAPSHOTS)[-1]
            content = self._read(_SNAPSHOTS, number)
        self._connection.deserialize(content)
        self._prepare()
        self._number = number

    def _save(self) -> None:
        """Writes a snapshot, and removes what is before the one before."""
        with self._lock, contextlib.suppress(CallError):  # the next one will do
            self._put(_SNAPSHOTS, self._number, self._connection.serialize(), "overwrite")
            *old, first, _ = [0, *self._numbers(_SNAPSHOTS)]
            self._remove(_SNAPSHOTS, lambda number: number in old)
            self._remove(_LOG, lambda number: number < first)

    # ---- the store ----

    def _numbers(self, place: str) -> list[int]:
        """What is in one place, ascending."""
        import obstore

        def found() -> list[int]:
            names = [
                pathlib.PurePosixPath(meta["path"]).name
                for page in obstore.list(self._store, prefix=place)
                for meta in page
            ]
            return sorted(int(name) for name in names if name.isdecimal())

        return reached(found)

    def _read(self, place: str, number: int) -> bytes | None:
        """What has a number in one place; None when nothing has."""
        import obstore

        def found() -> bytes | None:
            try:
                return bytes(obstore.get(self._store, _path(place, number)).bytes())
            except FileNotFoundError:
                return None

        return reached(found)

    def _put(self, place: str, number: int, content: bytes, mode: Any) -> bool:
        """Writes, for good; False when `mode` is `create` and there is such a number already."""
        import obstore
        import obstore.exceptions

        def put() -> bool:
            path = _path(place, number)
            try:
                obstore.put(self._store, path, content, mode=mode, use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            if self._folder is not None:  # of which obstore leaves the disk's part to the system
                sync(self._folder / path)
                sync((self._folder / path).parent)
            return True

        return reached(put)

    def _remove(self, place: str, which: Callable[[int], bool]) -> None:
        import obstore

        paths = [_path(place, number) for number in self._numbers(place) if which(number)]
        if paths:
            reached(lambda: obstore.delete(self._store, paths))


def _path(place: str, number: int) -> str:
    return f"{place}/{number:020d}"


def _folder(url: str) -> pathlib.Path | None:
    """The folder that an object store is, when it is one."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "file":
        return None
    return pathlib.Path(urllib.request.url2pathname(parts.path))


def _encoded(value: bytes) -> dict[str, str]:
    """Bytes as JSON takes them."""
    return {"base64": base64.b64encode(value).decode()}


def _decoded(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
