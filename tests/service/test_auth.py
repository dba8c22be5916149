"""Who may call, how they are known, and that they see only what is theirs."""

from __future__ import annotations

import hashlib
import logging
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import typer.testing
import yaml
from certificates import Authority
from conftest import Server
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import secateur
import secateur.aio
from secateur import Recipe, Tls, _wire
from secateur.cli import app
from secateur.service import auth
from secateur.service.config import ServerConfig
from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc, pruning_pb2, pruning_pb2_grpc

TOKENS = {name: auth.new_token() for name in ("alice", "bob", "carol")}
HALF = Recipe(target={"macs": 0.5})


def listed(**clients: dict[str, list[str]]) -> str:
    return yaml.safe_dump({"clients": clients})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("auth")


@pytest.fixture(scope="module")
def authority(home: pathlib.Path) -> Authority:
    return Authority(home, "ca")


@pytest.fixture(scope="module")
def secured(home: pathlib.Path, authority: Authority) -> Iterator[Server]:
    """A server with mutual TLS: alice and bob have tokens, dora a certificate."""
    certificate, key = authority.issue("server")
    clients = home / "clients.yaml"
    people = {name: {"tokens": [TOKENS[name][1]]} for name in ("alice", "bob")}
    clients.write_text(listed(**people, dora={"certificates": ["dora.example"]}))
    running = Server(
        home,
        *("--tls-certificate", str(certificate), "--tls-key", str(key)),
        *("--tls-client-ca", str(authority.pem), "--clients", str(clients)),
        *("--health-listen", "127.0.0.1:0", "--log-format", "json"),
    )
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def nobody(authority: Authority) -> Tls:
    """A certificate that belongs to no client: enough to connect."""
    return Tls(authority.pem, *authority.issue("nobody"))


def by_token(server: Server, tls: Tls, name: str) -> secateur.Client:
    return secateur.Client(server.address, timeout=60, tls=tls, token=TOKENS[name][0])


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(secateur.ServerError) as caught:
        call()
    return str(caught.value)


# ---- who is let in -----------------------------------------------------------------------------


def test_a_token_lets_in(secured: Server, nobody: Tls, cnn: pathlib.Path) -> None:
    with by_token(secured, nobody, "alice") as client:
        assert client.prune(cnn, HALF).model == secateur.prune(cnn, HALF).model


async def test_a_token_lets_in_from_an_event_loop(
    secured: Server, nobody: Tls, cnn: pathlib.Path
) -> None:
    token = TOKENS["bob"][0]
    async with secateur.aio.Client(secured.address, 60, tls=nobody, token=token) as client:
        assert (await client.inspect(cnn)).groups


def test_a_certificate_lets_in(secured: Server, authority: Authority, cnn: pathlib.Path) -> None:
    tls = Tls(authority.pem, *authority.issue("dora.example"))
    with secateur.Client(secured.address, timeout=60, tls=tls) as client:
        assert client.inspect(cnn).groups
    assert '"client": "dora"' in secured.log.read_text()


def test_whoever_is_not_known_is_not_let_in(
    secured: Server, nobody: Tls, cnn: pathlib.Path
) -> None:
    with secateur.Client(secured.address, timeout=30, tls=nobody) as client:
        text = refused(lambda: client.inspect(cnn))
        assert "UNAUTHENTICATED" in text
        assert "belongs to no client" in text
    for token in ("", "sct_wrong", TOKENS["carol"][0], TOKENS["alice"][1]):
        with secateur.Client(secured.address, timeout=30, tls=nobody, token=token) as client:
            assert "not one that this server knows" in refused(lambda: client.inspect(cnn))
    assert TOKENS["carol"][0] not in secured.log.read_text()


