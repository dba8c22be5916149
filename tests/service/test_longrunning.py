"""Operations on a server: they outlive calls, clients and servers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import typer.testing
from conftest import Server, frozen, is_gone, perceptron, wait_for
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import duration_pb2

import secateur
import secateur.aio
from secateur import Recipe
from secateur._calls import run
from secateur._wire import recipe_to_wire
from secateur.cli import app
from secateur.operation import State
from secateur.service.errors import CallError
from secateur.service.longrunning import states_of
from secateur.v1 import pruning_pb2, pruning_pb2_grpc, report_pb2

MODEL = perceptron(16, 32, 8)


class Raw:
    """What any gRPC program sees of a server's operations."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.pruning = pruning_pb2_grpc.PruningStub(channel)
        self.operations = operations_pb2_grpc.OperationsStub(channel)

    def start(self, model: bytes = MODEL, **more: Any) -> Any:
        payload = pruning_pb2.Payload(inline=model)
        return self.pruning.StartPrune(pruning_pb2.StartPruneRequest(model=payload, **more))

    def get(self, name: str) -> Any:
        return self.operations.GetOperation(operations_pb2.GetOperationRequest(name=name))

    def wait(self, name: str, seconds: float = 30.0) -> Any:
        timeout = duration_pb2.Duration()
        timeout.FromMilliseconds(round(seconds * 1000))
        request = operations_pb2.WaitOperationRequest(name=name, timeout=timeout)
        return self.operations.WaitOperation(request)

    def cancel(self, name: str) -> None:
        self.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=name))

    def delete(self, name: str) -> None:
        self.operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=name))

    def page(self, **fields: Any) -> Any:
        return self.operations.ListOperations(operations_pb2.ListOperationsRequest(**fields))


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    with grpc.insecure_channel(server.address) as channel:
        yield Raw(channel)


def metadata(operation: Any) -> Any:
    found = pruning_pb2.PruneMetadata()
    assert operation.metadata.Unpack(found)
    return found


def state(operation: Any) -> str:
    name = pruning_pb2.OperationState.Name(metadata(operation).state)
    return str(name.removeprefix("OPERATION_STATE_"))


def response(operation: Any) -> Any:
    assert operation.done and operation.WhichOneof("result") == "response", operation
    found = pruning_pb2.PruneResult()
    assert operation.response.Unpack(found)
    return found


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


# ---- one operation -----------------------------------------------------------------------------


def test_an_operation_gives_what_the_call_gives(raw: Raw, client: secateur.Client) -> None:
    started = raw.start()
    assert not started.done and started.name.startswith("operations/")
    ended = raw.wait(started.name)
    assert state(ended) == "SUCCEEDED"
    expected = secateur.prune(MODEL, measure_latency=False)
    result = response(ended)
    assert result.model.blob.size_bytes == len(expected.model)
    budget = client._calls._budget(10)
    assert run(client._calls._receive(result.model, budget)) == expected.model
    about = metadata(ended)
    assert about.attempts == 1 and not about.HasField("queue_position")
    times = [about.create_time, about.start_time, about.end_time, about.expire_time]
    seconds = [t.ToNanoseconds() for t in times]
    assert seconds == sorted(seconds) and all(seconds)
    assert raw.get(started.name) == ended


def test_a_refusal_is_its_error(raw: Raw) -> None:
    ended = raw.wait(raw.start(b"no model").name)
    assert ended.WhichOneof("result") == "error"
    assert ended.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert state(ended) == "FAILED"
    assert any(detail.type_url.endswith("secateur.v1.Refusal") for detail in ended.error.details)


def test_stage_and_place_in_the_queue_are_told(server: Server, raw: Raw) -> None:
    raw.wait(raw.start(perceptron(16, 31, 8)).name)
    worker = server.idle_worker()
    with frozen(worker):
        first, second, third = (raw.start(perceptron(16, 32 + n, 8)) for n in range(3))
        wait_for(lambda: state(raw.get(first.name)) == "RUNNING")
        assert metadata(raw.get(third.name)).queue_position == 1
        waiting = metadata(raw.get(second.name))
        assert waiting.queue_position == 0
        now = time.time()
        assert now < waiting.estimated_end_time.ToSeconds() + 1 < now + 60
        late = raw.wait(third.name, 0.2)
        assert not late.done
    assert response(raw.wait(third.name)).model
    assert metadata(raw.get(second.name)).start_time.ToNanoseconds()


