"""Worker processes: started warm, one job at a time each, killed whole.

The pool is the only place that knows processes. What comes later goes in here: resource limits and
namespaces where a worker is started, another executor (a cluster) where a job is run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

import secateur
from secateur.errors import ServerError
from secateur.service.errors import CallError

log = logging.getLogger("secateur.service")

MAX_LINE = 4 << 20  # bytes of one message from a worker; models travel as files


class Worker:
    """One worker process, leader of its own session and process group."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.jobs = 0
        self._ready = False

    @classmethod
    async def start(cls) -> Worker:
        """Starts a process, which imports the engine and waits for a job."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the folder the server was started in is no place for modules
            "-m",
            "secateur.service.worker",
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            start_new_session=True,
            env=_environment(),
        )
        log.info("worker %d started", process.pid)
        return cls(process)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.returncode is None

    async def ready(self) -> None:
        """Waits until the engine is imported. Raises as `run`."""
        if not self._ready:
            await self._read()
            self._ready = True

    async def run(self, job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Messages of a job, the last of which has one of the keys `done`, `refused`, `failed`.

        Raises:
            CallError: INTERNAL when the process dies or says what it should not.
        """
        self.jobs += 1
        await self.ready()
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # reading will tell
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            await self._process.stdin.drain()
        while True:
            message = await self._read()
            yield message
            if "progress" not in message:
                return

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = await self._process.stdout.readline()
            if line:
                message: dict[str, Any] = json.loads(line)
                return message
        except (ConnectionError, ValueError) as error:
            log.warning("worker %d: %s", self.pid, error)
        text = "the worker process died over this job"
        raise CallError(grpc.StatusCode.INTERNAL, "WORKER_DIED", text)

    async def end(self) -> None:
        """Kills the process with all it started, and waits until it is gone."""
        # by group, and even when the leader is dead: it may have left children
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()
        log.info("worker %d ended", self.pid)


class WorkerPool:
    """Runs jobs in worker processes, at most `workers` at once; more wait their turn.

    Args:
        workers: how many run at once.
        jobs_per_worker: jobs after which a process is replaced.
    """

    def __init__(self, workers: int, jobs_per_worker: int) -> None:
        self._workers = workers
        self._slots = asyncio.Semaphore(workers)
        self._jobs_per_worker = jobs_per_worker
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Starts a first process, so that the first job need not wait for imports.

        Raises:
            ServerError: the engine cannot be imported.
        """
        await self._spare()
        try:
            await self._idle[0].ready()
        except CallError:
            text = "no worker process can be started; its own error is in the log"
            raise ServerError(text) from None

    async def run(self, job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Messages of a job; see `Worker.run`. Closing the iterator kills the job at once."""
        async with self._slots:
            worker = await self._take()
            clean = False
            try:
                async with contextlib.aclosing(worker.run(job)) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        clean = "done" in message or "refused" in message
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
        few = len(self._all) <= self._workers
        return few and worker.jobs < self._jobs_per_worker and not self._closed

    async def _take(self) -> Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            await self._end(worker)
        return await self._new()

    async def _new(self) -> Worker:
        if self._closed:
            text = "the server is stopping"
            raise CallError(grpc.StatusCode.UNAVAILABLE, "STOPPING", text)
        worker = await Worker.start()
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


def _environment() -> dict[str, str]:
    """The environment of a worker: ours, and the way to this package wherever it was found."""
    package = str(pathlib.Path(secateur.__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([path, package] if path else [package])}