def test_no_method_but_health_is_open(secured: Server, nobody: Tls) -> None:
    def code_of(call: Any) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        return caught.value.code()

    with grpc.secure_channel(secured.address, nobody.credentials()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == 1
        stubs = (
            (pruning_pb2_grpc.PruningStub(channel), pruning_pb2.DESCRIPTOR, "Pruning"),
            (bytestream_pb2_grpc.ByteStreamStub(channel), bytestream_pb2.DESCRIPTOR, "ByteStream"),
            (
                operations_pb2_grpc.OperationsStub(channel),
                operations_pb2.DESCRIPTOR,
                "Operations",
            ),
            (
                reflection_pb2_grpc.ServerReflectionStub(channel),
                reflection_pb2.DESCRIPTOR,
                "ServerReflection",
            ),
        )
        for stub, descriptor, service in stubs:
            for method in descriptor.services_by_name[service].methods:
                empty = message_factory.GetMessageClass(method.input_type)()
                call = getattr(stub, method.name)
                sent = iter([empty]) if method.client_streaming else empty
                if method.server_streaming:
                    assert code_of(call(sent)) is grpc.StatusCode.UNAUTHENTICATED, method.name
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    call(sent)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method.name


@pytest.mark.parametrize("stranger", ["no certificate", "another CA", "no TLS"])
def test_strangers_do_not_even_connect(
    secured: Server, authority: Authority, tmp_path: pathlib.Path, stranger: str, cnn: pathlib.Path
) -> None:
    other = Authority(tmp_path, "other")
    tls = {
        "no certificate": Tls(authority.pem),
        "another CA": Tls(authority.pem, *other.issue("alice")),
        "no TLS": None,
    }[stranger]
    token = TOKENS["alice"][0]
    with secateur.Client(secured.address, timeout=10, tls=tls, token=token) as client:
        assert "UNAVAILABLE" in refused(lambda: client.inspect(cnn))


def test_an_impostor_of_the_server_is_noticed(
    secured: Server, tmp_path: pathlib.Path, cnn: pathlib.Path
) -> None:
    tls = Tls(Authority(tmp_path, "other").pem)
    with secateur.Client(secured.address, timeout=10, tls=tls) as client:
        assert "UNAVAILABLE" in refused(lambda: client.inspect(cnn))


def test_probes_need_no_certificate(secured: Server) -> None:
    found = re.search(r"health checks on ([\d.:]+)", secured.log.read_text())
    assert found is not None
    with grpc.insecure_channel(found[1]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        ask = health_pb2.HealthCheckRequest(service="secateur.v1.Pruning")
        assert health.Check(ask).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            pruning_pb2_grpc.PruningStub(channel).Inspect(pruning_pb2.InspectRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_command_line_connects(
    secured: Server, nobody: Tls, cnn: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKENS["alice"][0] + "\n")
    flags = ["--server", secured.address, "--tls-ca", str(nobody.ca), "--token-file", str(file)]
    variables = {"SECATEUR_TLS_CERT": str(nobody.certificate), "SECATEUR_TLS_KEY": str(nobody.key)}
    runner = typer.testing.CliRunner()
    done = runner.invoke(app, ["inspect", str(cnn), *flags], env=variables)
    assert done.exit_code == 0, done.output
    for wrong in ("--token-file", "--tls-ca"):
        changed = [*flags]
        changed[flags.index(wrong) + 1] = str(tmp_path / "missing")
        assert runner.invoke(app, ["inspect", str(cnn), *changed], env=variables).exit_code == 2


# ---- what they see -----------------------------------------------------------------------------


def test_blobs_and_operations_are_their_clients(
    secured: Server, nobody: Tls, cnn: pathlib.Path
) -> None:
    content = cnn.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    name = _wire.upload_name(str(uuid.uuid4()), digest, len(content))
    blob = pruning_pb2.Payload(blob=pruning_pb2.Blob(sha256=digest, size_bytes=len(content)))
    with grpc.secure_channel(secured.address, nobody.credentials()) as channel:
        blobs = bytestream_pb2_grpc.ByteStreamStub(channel)
        pruning = pruning_pb2_grpc.PruningStub(channel)
        operations = operations_pb2_grpc.OperationsStub(channel)
        alice, bob = ((("authorization", f"Bearer {TOKENS[who][0]}"),) for who in ("alice", "bob"))
        write = bytestream_pb2.WriteRequest(resource_name=name, data=content, finish_write=True)
        blobs.Write(iter([write]), metadata=alice)
        started = pruning.StartPrune(pruning_pb2.StartPruneRequest(model=blob), metadata=alice)

        def as_bob(call: Callable[..., Any], request: Any) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as caught:
                found = call(request, metadata=bob)
                list(found)
            return caught.value.code()

        read = bytestream_pb2.ReadRequest(resource_name=_wire.blob_name(digest, len(content)))
        status = bytestream_pb2.QueryWriteStatusRequest(resource_name=name)
        assert b"".join(part.data for part in blobs.Read(read, metadata=alice)) == content
        for call, request in (
            (blobs.Read, read),
            (blobs.QueryWriteStatus, status),
            (pruning.Inspect, pruning_pb2.InspectRequest(model=blob)),
            (pruning.StartPrune, pruning_pb2.StartPruneRequest(model=blob)),
            (operations.GetOperation, operations_pb2.GetOperationRequest(name=started.name)),
            (operations.WaitOperation, operations_pb2.WaitOperationRequest(name=started.name)),
            (operations.CancelOperation, operations_pb2.CancelOperationRequest(name=started.name)),
            (operations.DeleteOperation, operations_pb2.DeleteOperationRequest(name=started.name)),
        ):
            assert as_bob(call, request) is grpc.StatusCode.NOT_FOUND, call
        everything = operations_pb2.ListOperationsRequest(name="operations")
        assert not operations.ListOperations(everything, metadata=bob).operations
        mine = operations.ListOperations(everything, metadata=alice).operations
        assert started.name in {operation.name for operation in mine}


def test_a_worker_serves_one_client(secured: Server, nobody: Tls, cnn: pathlib.Path) -> None:
    def worker_of(name: str) -> int:
        with by_token(secured, nobody, name) as client:
            client.inspect(cnn)
        return secured.idle_worker()

    first = worker_of("alice")
    assert worker_of("alice") == first
    assert worker_of("bob") != first


# ---- files that change -------------------------------------------------------------------------


def test_tokens_and_certificates_change_without_a_restart(
    own_server: Callable[..., Server], tmp_path: pathlib.Path, cnn: pathlib.Path
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    certificate, key = old.issue("server")
    clients = tmp_path / "clients.yaml"
    clients.write_text(listed(alice={"tokens": [TOKENS["alice"][1]]}))
    server = own_server(
        *("--tls-certificate", str(certificate), "--tls-key", str(key), "--clients", str(clients))
    )

    def health(authority: Authority, timeout: float = 10.0) -> bool:
        with secateur.Client(server.address, tls=Tls(authority.pem)) as client:
            try:
                return client.health(timeout=timeout)
            except secateur.SecateurError:
                return False

    def known(name: str) -> bool:
        with secateur.Client(server.address, 60, tls=Tls(old.pem), token=TOKENS[name][0]) as client:
            try:
                return bool(client.inspect(cnn).groups)
            except secateur.ServerError:
                return False

    assert (health(old), health(new, 1.0)) == (True, False)
    assert (known("alice"), known("bob")) == (True, False)
    clients.write_text(listed(bob={"tokens": [TOKENS["bob"][1]]}))
    assert (known("alice"), known("bob")) == (False, True)
    clients.write_text("clients: [")
    assert known("bob")
    assert "what is in force stays" in server.log.read_text()

    with secateur.Client(server.address, tls=Tls(old.pem), token=TOKENS["bob"][0]) as client:
        assert client.health(timeout=5)  # connected before, and stays so
        certificate.write_text("half")
        assert (health(old), health(new, 1.0)) == (True, False)
        new.issue("server")
        assert health(new)
        assert not health(old, 1.0)
        assert client.inspect(cnn, timeout=60).groups


def test_what_is_reloaded_keeps_its_last_good_state(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "number"
    with pytest.raises(OSError, match="number"):
        auth.Reloaded((path,), lambda: int(path.read_text()))
    path.write_text("1")
    reloaded = auth.Reloaded((path,), lambda: int(path.read_text()))
    for content, value in (("22", 22), ("nonsense", 22), ("333", 333)):
        path.write_text(content)
        assert [reloaded.value, reloaded.value] == [value, value]
    path.unlink()
    assert reloaded.value == 333
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2  # each bad state is told once


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no clients file"),
        ("clients: {a: {tokens: [plain]}}", "no clients file"),
        ("clients: {'a b': {}}", "no clients file"),
        (
            listed(a={"certificates": ["x"]}, b={"certificates": ["x"]}),
            "a and b share certificate:x",
        ),
    ],
)
def test_a_clients_file_must_make_sense(tmp_path: pathlib.Path, content: str, said: str) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        auth.load_clients(path)


def test_tokens_are_random_and_only_their_hash_is_kept() -> None:
    done = typer.testing.CliRunner().invoke(app, ["token"])
    said = yaml.safe_load(done.stdout)
    assert said["hash"] == f"sha256:{hashlib.sha256(said['token'].encode()).hexdigest()}"
    assert len({auth.new_token()[0] for _ in range(100)}) == 100
    assert len(said["token"]) > 40


# ---- what is refused before it starts ----------------------------------------------------------


def test_tokens_do_not_travel_readable() -> None:
    for target in ("example.com:1", "10.0.0.1:1", "dns:///localhost:1"):
        with pytest.raises(ValueError, match="readable"):
            secateur.Client(target, token="t")
    secateur.Client("localhost:1", token="t").close()
    secateur.Client("unix:/tmp/socket", token="t").close()


def test_half_a_certificate_is_refused(authority: Authority) -> None:
    with pytest.raises(ValueError, match="belong together"):
        secateur.Client("localhost:1", tls=Tls(certificate=authority.pem))
    with pytest.raises(FileNotFoundError):
        secateur.Client("localhost:1", tls=Tls(ca="missing"))


def test_a_public_address_needs_both_tls_and_clients(
    authority: Authority, tmp_path: pathlib.Path
) -> None:
    certificate, key = authority.issue("public")
    clients = tmp_path / "clients.yaml"
    clients.write_text(listed())
    tls = {"tls_certificate": certificate, "tls_key": key}
    public = {"listen": "0.0.0.0:1"}
    ServerConfig.load(None, {**public, **tls, "clients": clients})
    for given in ({}, tls, {"clients": clients}):
        with pytest.raises(ValueError, match="can be reached from other machines"):
            ServerConfig.load(None, {**public, **given})
    for given in (
        {"tls_key": key},
        {"tls_client_ca": authority.pem},
        {**tls, "tls_client_ca": authority.pem},
        {"clients": tmp_path / "missing"},
        {"health_listen": "nowhere"},
    ):
        with pytest.raises(ValueError, match=r"tls_|clients|health_listen"):
            ServerConfig.load(None, given)


def test_files_that_do_not_belong_together_are_wrong_usage(
    authority: Authority, tmp_path: pathlib.Path
) -> None:
    certificate, _ = authority.issue("one")
    _, key = authority.issue("other")
    flags = ["--check-config", "--tls-certificate", str(certificate), "--tls-key", str(key)]
    done = typer.testing.CliRunner().invoke(app, ["serve", *flags])
    assert done.exit_code == 5
    assert "no TLS set" in done.stderr
