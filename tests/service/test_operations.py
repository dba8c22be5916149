"""What the server remembers: the suite that every back end of the repository must pass."""

from __future__ import annotations

import itertools
import pathlib
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from secateur.operation import State
from secateur.service.errors import CallError
from secateur.service.operations import Record, Repository
from secateur.service.shared import SharedRepository

Open = Callable[..., Repository]


def sqlite(folder: pathlib.Path, ttl_s: float = 60.0) -> Repository:
    return Repository(folder / "state", durable=True, ttl_s=ttl_s)


@pytest.fixture(params=["sqlite", "folder", "s3"])
def opened(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Open]:
    """Opens a repository; opening again stands for the next server on the same state."""
    made: list[Repository] = []
    url = f"file://{tmp_path}/store"
    if request.param != "sqlite":
        pytest.importorskip("obstore")
    if request.param == "s3":
        url = request.getfixturevalue("bucket")

    def open_again(ttl_s: float = 60.0) -> Repository:
        while made:
            made.pop().close()
        if request.param == "sqlite":
            made.append(sqlite(tmp_path, ttl_s))
        else:
            made.append(SharedRepository(url, ttl_s=ttl_s, lease_s=60.0))
            made[-1].lease_s = 0.0  # others are dead at once; requests have the patience of 60 s
        return made[-1]

    yield open_again
    for one in made:
        one.close()


@pytest.fixture
def repository(opened: Open) -> Repository:
    return opened()


def add(repository: Repository, client: str = "", key: str = "k", **more: Any) -> Record:
    return repository.add(client, key, b"request", b"", more.pop("needs", ()), **more)


