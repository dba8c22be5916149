"""Who may come in: work beyond what can wait is refused at once, with the time to come again."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
from collections.abc import AsyncIterator

import grpc

from secateur.service.errors import CallError
from secateur.service.operations import Repository

_SOONEST_S, _LATEST_S = 1.0, 60.0  # when a refused caller is told to come again


class Admission:
    """Counts the work that is here: calls, which this process knows, and operations.

    Args:
        repository: the operations.
        workers: how much is worked on at once.
        max_queued: how much more may wait.
        max_jobs_per_client: how much of both one client may have.
    """

    def __init__(
        self, repository: Repository, *, workers: int, max_queued: int, max_jobs_per_client: int
    ) -> None:
        self._repository = repository
        self._workers = workers
        self._max_jobs = workers + max_queued
        self._max_jobs_per_client = max_jobs_per_client
        self._calls: collections.Counter[str] = collections.Counter()

    @contextlib.asynccontextmanager
    async def call(self, client: str) -> AsyncIterator[None]:
        """Holds the place of a call while it lasts. Raises CallError RESOURCE_EXHAUSTED."""
        await self.check(client)
        self._calls[client] += 1
        try:
            yield
        finally:
            self._calls[client] -= 1
            if not self._calls[client]:
                del self._calls[client]

    async def check(self, client: str) -> None:
        """Whether one more may come in. Raises CallError RESOURCE_EXHAUSTED."""
        operations, own = await asyncio.to_thread(self._repository.count, client)
        jobs = operations + self._calls.total()
        own += self._calls[client]
        if jobs >= self._max_jobs:
            text = f"the server has {jobs} jobs, which is all that may run and wait"
            raise await self._busy("QUEUE_FULL", text, jobs)
        if own >= self._max_jobs_per_client:
            text = f"this client has {own} jobs, which is all that one client may have"
            raise await self._busy("CLIENT_QUOTA", text, own)

    async def _busy(self, reason: str, text: str, jobs: int) -> CallError:
        usual = await asyncio.to_thread(self._repository.usual_seconds)
        wait = min(max((usual or 0.0) * jobs / self._workers, _SOONEST_S), _LATEST_S)
        # spread, so that those who were refused together do not come together
        wait *= random.uniform(1.0, 1.5)
        return CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, text, retry_s=wait)
