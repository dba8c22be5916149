"""What the clients promise as a library."""

from __future__ import annotations

import concurrent.futures
import inspect
import random
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from conftest import Server
from google.longrunning import operations_pb2

import secateur
import secateur.aio
from secateur._calls import run
from secateur._inputs import Source
from secateur.v1 import bytestream_pb2, pruning_pb2

IN_PROCESS = ("prune", "inspect", "profile")
SERVICES = (
    pruning_pb2.DESCRIPTOR.services_by_name["Pruning"],
    operations_pb2.DESCRIPTOR.services_by_name["Operations"],
)
BYTESTREAM = bytestream_pb2.DESCRIPTOR.services_by_name["ByteStream"]
RPCS = [method.name for service in SERVICES for method in service.methods]


@pytest.mark.parametrize("client", [secateur.Client, secateur.aio.Client])
@pytest.mark.parametrize("rpc", RPCS)
def test_each_rpc_has_a_client_method(client: type, rpc: str) -> None:
    name = re.sub("(?<!^)([A-Z])", r"_\1", rpc).lower()
    assert callable(getattr(client, name))


def test_transports_carry_each_rpc_they_need() -> None:
    with secateur.Client("localhost:1") as client:
        methods = client._calls._transport._methods.keys()  # type: ignore[attr-defined]
    assert methods == {*RPCS, *(method.name for method in BYTESTREAM.methods), "Check"}


async def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with secateur.Client(server.address, timeout=10) as client:
        assert client.health()
    async with secateur.aio.Client(server.address, timeout=10) as other:
        assert await other.health()


def public(client: type) -> dict[str, list[inspect.Parameter]]:
    members = {name: m for name, m in vars(client).items() if callable(m) and name[0] != "_"}
    return {n: list(inspect.signature(m).parameters.values()) for n, m in members.items()}


def test_both_clients_have_the_same_calls() -> None:
    assert public(secateur.Client) == public(secateur.aio.Client)


def test_clients_take_what_the_calls_in_process_take() -> None:
    for name in IN_PROCESS:
        local = inspect.signature(getattr(secateur, name)).parameters
        remote = inspect.signature(getattr(secateur.Client, name)).parameters
        only_local = {"external_data", "max_nodes", "measure_latency", "memory_meter", "sha256"}
        assert local.keys() - only_local == remote.keys() - {"self", "timeout"}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import secateur", ["grpc", "google.protobuf", "numpy"]),
        ("import secateur; secateur.Client; secateur.aio; secateur.Recipe()", ["numpy"]),
        ("import secateur.cli", ["numpy", "grpc"]),
        ("import secateur.service.server", ["numpy"]),
    ],
)
def test_light_parts_load_nothing_heavy(code: str, unwanted: list[str]) -> None:
    heavy = ["onnxruntime", "onnx", "onnx_ir", "scipy", "torch", "secateur.graphops", *unwanted]
    check = f"import sys; {code}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- what is repeated, and what is not ---------------------------------------------------------


class Flaky(grpc.GenericRpcHandler):
    """Answers every call UNAVAILABLE a few times, then with an empty message."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[str] = []

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]

        def answer(request: Any, context: Any) -> bytes:
            self.calls.append(name)
            if len(self.calls) <= self.failures:
                context.abort(grpc.StatusCode.UNAVAILABLE, "come again")
            return b""

        def answers(request: Any, context: Any) -> Iterator[bytes]:
            yield answer(request, context)

        if name in ("Prune", "Read"):
            return grpc.unary_stream_rpc_method_handler(answers)
        if name == "Write":
            return grpc.stream_unary_rpc_method_handler(answer)
        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def flaky() -> Iterator[Callable[[int], tuple[Flaky, str]]]:
    servers = []

    def start(failures: int) -> tuple[Flaky, str]:
        handler = Flaky(failures)
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), handlers=(handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return handler, f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def test_a_call_that_may_be_repeated_is(flaky: Callable[[int], tuple[Flaky, str]]) -> None:
    handler, address = flaky(2)
    with secateur.Client(address, timeout=20) as client:
        client.cancel_operation("operations/x")
        assert handler.calls == ["CancelOperation"] * 3
        assert client.health() is False  # of a message that says nothing


def test_the_same_operation_is_started_again(flaky: Callable[[int], tuple[Flaky, str]]) -> None:
    handler, address = flaky(1)
    sent: list[Any] = []
    with secateur.Client(address, timeout=20) as client:
        transport: Any = client._calls._transport
        unary = transport.unary

        async def watched(method: str, request: Any, timeout: float | None) -> Any:
            sent.append(request.request_id)
            return await unary(method, request, timeout)

        transport.unary = watched
        with pytest.raises(secateur.ServerError):  # the answer says nothing
            client.start_prune(b"model")
    assert handler.calls == ["StartPrune"] * 2
    assert len(sent) == 1 and uuid.UUID(sent[0])  # one message with one id, sent twice


def test_a_server_that_is_not_there_is_asked_a_few_times(
    flaky: Callable[[int], tuple[Flaky, str]],
) -> None:
    handler, address = flaky(99)
    with secateur.Client(address, timeout=20) as client:
        with pytest.raises(secateur.ServerError, match="UNAVAILABLE"):
            client.get_operation("operations/x")
        assert handler.calls == ["GetOperation"] * 4
        with pytest.raises(secateur.ServerError, match="UNAVAILABLE"):
            client.delete_operation("operations/x")
        assert handler.calls[4:] == ["DeleteOperation"]  # the second would not find it


def test_a_download_goes_on_where_it_broke_off(server: Server) -> None:
    content = random.Random(3).randbytes((3 << 20) + 5)
    with secateur.Client(server.address, timeout=20) as client:
        payload = run(client._calls._send(Source(content), client._calls._budget(20)))
        transport: Any = client._calls._transport
        stream, offsets = transport.stream, []

        class Broken(grpc.RpcError):
            def code(self) -> grpc.StatusCode:
                return grpc.StatusCode.UNAVAILABLE

        async def breaking(method: str, request: Any, timeout: float | None) -> Any:
            offsets.append(request.read_offset)
            async for chunk in stream(method, request, timeout):
                yield chunk
                if len(offsets) < 3:
                    raise Broken

        transport.stream = breaking
        found = run(client._calls._receive(payload, client._calls._budget(20)))
    assert found == content
    assert offsets == [0, 1 << 20, 2 << 20]