def reason(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(CallError) as caught:
        call()
    return caught.value.code, caught.value.reason


# ---- operations --------------------------------------------------------------------------------


def test_an_operation_waits_runs_and_ends(repository: Repository) -> None:
    added = add(repository)
    assert (added.state, added.attempts, added.request) == (State.QUEUED, 0, b"request")
    assert repository.get("", added.id) == added
    running = repository.claim()
    assert running is not None and running.id == added.id
    assert (running.state, running.attempts) == (State.RUNNING, 1)
    assert running.started is not None and running.started >= running.created
    assert repository.finish(added.id, State.SUCCEEDED, response=b"response")
    ended = repository.get("", added.id)
    assert (ended.state, ended.response, ended.error) == (State.SUCCEEDED, b"response", None)
    assert ended.ended is not None and ended.expires == ended.ended + 60.0


def test_it_ends_once(repository: Repository) -> None:
    name = add(repository).id
    assert repository.finish(name, State.CANCELLED, error=b"cancelled")
    assert not repository.finish(name, State.SUCCEEDED, response=b"too late")
    assert repository.get("", name).state is State.CANCELLED
    assert repository.claim() is None
    assert not repository.finish("nothing", State.FAILED)


def test_they_run_in_the_order_of_arrival_whatever_the_clock_says(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for now in (5e9, 1.0, 4e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        names.append(add(repository).id)
    assert [record.id for record in repository.page("", State, None, 9)] == names[::-1]
    assert repository.waiting_before(repository.get("", names[2])) == 2
    claimed = [repository.claim() for _ in range(4)]
    assert [record and record.id for record in claimed] == [*names, None]


def test_who_runs_it_is_known_and_alone_tells_what_came_of_it(opened: Open) -> None:
    repository = opened()
    first, second = add(repository).id, add(repository).id
    repository.claim()
    assert repository.unfinished() == {first: True, second: False}
    repository.beat({first: b"half", second: b"not running"})
    told = [repository.get("", name) for name in (first, second)]
    assert [(record.beats, record.progress) for record in told] == [(1, b"half"), (0, None)]
    repository = opened()  # what the one before ran is not this one's to tell about
    assert repository.unfinished() == {first: False, second: False}
    repository.beat({first: b"more"})
    repository.release(first, True)
    assert not repository.finish(first, State.FAILED)
    assert repository.get("", first) == told[0]
    assert repository.finish(first, State.CANCELLED)
    assert repository.unfinished() == {second: False}


def test_a_released_one_keeps_its_place(repository: Repository) -> None:
    first, _ = add(repository), add(repository)
    assert repository.claim()
    repository.release(first.id, True)
    again = repository.claim()
    assert again is not None and (again.id, again.attempts) == (first.id, 2)
    repository.release(first.id, False)
    assert repository.get("", first.id).attempts == 1
    repository.finish(first.id, State.FAILED)
    repository.release(first.id, True)
    assert repository.get("", first.id).state is State.FAILED


def test_claims_of_many_threads_never_meet(repository: Repository) -> None:
    names = {add(repository).id for _ in range(40)}
    claimed: list[str] = []

    def claim() -> None:
        while (record := repository.claim()) is not None:
            claimed.append(record.id)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 40 and set(claimed) == names


def test_pages_hold_everything_once(repository: Repository) -> None:
    names = [add(repository).id for _ in range(7)]
    add(repository, "other")
    repository.finish(names[3], State.CANCELLED)
    seen: list[Record] = []
    while page := repository.page("", State, seen[-1].number if seen else None, 3):
        add(repository)  # newer ones do not move the pages
        seen += page
    assert [record.id for record in seen] == names[::-1]
    cancelled = repository.page("", [State.CANCELLED], None, 9)
    assert [record.id for record in cancelled] == [names[3]]
    assert repository.page("", [], None, 9) == []


def test_a_request_id_starts_one_operation(repository: Repository) -> None:
    first = add(repository, request_id="r")
    assert add(repository, request_id="r") == first
    assert repository.started_as("", "r", "k") == first
    assert repository.started_as("", "s", "k") is None
    assert add(repository, "other", request_id="r").id != first.id
    assert add(repository).id != add(repository).id
    reused = (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert reason(lambda: add(repository, key="l", request_id="r")) == reused
    assert reason(lambda: repository.started_as("", "r", "l")) == reused


def test_one_whose_result_is_known_is_done_at_once(repository: Repository) -> None:
    record = repository.add("", "k", b"", b"response", ())
    assert (record.state, record.response, record.attempts) == (State.SUCCEEDED, b"response", 0)
    assert record.expires is not None and repository.claim() is None


def test_clients_see_their_own(repository: Repository) -> None:
    mine, theirs = add(repository, "a"), add(repository, "b")
    assert reason(lambda: repository.get("a", theirs.id))[0] is grpc.StatusCode.NOT_FOUND
    assert reason(lambda: repository.delete("a", theirs.id))[0] is grpc.StatusCode.NOT_FOUND
    assert [record.id for record in repository.page("a", State, None, 9)] == [mine.id]
    assert repository.count("a") == (2, 1)
    assert repository.count("c") == (2, 0)


def test_only_what_has_ended_is_deleted(repository: Repository) -> None:
    name = add(repository).id
    refused = (grpc.StatusCode.FAILED_PRECONDITION, "NOT_DONE")
    assert reason(lambda: repository.delete("", name)) == refused
    repository.finish(name, State.CANCELLED)
    repository.delete("", name)
    gone = (grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
    assert reason(lambda: repository.get("", name)) == gone


def test_what_ended_expires(opened: Open) -> None:
    repository = opened(ttl_s=0.05)
    name, waiting = add(repository).id, add(repository).id
    repository.finish(name, State.CANCELLED)
    assert repository.expire() == []
    time.sleep(0.06)
    assert repository.expire() == [name]
    assert [record.id for record in repository.page("", State, None, 9)] == [waiting]


def test_a_jump_of_the_clock_makes_nothing_expire(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, real = opened(ttl_s=1000.0), time.time()
    name = add(repository).id
    repository.finish(name, State.CANCELLED)
    repository.add_blob("", "b" * 64, 1)
    monkeypatch.setattr("time.time", lambda: real + 1e9)
    assert repository.expire() == [] and repository.evict(unused_s=1000.0) == []
    monkeypatch.setattr("time.time", lambda: 0.0)  # the next one starts before its clock is set
    again = opened(ttl_s=1000.0)
    assert again.now() >= real
    assert add(again).created >= real
    assert again.expire() == [] and again.evict(unused_s=1000.0) == []


def test_usual_seconds_come_from_what_ran(repository: Repository) -> None:
    assert repository.usual_seconds() is None
    repository.add("", "k", b"", b"known before", ())
    assert repository.usual_seconds() is None
    add(repository)
    record = repository.claim()
    assert record is not None
    time.sleep(0.02)
    repository.finish(record.id, State.SUCCEEDED, response=b"r")
    usual = repository.usual_seconds()
    assert usual is not None and 0.02 <= usual < 1.0


# ---- the next server ---------------------------------------------------------------------------


def test_the_next_server_finds_everything(opened: Open) -> None:
    repository = opened()
    repository.add_blob("", "a" * 64, 3)
    names = [add(repository, needs=["a" * 64]).id for _ in range(4)]
    for _ in range(3):
        repository.claim()
    repository.finish(names[0], State.SUCCEEDED, response=b"r")
    repository.remember("", "k", b"known", ["a" * 64])
    before = [repository.get("", name) for name in names]
    repository = opened()
    assert [repository.get("", name) for name in names] == before
    assert repository.recall("", "k") == b"known"
    repository.recover(max_attempts=2, error=b"killed")
    states = [repository.get("", name).state for name in names]
    assert states == [State.SUCCEEDED, State.QUEUED, State.QUEUED, State.QUEUED]
    again = repository.claim()
    assert again is not None and (again.id, again.attempts) == (names[1], 2)
    repository = opened()
    repository.recover(max_attempts=2, error=b"killed")
    failed = repository.get("", names[1])
    assert (failed.state, failed.error) == (State.FAILED, b"killed")
    assert failed.expires is not None


# ---- blobs -------------------------------------------------------------------------------------


def test_blobs_that_are_needed_stay(repository: Repository) -> None:
    one, two, three = ("1" * 64, "2" * 64, "3" * 64)
    for sha256 in (one, two, three):
        repository.add_blob("", sha256, 10)
    running = add(repository, needs=[one, one])
    assert repository.evict() == [two, three]
    assert repository.use_blob("", one) == 10
    repository.add_blob("", two, 10)
    repository.finish(running.id, State.SUCCEEDED, response=b"r", needs=[two])
    assert repository.evict() == [one]
    repository.delete("", running.id)
    assert repository.evict() == [two]
    assert repository.stored() == 0


def test_blobs_longest_unused_go_first(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [digit * 64 for digit in "0123"]
    start = time.time()
    for step, sha256 in enumerate(names):
        monkeypatch.setattr(repository, "now", lambda step=step: start + 100 * step)
        repository.add_blob("", sha256, 10)
    monkeypatch.setattr(repository, "now", lambda: start + 1000)
    assert repository.use_blob("", names[0]) == 10
    assert repository.evict(at_least=15) == [names[1], names[2]]
    assert repository.evict(unused_s=500) == [names[3]]
    assert repository.blobs() == {names[0]}


def test_a_needed_blob_must_be_there(repository: Repository) -> None:
    gone = (grpc.StatusCode.NOT_FOUND, "BLOB_NOT_FOUND")
    assert reason(lambda: add(repository, needs=["a" * 64])) == gone
    assert repository.page("", State, None, 9) == []  # nothing half
    repository.add_blob("other", "a" * 64, 1)
    assert reason(lambda: add(repository, needs=["a" * 64])) == gone


def test_content_goes_with_its_last_owner(repository: Repository) -> None:
    for client in ("a", "b"):
        repository.add_blob(client, "a" * 64, 10)
    assert repository.stored() == 10
    needed = add(repository, "b", needs=["a" * 64])
    assert repository.evict() == []
    assert repository.use_blob("a", "a" * 64) is None
    assert repository.use_blob("b", "a" * 64) == 10
    repository.finish(needed.id, State.CANCELLED)
    assert repository.evict() == ["a" * 64]


def test_results_last_as_long_as_their_blobs(repository: Repository) -> None:
    repository.add_blob("", "a" * 64, 10)
    repository.remember("", "k", b"one", ["a" * 64])
    repository.remember("", "k", b"two", ["a" * 64])
    assert repository.recall("", "k") == b"two"
    assert repository.recall("other", "k") is None
    assert repository.evict() == ["a" * 64]
    assert repository.recall("", "k") is None
    repository.add_blob("", "a" * 64, 10)
    assert repository.recall("", "k") is None


# ---- SQLite ------------------------------------------------------------------------------------


def test_a_newer_schema_is_refused(tmp_path: pathlib.Path) -> None:
    sqlite(tmp_path).close()
    with sqlite3.connect(tmp_path / "state") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(sqlite3.DatabaseError, match="newer"):
        sqlite(tmp_path)


def test_a_file_of_the_schema_before_is_taken_over(tmp_path: pathlib.Path) -> None:
    repository = sqlite(tmp_path)
    ran, waits = add(repository).id, add(repository).id
    repository.claim()
    for column in ("owner", "beats", "progress"):
        repository._connection.execute(f"ALTER TABLE operations DROP COLUMN {column}")
    repository._connection.execute("PRAGMA user_version = 1")
    repository.close()
    repository = sqlite(tmp_path)
    assert repository.unfinished() == {ran: False, waits: False}
    repository.recover(max_attempts=9, error=b"")
    again = repository.claim()
    assert again is not None and (again.id, again.attempts) == (ran, 2)
    repository.close()


def test_power_loss_keeps_what_was_answered(tmp_path: pathlib.Path) -> None:
    """The log is cut at any byte after the last one that was synced when an answer was given."""
    repository, log = sqlite(tmp_path), tmp_path / "state-wal"
    answered: list[tuple[int, set[str]]] = []  # bytes of the log, and what was there by then
    names: set[str] = set()
    for number in range(12):
        repository.add_blob("", f"{number:064x}", 1)
        names.add(add(repository, needs=[f"{number:064x}"]).id)
        answered.append((log.stat().st_size, set(names)))
    for copied in ("state", "state-wal"):
        shutil.copy(tmp_path / copied, tmp_path / f"kept-{copied}")
    repository.close()
    noise = random.Random(0)
    for (size, known), (larger, _) in itertools.pairwise(answered):
        cut = noise.randrange(size, larger)
        lost = tmp_path / f"lost-{cut}"
        lost.mkdir()
        shutil.copy(tmp_path / "kept-state", lost / "state")
        content = (tmp_path / "kept-state-wal").read_bytes()[:cut]
        (lost / "state-wal").write_bytes(content + noise.randbytes(100))  # a torn last write
        after = sqlite(lost)
        found = {record.id for record in after.page("", State, None, 99)}
        after.close()
        assert known <= found <= names


def test_a_full_disk_is_said_and_harms_nothing(repository: Repository) -> None:
    kept = add(repository)
    connection = repository._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for number in range(1000):
            repository.add("", "k", bytes(4096), b"", (), request_id=str(number))

    assert reason(fill) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE")
    connection.execute("PRAGMA max_page_count = 1000000")
    assert repository.get("", kept.id) == kept
    assert add(repository).number > kept.number
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
