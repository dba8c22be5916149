"""The service under load, hostile input and kills: figures for speed, memory and loss.

    python benchmarks/service.py                         # every part, a few minutes each at most
    python benchmarks/service.py mix --minutes 30
    python benchmarks/service.py kills --rounds 200

Each part starts servers of its own on this machine. Times are of this machine at this moment;
ratios come from runs that take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import functools
import os
import pathlib
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any

import grpc
import grpc.aio
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from grpc_health.v1 import health_pb2, health_pb2_grpc

import secateur
from secateur import Recipe, _wire
from secateur._calls import run
from secateur._inputs import Source
from secateur.errors import SecateurError
from secateur.operation import Operation, State
from secateur.service.operations import Repository
from secateur.service.shared import SharedRepository
from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc, pruning_pb2, pruning_pb2_grpc

ROOT = pathlib.Path(__file__).resolve().parents[1]
MIB = 1 << 20


# ---- a server, and what it takes ---------------------------------------------------------------


class Server:
    """`secateur serve` as a process of its own.

    Args:
        home: for its log, and its folder, which the next one may go on with.
        durable: whether it has that folder, and what it says is stored is on the disk.
        flags: more of them.
    """

    def __init__(self, home: pathlib.Path, *flags: str, durable: bool = True) -> None:
        self.folder, self.log = home / "server", home / "log"
        flags = ("--listen", "127.0.0.1:0", *flags)
        if durable:
            flags = (*flags, "--folder", str(self.folder))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "secateur", "serve", "--log-level", "warning", *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        found = []
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def busy_worker(self) -> int | None:
        """The process id of a worker that has a job; None when none has."""
        for pid in self.workers():
            with contextlib.suppress(OSError):
                home = pathlib.Path(f"/proc/{pid}/cwd").readlink()
                if any(home.glob("*/model/model.onnx")):
                    return pid
        return None

    def taken(self) -> dict[str, int]:
        """What it holds: memory in KiB, descriptors, threads, worker processes, files of jobs."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        resident, threads = (
            int(found[1])
            for key in ("VmRSS", "Threads")
            if (found := re.search(rf"^{key}:\s+(\d+)", status, re.MULTILINE))
        )
        return {
            "memory": resident,
            "descriptors": len(list(pathlib.Path(f"/proc/{self.process.pid}/fd").iterdir())),
            "threads": threads,
            "workers": len(self.workers()),
            "files": len([*self.folder.glob("jobs/*"), *self.folder.glob("workers/*/*")]),
        }

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end; gives the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def serving(*flags: str, durable: bool = True) -> Iterator[Server]:
    """A fresh server; it must end well."""
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as home:
        server = Server(pathlib.Path(home), *flags, durable=durable)
        try:
            yield server
        finally:
            code = server.end()
            if code != 0:
                print(server.log.read_text()[-4000:])
                raise SystemExit(f"the server ended with exit code {code}")


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What a condition gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise SystemExit("waited in vain")
        time.sleep(0.001)
    return found


