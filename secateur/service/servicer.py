"""secateur.v1.Pruning: thin methods over `Jobs` and `Runner`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from secateur import _wire
from secateur.report import Progress
from secateur.service.admission import Admission
from secateur.service.auth import caller
from secateur.service.jobs import Jobs
from secateur.service.runner import Runner
from secateur.v1 import pruning_pb2, pruning_pb2_grpc, report_pb2


class Pruning(pruning_pb2_grpc.PruningServicer):  # type: ignore[misc]
    """The methods.

    Args:
        jobs: what is done while the caller waits.
        runner: what is done whether or not anybody waits.
        admission: how much may be done and wait.
    """

    def __init__(self, jobs: Jobs, runner: Runner, admission: Admission) -> None:
        self._jobs = jobs
        self._runner = runner
        self._admission = admission

    async def Prune(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Prunes a model: progress, then the result."""
        client = caller()
        steps = self._jobs.prune(client, request)
        async with self._admission.call(client), contextlib.aclosing(steps):  # type: ignore[type-var]
            async for step in steps:
                if isinstance(step, Progress):
                    message = _wire.to_wire(step, report_pb2.Progress())
                    yield pruning_pb2.PruneResponse(progress=message)
                else:
                    result = await self._jobs.inlined(client, step)
                    yield pruning_pb2.PruneResponse(result=result)

    async def StartPrune(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Starts a prune that outlives the call."""
        return await self._runner.start(caller(), request)

    async def Inspect(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tells what can go."""
        client = caller()
        async with self._admission.call(client):
            found = await self._jobs.inspect(client, request)
        message = _wire.to_wire(found, report_pb2.Inspection())
        return pruning_pb2.InspectResponse(inspection=message)

    async def Profile(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Measures."""
        client = caller()
        async with self._admission.call(client):
            found = await self._jobs.profile(client, request)
        return pruning_pb2.ProfileResponse(profile=_wire.to_wire(found, report_pb2.Profile()))
