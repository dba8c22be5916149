"""Limits: beyond them a request is refused with the two numbers, or told when to come again."""

from __future__ import annotations

import asyncio
import io
import pathlib
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import onnx
import onnx.helper
import pytest
from conftest import Server, frozen, is_gone, perceptron, wait_for

import secateur
from secateur import Code, Refusal
from secateur.graphops.model import checking
from secateur.operation import State
from secateur.service.config import ServerConfig
from secateur.service.errors import CallError
from secateur.service.guard import Guard, disk_of, memory_of
from secateur.service.worker import _wants_memory

SMALL = perceptron(16, 32, 8)


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with little room for anything."""
    limits = {
        "max-model-bytes": 1 << 20,
        "max-nodes": 10,
        "max-calibration-bytes": 100_000,
        "max-decompressed-bytes": 200_000,
        "max-queued": 2,
        "max-jobs-per-client": 9,
        "job": 1.0,
    }
    flags = [str(word) for name, value in limits.items() for word in (f"--{name}", value)]
    server = Server(tmp_path_factory.mktemp("tight"), *flags, "--no-cache")
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(tight: Server) -> Iterator[secateur.Client]:
    with secateur.Client(tight.address, timeout=30) as client:
        yield client


def limit(call: Callable[[], Any]) -> tuple[str, str]:
    """The two numbers of a limit that a call exceeds."""
    with pytest.raises(secateur.Refused) as caught:
        call()
    refusal = caught.value.refusal
    assert refusal.code is Code.LIMIT_EXCEEDED
    return refusal.expected, refusal.found


def chain(nodes: int) -> onnx.ModelProto:
    """`y = Relu(Relu(… x))`."""
    make = onnx.helper.make_node
    steps = [make("Relu", [f"v{n}"], [f"v{n + 1}"]) for n in range(nodes)]
    kind = onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(f"v{n}", kind, [1, 4]) for n in (0, nodes)]
    graph = onnx.helper.make_graph(steps, "g", ends[:1], ends[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])


def bomb(levels: int) -> onnx.ModelProto:
    """A file of a kilobyte whose functions, inlined, are 10^levels nodes."""
    model = chain(1)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("bomb", 1)]
    for level in range(levels):
        inner = ("Relu", "") if level == 0 else (f"f{level - 1}", "bomb")
        steps = [
            onnx.helper.make_node(inner[0], [f"v{n}"], [f"v{n + 1}"], domain=inner[1])
            for n in range(10)
        ]
        function = onnx.helper.make_function("bomb", f"f{level}", ["v0"], ["v10"], steps, opsets)
        model.functions.append(function)
    model.graph.node[0].op_type, model.graph.node[0].domain = f"f{levels - 1}", "bomb"
    model.opset_import.add(domain="bomb", version=1)
    return model


# ---- sizes -------------------------------------------------------------------------------------


def test_a_model_may_be_too_large(client: secateur.Client) -> None:
    large = perceptron(300, 1000, 10)
    for call in (client.prune, client.inspect, client.start_prune, client.profile):
        assert limit(lambda call=call: call(large)) == ("at most 1048576", str(len(large)))  # type: ignore[misc]
    against = limit(lambda: client.profile(SMALL, against=large))
    assert against == ("at most 1048576", str(len(large)))


def test_a_model_may_have_too_many_nodes(client: secateur.Client) -> None:
    assert limit(lambda: client.inspect(chain(11))) == ("at most 10", "11")
    with pytest.raises(secateur.Refused) as caught:  # one less, and it is another matter
        client.prune(chain(10))
    assert caught.value.refusal.code is Code.NOTHING_TO_PRUNE


def test_functions_are_counted_inlined(client: secateur.Client) -> None:
    start = time.monotonic()
    assert limit(lambda: client.inspect(bomb(30))) == ("at most 10", str(10**30))
    assert time.monotonic() - start < 5


def test_functions_that_call_themselves_are_refused(client: secateur.Client) -> None:
    loop = bomb(2)
    loop.functions[0].node[0].op_type, loop.functions[0].node[0].domain = "f1", "bomb"
    for model in (loop, bomb(2000)):
        with pytest.raises(secateur.Refused) as caught:
            client.inspect(model)
        assert caught.value.refusal.code is Code.INVALID_MODEL
        assert "calls" in caught.value.refusal.message


def test_nodes_of_subgraphs_count() -> None:
    model = chain(3)
    branch = chain(4).graph
    branches = {"then_branch": branch, "else_branch": branch}
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["z"], **branches))
    assert checking.count_nodes(model) == 3 + 1 + 4 + 4


@pytest.mark.parametrize("kind", ["calibration", "labels"])
def test_samples_may_be_too_large_as_they_are_sent(client: secateur.Client, kind: str) -> None:
    samples = {"x": np.random.default_rng(0).standard_normal((2000, 16), np.float32)}
    expected, found = limit(lambda: client.prune(SMALL, **{kind: samples}))
    assert expected == "at most 100000" and int(found) > 2000 * 16 * 4


@pytest.mark.parametrize("kind", ["calibration", "labels"])
def test_samples_may_be_too_large_when_they_are_read(
    client: secateur.Client, tmp_path: pathlib.Path, kind: str
) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros((5000, 16), np.float32))
    for number in range(2):
        with zipfile.ZipFile(tmp_path / f"{number}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", content.getvalue())
    size = 2 * len(content.getvalue())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000
    found = limit(lambda: client.prune(SMALL, **{kind: tmp_path}))
    assert found == ("at most 200000", str(size))


# ---- what one job may take ---------------------------------------------------------------------


def test_a_job_that_takes_too_long_dies_alone(tight: Server, client: secateur.Client) -> None:
    client.inspect(SMALL)  # imports are over
    worker = tight.idle_worker()
    with frozen(worker):
        start = time.monotonic()
        assert limit(lambda: client.prune(SMALL)) == ("at most 1", "more")
        assert 1.0 < time.monotonic() - start < 3.0
        wait_for(lambda: is_gone(worker), 1.0)
    client.inspect(SMALL)
    worker = tight.idle_worker()
    with frozen(worker):
        ended = client.wait_operation(client.start_prune(SMALL))
    assert ended.refusal is not None and ended.refusal.code is Code.LIMIT_EXCEEDED
    assert ended.attempts == 1  # it would take as long again
    assert client.prune(SMALL).model


def test_a_job_that_takes_too_much_memory_dies_alone(own_server: Callable[..., Server]) -> None:
    server = own_server("--job-memory-bytes", str(160 << 20))
    with secateur.Client(server.address, timeout=60) as client:
        worker = server.idle_worker()
        assert memory_of(worker) < 120 << 20
        expected, _ = limit(lambda: client.prune(perceptron(3000, 6000, 100)))
        assert expected in (f"at most {160 << 20}", "")  # counted, or refused by the kernel
        assert client.prune(SMALL).model


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("not an ONNX file …: Error parsing message: Arena alloc failed", True),
        ("ONNX Runtime cannot run it: std::bad_alloc", True),
        ("Failed to allocate memory for requested buffer of size 72000000", True),
        ("not an ONNX file, cut short, or nested too deep", False),
    ],
)
def test_a_library_without_memory_is_not_the_models_fault(message: str, expected: bool) -> None:
    assert _wants_memory(Refusal(code=Code.INVALID_MODEL, message=message)) is expected


def test_what_a_job_fills_of_the_disk_is_counted(tmp_path: pathlib.Path) -> None:
    home, size = tmp_path / "home", 1 << 20
    (home / "deep").mkdir(parents=True)
    for path in (tmp_path / "blob", home / "deep" / "file", home / "nameless"):
        path.write_bytes(b"x" * size)
    (home / "linked").hardlink_to(tmp_path / "blob")
    (home / "pointing").symlink_to(tmp_path / "blob")
    nothing = subprocess.DEVNULL
    with (
        (home / "nameless").open("rb") as file,
        subprocess.Popen(["sleep", "60"], stdin=file, stdout=nothing, stderr=nothing) as process,
    ):
        assert disk_of(process.pid, home) == 2 * size
        (home / "nameless").unlink()
        assert disk_of(process.pid, home) == 2 * size
        process.kill()
        process.wait()
        assert disk_of(process.pid, home) == size


async def test_a_worker_that_fills_the_disk_is_killed(tmp_path: pathlib.Path) -> None:
    code = "open('large', 'wb').write(bytes(4 << 20)); import time; time.sleep(60)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=tmp_path, start_new_session=True
    )
    config = ServerConfig(job_disk_bytes=1 << 20)
    with pytest.raises(secateur.Refused, match="more of the disk") as caught:
        async with Guard(process.pid, tmp_path, config):
            await process.wait()
            raise CallError(grpc.StatusCode.INTERNAL, "WORKER_DIED", "as the pool says")
    assert caught.value.refusal.expected == f"at most {1 << 20}"
    assert int(caught.value.refusal.found) >= 4 << 20


# ---- how much work there may be ----------------------------------------------------------------


def busy(call: Callable[[], Any]) -> secateur.ServerBusy:
    with pytest.raises(secateur.ServerBusy) as caught:
        call()
    assert 0.5 <= caught.value.retry_s <= 120
    return caught.value


def test_a_full_queue_says_when_to_come_again(own_server: Callable[..., Server]) -> None:
    server = own_server("--max-queued", "1", "--no-cache")
    with secateur.Client(server.address, timeout=30) as client:
        call = threading.Thread(target=lambda: client.inspect(SMALL))
        with frozen(server.idle_worker()):
            call.start()
            wait_for(server.has_job)
            started = client.start_prune(SMALL)
            for one_more in (client.prune, client.inspect, client.profile, client.start_prune):
                assert "2 jobs" in str(busy(lambda more=one_more: more(SMALL)))  # type: ignore[misc]
            assert client.health()
            client.cancel_operation(started)
            client.cancel_operation(client.start_prune(SMALL))
        call.join()


def test_one_client_may_not_take_all(own_server: Callable[..., Server]) -> None:
    server = own_server("--max-jobs-per-client", "2", "--no-cache")
    with secateur.Client(server.address, timeout=30) as client, frozen(server.idle_worker()):
        request_id = "00000000-0000-4000-8000-000000000000"
        first = client.start_prune(SMALL, request_id=request_id)
        second = client.start_prune(SMALL)
        assert "this client has 2 jobs" in str(busy(lambda: client.start_prune(SMALL)))
        # what is there already needs no room
        assert client.start_prune(SMALL, request_id=request_id).name == first.name
        client.cancel_operation(first)
        client.cancel_operation(second)


def test_no_room_on_the_disk_says_when_to_come_again(own_server: Callable[..., Server]) -> None:
    server = own_server("--max-stored-bytes", str(4 << 20))
    with secateur.Client(server.address, timeout=30) as client:
        large = perceptron(300, 3000, 10)  # 3.7 MB
        started = client.start_prune(large)
        assert "bytes for blobs" in str(busy(lambda: client.prune(perceptron(301, 3000, 10))))
        # its model is needed until it has ended, and its result has no room beside it
        ended = client.wait_operation(started)
        assert ended.state is State.FAILED and "bytes for blobs" in ended.error
        assert client.prune(perceptron(301, 3000, 10)).model


def test_calls_have_a_bound(own_server: Callable[..., Server]) -> None:
    server = own_server("--max-calls", "2", "--no-cache")
    with secateur.Client(server.address, timeout=20) as client, frozen(server.idle_worker()):
        operation = client.start_prune(SMALL)
        waits = [
            threading.Thread(target=lambda: client.wait_operation(operation, timeout=3))
            for _ in range(2)
        ]
        for thread in waits:
            thread.start()
        time.sleep(0.5)
        with pytest.raises(secateur.ServerError, match="RESOURCE_EXHAUSTED"):
            client.health()
        for thread in waits:
            thread.join()
        assert client.health()
        client.cancel_operation(operation)


def test_watching_costs_no_slot(server: Server, cnn: pathlib.Path) -> None:
    with grpc.insecure_channel(server.address), secateur.Client(server.address) as client:
        worker = server.idle_worker()
        with frozen(worker):
            operation = client.start_prune(SMALL)
            threads = [
                threading.Thread(target=lambda: client.wait_operation(operation)) for _ in range(8)
            ]
            for thread in threads:
                thread.start()
            assert client.health(timeout=5)
            client.cancel_operation(operation)
        for thread in threads:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in threads)
