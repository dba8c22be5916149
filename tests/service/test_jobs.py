"""Jobs: the same as in process, ended when nobody waits, and alone in their death."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
import onnxruntime as ort
import pytest
import typer.testing
from conftest import DIGITS, Server, frozen, is_gone, perceptron, wait_for

import secateur
import secateur.aio
from secateur import Recipe, Stage
from secateur.cli import app
from secateur.service.pool import Worker
from secateur.v1 import pruning_pb2, pruning_pb2_grpc

HALF = Recipe(target={"macs": 0.5})
HELDOUT = DIGITS / "heldout.npz"


# ---- the same as in process --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_cnn.onnx", "digits_transformer.onnx"])
def test_same_bytes_and_plan_as_in_process(client: secateur.Client, name: str) -> None:
    local = secateur.prune(DIGITS / name, HALF, measure_latency=False)
    remote = client.prune(DIGITS / name, HALF)
    assert remote.model == local.model
    assert remote.plan == local.plan
    assert remote.report.groups == local.report.groups
    assert remote.report.frozen == local.report.frozen
    assert remote.report.after.macs == local.report.after.macs


def test_same_bytes_through_blobs(client: secateur.Client, wide: pathlib.Path) -> None:
    recipe = Recipe(target={"channels": 0.6})
    local = secateur.prune(wide, recipe, measure_latency=False)
    assert len(local.model) > 2 << 20
    for model in (wide, wide.read_bytes()):
        remote = client.prune(model, recipe)
        assert remote.model == local.model
        assert remote.plan == local.plan


def test_every_way_to_hand_in_calibration_gives_the_same(
    client: secateur.Client, cnn: pathlib.Path, calibration: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    recipe = Recipe(target={"macs": 0.5}, criterion="activation")
    local = secateur.prune(cnn, recipe, calibration=calibration, measure_latency=False)
    with np.load(calibration) as arrays:
        samples = arrays["input"]
    assert client.prune(cnn, recipe, calibration=calibration).model == local.model
    assert client.prune(cnn, recipe, calibration={"input": samples}).model == local.model
    for number, part in enumerate(np.array_split(samples, 2)):
        np.savez(tmp_path / f"{number}.npz", input=part)
    folder = secateur.prune(cnn, recipe, calibration=tmp_path, measure_latency=False)
    remote = client.prune(cnn, recipe, calibration=tmp_path)
    assert remote.model == folder.model
    assert remote.report.verification.from_calibration


def accuracy(model: bytes) -> float:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    with np.load(HELDOUT) as arrays:
        (scores,) = session.run(None, {"input": arrays["input"]})
        return float((scores.argmax(axis=1) == arrays["label"]).mean())


def test_labels_give_the_same_accuracy_on_a_server(
    client: secateur.Client, cnn: pathlib.Path, calibration: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    local = secateur.prune(cnn, HALF, labels=HELDOUT, measure_latency=False)
    (found,) = local.report.accuracy
    assert found.top1_before == accuracy(cnn.read_bytes())
    assert found.top1_after == accuracy(local.model)
    with np.load(HELDOUT) as arrays:
        for number in range(2):  # from several files, too
            part = {name: arrays[name][number::2] for name in arrays.files}
            np.savez(tmp_path / f"{number}.npz", **part)
    for labels in (HELDOUT, tmp_path):
        remote = client.prune(cnn, HALF, labels=labels)
        assert remote.model == local.model
        assert remote.report.accuracy == local.report.accuracy
    own = {"label": np.zeros(512, np.int64)}
    begun = client.start_prune(cnn, HALF, calibration, labels=own)
    assert client.wait_operation(begun, timeout=120).done
    (found,) = client.operation_result(begun).report.accuracy
    assert found.from_calibration and found.held_back and found.labels == 64


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_single_weights_and_int8_give_the_same_bytes(
    client: secateur.Client, cnn: pathlib.Path, calibration: pathlib.Path, quantize: str | None
) -> None:
    fields = {"granularity": ["weight"], "sparsity": "2:4", "quantize": quantize}
    recipe = Recipe.parse({name: value for name, value in fields.items() if value})
    local = secateur.prune(cnn, recipe, calibration=calibration)
    remote = client.prune(cnn, recipe, calibration=calibration)
    assert remote.model == local.model
    assert remote.report.sparse_weights == local.report.sparse_weights


def test_plan_replays_to_the_same_bytes(client: secateur.Client, cnn: pathlib.Path) -> None:
    first = client.prune(cnn, HALF)
    assert client.prune(cnn, plan=first.plan).model == first.model
    assert secateur.prune(cnn, plan=first.plan, measure_latency=False).model == first.model


def test_inspect_and_profile_as_in_process(client: secateur.Client, cnn: pathlib.Path) -> None:
    assert client.inspect(cnn, HALF) == secateur.inspect(cnn, HALF)
    found = client.profile(cnn, against=DIGITS / "digits_cnn.onnx")
    assert found.model.macs == secateur.inspect(cnn).cost.macs
    assert found.against is not None and found.latency_ratio is not None
    assert all(drift.relative_error < 1e-5 for drift in found.drift)


async def test_asyncio_client_gives_the_same(
    server: Server, client: secateur.Client, cnn: pathlib.Path, wide: pathlib.Path
) -> None:
    async with secateur.aio.Client(server.address, timeout=60) as other:
        assert await other.health() is True
        steps: list[secateur.Progress] = []
        one = await other.prune(cnn, HALF, progress=steps.append)
        assert one.model == client.prune(cnn, HALF).model
        assert steps
        two = await other.prune(wide, Recipe(target={"channels": 0.6}))
        assert two.model == client.prune(wide, Recipe(target={"channels": 0.6})).model
        assert await other.inspect(cnn) == client.inspect(cnn)
        assert (await other.profile(cnn)).against is None


def test_model_objects_are_taken(client: secateur.Client, cnn: pathlib.Path) -> None:
    import onnx
    import onnx_ir

    proto = onnx.load(cnn)
    expected = secateur.inspect(cnn).groups
    assert client.inspect(proto).groups == expected
    assert client.inspect(onnx_ir.from_proto(proto)).groups == expected
    with pytest.raises(TypeError, match="int"):
        client.inspect(3)


def test_progress_is_typed_and_never_falls(client: secateur.Client, cnn: pathlib.Path) -> None:
    steps: list[secateur.Progress] = []
    client.prune(cnn, HALF, progress=steps.append)
    assert all(isinstance(step, secateur.Progress) for step in steps)
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1
    order = list(Stage)
    stages = [order.index(step.stage) for step in steps]
    assert stages == sorted(stages)
    assert Stage.VERIFY in {step.stage for step in steps}


def test_an_exception_in_the_progress_callback_ends_the_call(
    client: secateur.Client, cnn: pathlib.Path
) -> None:
    def stop(step: secateur.Progress) -> None:
        raise KeyError(step.stage)

    with pytest.raises(KeyError):
        client.prune(cnn, HALF, progress=stop)
    assert client.inspect(cnn)


# ---- ended when nobody waits -------------------------------------------------------------------


def test_deadline_ends_the_worker(server: Server, cnn: pathlib.Path) -> None:
    worker = server.idle_worker()
    with secateur.Client(server.address) as client, frozen(worker):
        start = time.monotonic()
        with pytest.raises(secateur.Cancelled, match="DEADLINE_EXCEEDED"):
            client.prune(cnn, timeout=0.5)
        assert time.monotonic() - start < 1.5
        assert wait_for(lambda: is_gone(worker), 1.0) < 1.0
        assert client.inspect(cnn)  # by another worker


def test_cancelling_a_task_ends_the_worker(server: Server, cnn: pathlib.Path) -> None:
    worker = server.idle_worker()

    async def cancel() -> None:
        async with secateur.aio.Client(server.address) as client:
            task = asyncio.ensure_future(client.prune(cnn))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(wait_for, lambda: is_gone(worker), 1.0) < 1.0

    with frozen(worker):
        asyncio.run(cancel())


def test_a_client_that_vanishes_ends_the_worker(server: Server, cnn: pathlib.Path) -> None:
    worker = server.idle_worker()
    with frozen(worker):
        channel = grpc.insecure_channel(server.address)
        model = pruning_pb2.Payload(inline=cnn.read_bytes())
        call = pruning_pb2_grpc.PruningStub(channel).Prune(pruning_pb2.PruneRequest(model=model))
        time.sleep(0.3)
        assert not is_gone(worker)
        channel.close()
        wait_for(lambda: is_gone(worker), 1.0)
        assert call.code() is grpc.StatusCode.CANCELLED


def test_ctrl_c_on_the_command_line_ends_the_worker(
    server: Server, cnn: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    worker, out = server.idle_worker(), tmp_path / "slim.onnx"
    # whoever runs the tests may ignore the signal, and children inherit that
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from secateur.cli import main; main()"
    )
    flags = ["prune", str(cnn), "-o", str(out), "--server", server.address]
    with frozen(worker), subprocess.Popen([sys.executable, "-c", code, *flags]) as process:
        wait_for(server.has_job)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        wait_for(lambda: is_gone(worker), 1.0)
    assert not out.exists()


def test_command_line_with_a_server_writes_the_same(
    server: Server, cnn: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    said = []
    for more in ([], ["--server", server.address]):
        out = tmp_path / f"{len(more)}.onnx"
        flags = ["prune", str(cnn), "-o", str(out), "--target", "macs=0.5", *more]
        done = typer.testing.CliRunner().invoke(app, flags)
        assert done.exit_code == 0, done.output
        words = [line.split() for line in done.stdout.splitlines()]  # columns follow the times
        said.append((out.read_bytes(), done.stderr, words[:4]))
    assert said[0] == said[1]


def test_children_of_a_worker_end_with_it(server: Server, tmp_path: pathlib.Path) -> None:
    worker = server.idle_worker()
    assert os.getpgid(worker) == os.getsid(worker) == worker

    async def end() -> int:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", "sleep 60 & echo $!; wait"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        child = int(await process.stdout.readline())
        await Worker(process, tmp_path / "home", 1 << 30).end()
        return child

    child = asyncio.run(end())
    wait_for(lambda: is_gone(child), 1.0)


def test_waiting_jobs_take_their_turn_and_can_be_cancelled(
    server: Server, cnn: pathlib.Path
) -> None:
    worker = server.idle_worker()
    found: list[secateur.Inspection] = []
    with secateur.Client(server.address) as client:
        with frozen(worker):
            first = threading.Thread(target=lambda: found.append(client.inspect(cnn)))
            first.start()
            time.sleep(0.2)
            with pytest.raises(secateur.Cancelled):
                client.inspect(cnn, timeout=0.3)  # waits for the only worker
            assert not is_gone(worker)  # which works on something else
        first.join()
    assert len(found) == 1


# ---- alone in their death ----------------------------------------------------------------------


def test_a_crashing_worker_is_an_error_of_its_call_only(server: Server, cnn: pathlib.Path) -> None:
    worker = server.idle_worker()
    caught: list[Exception] = []

    def call(client: secateur.Client) -> None:
        try:
            client.prune(cnn)
        except secateur.SecateurError as error:
            caught.append(error)

    with secateur.Client(server.address) as client:
        with frozen(worker):
            thread = threading.Thread(target=call, args=(client,))
            thread.start()
            time.sleep(0.3)
            os.kill(worker, signal.SIGKILL)
            thread.join(timeout=10)
        assert [type(error) for error in caught] == [secateur.ServerError]
        assert "worker process died" in str(caught[0])
        assert client.prune(cnn, HALF).model


def test_an_idle_worker_that_dies_is_replaced(server: Server, cnn: pathlib.Path) -> None:
    worker = server.idle_worker()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: worker not in server.workers())
    with secateur.Client(server.address) as client:
        assert client.inspect(cnn)


def test_the_next_worker_starts_while_one_does_its_last_job(
    own_server: Callable[..., Server], cnn: pathlib.Path
) -> None:
    server = own_server("--jobs-per-worker", "2")
    first = server.idle_worker()
    with secateur.Client(server.address) as client:
        client.inspect(cnn)
        assert server.workers() == [first]
        seen: list[list[int]] = []
        client.prune(cnn, HALF, progress=lambda step: seen.append(server.workers()))
    assert max(len(workers) for workers in seen if first in workers) == 2
    assert server.idle_worker() != first


def test_jobs_leave_no_files(server: Server, client: secateur.Client) -> None:
    client.prune(perceptron(16, 32, 8))
    with pytest.raises(secateur.Refused):
        client.prune(b"nonsense")
    with frozen(server.idle_worker()), pytest.raises(secateur.Cancelled):
        client.prune(perceptron(16, 32, 8), timeout=0.3)
    wait_for(lambda: not list((server.folder / "jobs").iterdir()))


def test_unreachable_server_is_an_error(cnn: pathlib.Path) -> None:
    with (
        secateur.Client("127.0.0.1:1", timeout=10) as client,
        pytest.raises(secateur.ServerError, match="UNAVAILABLE"),
    ):
        client.inspect(cnn)
