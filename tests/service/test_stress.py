"""Everything at once, and what may be left of it: nothing. `benchmarks/service.py` takes longer."""

from __future__ import annotations

import importlib.util
import pathlib
import random
import sys
import threading
import time
from typing import Any

import grpc
import pytest
from conftest import Server, frozen, is_gone, perceptron, wait_for
from google.longrunning import operations_pb2, operations_pb2_grpc

import secateur
from secateur import Recipe
from secateur.operation import State

SECONDS = 20.0
ROOT = pathlib.Path(__file__).parents[2]
SMALL = perceptron(16, 32, 8)


@pytest.fixture(scope="module")
def bench() -> Any:
    """benchmarks/service.py, whose parts run here for a short time."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "service.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module


def test_a_mix_of_everything_leaves_nothing(bench: Any) -> None:
    with bench.serving("--workers", "2") as server:
        with secateur.Client(server.address) as client:
            client.prune(SMALL)
        before = server.taken()
        ends, samples = bench.stress(server, SECONDS, seed=0)
        after = samples[-1][1]
        with secateur.Client(server.address, timeout=30) as client:
            assert client.prune(SMALL, Recipe(seed=7)).model
    assert after["descriptors"] <= before["descriptors"] + 6  # a worker more or less
    assert after["workers"] <= 3
    assert after["files"] == 0
    assert after["threads"] <= before["threads"] + 24  # pools of gRPC and asyncio fill, once
    assert after["memory"] <= before["memory"] + (100 << 10)
    assert {end.split()[0] for end in ends} == {act.__name__[1:] for act in bench.ACTS}
    bad = [end for end in ends if end.endswith(("INTERNAL", "UNKNOWN", "crash", "hang", "Error"))]
    assert not bad, ends


def test_damaged_messages_are_refused(bench: Any, server: Server) -> None:
    noise = random.Random(1)
    with grpc.insecure_channel(server.address) as channel:
        ends = {bench._bad_message(channel, noise) for _ in range(80)}
    assert ends == {"refused", "result"}
    for _ in range(20):
        bench._bad_frames(server.address, noise)
    with secateur.Client(server.address, timeout=10) as client:
        assert client.health()


def test_a_storm_of_cancels(server: Server) -> None:
    """Many clients cancel, each more than once, what waits and what runs."""
    model = perceptron(64, 512, 64)
    with secateur.Client(server.address, timeout=60) as client:
        worker = server.idle_worker()
        with frozen(worker):
            started = [client.start_prune(model, Recipe(seed=seed)) for seed in range(40)]
            wait_for(lambda: client.get_operation(started[0]).state is State.RUNNING)

            def storm(noise: random.Random) -> None:
                for operation in noise.sample(started, len(started)):
                    client.cancel_operation(operation)

            threads = [threading.Thread(target=storm, args=(random.Random(n),)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_for(lambda: is_gone(worker), 1.0)
        assert {client.get_operation(o).state for o in started} == {State.CANCELLED}
        assert client.prune(SMALL).model
        wait_for(lambda: len(server.workers()) == 1)


def test_two_hundred_idle_watchers(server: Server) -> None:
    """They cost neither slots nor much time of others, and all hear of the end."""
    with (
        secateur.Client(server.address, timeout=60) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = operations_pb2_grpc.OperationsStub(channel)
        with frozen(server.idle_worker()):
            started = client.start_prune(SMALL)
            request = operations_pb2.WaitOperationRequest(name=started.name)
            request.timeout.seconds = 60
            watchers = [stub.WaitOperation.future(request) for _ in range(200)]
            time.sleep(1.0)
            assert not any(watcher.done() for watcher in watchers)
            start = time.monotonic()
            assert client.health()
            assert time.monotonic() - start < 1.0
            client.cancel_operation(started)
        assert all(watcher.result(timeout=20).done for watcher in watchers)
