"""Servers that share operations: the repository among several, then real servers."""

from __future__ import annotations

import pathlib
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from conftest import Server, frozen, is_gone, perceptron, wait_for

import secateur
from secateur import Recipe
from secateur.operation import State
from secateur.service.blobs import BlobStore
from secateur.service.errors import CallError
from secateur.service.remote import RemoteBlobs
from secateur.service.shared import SharedRepository

pytest.importorskip("obstore")

MODEL = perceptron(16, 32, 8)


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    return f"file://{tmp_path}/store"


@pytest.fixture
def another(url: str) -> Iterator[Callable[..., SharedRepository]]:
    """Opens the repository of one more server."""
    made: list[SharedRepository] = []

    def more(lease_s: float = 60.0) -> SharedRepository:
        made.append(SharedRepository(url, ttl_s=60.0, lease_s=lease_s))
        return made[-1]

    yield more
    for one in made:
        one.close()


Another = Callable[..., SharedRepository]


def add(repository: SharedRepository, **more: Any) -> str:
    return repository.add("", "k", b"request", b"", more.pop("needs", ()), **more).id


# ---- the repository ----------------------------------------------------------------------------


def test_each_sees_at_once_what_others_did(another: Another) -> None:
    one, two = another(), another()
    name = add(one, request_id="r")
    assert two.get("", name) == one.get("", name)
    assert add(two, request_id="r") == name
    running = two.claim()
    assert running is not None and running.id == name
    assert (one.unfinished(), two.unfinished()) == ({name: False}, {name: True})
    assert one.claim() is None
    two.beat({name: b"half"})
    told = one.get("", name)
    assert (told.state, told.progress) == (State.RUNNING, b"half")
    assert one.finish(name, State.CANCELLED)
    assert not two.finish(name, State.SUCCEEDED, response=b"late")
    assert two.get("", name).state is State.CANCELLED
    assert two.page("", State, None, 9) == one.page("", State, None, 9)
    one.delete("", name)
    with pytest.raises(CallError, match="not here"):
        two.get("", name)


