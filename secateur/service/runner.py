"""Runs operations: takes them from the repository in their order, and tells how they stand.

The repository is the truth. What is only here (tasks, the latest progress, who waits) may go with
the process: the next one starts the operations again that ran. Where servers share a repository,
each looks every so often at what the others did.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import grpc
import pydantic
from google.longrunning import operations_pb2
from google.protobuf import timestamp_pb2
from google.rpc import status_pb2

from secateur import _trace, _wire
from secateur.operation import State
from secateur.report import Progress
from secateur.service import logs, telemetry
from secateur.service.admission import Admission
from secateur.service.errors import CallError, reason_of, status_of
from secateur.service.jobs import Jobs, blobs_of, key_of
from secateur.service.operations import Record, Repository
from secateur.v1 import pruning_pb2, report_pb2

log = logging.getLogger("secateur.service")

_T = TypeVar("_T")

NAME = "operations/"  # of an operation: this and its id
_PASSING = ("STORAGE", "OBJECT_STORE")  # reasons of errors that are worth another attempt
_TELLING = 0.1  # share of a job after which its own pace says more than what ran before
_AGAIN_S = 1.0  # until the next attempt to write down how an operation ended
_LOOK_S = 0.5  # between two looks at what other servers did
_BEATS = 4  # signs of life in the time after which a server without any is given up


class Runner:
    """The operations of one server.

    Args:
        repository: where they are.
        jobs: how they are done.
        admission: how many may wait.
        workers: how many run at once.
        max_attempts: how often one may be given to a worker: it may be what kills them.
    """

    def __init__(
        self,
        repository: Repository,
        jobs: Jobs,
        admission: Admission,
        *,
        workers: int,
        max_attempts: int,
    ) -> None:
        self._repository = repository
        self._jobs = jobs
        self._admission = admission
        self._workers = workers
        self._max_attempts = max_attempts
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, Progress] = {}
        self._parents: dict[str, _trace.Headers] = {}  # spans of the calls that started them
        self._ended: dict[str, asyncio.Event] = {}
        self._wake = asyncio.Event()
        self._claiming = asyncio.Lock()  # a claimed operation has a task before it is cancelled

    # ---- what clients ask for ----

    async def start(self, client: str, request: Any) -> operations_pb2.Operation:
        """The operation that a StartPruneRequest starts, or started before."""
        request_id = _request_id(request.request_id)
        key = await asyncio.to_thread(key_of, request)
        if request_id is not None:
            known = await asyncio.to_thread(self._repository.started_as, client, request_id, key)
            if known is not None:
                return await self._message(known)
        result = await self._jobs.known(client, key)
        if result is None:
            await self._admission.check(client)
        message = await self._jobs.lasting(client, request) if result is None else result
        content, needs = message.SerializeToString(), blobs_of(message)
        todo, done = (content, b"") if result is None else (b"", content)
        operation = await asyncio.to_thread(
            self._repository.add, client, key, todo, done, needs, request_id
        )
        if not operation.state.done:
            self._parents.setdefault(operation.id, _trace.headers())
        self._wake.set()
        return await self._message(operation)

    async def get(self, client: str, name: str) -> operations_pb2.Operation:
        """How an operation stands. Raises CallError, as all methods here."""
        return await self._message(await asyncio.to_thread(self._repository.get, client, _id(name)))

    async def page(
        self, client: str, states: Iterable[State], before: int | None, size: int
    ) -> tuple[list[operations_pb2.Operation], int | None]:
        """Operations, newest first, without responses; and where the next page starts."""
        found = await asyncio.to_thread(self._repository.page, client, states, before, size + 1)
        page = [await self._message(operation, response=False) for operation in found[:size]]
        return page, found[size - 1].number if len(found) > size else None

    async def wait(self, client: str, name: str, timeout: float) -> operations_pb2.Operation:
        """How an operation stands when it has ended, or after `timeout` seconds."""
        end = time.monotonic() + timeout
        operation = await asyncio.to_thread(self._repository.get, client, _id(name))
        while not operation.state.done and time.monotonic() < end:
            ended = self._ended.setdefault(operation.id, asyncio.Event())
            operation = await asyncio.to_thread(self._repository.get, client, operation.id)
            if operation.state.done:  # between the two looks
                self._forget(operation.id)
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), end - time.monotonic())
            operation = await asyncio.to_thread(self._repository.get, client, operation.id)
        return await self._message(operation)

    async def cancel(self, client: str, name: str) -> None:
        """Ends an operation and its worker; nothing happens to one that has ended."""
        async with self._claiming:
            operation = await asyncio.to_thread(self._repository.get, client, _id(name))
            text = "the operation was cancelled"
            status = _wire.failure_to_status(
                grpc.StatusCode.CANCELLED, text, "CANCELLED", operation.id
            )
            await self._end(operation.id, State.CANCELLED, error=status.SerializeToString())
            task = self._tasks.get(operation.id)
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def delete(self, client: str, name: str) -> None:
        """Forgets an operation that has ended."""
        await asyncio.to_thread(self._repository.delete, client, _id(name))

    # ---- work ----

    async def run(self) -> None:
        """Works until it is cancelled; operations that run then wait for the next server."""
        await self._surely(self._recover)
        try:
            async with asyncio.TaskGroup() as group:
                if self._repository.lease_s is not None:
                    group.create_task(self._follow(self._repository.lease_s))
                while True:
                    self._wake.clear()
                    await self._claim()
                    await self._wake.wait()
        finally:
            self._drop_all()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _recover(self) -> None:
        text = f"the server ended {self._max_attempts} times while this operation ran"
        failure = _wire.failure_to_status(grpc.StatusCode.ABORTED, text, "TOO_MANY_ATTEMPTS", "")
        for name in self._repository.recover(self._max_attempts, failure.SerializeToString()):
            log.warning(
                "the server that ran an operation is gone", extra=logs.fields(operation=name)
            )

    def _drop_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _follow(self, lease_s: float) -> None:
        """Gives signs of life, and acts on what other servers did, until it is cancelled.

        Without a sign of life others may run what runs here: it is stopped in good time.
        """
        beat_s, loop = lease_s / _BEATS, asyncio.get_running_loop()
        told, fuse = loop.time(), loop.call_later(lease_s / 2, self._drop_all)
        while True:
            await asyncio.sleep(min(_LOOK_S, beat_s))
            try:
                now = loop.time()
                if not self._tasks or now - told >= beat_s:
                    if self._tasks:
                        await asyncio.to_thread(self._repository.beat, self._steps())
                    fuse.cancel()
                    told, fuse = now, loop.call_at(now + lease_s / 2, self._drop_all)
                await asyncio.to_thread(self._recover)
                await self._compare()
            except (sqlite3.OperationalError, CallError):
                log.exception("the state of operations cannot be reached")

    def _steps(self) -> dict[str, bytes]:
        """The progress of what runs, as messages."""
        return {
            name: _wire.to_wire(step, report_pb2.Progress()).SerializeToString()
            for name, step in self._progress.items()
        }

    async def _compare(self) -> None:
        """Makes what is here agree with the repository, which other servers write to as well."""
        async with self._claiming:
            unfinished = await asyncio.to_thread(self._repository.unfinished)
            for name, task in self._tasks.items():
                if not unfinished.get(name):  # cancelled, or run by another server
                    task.cancel()
            for name, own in unfinished.items():
                if own and name not in self._tasks:  # nobody heard that it was claimed
                    await asyncio.to_thread(self._repository.release, name, False)
        for name in (self._ended.keys() | self._parents.keys()) - unfinished.keys():
            self._forget(name)
        self._wake.set()

    async def _claim(self) -> None:
        """Gives work to every worker that has none."""
        while len(self._tasks) < self._workers:
            async with self._claiming:
                operation = await self._surely(self._repository.claim)
                if operation is None:
                    return
                task = asyncio.create_task(self._work(operation))
                self._tasks[operation.id] = task

    async def _work(self, operation: Record) -> None:
        name = operation.id
        logs.add_ids(operation=name, client=operation.client)
        span = _trace.start("operation", parent=self._parents.get(name, ()))
        span.set(operation=name, attempt=operation.attempts)
        span.enter()  # for good: each operation has a task of its own
        log.info("operation started", extra=logs.fields(attempt=operation.attempts))
        try:
            result = await self._pruned(operation)
            needs = blobs_of(result)
            content = result.SerializeToString()
            await self._end(name, State.SUCCEEDED, response=content, needs=needs)
        except asyncio.CancelledError:  # it was cancelled, or the server stops
            with contextlib.suppress(sqlite3.Error, CallError):  # else the next server recovers it
                await asyncio.to_thread(self._repository.release, name, False)
            raise
        except Exception as error:
            await self._failed(operation, error)
        finally:
            span.end()
            del self._tasks[name]
            self._progress.pop(name, None)
            self._wake.set()

    async def _pruned(self, operation: Record) -> Any:
        request = pruning_pb2.StartPruneRequest.FromString(operation.request)
        steps = self._jobs.prune(operation.client, request)
        result = None
        async with contextlib.aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                if isinstance(step, Progress):
                    self._progress[operation.id] = step
                else:
                    result = step
        return result

    async def _failed(self, operation: Record, error: Exception) -> None:
        died = isinstance(error, CallError) and error.reason == "WORKER_DIED"
        if died and operation.attempts < self._max_attempts:
            log.warning("the worker died over the operation, which is run again")
            await self._surely(self._repository.release, operation.id, True)
            return
        telemetry.REFUSALS.labels(reason_of(error)).inc()
        status = status_of(error, operation.id)
        if status.code == grpc.StatusCode.INTERNAL.value[0]:
            log.error("the operation failed", exc_info=error)
        await self._end(operation.id, State.FAILED, error=status.SerializeToString())

    async def _end(self, name: str, state: State, **outcome: Any) -> None:
        """Writes down how an operation ended, however long that takes, and tells who waits."""

        def finish() -> bool:
            return self._repository.finish(name, state, **outcome)

        if await self._surely(finish):
            log.info("operation ended", extra=logs.fields(operation=name, state=state))
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Drops what is kept here of an operation that has ended, and tells who waits for it."""
        self._parents.pop(name, None)
        ended = self._ended.pop(name, None)
        if ended is not None:
            ended.set()

    async def _surely(self, function: Callable[..., _T], *args: Any) -> _T:
        """The result of a function, which is called again while the disk is full or fails."""
        while True:
            try:
                return await asyncio.to_thread(function, *args)
            except (sqlite3.OperationalError, CallError) as error:
                if isinstance(error, CallError) and error.reason not in _PASSING:
                    raise
                log.exception("the state of operations cannot be written")
                await asyncio.sleep(_AGAIN_S)

    # ---- messages ----

    async def _message(
        self, operation: Record, *, response: bool = True
    ) -> operations_pb2.Operation:
        message = operations_pb2.Operation(name=NAME + operation.id, done=operation.state.done)
        message.metadata.Pack(await asyncio.to_thread(self._metadata, operation))
        if operation.error is not None:
            message.error.CopyFrom(status_pb2.Status.FromString(operation.error))
        elif operation.response is not None and response:
            message.response.Pack(pruning_pb2.PruneResult.FromString(operation.response))
        return message

    def _metadata(self, operation: Record) -> Any:
        progress = self._progress.get(operation.id) or _told(operation)
        metadata = pruning_pb2.PruneMetadata(
            state=f"OPERATION_STATE_{operation.state}", attempts=operation.attempts
        )
        if operation.state is State.RUNNING and progress is not None:
            metadata.progress.CopyFrom(_wire.to_wire(progress, report_pb2.Progress()))
        waiting = 0
        if operation.state is State.QUEUED:
            waiting = self._repository.waiting_before(operation)
            metadata.queue_position = waiting
        times = {
            "create_time": operation.created,
            "start_time": operation.started,
            "end_time": operation.ended,
            "expire_time": operation.expires,
            "estimated_end_time": self._estimate(operation, progress, waiting),
        }
        for field, seconds in times.items():
            if seconds is not None:
                getattr(metadata, field).CopyFrom(_timestamp(seconds))
        return metadata

    def _estimate(self, operation: Record, progress: Progress | None, waiting: int) -> float | None:
        """When an operation will end, in seconds since 1970; None when nothing is known."""
        now = self._repository.now()
        if operation.state.done:
            return None
        if operation.started is not None and progress is not None:
            ran = now - operation.started
            if progress.fraction >= _TELLING:
                return operation.started + ran / progress.fraction
        usual = self._repository.usual_seconds()
        if usual is None:
            return None
        if operation.started is not None:
            return max(now, operation.started + usual)
        rounds = waiting // self._workers + 1
        return now + usual * (rounds + (len(self._tasks) >= self._workers))


def _told(operation: Record) -> Progress | None:
    """The progress that the server which runs an operation told of; None when it told of none."""
    if operation.progress is None:
        return None
    with contextlib.suppress(pydantic.ValidationError):  # a stage that only newer servers know
        return _wire.from_wire(report_pb2.Progress.FromString(operation.progress), Progress)
    return None


def _id(name: str) -> str:
    if not name.startswith(NAME):
        text = f"bad name {name[:200]!r}: expected {NAME}{{id}}"
        raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_RESOURCE_NAME", text)
    return name.removeprefix(NAME)


def _request_id(text: str) -> str | None:
    if not text:
        return None
    try:
        return str(uuid.UUID(text))
    except ValueError:
        text = f"request_id {text[:64]!r} is not a UUID"
        raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST_ID", text) from None


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    whole = int(seconds)
    return timestamp_pb2.Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))
