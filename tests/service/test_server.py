"""A server's life, and what any gRPC program may ask of it."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import grpc
import pytest
from conftest import Server, frozen, is_gone, wait_for
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import secateur
from secateur.errors import Code
from secateur.service.config import ServerConfig
from secateur.v1 import pruning_pb2, pruning_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OURS = (
    "secateur.v1.Pruning",
    "google.bytestream.ByteStream",
    "google.longrunning.Operations",
)


# ---- what it offers ----------------------------------------------------------------------------


def test_health_of_the_server_and_of_each_service(server: Server, client: secateur.Client) -> None:
    assert client.health() is True
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", *OURS):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_and_describes_the_services(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=n) for n in OURS),
        ]
        answers = list(stub.ServerReflectionInfo(iter(requests)))
    names = {service.name for service in answers[0].list_services_response.service}
    assert {*OURS, "grpc.health.v1.Health"} <= names
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in answers[1:])


def test_garbage_bytes_do_not_harm_it(server: Server, client: secateur.Client) -> None:
    host, port = server.address.split(":")
    noise = random.Random(0)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for start in (b"", preface, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(start + noise.randbytes(4096))
    with grpc.insecure_channel(server.address) as channel:
        for method in ("Prune", "Inspect"):
            call = channel.unary_unary(f"/secateur.v1.Pruning/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                call(noise.randbytes(1000), timeout=10)
            assert caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    for size in (0, 1, 100, 3 << 20):
        with pytest.raises(secateur.Refused) as refused:
            client.inspect(noise.randbytes(size))
        assert refused.value.refusal.code is Code.INVALID_MODEL
    assert client.health() is True


def test_requests_that_lack_or_misname_things_are_refused(server: Server) -> None:
    inline = pruning_pb2.Payload(inline=b"x")
    part = pruning_pb2.CalibrationPart
    cases = [
        ({}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"model": {"blob": {"sha256": "../../etc/passwd"}}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"model": {"blob": {"sha256": "a" * 64, "size_bytes": 1}}}, grpc.StatusCode.NOT_FOUND),
        ({"model": inline, "plan": {}}, grpc.StatusCode.INVALID_ARGUMENT),
        (
            {"model": inline, "calibration": {"parts": [part(name="../x", content=inline)]}},
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            {"model": inline, "calibration": {"parts": [part(content=inline)] * 2}},
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            {"model": inline, "labels": {"parts": [part(name="../x", content=inline)]}},
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ]
    with grpc.insecure_channel(server.address) as channel:
        stub = pruning_pb2_grpc.PruningStub(channel)
        for fields, code in cases:
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Prune(pruning_pb2.PruneRequest(**fields)))
            assert caught.value.code() is code, fields
            with pytest.raises(grpc.RpcError) as caught:
                stub.StartPrune(pruning_pb2.StartPruneRequest(**fields))
            assert caught.value.code() is code, fields


def test_large_refusals_reach_programs_with_default_limits(server: Server) -> None:
    request = pruning_pb2.InspectRequest(model=pruning_pb2.Payload(inline=b"x"))
    request.recipe.target["名" * 50_000] = 0.5
    with (
        grpc.insecure_channel(server.address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        pruning_pb2_grpc.PruningStub(channel).Inspect(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "unknown target" in caught.value.details()


def test_one_folder_serves_one_server(server: Server) -> None:
    flags = ["--listen", "127.0.0.1:0", "--folder", str(server.folder)]
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "serve", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 5
    assert "another server" in done.stderr


def test_it_never_loads_the_engine(server: Server, client: secateur.Client) -> None:
    client.health()
    maps = pathlib.Path(f"/proc/{server.process.pid}/maps").read_text()
    for library in ("onnxruntime", "scipy", "/onnx/"):
        assert library not in maps


# ---- where it listens --------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:1", "[::1]:0", "unix:/tmp/socket"])
def test_loopback_is_allowed(listen: str) -> None:
    ServerConfig(listen=listen).check()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", ":0", "10.0.0.1:0", "example.com:0"])
def test_public_addresses_need_a_word(listen: str) -> None:
    with pytest.raises(ValueError, match="insecure-public"):
        ServerConfig(listen=listen).check()
    ServerConfig(listen=listen, insecure_public=True).check()


@pytest.mark.parametrize("flags", [("--listen", "0.0.0.0:0"), ("--listen", "nonsense")])
def test_refused_addresses_are_wrong_usage(flags: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "serve", *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_a_taken_port_is_an_error(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "serve", "--listen", server.address],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 5
    assert "cannot listen" in done.stderr


def test_a_server_whose_engine_does_not_load_does_not_start(tmp_path: pathlib.Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken on purpose')")
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "serve", "--listen", "127.0.0.1:0"],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{pathlib.Path(secateur.__file__).parents[1]}",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (5, "")
    assert "broken on purpose" in done.stderr
    assert "no worker process can be started" in done.stderr


# ---- how it ends -------------------------------------------------------------------------------


def test_stop_waits_for_calls_says_so_and_leaves_nothing(
    own_server: Callable[..., Server], cnn: pathlib.Path
) -> None:
    server = own_server()
    worker = server.idle_worker()
    seen: list[int] = []
    with (
        grpc.insecure_channel(server.address) as channel,
        secateur.Client(server.address) as client,
    ):
        request = health_pb2.HealthCheckRequest(service="secateur.v1.Pruning")
        watch = health_pb2_grpc.HealthStub(channel).Watch(request)
        seen.append(next(watch).status)
        found: list[secateur.Inspection] = []
        with frozen(worker):
            call = threading.Thread(target=lambda: found.append(client.inspect(cnn)))
            call.start()
            wait_for(server.has_job)
            server.process.send_signal(signal.SIGTERM)
            seen.append(next(watch).status)
        call.join()
        watch.cancel()
    assert seen == [SERVING, NOT_SERVING]
    assert len(found) == 1  # the running call was allowed to finish
    assert server.process.wait(timeout=20) == 0
    assert is_gone(worker)


def test_second_signal_ends_calls_that_do_not_finish(
    own_server: Callable[..., Server], cnn: pathlib.Path
) -> None:
    server = own_server("--grace", "60")
    worker = server.idle_worker()
    errors: list[Exception] = []

    def call() -> None:
        with secateur.Client(server.address) as client:
            try:
                client.inspect(cnn)
            except secateur.SecateurError as error:
                errors.append(error)

    with frozen(worker):
        thread = threading.Thread(target=call)
        thread.start()
        wait_for(server.has_job)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "stopping" in server.log.read_text())
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=5) == 0
        thread.join()
    assert len(errors) == 1
    wait_for(lambda: is_gone(worker), 1.0)


def test_a_killed_server_leaves_no_worker(own_server: Callable[..., Server]) -> None:
    server = own_server()
    worker = server.idle_worker()
    server.stop(signal.SIGKILL)
    wait_for(lambda: is_gone(worker), 1.0)
