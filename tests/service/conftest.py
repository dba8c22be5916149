"""A real server, as a separate process, started as people start it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

import secateur

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"


class Server:
    """`secateur serve` on a free port of this machine.

    Attributes:
        address: `127.0.0.1:PORT`.
        folder: where its blobs and jobs lie.
        log: what it writes to standard error.
    """

    def __init__(self, home: pathlib.Path, *flags: str) -> None:
        self.log, self.folder = home / "server.log", home / "server"
        flags = ("--listen", "127.0.0.1:0", "--folder", str(self.folder), "--workers", "1", *flags)
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "secateur", "serve", *flags],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.log.read_text()
        self.address = line.split()[-1]

    def workers(self) -> list[int]:
        """Process ids of the workers that are there."""
        pid = self.process.pid
        found = []
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def has_job(self) -> bool:
        """Whether a worker has a job."""
        return any(self.folder.glob("workers/*/*/model/model.onnx"))

    def idle_worker(self) -> int:
        """The process id of the only worker, once it listens and all before has ended."""

        def idle() -> bool:
            threads = [_threads(pid) for pid in self.workers()]
            return not self.has_job() and len(threads) == 1 and threads[0] > 1

        wait_for(idle)
        return self.workers()[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end; gives the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=20)
        self.close()
        return code

    def close(self) -> None:
        """Makes sure that it is gone."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _threads(pid: int) -> int:
    """How many threads a process has; 0 when it is gone."""
    return 0 if is_gone(pid) else len(list(pathlib.Path(f"/proc/{pid}/task").iterdir()))


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> float:
    """Waits until a condition holds; gives how many seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - start


def is_gone(pid: int) -> bool:
    """Whether a process has ended (reaped or not)."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stops a worker, so that the job it gets next lasts until it is killed."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests share; they may end its workers, not it."""
    # what one test had done must not spare the next one's worker the work
    running = Server(tmp_path_factory.mktemp("server"), "--no-cache")
    yield running
    assert running.stop() == 0


@pytest.fixture
def own_server(tmp_path: pathlib.Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of a test's own; those still there at its end are stopped."""
    started: list[Server] = []

    def start(*flags: str) -> Server:
        started.append(Server(tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[secateur.Client]:
    with secateur.Client(server.address, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def cnn() -> pathlib.Path:
    return DIGITS / "digits_cnn.onnx"


@pytest.fixture(scope="session")
def calibration() -> pathlib.Path:
    return DIGITS / "calibration.npz"


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two layers of 9 MB: large enough that it and half of it travel as blobs."""
    path = tmp_path_factory.mktemp("models") / "wide.onnx"
    path.write_bytes(perceptron(512, 3000, 256))
    return path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on a server on this machine that speaks S3."""
    pytest.importorskip("obstore")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
        ("NO_PROXY", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    with urllib.request.urlopen(
        urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=10
    ):
        pass
    yield f"s3://bucket/{uuid.uuid4()}"  # moto remembers what was before
    server.stop()


def perceptron(inputs: int, hidden: int, outputs: int, **changes: Any) -> bytes:
    """Serialised Gemm, Relu, Gemm with random weights."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.standard_normal((inputs, hidden), np.float32) / np.float32(inputs**0.5),
        "b1": random.standard_normal(hidden, dtype=np.float32),
        "w2": random.standard_normal((hidden, outputs), np.float32) / np.float32(hidden**0.5),
    }
    make = onnx.helper.make_node
    nodes = [
        make("Gemm", ["x", "w1", "b1"], ["h"], "first"),
        make("Relu", ["h"], ["r"], "relu"),
        make("Gemm", ["r", "w2"], ["y"], "second"),
    ]
    return serialised(nodes, inputs, outputs, weights, **changes)


def serialised(
    nodes: list[onnx.NodeProto],
    inputs: int,
    outputs: int,
    weights: dict[str, Any] | None = None,
    opsets: tuple[tuple[str, int], ...] = (("", 17),),
) -> bytes:
    """A model from `x` [batch, inputs] to `y` [batch, outputs]."""
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [make("x", kind, ["batch", inputs])],
        [make("y", kind, ["batch", outputs])],
        [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [onnx.helper.make_opsetid(*opset) for opset in opsets]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)
    return bytes(model.SerializeToString())
