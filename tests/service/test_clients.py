"""What the clients promise as a library."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from conftest import Server

import secateur
import secateur.aio
from secateur.v1 import bytestream_pb2, pruning_pb2

METHOD_OF_RPC = {"Prune": "prune", "Inspect": "inspect", "Profile": "profile"}
WITHOUT_METHOD = {"StartPrune": "answers UNIMPLEMENTED until servers keep operations"}


@pytest.mark.parametrize("client", [secateur.Client, secateur.aio.Client])
def test_each_rpc_has_a_client_method(client: type) -> None:
    service = pruning_pb2.DESCRIPTOR.services_by_name["Pruning"]
    rpcs = {method.name for method in service.methods}
    assert rpcs == METHOD_OF_RPC.keys() | WITHOUT_METHOD.keys()
    assert all(callable(getattr(client, name)) for name in METHOD_OF_RPC.values())


def test_transports_carry_each_rpc_they_need() -> None:
    with secateur.Client("localhost:1") as client:
        methods = client._calls._transport._methods.keys()  # type: ignore[attr-defined]
    blobs = {m.name for m in bytestream_pb2.DESCRIPTOR.services_by_name["ByteStream"].methods}
    assert methods == METHOD_OF_RPC.keys() | blobs | {"Check"}


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
    for name in METHOD_OF_RPC.values():
        local = inspect.signature(getattr(secateur, name)).parameters
        remote = inspect.signature(getattr(secateur.Client, name)).parameters
        only_local = {"external_data", "measure_latency", "memory_meter"}
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