def perceptron(inputs: int, hidden: int, outputs: int) -> onnx.ModelProto:
    """Gemm, Relu, Gemm with random weights."""
    noise = np.random.default_rng(0)
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    weights = {
        "w1": noise.standard_normal((inputs, hidden), np.float32),
        "w2": noise.standard_normal((hidden, outputs), np.float32),
    }
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w1"], ["h"], "first"),
        onnx.helper.make_node("Relu", ["h"], ["r"], "relu"),
        onnx.helper.make_node("Gemm", ["r", "w2"], ["y"], "second"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [make("x", kind, ["batch", inputs])],
        [make("y", kind, ["batch", outputs])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9
    )


SMALL = perceptron(16, 32, 8).SerializeToString()


def percentiles(seconds: list[float]) -> str:
    """p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return " / ".join(f"{cuts[p - 1] * 1e3:7.1f}" for p in (50, 95, 99))


# ---- speed -------------------------------------------------------------------------------------


def calls(args: argparse.Namespace) -> None:
    """Requests for small models per second, at 1, 4 and 16 clients; nothing comes from before."""
    print("small models, none known from before: requests/s, p50 / p95 / p99 ms")
    with serving("--no-cache") as server:
        for name in ("inspect", "prune"):
            for clients in (1, 4, 16):
                seconds = _calls_of(server.address, name, clients, args.seconds)
                rate = len(seconds) / args.seconds
                print(f"  {name:8s} {clients:2d} clients {rate:7.1f}   {percentiles(seconds)}")
    with serving() as server, secateur.Client(server.address) as client:
        client.prune(SMALL)
        seconds = _calls_of(server.address, "prune", 16, args.seconds)
        rate = len(seconds) / args.seconds
        print(f"  known    16 clients {rate:7.1f}   {percentiles(seconds)}", flush=True)


def _calls_of(address: str, name: str, clients: int, seconds: float) -> list[float]:
    taken: list[float] = []
    end = time.monotonic() + seconds

    def work() -> None:
        with secateur.Client(address) as client:
            while (start := time.monotonic()) < end:
                getattr(client, name)(SMALL)
                taken.append(time.monotonic() - start)

    _together([work] * clients)
    return taken


def _together(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def health(args: argparse.Namespace) -> None:
    """Latency of health checks while two prunes run."""
    model = perceptron(1024, 4096, 512).SerializeToString()
    taken: list[float] = []
    with serving("--no-cache", "--workers", "2") as server:
        end = time.monotonic() + args.seconds

        def prune() -> None:
            with secateur.Client(server.address) as client:
                while time.monotonic() < end:
                    client.prune(model)

        def check() -> None:
            with grpc.insecure_channel(server.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while (start := time.monotonic()) < end:
                    stub.Check(health_pb2.HealthCheckRequest())
                    taken.append(time.monotonic() - start)
                    time.sleep(0.005)

        _together([prune, prune, check])
    print(f"health checks beside two prunes: p50 / p95 / p99 ms {percentiles(taken)}", flush=True)


class Pump(bytestream_pb2_grpc.ByteStreamServicer):  # type: ignore[misc]
    """What asyncio gRPC can do at best: bytes come and go, and nothing is done with them."""

    async def Write(self, requests: Any, context: Any) -> Any:  # noqa: D102, N802
        size = 0
        async for request in requests:
            size += len(request.data)
        return bytestream_pb2.WriteResponse(committed_size=size)

    async def Read(self, request: Any, context: Any) -> Any:  # noqa: D102, N802
        chunk = bytes(_wire.CHUNK)
        for _ in range(request.read_limit // len(chunk)):
            yield bytestream_pb2.ReadResponse(data=chunk)


async def _pump() -> None:
    server = grpc.aio.server(options=_wire.MESSAGE_OPTIONS)
    bytestream_pb2_grpc.add_ByteStreamServicer_to_server(Pump(), server)
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


def transfer(args: argparse.Namespace) -> None:
    """Uploads and downloads beside a bare pump, in turns; and the server's memory meanwhile.

    A server without a folder forgets all when it ends, and writes as the disk finds time. One with
    a folder says that an upload is stored when it is: it can be no faster than the disk.

    Files take the place of those before them, as where a disk is full, and a first turn is not
    counted: to be given memory for the first time costs a virtual machine ten times what it costs
    to write to it.
    """
    size = args.mebibytes * MIB
    command = [sys.executable, __file__, "pump"]
    room = ("--max-stored-bytes", str(size * 3 // 2))
    with (
        serving(*room, durable=False) as server,
        serving(*room) as durable,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pump,
        tempfile.NamedTemporaryFile() as file,
        tempfile.TemporaryFile() as target,
    ):
        try:
            assert pump.stdout is not None
            address = pump.stdout.readline().strip()
            for _ in range(args.mebibytes):
                file.write(os.urandom(MIB))
            before, rounds = server.taken()["memory"], []
            for _ in range(1 + args.turns):
                file.seek(0)
                file.write(os.urandom(64))  # another blob
                file.flush()
                moved = [_moved(one.address, file.name, target) for one in (server, durable)]
                rounds.append((*_pumped(address, size), *moved[0], *moved[1], _synced(size)))
            grown, rounds = server.taken()["memory"] - before, rounds[1:]
        finally:
            pump.kill()

    def line(what: str, ours: int, theirs: int, other: str) -> None:
        speeds = [statistics.median(size / MIB / r[i] for r in rounds) for i in (ours, theirs)]
        ratio = statistics.median(r[theirs] / r[ours] for r in rounds)
        print(f"  {what:16s} {speeds[0]:6.0f}, {other} {speeds[1]:6.0f}: {ratio:.0%}")

    print(f"{args.mebibytes} MiB, {args.turns} turns; median MiB/s and median of the ratios:")
    line("upload", 2, 0, "pump")
    line("download", 3, 1, "pump")
    line("durable upload", 4, 0, "pump")
    line("durable upload", 4, 6, "disk")
    line("durable download", 5, 1, "pump")
    print(f"  memory of the server grew by {grown / 1024:.0f} MiB", flush=True)


def _synced(size: int) -> float:
    """Seconds in which the disk takes so many bytes for good."""
    chunk = os.urandom(MIB)
    with tempfile.NamedTemporaryFile() as file:
        start = time.monotonic()
        for _ in range(size // len(chunk)):
            file.write(chunk)
        os.fdatasync(file.fileno())
        return time.monotonic() - start


def _pumped(address: str, size: int) -> tuple[float, float]:
    chunk = bytes(_wire.CHUNK)
    with grpc.insecure_channel(address, options=_wire.MESSAGE_OPTIONS) as channel:
        stub = bytestream_pb2_grpc.ByteStreamStub(channel)
        start = time.monotonic()
        stub.Write(bytestream_pb2.WriteRequest(data=chunk) for _ in range(size // len(chunk)))
        middle = time.monotonic()
        collections.deque(stub.Read(bytestream_pb2.ReadRequest(read_limit=size)), maxlen=0)
        return middle - start, time.monotonic() - middle


def _moved(address: str, path: str, target: IO[bytes]) -> tuple[float, float]:
    """Seconds of an upload, checked and synced, and of a download, as a client's calls do them."""
    source = Source(pathlib.Path(path))
    digest = source.sha256()  # names what is sent, and so comes before it
    blob = pruning_pb2.Blob(sha256=digest, size_bytes=source.size)
    target.seek(0)
    with secateur.Client(address) as client:
        ours, budget = client._calls, client._calls._budget(None)
        start = time.monotonic()
        run(ours._upload(source, digest, budget))
        middle = time.monotonic()
        run(ours._download(blob, target, budget))
        return middle - start, time.monotonic() - middle


def large(args: argparse.Namespace) -> None:
    """A model of 2.5 GB, its weights beside it, there and back; its result has some beside it."""
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as home, serving() as server:
        path = pathlib.Path(home, "large.onnx")
        _write_large(path, 5, 2500 * 10**6)
        size = sum(file.stat().st_size for file in pathlib.Path(home).iterdir())
        before, start = server.taken()["memory"], time.monotonic()
        with secateur.Client(server.address) as client:
            result = client.prune(path, Recipe(target={"channels": 0.95}))
        assert result.weights is not None
        seconds, grown = time.monotonic() - start, server.taken()["memory"] - before
        kept = len(result.model) + result.weights.path.stat().st_size
        result.save(pathlib.Path(home, "slim.onnx"))
    print(
        f"{size / 1e9:.2f} GB in, {kept / 1e9:.2f} GB out, {seconds:.0f} s; memory of the server "
        f"grew by {grown / 1024:.0f} MiB",
        flush=True,
    )


def _write_large(path: pathlib.Path, layers: int, size: int) -> None:
    """A chain of square Gemm and Relu, `size` bytes of weights in a file beside it."""
    width = int((size / 4 / layers) ** 0.5)
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes, tensors, block = [], [], np.random.default_rng(0).standard_normal(width, np.float32)
    with path.with_name("large.data").open("wb") as file:
        for n in range(layers):
            tensor = onnx.TensorProto(name=f"w{n}", data_type=kind, dims=[width, width])
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": "large.data", "offset": file.tell(), "length": 4 * width * width}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            for row in range(width):
                file.write((np.roll(block, row) / width**0.5).tobytes())
            nodes.append(onnx.helper.make_node("Gemm", [f"x{n}", f"w{n}"], [f"h{n}"], f"gemm{n}"))
            nodes.append(onnx.helper.make_node("Relu", [f"h{n}"], [f"x{n + 1}"], f"relu{n}"))
    ends = [make(f"x{n}", kind, ["batch", width]) for n in (0, layers)]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    path.write_bytes(model.SerializeToString())


def cancel(args: argparse.Namespace) -> None:
    """Time from a cancel to the end of the worker, which is busy."""
    model, taken = perceptron(1024, 4096, 512).SerializeToString(), []
    with serving("--no-cache", "--workers", "1") as server, secateur.Client(server.address) as c:
        for seed in range(args.rounds or 20):
            started = c.start_prune(model, Recipe(seed=seed))
            worker = wait_for(server.busy_worker)
            start = time.monotonic()
            c.cancel_operation(started)
            wait_for(lambda pid=worker: gone(pid))  # type: ignore[misc]
            taken.append(time.monotonic() - start)
    print(
        f"from cancel to the worker's end, {len(taken)} times: median "
        f"{statistics.median(taken) * 1e3:.0f} ms, longest {max(taken) * 1e3:.0f} ms",
        flush=True,
    )


# ---- loss --------------------------------------------------------------------------------------


def kills(args: argparse.Namespace) -> None:
    """Kills the server at random moments: no operation that it told of may be lost or stay half."""
    rounds, noise = args.rounds or 20, random.Random(args.seed)
    known: dict[str, State] = {}
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as name:
        home = pathlib.Path(name)
        for _ in range(rounds):
            server = Server(home, "--no-cache", "--workers", "2", "--max-attempts", "1000")
            killer = threading.Timer(noise.uniform(0.0, 1.0), server.end, [signal.SIGKILL])
            killer.start()
            with contextlib.suppress(SecateurError), secateur.Client(server.address) as client:
                while True:
                    _one_step(client, known, noise)
            killer.join()
        server = Server(home, "--no-cache", "--max-attempts", "1000")
        with secateur.Client(server.address) as client:
            lost = [name for name, was in known.items() if not _ends(client, name, was)]
        server.end()
    done = collections.Counter(known.values())
    print(
        f"{rounds} kills, {len(known)} operations told of ({done[State.QUEUED]} not known to have "
        f"ended when the server was killed): {len(lost)} lost",
        flush=True,
    )
    if lost:
        raise SystemExit(1)


def _one_step(client: secateur.Client, known: dict[str, State], noise: random.Random) -> None:
    """Starts an operation, or looks at one; writes down what was said of it."""
    if noise.random() < 0.6 or not known:
        started = client.start_prune(SMALL, Recipe(seed=noise.randrange(2**32)), timeout=10)
        known[started.name] = State.QUEUED
        return
    name = noise.choice(list(known))
    if noise.random() < 0.1:
        client.cancel_operation(name, timeout=10)
    found = client.get_operation(name, timeout=10)
    if found.done:
        known[name] = found.state


def _ends(client: secateur.Client, name: str, was: State) -> bool:
    """Whether an operation is there, ends, stays as it ended, and has its result."""
    found: Operation = client.wait_operation(name)
    if was.done and found.state is not was:
        return False
    if found.state is State.SUCCEEDED:
        return bool(client.operation_result(found).model)
    return found.state is State.CANCELLED


def replicas(args: argparse.Namespace) -> None:
    """Operations of servers that share a store: what that costs, and what kills leave of it."""
    print("an operation told of, begun and ended in the repository alone: per second, ms")
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as name, _bucket() as bucket:
        made = {
            "a file, synced": Repository(pathlib.Path(name, "file"), durable=True, ttl_s=60.0),
            "a folder, synced": SharedRepository(f"file://{name}/shared", ttl_s=60.0, lease_s=60.0),
            "S3 on this machine": SharedRepository(bucket, ttl_s=60.0, lease_s=60.0),
        }
        for what, repository in made.items():
            count, start = 0, time.monotonic()
            while (seconds := time.monotonic() - start) < args.seconds / 2:
                started = repository.add("", "key", bytes(500), b"", ())
                repository.claim()
                repository.finish(started.id, State.SUCCEEDED, response=bytes(500))
                count += 1
            print(f"  {what:18s} {count / seconds:7.0f} {seconds / count * 1e3:7.1f}", flush=True)
            repository.close()
    print("operations of small models, 8 clients: per second, p50 / p95 / p99 ms")
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as name:
        home = pathlib.Path(name)
        for what, start_all in {
            "one server, a file": lambda: [Server(home, "--no-cache", "--workers", "2")],
            "two that share a folder": lambda: [
                _sharing(home, number, "--workers", "1") for number in range(2)
            ],
        }.items():
            servers = start_all()
            taken = _operated([one.address for one in servers], 8, args.seconds)
            print(
                f"  {what:24s} {len(taken) / args.seconds:6.1f}   {percentiles(taken)}", flush=True
            )
            for one in servers:
                one.end()
    _kill_replicas(args.rounds or 20, random.Random(args.seed))


@contextlib.contextmanager
def _bucket() -> Iterator[str]:
    """The URL of a bucket on a server that speaks S3: one for tests, and not fast."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    command = [sys.executable, "-m", "moto.server", "-p", address.partition(":")[2]]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            make = urllib.request.Request(f"http://{address}/bucket", method="PUT")
            wait_for(lambda: _opened(make))
            yield "s3://bucket/replicas"
        finally:
            server.kill()


def _opened(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=10):
            return True
    except OSError:
        return False


def _sharing(home: pathlib.Path, number: int, *flags: str) -> Server:
    """One of the servers that share a folder."""
    (home / str(number)).mkdir(exist_ok=True)
    shared = ("--object-store", f"file://{home}/store", "--share-operations")
    return Server(home / str(number), "--no-cache", *shared, *flags)


def _operated(addresses: list[str], clients: int, seconds: float) -> list[float]:
    """Seconds from the start of each operation until its client heard of its end."""
    taken: list[float] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        with secateur.Client(addresses[number % len(addresses)]) as client:
            while (start := time.monotonic()) < end:
                client.wait_operation(client.start_prune(SMALL, Recipe(seed=number)))
                taken.append(time.monotonic() - start)

    _together([functools.partial(work, number) for number in range(clients)])
    return taken


def _kill_replicas(rounds: int, noise: random.Random) -> None:
    """Kills one of two servers again and again, while clients ask either of them."""
    flags = ("--lease", "2", "--workers", "1", "--max-attempts", "1000")
    known: dict[str, State] = {}
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as name:
        home = pathlib.Path(name)
        servers = [_sharing(home, number, *flags) for number in range(2)]
        for _ in range(rounds):
            victim = noise.randrange(2)
            killer = threading.Timer(noise.uniform(0.0, 2.0), servers[victim].end, [signal.SIGKILL])
            killer.start()
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(secateur.Client(one.address)) for one in servers]
                while killer.is_alive():
                    with contextlib.suppress(SecateurError):
                        _one_step(noise.choice(clients), known, noise)
            killer.join()
            servers[victim] = _sharing(home, victim, *flags)
        lost = []
        for one in servers:
            with secateur.Client(one.address) as client:
                lost += [name for name, was in known.items() if not _ends(client, name, was)]
            one.end()
    print(
        f"two servers that share a folder, one of them killed {rounds} times: {len(known)} "
        f"operations told of, {len(lost)} lost",
        flush=True,
    )
    if lost:
        raise SystemExit(1)


def hostile(args: argparse.Namespace) -> None:
    """Bad models, messages, names and frames: each is refused, and no process dies of it."""
    from fuzz import make

    noise, ends = random.Random(args.seed), collections.Counter[str]()
    with serving("--no-cache", "--workers", "2") as server:
        with grpc.insecure_channel(server.address) as channel:
            for number in range(args.inputs):
                kind = number % 4
                if kind == 0:
                    ends[_bad_frames(server.address, noise)] += 1
                elif kind == 1:
                    ends[_bad_message(channel, noise)] += 1
                else:
                    with secateur.Client(server.address, timeout=60) as client:
                        ends[_bad_model(client, make(args.seed, number)[1])] += 1
        with secateur.Client(server.address) as client:
            assert client.health()
            assert client.prune(SMALL).model
    print(f"{sum(ends.values())} bad inputs: {dict(ends)}", flush=True)
    print(f"  crashes of the server 0, of workers {ends['crash']}", flush=True)


def _bad_model(client: secateur.Client, model: bytes) -> str:
    try:
        client.inspect(model)
    except secateur.Refused:
        return "refused"
    except secateur.ServerError as error:
        return "crash" if "died" in str(error) else f"defect: {error}"
    return "result"


METHODS = (
    *(f"secateur.v1.Pruning/{name}" for name in ("Prune", "StartPrune", "Inspect", "Profile")),
    *(f"google.longrunning.Operations/{verb}Operation" for verb in ("Get", "Wait", "Cancel")),
    "google.longrunning.Operations/ListOperations",
    "google.bytestream.ByteStream/Read",
    "google.bytestream.ByteStream/QueryWriteStatus",
)


def _bad_message(channel: grpc.Channel, noise: random.Random) -> str:
    """A message of random fields, or a real one with bytes changed."""
    real = pruning_pb2.PruneRequest(model={"inline": SMALL}, recipe={"target": {"macs": 0.5}})
    content = bytearray(real.SerializeToString() if noise.random() < 0.7 else noise.randbytes(200))
    for _ in range(noise.randrange(8)):
        content[noise.randrange(min(len(content), 64))] = noise.randrange(256)
    call = channel.unary_stream(f"/{noise.choice(METHODS)}")
    try:
        collections.deque(call(bytes(content), timeout=60), maxlen=0)
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.INTERNAL and "died" in (error.details() or ""):
            return "crash"
        return "refused" if code is not grpc.StatusCode.DEADLINE_EXCEEDED else "hang"
    return "result"


def _bad_frames(address: str, noise: random.Random) -> str:
    """Bytes that are no HTTP/2, or stop being it."""
    host, _, port = address.rpartition(":")
    start = noise.choice((b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"))
    settings = b"\0\0\0\4\0\0\0\0\0" if noise.random() < 0.5 else b""
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        contextlib.suppress(OSError),
    ):
        connection.sendall(start + settings + noise.randbytes(noise.randrange(2000)))
    return "refused"


# ---- a mix of everything -----------------------------------------------------------------------


def mix(args: argparse.Namespace) -> None:
    """Everything at once, for as long as wanted; then nothing may be left of it."""
    with serving("--workers", "2") as server:
        ends, samples = stress(server, args.minutes * 60, args.seed)
    print(f"mix of {args.minutes:g} min: {dict(sorted(ends.items()))}")
    print("  minute  memory MiB  descriptors  threads  workers  job files")
    for minute, taken in samples:
        memory, *rest = taken.values()
        cells = "".join(f"{value:10d}" for value in rest)
        print(f"  {minute:6.1f}  {memory / 1024:10.0f}  {cells}", flush=True)


_LEFT_S = 30.0  # for the operations that are left when the clients have gone


def stress(
    server: Any, seconds: float, seed: int
) -> tuple[collections.Counter[str], list[tuple[float, dict[str, int]]]]:
    """Has clients of all kinds work, and misbehave, at once.

    Args:
        server: with `address` and `taken`.
        seconds: for how long.
        seed: of what each does.

    Returns:
        How calls ended, and (minutes, what the server held) about ten times, the last when all
        clients had gone.
    """
    ends = collections.Counter[str]()
    start = time.monotonic()
    samples = []
    stop = threading.Event()

    def keep(act: Callable[[str, random.Random], str], number: int) -> Callable[[], None]:
        noise = random.Random(f"{seed} {number}")

        def work() -> None:
            while not stop.is_set():
                try:
                    ends[f"{act.__name__.strip('_')} {act(server.address, noise)}"] += 1
                except (SecateurError, grpc.RpcError) as error:
                    ends[f"{act.__name__.strip('_')} {_short(error)}"] += 1

        return work

    def watch() -> None:
        while not stop.wait(max(seconds / 10, 0.5)):
            samples.append(((time.monotonic() - start) / 60, server.taken()))
            if time.monotonic() - start > seconds:
                stop.set()

    _together([*(keep(act, number) for number, act in enumerate(ACTS)), watch])
    time.sleep(3.0)  # what clients left is cleared away
    end = time.monotonic() + _LEFT_S  # operations that nobody waits for are worked on all the same
    while server.taken()["files"] and time.monotonic() < end:
        time.sleep(0.1)
    samples.append(((time.monotonic() - start) / 60, server.taken()))
    return ends, samples


def _short(error: Exception) -> str:
    if isinstance(error, secateur.Refused):
        return "refused"
    if isinstance(error, grpc.RpcError):
        return str(error.code().name)
    found = re.search(r": ([A-Z_]{4,}): ", str(error))
    return found[1] if found else type(error).__name__


def _prunes(address: str, noise: random.Random) -> str:
    with secateur.Client(address, timeout=60) as client:
        recipe = Recipe(target={"macs": noise.choice((0.5, 0.001))}, seed=noise.randrange(99))
        client.prune(SMALL, recipe)
    return "done"


def _leaves(address: str, noise: random.Random) -> str:
    with secateur.Client(address, timeout=noise.uniform(0.01, 0.4)) as client:
        client.prune(perceptron(64, 512, 64), Recipe(seed=noise.randrange(2**32)))
    return "done"


def _operates(address: str, noise: random.Random) -> str:
    with secateur.Client(address, timeout=60) as client:
        started = client.start_prune(SMALL, Recipe(seed=noise.randrange(2**32)))
        what = noise.choice(("wait", "cancel", "forget", "fetch"))
        if what == "cancel":
            time.sleep(noise.uniform(0.0, 0.1))
            client.cancel_operation(started)
        elif what != "forget":
            client.wait_operation(started, timeout=60)
        if what == "fetch":
            client.operation_result(started)
            client.delete_operation(started)
    return what


def _crashes(address: str, noise: random.Random) -> str:
    """Goes in the middle of a call, or of an upload."""
    channel = grpc.insecure_channel(address)
    if noise.random() < 0.5:
        request = pruning_pb2.PruneRequest(model={"inline": SMALL})
        request.recipe.seed = noise.randrange(2**32)
        pruning_pb2_grpc.PruningStub(channel).Prune(request)
        time.sleep(noise.uniform(0.0, 0.2))
    else:
        name = _wire.upload_name("0" * 8 + "-0000-4000-8000-" + "0" * 12, "a" * 64, 9 * MIB)
        messages = (
            bytestream_pb2.WriteRequest(resource_name=name, write_offset=n * MIB, data=bytes(MIB))
            for n in range(noise.randrange(1, 8))
        )
        bytestream_pb2_grpc.ByteStreamStub(channel).Write.future(messages)
        time.sleep(noise.uniform(0.0, 0.1))
    channel.close()
    return "gone"


def _hangs(address: str, noise: random.Random) -> str:
    """Says that it speaks HTTP/2, and then nothing."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        time.sleep(noise.uniform(0.1, 2.0))
    return "gone"


def _reads_slowly(address: str, noise: random.Random) -> str:
    content = random.Random(7).randbytes(5 * MIB)
    with secateur.Client(address, timeout=60) as client:
        payload = run(client._calls._send(Source(content), client._calls._budget(60)))
    name = _wire.blob_name(payload.blob.sha256, payload.blob.size_bytes)
    with grpc.insecure_channel(address) as channel:
        stub = bytestream_pb2_grpc.ByteStreamStub(channel)
        for _ in stub.Read(bytestream_pb2.ReadRequest(resource_name=name)):
            time.sleep(noise.uniform(0.0, 0.2))
    return "done"


def _annoys(address: str, noise: random.Random) -> str:
    _bad_frames(address, noise)
    with grpc.insecure_channel(address) as channel:
        return _bad_message(channel, noise)


ACTS = (_prunes, _prunes, _leaves, _operates, _operates, _crashes, _hangs, _reads_slowly, _annoys)


# ---- the program -------------------------------------------------------------------------------

PARTS = (calls, health, transfer, large, cancel, kills, replicas, hostile, mix)


def main() -> None:
    """Runs the parts that were asked for."""
    if sys.argv[1:] == ["pump"]:
        asyncio.run(_pump())
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [part.__name__ for part in PARTS]
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of speed")
    parser.add_argument("--minutes", type=float, default=1.0, help="of the mix")
    parser.add_argument("--rounds", type=int, help="of kills and cancels; default 20")
    parser.add_argument("--inputs", type=int, default=400, help="bad inputs")
    parser.add_argument("--mebibytes", type=int, default=512, help="of a transfer")
    parser.add_argument("--turns", type=int, default=11, help="of transfers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(names):
        parser.error(f"no part is called {', '.join(unknown)}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    for part in PARTS:
        if not args.parts or part.__name__ in args.parts:
            part(args)


if __name__ == "__main__":
    main()
