"""Models whose weights lie in files beside them, through a server."""

from __future__ import annotations

import pathlib
from typing import Any

import grpc
import onnx
import pytest
from conftest import Server, perceptron

import secateur
from secateur import Code, Recipe, Refusal, _wire
from secateur._calls import run
from secateur.operation import State
from secateur.v1 import pruning_pb2, pruning_pb2_grpc

HALF = Recipe(target={"macs": 0.5})


@pytest.fixture
def beside(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model with its weights in the file `weights.bin` beside it; large enough for a blob."""
    path = tmp_path / "large.onnx"
    model = onnx.load_from_string(perceptron(256, 3000, 100))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert path.stat().st_size < 10_000
    return path


def refused(call: Any) -> Refusal:
    with pytest.raises(secateur.Refused) as caught:
        call()
    return caught.value.refusal


def test_they_travel_with_their_model(client: secateur.Client, beside: pathlib.Path) -> None:
    local = secateur.prune(beside, HALF, measure_latency=False)
    remote = client.prune(beside, HALF)
    assert (remote.model, remote.plan) == (local.model, local.plan)
    operation = client.wait_operation(client.start_prune(beside, HALF))
    assert operation.state is State.SUCCEEDED
    assert client.operation_result(operation).model == local.model
    assert client.inspect(beside) == secateur.inspect(beside)
    found = client.profile(beside, against=beside)
    assert found.against is not None and found.model.params == found.against.params


async def test_they_travel_with_the_asyncio_client(
    server: Server, client: secateur.Client, beside: pathlib.Path
) -> None:
    async with secateur.aio.Client(server.address, timeout=60) as other:
        assert (await other.prune(beside, HALF)).model == client.prune(beside, HALF).model


def test_another_file_is_another_request(client: secateur.Client, beside: pathlib.Path) -> None:
    first = client.prune(beside, HALF)
    weights = beside.with_name("weights.bin")
    content = bytearray(weights.read_bytes())
    content[:4000] = content[4000:8000]
    weights.write_bytes(content)
    assert client.prune(beside, HALF).model != first.model


def test_what_does_not_lie_beside_is_not_sent(
    client: secateur.Client, beside: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    weights = beside.with_name("weights.bin")
    away = tmp_path / "away.bin"
    weights.rename(away)
    missing = refused(lambda: client.inspect(beside))
    assert missing.code is Code.MISSING_EXTERNAL_DATA and missing.found == "no such file"
    weights.symlink_to(away)
    assert refused(lambda: client.inspect(beside)).code is Code.UNSAFE_EXTERNAL_DATA
    weights.unlink()
    away.rename(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    short = refused(lambda: client.inspect(beside))
    assert short.code is Code.MISSING_EXTERNAL_DATA
    assert short == refused(lambda: secateur.inspect(beside))
    for place in ("../weights.bin", "/etc/passwd", "sub/weights.bin"):
        model = onnx.load(beside, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        beside.write_bytes(model.SerializeToString())
        assert refused(lambda: client.inspect(beside)).code is Code.UNSAFE_EXTERNAL_DATA


def test_names_and_places_are_checked(server: Server, beside: pathlib.Path) -> None:
    content = pruning_pb2.Payload(inline=b"x")
    model = beside.read_bytes()
    bad = [
        [("", content)],
        [("../x", content)],
        [("a/b", content)],
        [("model.onnx", content)],
        [("same", content), ("same", content)],
        [("weights.bin", pruning_pb2.Payload())],
        [("weights.bin", pruning_pb2.Payload(inline=b"x", external_data=[{"name": "y"}]))],
    ]
    with grpc.insecure_channel(server.address) as channel:
        stub = pruning_pb2_grpc.PruningStub(channel)
        for files in bad:
            payload = pruning_pb2.Payload(inline=model)
            for name, part in files:
                payload.external_data.add(name=name, content=part)
            for call in (
                lambda p=payload: stub.Inspect(pruning_pb2.InspectRequest(model=p)),
                lambda p=payload: stub.StartPrune(pruning_pb2.StartPruneRequest(model=p)),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call()  # type: ignore[no-untyped-call]
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, files


def test_weights_of_a_result_come_as_a_file(
    client: secateur.Client, beside: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """What a server sends above 2 GiB; benchmarks/service.py has it do so."""
    message = pruning_pb2.PruneResult()
    local = secateur.prune(beside, HALF, measure_latency=False)
    model = onnx.load_from_string(local.model)
    onnx.save(
        model,
        tmp_path / "r.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    message.model.inline = (tmp_path / "r.onnx").read_bytes()
    weights = (tmp_path / "model.onnx.data").read_bytes()
    message.model.external_data.add(name="model.onnx.data", content={"inline": weights})
    message.plan.inline = local.plan.to_json().encode()
    message.report.CopyFrom(_wire.to_wire(local.report, message.report))
    result = run(client._calls._result(message, client._calls._budget(10)))
    assert result.weights is not None and result.weights.path.read_bytes() == weights
    result.save(tmp_path / "slim.onnx")
    saved = onnx.load(tmp_path / "slim.onnx")
    assert (tmp_path / "slim.onnx.data").read_bytes() == weights
    original = onnx.load_from_string(local.model)
    assert [t.raw_data for t in saved.graph.initializer] == [
        t.raw_data for t in original.graph.initializer
    ]
