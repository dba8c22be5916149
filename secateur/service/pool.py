"""Worker processes: started warm, one job at a time each, killed whole.

The pool is the only place that knows processes. What comes later goes in here: another executor
(a cluster) where a job is run.

A worker is not trusted (see `jail`). It has a folder of its own, its home, into which a job's
folder is moved while it works on it; what it leaves there is looked at before anybody reads it, and
what it writes to standard error goes to the log as its own words.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import stat
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc

import secateur
from secateur.errors import ServerError
from secateur.service import telemetry
from secateur.service.config import ServerConfig
from secateur.service.errors import CallError
from secateur.service.guard import Guard, limit_allocations

log = logging.getLogger("secateur.service")

MAX_LINE = 4 << 20  # bytes of one message from a worker; models travel as files
MAX_LOG = 256 << 10  # bytes of one worker's standard error that the log takes
MAX_REPORT = 64 << 20  # bytes of a JSON file that the server reads whole
_REPORTS = ("report.json", "inspection.json", "profile.json")
MEASURE_SECONDS = 600.0
READY_SECONDS = 120.0  # for the imports of a worker, on a machine that is very busy
MAX_NUMBER = 32  # bytes of the answer

# All that a worker gets of the server's environment, which may hold secrets
_VARIABLES = re.compile(
    "PATH|LANG|LC_.*|TZ|LD_LIBRARY_PATH|(PYTHON|OMP_|OPENBLAS_|MKL_|KMP_|GOMP_|ORT_).*"
)


class Worker:
    """One worker process, leader of its own session and process group.

    Attributes:
        pid: its process id.
        home: the folder that is its own; gone with it.
        jobs: how many it was given.
        client: whose; None before the first.
        gaps: walls of its jail that could not be raised; known once it is ready.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, home: pathlib.Path, memory: int
    ) -> None:
        self._process = process
        self._memory = memory
        self._log = asyncio.ensure_future(_relay(process))
        self._ready = False
        self.pid = process.pid
        self.home = home
        self.jobs = 0
        self.client: str | None = None
        self.gaps: list[str] = []

    @classmethod
    async def start(cls, home: pathlib.Path, memory: int) -> Worker:
        """Starts a process, which imports the engine and waits for a job. Makes its home.

        Args:
            home: its folder.
            memory: bytes that a job of it may take.
        """
        home.mkdir(mode=0o700, parents=True)
        process = await _spawn(home, memory, stdin=asyncio.subprocess.PIPE)
        log.info("worker %d started", process.pid)
        telemetry.WORKER_STARTS.inc()
        return cls(process, home, memory)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.returncode is None

    async def ready(self) -> None:
        """Waits until the engine is imported. Raises as `run`."""
        if self._ready:
            return
        try:
            async with asyncio.timeout(READY_SECONDS):
                self.gaps = (await self._read())["ready"]["gaps"]
        except TimeoutError:
            raise _died() from None
        self._ready = True

    async def run(self, job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Messages of a job, the last of which has one of the keys `done`, `refused`, `failed`.

        Raises:
            CallError: INTERNAL when the process dies or says what it should not.
        """
        self.jobs += 1
        await self.ready()
        await self._write(job)
        while True:
            message = await self._read()
            if "measure" in message:
                await self._write({"bytes": await self._measure(*message["measure"])})
                continue
            yield message
            if "progress" not in message:
                return

    async def _measure(self, model: str, feeds: str) -> int | None:
        """Bytes that a fresh process, in the same jail, grows by over a model; None: it failed."""
        process = await _spawn(self.home, self._memory, model, feeds)
        log_task = asyncio.ensure_future(_relay(process))
        assert process.stdout is not None
        try:
            async with asyncio.timeout(MEASURE_SECONDS):
                answer = await process.stdout.read(MAX_NUMBER)
        except TimeoutError:
            answer = b""
        finally:
            await _kill(process, log_task)
        return int(answer) if answer.strip().isdigit() else None

    async def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # reading will tell
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            if line:
                message: dict[str, Any] = json.loads(line)
                return message
        except (ConnectionError, ValueError) as error:
            log.warning("worker %d: %s", self.pid, error)
        telemetry.WORKER_DEATHS.labels("WORKER_DIED").inc()
        raise _died()

    async def end(self) -> None:
        """Kills the process with all it started, and waits until it is gone."""
        await _kill(self._process, self._log)
        await asyncio.to_thread(shutil.rmtree, self.home, ignore_errors=True)
        log.info("worker %d ended", self.pid)


class WorkerPool:
    """Runs jobs in worker processes, at most `workers` at once; more wait their turn.

    Args:
        config: how many, how long each lasts, what a job may take, how well they are shut in.
        homes: folder for the homes of workers, on the file system of the jobs' folders; emptied.
    """

    def __init__(self, config: ServerConfig, homes: pathlib.Path) -> None:
        shutil.rmtree(homes, ignore_errors=True)  # of a server that was killed
        self._homes = homes
        self._config = config
        self._slots = asyncio.Semaphore(config.workers)
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Starts a first process, so that the first job need not wait for imports.

        Raises:
            ServerError: the engine cannot be imported; a jail is required and cannot be had.
        """
        await self._spare()
        try:
            await self._idle[0].ready()
        except CallError:
            await self._idle[0].end()  # after which the log is complete
            text = "no worker process can be started; its own error is in the log"
            raise ServerError(text) from None
        if gaps := self._idle[0].gaps:
            text = f"workers are not fully shut in, for want of: {'; '.join(gaps)}"
            if self._config.require_jail:
                raise ServerError(text)
            log.warning(text)

    async def run(self, client: str, job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Messages of a job; see `Worker.run`. Closing the iterator kills the job at once.

        A worker works for one client only: whoever takes it over finds nothing of anybody else's.

        Raises:
            Refused: `LIMIT_EXCEEDED` when it took too much; its worker is killed.
            CallError: as `Worker.run`.
        """
        async with contextlib.AsyncExitStack() as stack:
            with telemetry.JOBS_WAITING.track_inprogress():
                await stack.enter_async_context(self._slots)
            stack.enter_context(telemetry.JOBS_RUNNING.track_inprogress())
            worker = await self._take(client)
            if worker.jobs + 1 >= self._config.jobs_per_worker and not self._idle:
                self._background(self._spare())  # imports while this one does its last job
            guard = Guard(worker.pid, worker.home, self._config)
            clean = False
            try:
                folder = pathlib.Path(job["folder"])
                inside = folder.rename(worker.home / folder.name)
                here = {**job, "folder": str(inside)}
                await worker.ready()  # imports are not the job's time
                messages = worker.run(here)
                async with guard, contextlib.aclosing(messages):  # type: ignore[type-var]
                    async for message in messages:
                        if "done" in message or "refused" in message:
                            inside.rename(folder)
                            _seal(folder)
                            clean = True
                        yield message
            finally:
                if clean and self._may_stay(worker):
                    self._idle.append(worker)
                else:
                    await self._drop(worker)

    async def close(self) -> None:
        """Ends every process; jobs that still run fail."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(worker) for worker in list(self._all)))

    def _may_stay(self, worker: Worker) -> bool:
        # spares may have made one too many
        staying = sum(one.jobs < self._config.jobs_per_worker for one in self._all)
        few = staying <= self._config.workers
        return few and worker.jobs < self._config.jobs_per_worker and not self._closed

    async def _take(self, client: str) -> Worker:
        for dead in [worker for worker in self._idle if not worker.alive]:
            self._idle.remove(dead)
            await self._end(dead)
        # one that has worked for this client, else a fresh one, else in the place of another's
        known = [worker for worker in self._idle if worker.client == client]
        fresh = [worker for worker in self._idle if worker.client is None]
        for worker in (*known, *fresh):
            self._idle.remove(worker)
            break
        else:
            if self._idle:
                self._background(self._end(self._idle.pop(0)))
            worker = await self._new()
        worker.client = client
        return worker

    async def _new(self) -> Worker:
        if self._closed:
            text = "the server is stopping"
            raise CallError(grpc.StatusCode.UNAVAILABLE, "STOPPING", text)
        home = self._homes / uuid.uuid4().hex
        worker = await Worker.start(home, self._config.job_memory_bytes)
        self._all.add(worker)
        return worker

    async def _drop(self, worker: Worker) -> None:
        # shielded: whoever cancelled the job may cancel again, and the process must go all the same
        await asyncio.shield(self._background(self._end(worker)))
        if not self._closed and not self._idle:
            self._background(self._spare())

    async def _end(self, worker: Worker) -> None:
        await worker.end()
        self._all.discard(worker)

    async def _spare(self) -> None:
        self._idle.append(await self._new())

    def _background(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _died() -> CallError:
    text = "the worker process died over this job"
    return CallError(grpc.StatusCode.INTERNAL, "WORKER_DIED", text)


async def _spawn(
    home: pathlib.Path, memory: int, *arguments: str, **pipes: Any
) -> asyncio.subprocess.Process:
    """Starts a process in the jail; it gets nothing of ours but what is said here."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the folder the server was started in is no place for modules
        "-m",
        "secateur.service.worker",
        str(os.getpid()),
        str(home),
        *arguments,
        **{"stdin": asyncio.subprocess.DEVNULL, **pipes},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=MAX_LINE,
        start_new_session=True,
        cwd=home,
        env=_environment(home),
    )
    limit_allocations(process.pid, memory)
    return process


async def _kill(process: asyncio.subprocess.Process, relay: asyncio.Task[None]) -> None:
    """Kills a process with all it started, and waits until it is gone and its words are logged."""
    # by group, and even when the leader is dead: it may have left children
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    await relay


async def _relay(process: asyncio.subprocess.Process) -> None:
    """Logs what a process writes to standard error, marked as its own, up to a limit."""
    if process.stderr is None:
        return
    left = MAX_LOG
    while text := await process.stderr.read(4096):
        for line in text[:left].decode(errors="replace").splitlines():
            log.warning("worker %d says: %s", process.pid, line)
        left = max(left - len(text), 0)


def _seal(folder: pathlib.Path) -> None:
    """Makes sure that what a worker left can be read: as files, and as files that stay the same.

    A link would lead a reader out of the folder, a FIFO hold it up, a large report fill its memory;
    a file that the worker still has open could change after its content was checked.

    Raises:
        CallError: INTERNAL.
    """
    for entry in folder.iterdir():
        details = entry.lstat()
        if stat.S_ISDIR(details.st_mode):
            continue
        large = entry.name in _REPORTS and details.st_size > MAX_REPORT
        if not stat.S_ISREG(details.st_mode) or large or _is_written(entry):
            telemetry.WORKER_DEATHS.labels("WORKER_MISBEHAVED").inc()
            text = f"the worker process left {entry.name!r}, which is no file that it should leave"
            raise CallError(grpc.StatusCode.INTERNAL, "WORKER_MISBEHAVED", text)


def _is_written(path: pathlib.Path) -> bool:
    """Whether any process has a file open for writing; afterwards, none can open it so."""
    path.chmod(0o444)
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    with path.open("rb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)  # granted when there is no writer
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            return True
        except OSError:  # a file system without leases
            return False
    return False


def _environment(home: pathlib.Path) -> dict[str, str]:
    """The environment of a worker, with the way to this package wherever it was found."""
    package = str(pathlib.Path(secateur.__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    entries = [str(pathlib.Path(entry).absolute()) for entry in path.split(os.pathsep) if entry]
    return {
        **{name: value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)},
        "PYTHONPATH": os.pathsep.join([*entries, package]),
        "HOME": str(home),
        "TMPDIR": str(home),
    }