def test_progress_is_told_while_it_runs(raw: Raw, cnn: pathlib.Path) -> None:
    started, seen = raw.start(cnn.read_bytes()), []
    while not (operation := raw.wait(started.name, 0.01)).done:
        if metadata(operation).HasField("progress"):
            seen.append(metadata(operation).progress)
    assert seen and all(step.stage != report_pb2.STAGE_UNSPECIFIED for step in seen)
    fractions = [step.fraction for step in seen]
    assert fractions == sorted(fractions)
    assert not metadata(operation).HasField("progress")


def test_cancel_ends_the_worker_within_a_second(server: Server, raw: Raw) -> None:
    worker = server.idle_worker()
    with frozen(worker):
        started, waiting = raw.start(), raw.start(perceptron(16, 33, 8))
        wait_for(lambda: state(raw.get(started.name)) == "RUNNING")
        raw.cancel(waiting.name)
        assert not is_gone(worker)
        raw.cancel(started.name)
        assert wait_for(lambda: is_gone(worker), 1.0) < 1.0
    for name in (started.name, waiting.name):
        ended = raw.get(name)
        assert ended.done and ended.error.code == grpc.StatusCode.CANCELLED.value[0]
        assert state(ended) == "CANCELLED"
        raw.cancel(name)  # again: nothing happens
    done = raw.wait(raw.start().name)
    raw.cancel(done.name)
    assert raw.get(done.name) == done


def test_it_outlives_its_client(server: Server) -> None:
    with frozen(server.idle_worker()), grpc.insecure_channel(server.address) as channel:
        name = Raw(channel).start().name
        wait_for(server.has_job)
    with grpc.insecure_channel(server.address) as channel:
        assert response(Raw(channel).wait(name)).model


def test_a_worker_that_dies_over_it_is_tried_again(server: Server, raw: Raw) -> None:
    worker = server.idle_worker()
    with frozen(worker):
        started = raw.start()
        wait_for(server.has_job)
        os.kill(worker, signal.SIGKILL)
        ended = raw.wait(started.name)
    assert response(ended).model
    assert metadata(ended).attempts == 2


def test_what_kills_every_worker_is_given_up(own_server: Callable[..., Server]) -> None:
    server = own_server("--max-attempts", "2")
    with grpc.insecure_channel(server.address) as channel:
        raw = Raw(channel)
        worker = server.idle_worker()
        with frozen(worker):
            started = raw.start()
            wait_for(server.has_job)
            os.kill(worker, signal.SIGKILL)

            def ends() -> bool:
                """Kills the second too, most likely while it imports what it needs."""
                for pid in server.workers():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return bool(raw.get(started.name).done)

            wait_for(ends)
        ended = raw.wait(started.name)
    assert metadata(ended).attempts == 2
    assert ended.error.code == grpc.StatusCode.INTERNAL.value[0]
    assert "worker process died" in ended.error.message


# ---- all of them -------------------------------------------------------------------------------


def test_list_gives_pages_newest_first_without_responses(own_server: Callable[..., Server]) -> None:
    server = own_server()
    with grpc.insecure_channel(server.address) as channel:
        raw = Raw(channel)
        names = [raw.start(perceptron(16, 32 + n, 8)).name for n in range(5)]
        raw.cancel(names[4])
        for name in names:
            raw.wait(name)
        found, token = [], ""
        while True:
            page = raw.page(page_size=2, page_token=token)
            found += [operation.name for operation in page.operations]
            assert all(not o.HasField("response") for o in page.operations)
            token = page.next_page_token
            if not token:
                break
            assert len(page.operations) == 2
        assert found == names[::-1]
        cancelled = raw.page(filter="done=true AND state=CANCELLED").operations
        assert [operation.name for operation in cancelled] == [names[4]]
        assert not raw.page(filter="done=false").operations


def test_filters() -> None:
    assert states_of("") == states_of("  ") == list(State)
    assert states_of("done=false") == [State.QUEUED, State.RUNNING]
    assert states_of("done = true AND state = FAILED") == [State.FAILED]
    assert states_of("done=false AND state=FAILED") == []
    for text in ("nonsense", "state=", "state=failed", "done=1", "done=true OR done=false", "="):
        with pytest.raises(CallError):
            states_of(text)