def test_no_claim_is_given_twice(another: Another) -> None:
    servers = [another() for _ in range(3)]
    names = {add(one) for one in servers for _ in range(8)}
    claimed: list[str] = []

    def claim(repository: SharedRepository) -> None:
        repository.catch_up()
        while (record := repository.claim()) is not None:
            claimed.append(record.id)

    threads = [threading.Thread(target=claim, args=(one,)) for one in servers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(names)


def test_what_a_silent_server_ran_is_run_by_another(another: Another) -> None:
    dead, living = another(), another(lease_s=0.3)
    name = add(dead)
    assert dead.claim() is not None
    for _ in range(3):  # signs of life
        living.recover(9, b"")
        time.sleep(0.15)
        dead.beat({})
    living.catch_up()
    assert living.get("", name).state is State.RUNNING
    assert living.recover(9, b"") == []
    time.sleep(0.3)
    assert living.recover(9, b"") == [name]
    assert living.recover(9, b"") == []
    again = living.claim()
    assert again is not None and (again.id, again.attempts) == (name, 2)
    # the one that was thought dead has nothing to say any more
    dead.release(name, True)
    assert not dead.finish(name, State.FAILED, error=b"")
    dead.beat({name: b"wrong"})
    assert living.get("", name) == again
    assert living.finish(name, State.SUCCEEDED, response=b"r")


def test_an_attempt_too_many_fails(another: Another) -> None:
    dead, living = another(), another(lease_s=0.0)
    name = add(dead)
    dead.claim()
    living.catch_up()
    living.recover(1, b"too often")
    failed = dead.get("", name)
    assert (failed.state, failed.error) == (State.FAILED, b"too often")


def test_old_transactions_are_removed_and_nobody_is_misled(
    another: Another, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.service.shared._EVERY", 4)
    awake, sleeper, other_sleeper = another(), another(), another()
    names = [add(awake) for _ in range(3)]
    other_sleeper.catch_up()
    names += [add(awake) for _ in range(15)]
    assert awake._numbers("operations/snapshots") == [12, 16]
    assert awake._numbers("operations/log") == list(range(12, 19))
    # the next number that each of the two knows is free: one writes, the other one reads that
    names += [add(sleeper), add(other_sleeper)]
    assert [record.id for record in awake.page("", State, None, 99)] == names[::-1]
    new = another()
    for one in (sleeper, other_sleeper, new):
        assert one.page("", State, None, 99) == awake.page("", State, None, 99)
    assert add(new) in {record.id for record in sleeper.page("", State, None, 99)}


def test_an_answer_that_got_lost_is_written_once(
    another: Another, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = another(), another()
    put = one._put

    def deaf(*args: Any) -> bool:
        put(*args)
        raise CallError(grpc.StatusCode.UNAVAILABLE, "OBJECT_STORE", "no answer")

    def repeated(*args: Any) -> bool:  # by the client of the store, which then finds its own
        put(*args)
        return put(*args)

    with monkeypatch.context() as patch:
        patch.setattr(one, "_put", deaf)
        with pytest.raises(CallError, match="no answer"):
            add(one, request_id="r")
    name = add(one, request_id="r")
    assert [record.id for record in two.page("", State, None, 9)] == [name]
    monkeypatch.setattr(one, "_put", repeated)
    more = add(one)
    assert [record.id for record in two.page("", State, None, 9)] == [more, name]


def test_blobs_that_one_server_evicts_leave_the_folders_of_all(
    url: str, another: Another, tmp_path: pathlib.Path
) -> None:
    stores, repositories = [], [another(), another()]
    for name, repository in zip("ab", repositories, strict=True):
        stores.append(
            BlobStore(
                tmp_path / name,
                repository,
                max_bytes=1 << 20,
                quota=1 << 20,
                ttl_s=60.0,
                durable=True,
                remote=RemoteBlobs(url),
            )
        )
    kept, gone = (stores[0].adopt_bytes("", content) for content in (b"kept", b"gone"))
    for blob in (kept, gone):  # the other one fetches them
        repositories[1].catch_up()
        assert stores[1].get("", blob).read_bytes() in (b"kept", b"gone")
    add(repositories[0], needs=[kept.sha256])
    assert repositories[0].evict() == [gone.sha256]
    repositories[1].catch_up()
    stores[1].sweep()
    assert [path.name for path in (tmp_path / "b" / "blobs").glob("*/*")] == [kept.sha256]
    assert stores[1].get("", gone).read_bytes() == b"gone"  # the object store forgets nothing


def test_a_store_that_lost_what_it_had_is_not_begun_anew(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.service.shared._EVERY", 4)
    store, away = tmp_path / "store", tmp_path / "away"
    one = SharedRepository(f"file://{store}", ttl_s=60.0, lease_s=60.0)
    for count in (1, 5):  # before the first snapshot, and after
        names = [add(one) for _ in range(count)]
        store.rename(away)
        with pytest.raises(CallError, match="not there any more"):
            add(one)
        with pytest.raises(CallError, match="not there any more"):
            one.get("", names[0])
        shutil.rmtree(store, ignore_errors=True)
        away.rename(store)
        assert one.get("", add(one)).state is State.QUEUED
    one.close()


def test_a_log_that_is_not_ours_is_refused(url: str, another: Another) -> None:
    import sqlite3

    one = another()
    for number, entry in enumerate(
        (b'{"schema": 99, "statements": []}', b'{"schema": 1, "statements": [["ATTACH x", []]]}')
    ):
        assert one._put("operations/log", 1 + number, entry, "create")
        with pytest.raises(sqlite3.DatabaseError, match=("newer", "not of a log")[number]):
            one.catch_up()
        one._number = 1


# ---- servers -----------------------------------------------------------------------------------


class Pair:
    """Two servers over one store."""

    def __init__(self, home: pathlib.Path, url: str, *flags: str) -> None:
        shared = ("--object-store", url, "--share-operations", "--lease", "2", *flags)
        for name in ("one", "two"):
            (home / name).mkdir()
        self.servers = [Server(home / name, *shared) for name in ("one", "two")]
        self.clients = [secateur.Client(one.address, timeout=60) for one in self.servers]

    def runner(self) -> int:
        """Which one has a job, once one has."""
        wait_for(lambda: any(one.has_job() for one in self.servers))
        return next(n for n, one in enumerate(self.servers) if one.has_job())

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for one in self.servers:
            one.close()


@pytest.fixture
def pair(url: str, tmp_path: pathlib.Path) -> Iterator[Pair]:
    made = Pair(tmp_path, url)
    yield made
    made.close()


def test_any_server_answers_for_any_operation(pair: Pair) -> None:
    one, two = pair.clients
    request_id = str(uuid.uuid4())
    started = one.start_prune(MODEL, request_id=request_id)
    assert two.start_prune(MODEL, request_id=request_id).name == started.name
    assert two.wait_operation(started).state is State.SUCCEEDED
    expected = secateur.prune(MODEL, measure_latency=False).model
    for client in (one, two):
        assert client.operation_result(started).model == expected
        assert [operation.name for operation in client.list_operations()] == [started.name]
    again = two.start_prune(MODEL)  # what was done before, wherever, is known
    assert again.state is State.SUCCEEDED
    two.delete_operation(started)
    with pytest.raises(secateur.ServerError, match="NOT_FOUND"):
        one.get_operation(started)


def test_any_server_cancels_any_operation(pair: Pair) -> None:
    workers = [one.idle_worker() for one in pair.servers]
    with frozen(workers[0]), frozen(workers[1]):
        started = pair.clients[0].start_prune(MODEL)
        runner = pair.runner()
        pair.clients[1 - runner].cancel_operation(started)
        wait_for(lambda: is_gone(workers[runner]), 2.0)
        assert not is_gone(workers[1 - runner])
    assert pair.clients[runner].get_operation(started).state is State.CANCELLED


def test_what_a_killed_server_ran_is_done_by_the_other(pair: Pair) -> None:
    workers = [one.idle_worker() for one in pair.servers]
    with frozen(workers[0]), frozen(workers[1]):
        operations = [
            pair.clients[0].start_prune(MODEL, Recipe(target={"macs": 0.5}, seed=seed))
            for seed in range(3)
        ]
        wait_for(lambda: all(one.has_job() for one in pair.servers))
        pair.servers[0].process.send_signal(signal.SIGKILL)
        pair.servers[0].process.wait()
    left = pair.clients[1]
    for operation in operations:
        assert left.wait_operation(operation).state is State.SUCCEEDED
        assert left.operation_result(operation).model
    attempts = [left.get_operation(operation).attempts for operation in operations]
    assert sorted(attempts) == [1, 1, 2]


def test_a_server_that_stops_hands_over_at_once(pair: Pair) -> None:
    workers = [one.idle_worker() for one in pair.servers]
    with frozen(workers[0]), frozen(workers[1]):
        started = pair.clients[0].start_prune(MODEL)
        runner = pair.runner()
        assert pair.servers[runner].stop() == 0
    ended = pair.clients[1 - runner].wait_operation(started)
    assert (ended.state, ended.attempts) == (State.SUCCEEDED, 1)


def test_a_server_that_slept_gives_up_what_another_one_runs(pair: Pair) -> None:
    workers = [one.idle_worker() for one in pair.servers]
    with frozen(workers[0]), frozen(workers[1]):
        started = pair.clients[0].start_prune(MODEL)
        runner = pair.runner()
        other = pair.clients[1 - runner]
        with frozen(pair.servers[runner].process.pid):
            wait_for(lambda: other.get_operation(started).attempts == 2)
        wait_for(lambda: is_gone(workers[runner]), 5.0)
        assert not is_gone(workers[1 - runner])
        running = other.get_operation(started)
        assert (running.state, running.attempts) == (State.RUNNING, 2)
    ended = pair.clients[runner].wait_operation(started)
    assert (ended.state, ended.attempts) == (State.SUCCEEDED, 2)


def test_progress_is_told_by_any_server(pair: Pair, wide: pathlib.Path) -> None:
    started = pair.clients[0].start_prune(wide)

    def told(client: secateur.Client) -> bool:
        return client.get_operation(started).progress is not None

    runner = pair.runner()
    wait_for(lambda: told(pair.clients[runner]))
    (worker,) = pair.servers[runner].workers()
    with frozen(worker):
        wait_for(lambda: told(pair.clients[1 - runner]), 5.0)
    assert pair.clients[1 - runner].wait_operation(started).state is State.SUCCEEDED


def test_without_the_store_nothing_runs_that_others_might(tmp_path: pathlib.Path) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    pair = Pair(tmp_path, f"file://{store}")
    workers = [one.idle_worker() for one in pair.servers]
    with frozen(workers[0]), frozen(workers[1]):
        started = pair.clients[0].start_prune(MODEL)
        worker = workers[pair.runner()]
        store.rename(away)
        wait_for(lambda: is_gone(worker), 2.0)  # which is the lease
        with pytest.raises(secateur.ServerError, match="UNAVAILABLE"):
            pair.clients[0].get_operation(started, timeout=10)
        shutil.rmtree(store, ignore_errors=True)
        away.rename(store)
    for client in pair.clients:
        assert client.wait_operation(started).state is State.SUCCEEDED
    pair.close()
