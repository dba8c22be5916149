"""What the server remembers: operations, the blobs they need, and results that may be asked again.

One SQLite file in WAL mode; every method is one transaction, synced before it returns, so that a
server killed at any moment finds all of it or nothing. Another back end, as `shared` is one, keeps
these methods and passes tests/service/test_operations.py.

    operations   what was asked and what came of it; `number` is the order of arrival
    blobs        which client has which content; the content itself is the BlobStore's
    needs        blobs that an operation cannot do without: they are never evicted
    results      finished prunes by what was asked, as long as their blobs are there

Functions here block; callers in the event loop use threads.
"""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from secateur.operation import State
from secateur.service.errors import CallError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS operations (
    number     INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    client     TEXT NOT NULL,              -- '' is whoever came without credentials
    state      TEXT NOT NULL,
    request_id TEXT,                       -- the client's own; NULL: none
    key        TEXT NOT NULL,              -- of what was asked, see `jobs.key_of`
    request    BLOB NOT NULL,              -- secateur.v1.StartPruneRequest, every payload a blob
    response   BLOB,                       -- secateur.v1.PruneResult, every payload a blob
    error      BLOB,                       -- google.rpc.Status
    attempts   INTEGER NOT NULL DEFAULT 0,
    created    REAL NOT NULL,              -- seconds since 1970, as the next three
    started    REAL,
    ended      REAL,
    expires    REAL,
    owner      TEXT,                       -- the server that runs it; NULL: none does
    beats      INTEGER NOT NULL DEFAULT 0, -- signs of life that it gave over it
    progress   BLOB                        -- secateur.v1.Progress by then
);
CREATE UNIQUE INDEX IF NOT EXISTS operations_request ON operations (client, request_id);
CREATE INDEX IF NOT EXISTS operations_state ON operations (state, number);
CREATE TABLE IF NOT EXISTS blobs (
    client TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    size   INTEGER NOT NULL,               -- bytes
    used   REAL NOT NULL,
    PRIMARY KEY (client, sha256)
);
CREATE INDEX IF NOT EXISTS blobs_used ON blobs (used);
CREATE TABLE IF NOT EXISTS needs (
    operation TEXT NOT NULL REFERENCES operations (id) ON DELETE CASCADE,
    client    TEXT NOT NULL,
    sha256    TEXT NOT NULL,
    PRIMARY KEY (operation, sha256),
    FOREIGN KEY (client, sha256) REFERENCES blobs (client, sha256)
);
CREATE INDEX IF NOT EXISTS needs_blob ON needs (client, sha256);
CREATE TABLE IF NOT EXISTS results (
    client   TEXT NOT NULL,
    key      TEXT NOT NULL,
    response BLOB NOT NULL,
    PRIMARY KEY (client, key)
);
CREATE TABLE IF NOT EXISTS result_blobs (
    client TEXT NOT NULL,
    key    TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (client, key, sha256),
    FOREIGN KEY (client, key) REFERENCES results (client, key) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS result_blobs_blob ON result_blobs (client, sha256);
"""

VERSION = 2  # of the schema; the file of a newer one is refused
_MIGRATIONS = {  # from the version that is the key to the next
    1: """
ALTER TABLE operations ADD COLUMN owner TEXT;
ALTER TABLE operations ADD COLUMN beats INTEGER NOT NULL DEFAULT 0;
ALTER TABLE operations ADD COLUMN progress BLOB;
""",
}
_USED_STEP_S = 60.0  # how far behind the record of a blob's last use may lag
_RECENT = 32  # finished operations over which the usual time is taken


@dataclass(frozen=True, slots=True)
class Record:
    """One row of `operations`; see there."""

    number: int
    id: str
    client: str
    state: State
    request_id: str | None
    key: str
    request: bytes
    response: bytes | None
    error: bytes | None
    attempts: int
    created: float
    started: float | None
    ended: float | None
    expires: float | None
    owner: str | None
    beats: int
    progress: bytes | None


class Clock:
    """Seconds since 1970 that follow no jump of the machine's clock while the server runs.

    Args:
        start: the time must not be before this, though the machine may say so at its start.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._base = max(time.time(), start) - time.monotonic()

    def now(self) -> float:
        """The time."""
        return self._base + time.monotonic()


class Repository:
    """Operations and blobs in one SQLite file.

    Args:
        path: made when it is not there.
        durable: whether what a method did survives a loss of power; else only a killed process.
        ttl_s: seconds for which a finished operation can be asked for.

    Attributes:
        lease_s: seconds without a sign of life of a server after which others run what it ran;
            None: there are no others.

    Raises:
        sqlite3.DatabaseError: the file is not ours, or damaged.
    """

    lease_s: float | None = None

    def __init__(self, path: pathlib.Path | str, *, durable: bool, ttl_s: float) -> None:
        self._lock = threading.Lock()
        self._ttl_s = ttl_s
        self._owner = uuid.uuid4().hex  # this server, until it ends
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._prepare()

    def _prepare(self) -> None:
        """Makes tables of this version of what is in the file. Raises sqlite3.DatabaseError."""
        run = self._connection.executescript
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            text = f"schema {version} of the state is newer than this program's {VERSION}"
            raise sqlite3.DatabaseError(text)
        for old in range(version or VERSION, VERSION):
            run(f"BEGIN; {_MIGRATIONS[old]} PRAGMA user_version = {old + 1}; COMMIT;")
        run(f"PRAGMA foreign_keys = ON; {_SCHEMA} PRAGMA user_version = {VERSION};")
        (latest,) = self._connection.execute(
            "SELECT max(max(created), coalesce(max(ended), 0)) FROM operations"
        ).fetchone()
        self._clock = Clock(latest or 0)

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._connection.close()

    def now(self) -> float:
        """The time that all rows are stamped with, in seconds since 1970."""
        return self._clock.now()

    # ---- operations ----

    def add(
        self,
        client: str,
        key: str,
        request: bytes,
        response: bytes,
        needs: Iterable[str],
        request_id: str | None = None,
    ) -> Record:
        """A new operation, or the one that the client started with the same `request_id`.

        Args:
            client: who asks.
            key: of what is asked.
            request: how to do it, after a restart too; empty when `response` is given.
            response: what came of it, when that is known already; else empty.
            needs: SHA-256 of the blobs it cannot do without.
            request_id: the client's own name for it.

        Raises:
            CallError: NOT_FOUND when a needed blob has gone; INVALID_ARGUMENT when the client used
                `request_id` for something else.
        """
        with self._transaction() as sql:
            known = sql(
                "SELECT * FROM operations WHERE client = ? AND request_id = ?", client, request_id
            ).fetchone()
            if known is not None:
                return _same(_record(known), key)
            now, name = self.now(), uuid.uuid4().hex
            done = bool(response)
            row = sql(
                "INSERT INTO operations (id, client, state, request_id, key, request, response,"
                " created, started, ended, expires) VALUES (?,?,?,?,?,?,?,?,?,?,?) RETURNING *",
                *(name, client, State.SUCCEEDED if done else State.QUEUED, request_id),
                *(key, request, response or None, now),
                *((now, now, now + self._ttl_s) if done else (None, None, None)),
            ).fetchone()
            _need(sql, name, client, needs)
            return _record(row)

    def started_as(self, client: str, request_id: str, key: str) -> Record | None:
        """What a client started with a `request_id`. Raises as `add`."""
        row = self._row(
            "SELECT * FROM operations WHERE client = ? AND request_id = ?", client, request_id
        )
        return None if row is None else _same(_record(row), key)

    def get(self, client: str, name: str) -> Record:
        """An operation of a client. Raises CallError NOT_FOUND."""
        row = self._row("SELECT * FROM operations WHERE client = ? AND id = ?", client, name)
        if row is None:
            raise _no_record(name)
        return _record(row)

    def page(
        self, client: str, states: Iterable[State], before: int | None, size: int
    ) -> list[Record]:
        """The newest operations of a client in one of `states`, newest first.

        Args:
            client: whose.
            states: of which.
            before: only those with a lower number; None: all.
            size: how many at most.
        """
        wanted = [str(state) for state in states]
        marks = ",".join("?" * len(wanted))
        rows = self._rows(
            f"SELECT * FROM operations WHERE client = ? AND state IN ({marks})"
            " AND number < ? ORDER BY number DESC LIMIT ?",
            *(client, *wanted, 2**62 if before is None else before, size),
        )
        return [_record(row) for row in rows]

    def claim(self) -> Record | None:
        """The operation that has waited longest, running from now on; None when none waits."""
        with self._transaction() as sql:
            row = sql(
                "UPDATE operations SET state = ?, started = ?, attempts = attempts + 1,"
                " owner = ?, beats = 0, progress = NULL"
                " WHERE number = (SELECT min(number) FROM operations WHERE state = ?) RETURNING *",
                *(State.RUNNING, self.now(), self._owner, State.QUEUED),
            ).fetchone()
            return None if row is None else _record(row)

    def release(self, name: str, counted: bool) -> None:
        """Puts an operation that this server runs back in its place in the queue.

        Args:
            name: its id.
            counted: whether the attempt was its own fault.
        """
        with self._transaction() as sql:
            sql(
                "UPDATE operations SET state = ?, started = NULL, owner = NULL,"
                " attempts = attempts - ? WHERE id = ? AND state = ? AND owner = ?",
                *(State.QUEUED, 0 if counted else 1, name, State.RUNNING, self._owner),
            )

    def finish(
        self,
        name: str,
        state: State,
        *,
        response: bytes | None = None,
        error: bytes | None = None,
        needs: Iterable[str] = (),
    ) -> bool:
        """Ends an operation that has not ended, for good; whether this call did.

        Anybody may cancel one; what came of it is told by no other than who runs it.

        Args:
            name: its id.
            state: one that is done.
            response: of one that succeeded.
            error: of one that did not.
            needs: SHA-256 of the blobs in `response`; those it needed to run are let go.
        """
        with self._transaction() as sql:
            now = self.now()
            row = sql(
                "UPDATE operations SET state = ?, response = ?, error = ?, ended = ?, expires = ?"
                " WHERE id = ? AND state IN (?, ?) AND (? OR coalesce(owner, ?) = ?)"
                " RETURNING client",
                *(state, response, error, now, now + self._ttl_s),
                *(name, State.QUEUED, State.RUNNING),
                *(state is State.CANCELLED, self._owner, self._owner),
            ).fetchone()
            if row is None:
                return False
            sql("DELETE FROM needs WHERE operation = ?", name)
            _need(sql, name, row["client"], needs)
            return True

    def delete(self, client: str, name: str) -> None:
        """Forgets an operation that has ended.

        Raises:
            CallError: NOT_FOUND; FAILED_PRECONDITION while it waits or runs.
        """
        with self._transaction() as sql:
            row = sql(
                "SELECT state FROM operations WHERE client = ? AND id = ?", client, name
            ).fetchone()
            if row is None:
                raise _no_record(name)
            if not State(row["state"]).done:
                text = f"operation {name} is {row['state']}: cancel it before it is deleted"
                raise CallError(grpc.StatusCode.FAILED_PRECONDITION, "NOT_DONE", text)
            sql("DELETE FROM operations WHERE id = ?", name)

    def recover(self, max_attempts: int, error: bytes) -> list[str]:
        """What a server ran that is no more waits again, or fails when it ran too often.

        Args:
            max_attempts: how often an operation may run.
            error: the google.rpc.Status of those that may not again.

        Returns:
            Ids of both.
        """
        with self._transaction() as sql:
            now, abandoned = self.now(), self._abandoned(sql)
            for name in abandoned:
                sql(
                    "UPDATE operations SET state = ?, error = ?, ended = ?, expires = ?"
                    " WHERE id = ? AND attempts >= ?",
                    *(State.FAILED, error, now, now + self._ttl_s, name, max_attempts),
                )
                sql(
                    "UPDATE operations SET state = ?, started = NULL, owner = NULL"
                    " WHERE id = ? AND state = ?",
                    *(State.QUEUED, name, State.RUNNING),
                )
            sql(
                "DELETE FROM needs WHERE operation IN (SELECT id FROM operations WHERE state = ?)",
                State.FAILED,
            )
            return abandoned

    def _abandoned(self, sql: Any) -> list[str]:
        """Operations that a server ran which is no more: any other, since no two have one file."""
        rows = sql(
            "SELECT id FROM operations WHERE state = ? AND owner IS NOT ?",
            *(State.RUNNING, self._owner),
        )
        return [row["id"] for row in rows]

    def beat(self, progress: Mapping[str, bytes]) -> None:
        """Tells that this server lives, and how far what it runs is, as far as that is known."""
        with self._transaction() as sql:
            sql(
                "UPDATE operations SET beats = beats + 1 WHERE state = ? AND owner = ?",
                *(State.RUNNING, self._owner),
            )
            for name, step in progress.items():
                sql(
                    "UPDATE operations SET progress = ? WHERE id = ? AND owner = ?",
                    *(step, name, self._owner),
                )

    def unfinished(self) -> dict[str, bool]:
        """Operations that wait or run, of all clients, and whether it is this server that runs."""
        rows = self._rows(
            "SELECT id, owner IS ? AS own FROM operations WHERE state IN (?, ?)",
            *(self._owner, State.QUEUED, State.RUNNING),
        )
        return {row["id"]: bool(row["own"]) for row in rows}

    def expire(self) -> list[str]:
        """Forgets operations whose time has come; gives their ids."""
        with self._transaction() as sql:
            rows = sql("DELETE FROM operations WHERE expires <= ? RETURNING id", self.now())
            return [row["id"] for row in rows]

    def waiting_before(self, operation: Record) -> int:
        """How many operations, of all clients, wait in front of one that waits."""
        text = "SELECT count(*) FROM operations WHERE state = ? AND number < ?"
        return int(self._one(text, State.QUEUED, operation.number))

    def count(self, client: str) -> tuple[int, int]:
        """How many operations wait or run: of all clients, and of one."""
        row = self._row(
            "SELECT count(*), coalesce(sum(client = ?), 0) FROM operations WHERE state IN (?, ?)",
            *(client, State.QUEUED, State.RUNNING),
        )
        assert row is not None
        return int(row[0]), int(row[1])

    def usual_seconds(self) -> float | None:
        """Mean time that the latest operations to succeed ran; None before there is one."""
        seconds: float | None = self._one(
            "SELECT avg(seconds) FROM (SELECT ended - started AS seconds FROM operations"
            " WHERE state = ? AND attempts > 0 ORDER BY number DESC LIMIT ?)",
            *(State.SUCCEEDED, _RECENT),
        )
        return seconds

    # ---- blobs ----

    def add_blob(self, client: str, sha256: str, size: int) -> None:
        """Records that a client has a blob, whose content is in its place."""
        with self._transaction() as sql:
            sql(
                "INSERT INTO blobs VALUES (?,?,?,?)"
                " ON CONFLICT DO UPDATE SET used = excluded.used, size = excluded.size",
                *(client, sha256, size, self.now()),
            )

    def use_blob(self, client: str, sha256: str) -> int | None:
        """The size of a client's blob in bytes, marked as used now; None: the client has none."""
        row = self._row("SELECT * FROM blobs WHERE client = ? AND sha256 = ?", client, sha256)
        if row is None:
            return None
        now = self.now()
        if row["used"] < now - _USED_STEP_S:
            with self._transaction() as sql:
                sql(
                    "UPDATE blobs SET used = ? WHERE client = ? AND sha256 = ?",
                    *(now, client, sha256),
                )
        return int(row["size"])

    def stored(self) -> int:
        """Bytes of all blobs, each content counted once."""
        text = "SELECT sum(size) FROM (SELECT max(size) AS size FROM blobs GROUP BY sha256)"
        return int(self._one(text) or 0)

    def evict(self, *, unused_s: float = 0.0, at_least: int | None = None) -> list[str]:
        """Forgets blobs that no operation needs, longest unused first.

        Args:
            unused_s: only those unused for that many seconds.
            at_least: enough when that many bytes are free; None: all of them.

        Returns:
            SHA-256 of contents that nobody has any more, whose files may go.
        """
        with self._transaction() as sql:
            rows = sql(
                "SELECT client, sha256, size FROM blobs AS b WHERE used <= ? AND NOT EXISTS"
                " (SELECT 1 FROM needs AS n WHERE n.client = b.client AND n.sha256 = b.sha256)"
                " ORDER BY used",
                self.now() - unused_s,
            ).fetchall()
            freed, gone = 0, []
            for row in rows:
                if at_least is not None and freed >= at_least:
                    break
                client, sha256 = row["client"], row["sha256"]
                sql("DELETE FROM blobs WHERE client = ? AND sha256 = ?", client, sha256)
                sql(
                    "DELETE FROM results WHERE (client, key) IN"
                    " (SELECT client, key FROM result_blobs WHERE client = ? AND sha256 = ?)",
                    *(client, sha256),
                )
                if sql("SELECT 1 FROM blobs WHERE sha256 = ?", sha256).fetchone() is None:
                    freed += row["size"]
                    gone.append(sha256)
            return gone

    def blobs(self) -> set[str]:
        """SHA-256 of every content that somebody has."""
        return {row["sha256"] for row in self._rows("SELECT DISTINCT sha256 FROM blobs")}

    # ---- results ----

    def remember(self, client: str, key: str, response: bytes, blobs: Iterable[str]) -> None:
        """Keeps what came of a prune for the next one who asks the same."""
        with self._transaction() as sql:
            sql("DELETE FROM results WHERE client = ? AND key = ?", client, key)
            sql("INSERT INTO results VALUES (?,?,?)", client, key, response)
            for sha256 in set(blobs):
                sql("INSERT INTO result_blobs VALUES (?,?,?)", client, key, sha256)

    def recall(self, client: str, key: str) -> bytes | None:
        """What came of a prune before, its blobs marked as used; None when it is not known."""
        row = self._row("SELECT response FROM results WHERE client = ? AND key = ?", client, key)
        if row is None:
            return None
        blobs = self._rows(
            "SELECT sha256 FROM result_blobs WHERE client = ? AND key = ?", client, key
        )
        if any(self.use_blob(client, blob["sha256"]) is None for blob in blobs):
            return None
        return bytes(row["response"])

    # ---- SQL ----

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """A function that runs SQL, all of it or nothing.

        Raises:
            CallError: RESOURCE_EXHAUSTED when the disk is full.
        """
        with self._lock:
            connection = self._connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield self._run
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                    text = "the server's disk is full"
                    raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE", text) from error
                raise

    def _run(self, text: str, *values: Any) -> sqlite3.Cursor:
        """What the function that `_transaction` gives does."""
        return self._connection.execute(text, values)

    def _rows(self, text: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(text, values).fetchall()

    def _row(self, text: str, *values: Any) -> sqlite3.Row | None:
        return next(iter(self._rows(text, *values)), None)

    def _one(self, text: str, *values: Any) -> Any:
        row = self._row(text, *values)
        return None if row is None else row[0]


def _record(row: sqlite3.Row) -> Record:
    return Record(**{**dict(row), "state": State(row["state"])})


def _need(sql: Any, name: str, client: str, needs: Iterable[str]) -> None:
    for sha256 in set(needs):
        try:
            sql("INSERT INTO needs VALUES (?,?,?)", name, client, sha256)
        except sqlite3.IntegrityError:
            text = f"blob {sha256} is not here any more; upload it again"
            raise CallError(grpc.StatusCode.NOT_FOUND, "BLOB_NOT_FOUND", text) from None


def _same(operation: Record, key: str) -> Record:
    if operation.key != key:
        text = f"request_id {operation.request_id} was used before, for another request"
        raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED", text)
    return operation


def _no_record(name: str) -> CallError:
    text = f"operation {name[:64]!r} is not here: it expired, was deleted or never was"
    return CallError(grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND", text)