def test_bad_requests_are_refused(raw: Raw) -> None:
    bad = grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(lambda: raw.page(filter="nonsense")) is bad
    assert code_of(lambda: raw.page(page_size=-1)) is bad
    assert code_of(lambda: raw.page(name="other")) is bad
    for token in ("x", "-1", "٣", "9" * 30):
        assert code_of(lambda token=token: raw.page(page_token=token)) is bad  # type: ignore[misc]
    assert code_of(lambda: raw.start(request_id="not a UUID")) is bad
    for call in (raw.get, raw.wait, raw.cancel, raw.delete):
        assert code_of(lambda call=call: call("nonsense")) is bad  # type: ignore[misc]
        for name in ("operations/x", "operations/", f"operations/{'a' * 9999}"):
            code = code_of(lambda call=call, name=name: call(name))  # type: ignore[misc]
            assert code is grpc.StatusCode.NOT_FOUND


def test_delete_forgets_what_has_ended(server: Server, raw: Raw) -> None:
    with frozen(server.idle_worker()):
        started = raw.start()
        assert code_of(lambda: raw.delete(started.name)) is grpc.StatusCode.FAILED_PRECONDITION
    raw.wait(started.name)
    raw.delete(started.name)
    assert code_of(lambda: raw.get(started.name)) is grpc.StatusCode.NOT_FOUND
    assert code_of(lambda: raw.delete(started.name)) is grpc.StatusCode.NOT_FOUND


# ---- asked twice -------------------------------------------------------------------------------


def test_a_request_id_starts_one_operation(raw: Raw) -> None:
    request_id = str(uuid.uuid4())
    first = raw.start(request_id=request_id)
    assert raw.start(request_id=request_id.upper()).name == first.name
    assert raw.start().name != first.name
    other = perceptron(16, 33, 8)
    code = code_of(lambda: raw.start(other, request_id=request_id))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    raw.wait(first.name)


def test_the_same_again_is_answered_from_before(own_server: Callable[..., Server]) -> None:
    server = own_server()
    half, seeded = Recipe(target={"macs": 0.5}), Recipe(target={"macs": 0.5}, seed=1)
    with (
        grpc.insecure_channel(server.address) as channel,
        secateur.Client(server.address, timeout=60) as client,
    ):
        raw = Raw(channel)
        first = client.prune(MODEL, half)
        steps: list[secateur.Progress] = []
        worker = server.idle_worker()
        with frozen(worker):  # nobody works
            again = client.prune(MODEL, half, progress=steps.append)
            assert (again, steps) == (first, [])
            known = raw.start(recipe=recipe_to_wire(half))
            assert known.done and metadata(known).attempts == 0
            assert response(raw.get(known.name)).model.blob.size_bytes == len(first.model)
            other = raw.start(recipe=recipe_to_wire(seeded))
            assert not other.done
        assert not is_gone(worker)
        assert response(raw.wait(other.name)).model


# ---- from the clients --------------------------------------------------------------------------


def test_the_client_starts_waits_and_fetches(client: secateur.Client) -> None:
    half = Recipe(target={"macs": 0.5})
    started = client.start_prune(MODEL, half)
    assert not started.done and started.failure is None
    steps: list[secateur.Progress] = []
    ended = client.wait_operation(started, steps.append)
    assert (ended.name, ended.state) == (started.name, State.SUCCEEDED)
    result = client.operation_result(ended)
    local = secateur.prune(MODEL, half, measure_latency=False)
    assert (result.model, result.plan) == (local.model, local.plan)
    assert client.get_operation(started.name) == ended
    assert client.list_operations("state=SUCCEEDED", limit=1)[0].state is State.SUCCEEDED
    client.delete_operation(ended)
    with pytest.raises(secateur.ServerError, match="NOT_FOUND"):
        client.get_operation(ended)


def test_a_refused_operation_raises_as_the_call_does(client: secateur.Client) -> None:
    ended = client.wait_operation(client.start_prune(b"no model"))
    with pytest.raises(secateur.Refused) as of_call:
        client.prune(b"no model")
    with pytest.raises(secateur.Refused) as of_operation:
        client.operation_result(ended)
    assert of_operation.value.refusal == of_call.value.refusal == ended.refusal


async def test_the_asyncio_client_does_the_same(server: Server) -> None:
    async with secateur.aio.Client(server.address, timeout=30) as client:
        with frozen(server.idle_worker()):
            started = await client.start_prune(MODEL)
            late = await client.wait_operation(started, timeout=0.2)
            assert late.state in (State.QUEUED, State.RUNNING)
            with pytest.raises(secateur.ServerError, match="not ended"):
                await client.operation_result(started)
            await client.cancel_operation(started)
        with pytest.raises(secateur.Cancelled):
            await client.operation_result(started)
        assert (await client.get_operation(started)).state is State.CANCELLED
        again = await client.start_prune(MODEL)
        await client.wait_operation(again, lambda step: None)
        assert (await client.operation_result(again)).model
        assert again.name in [o.name for o in await client.list_operations("done=true")]
        await client.delete_operation(again)


def on_command_line(*flags: object) -> tuple[int, str]:
    done = typer.testing.CliRunner().invoke(app, [str(flag) for flag in flags])
    return done.exit_code, done.stdout


def test_operations_on_the_command_line(
    server: Server, cnn: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    at, out = ("--server", server.address), tmp_path / "slim.onnx"
    code, said = on_command_line("prune", cnn, "--target", "macs=0.5", "--detach", *at)
    name = said.strip()
    assert (code, name[:11]) == (0, "operations/")
    flags = ("-o", out, "--save-plan", tmp_path / "plan.json", "--json")
    code, said = on_command_line("operations", "wait", name, *flags, *at)
    assert code == 0
    assert json.loads(said)["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    local = secateur.prune(cnn, Recipe(target={"macs": 0.5}), measure_latency=False)
    assert out.read_bytes() == local.model
    code, said = on_command_line("operations", "list", "--filter", "done=true", "--json", *at)
    assert name in [operation["name"] for operation in json.loads(said)]
    assert name in on_command_line("operations", "list", *at)[1]
    assert json.loads(on_command_line("operations", "get", name, "--json", *at)[1])["name"] == name
    assert on_command_line("operations", "delete", name, *at) == (0, "")
    assert on_command_line("operations", "get", name, *at)[0] == 5


def test_exit_codes_of_waiting(server: Server, tmp_path: pathlib.Path) -> None:
    at = ("--server", server.address)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    name = on_command_line("prune", bad, "--detach", *at)[1].strip()
    assert on_command_line("operations", "wait", name, *at)[0] == 3
    with frozen(server.idle_worker()):
        name = on_command_line("prune", bad, "--detach", *at)[1].strip()
        assert on_command_line("operations", "wait", name, "--timeout", 0.1, *at)[0] == 5
        code, said = on_command_line("operations", "cancel", name, *at)
        assert code == 0 and "CANCELLED" in said
    assert on_command_line("operations", "wait", name, *at)[0] == 130
    assert on_command_line("prune", bad, "--detach")[0] == 2
    assert on_command_line("prune", bad, "--detach", "-o", tmp_path / "x", *at)[0] == 2
    assert on_command_line("prune", bad)[0] == 2


# ---- servers come and go -----------------------------------------------------------------------


@dataclass
class Round:
    """Operations of one server, some done and some not, when it was killed."""

    done: list[str]
    running: str
    waiting: str


def leave(server: Server, number: int) -> Round:
    with grpc.insecure_channel(server.address) as channel:
        raw = Raw(channel)
        done = [raw.wait(raw.start().name).name, raw.wait(raw.start(b"no model").name).name]
        with frozen(server.idle_worker()):
            running, waiting = raw.start(), raw.start(perceptron(16, 40, 8))
            wait_for(lambda: state(raw.get(running.name)) == "RUNNING")
            wait_for(server.has_job)
            server.process.send_signal(number)
            if number == signal.SIGTERM:
                wait_for(lambda: server.process.poll() is not None)
        server.process.wait(timeout=20)
    return Round(done, running.name, waiting.name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_lost_with_the_server(own_server: Callable[..., Server], number: int) -> None:
    server = own_server("--no-cache", "--grace", "0")
    left = leave(server, number)
    server.close()
    server = own_server("--no-cache")
    with grpc.insecure_channel(server.address) as channel:
        raw = Raw(channel)
        assert [state(raw.get(name)) for name in left.done] == ["SUCCEEDED", "FAILED"]
        result = response(raw.get(left.done[0]))
        with secateur.Client(server.address, timeout=60) as client:
            content = run(client._calls._receive(result.model, client._calls._budget(10)))
        assert content == secateur.prune(MODEL, measure_latency=False).model
        for name in (left.running, left.waiting):
            assert response(raw.wait(name)).model
        # a stop by order is not the operation's fault
        attempts = 2 if number == signal.SIGKILL else 1
        assert metadata(raw.get(left.running)).attempts == attempts
        assert metadata(raw.get(left.waiting)).attempts == 1
