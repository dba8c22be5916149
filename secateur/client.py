"""The sync client.

with secateur.Client("localhost:50051") as client:
    result = client.prune("model.onnx", secateur.Recipe(target={"macs": 0.5}))
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2_grpc

from secateur import _wire
from secateur._calls import Calls, run
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Inspection, Profile, ProgressCallback
from secateur.result import Result
from secateur.v1 import bytestream_pb2_grpc, pruning_pb2_grpc

_T = TypeVar("_T")


class Client:
    """Talks to a Secateur server; same calls, types and bytes as in process. Thread-safe.

    Args:
        target: `host:port`, or any gRPC target name.
        timeout: of each call with its transfers, in seconds, unless the call says otherwise;
            None: no limit.
    """

    def __init__(self, target: str, timeout: float | None = None) -> None:
        # TLS and tokens come in here: a channel with credentials instead
        self._channel = grpc.insecure_channel(target, options=_wire.channel_options(target))
        self._calls = Calls(_Transport(self._channel, target), timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; running calls end as cancelled."""
        self._channel.close()

    def prune(
        self,
        model: Any,
        recipe: Recipe | None = None,
        calibration: Any = None,
        plan: Plan | None = None,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Prunes a model on the server.

        Args:
            model: a path, serialised bytes, `onnx.ModelProto`, `onnx_ir.Model` or `gs.Graph`,
                without external data.
            recipe: what to prune and how far; None: every default, or the plan's.
            calibration: a path to an `.npz` or a folder of them, or a mapping input → array with
                samples along axis 0.
            plan: a saved plan to replay.
            progress: called with each step, in the calling thread.
            timeout: in seconds, transfers included; None: the client's.

        Raises:
            Refused: the request cannot be honoured. VerificationFailed: nor its result.
            ServerError: the server cannot be reached, or failed.
            Cancelled: `timeout` passed.
        """
        return run(self._calls.prune(model, recipe, calibration, plan, progress, timeout))

    def inspect(
        self, model: Any, recipe: Recipe | None = None, timeout: float | None = None
    ) -> Inspection:
        """Tells what can go in a model, what must stay and why. Arguments and errors as `prune`."""
        return run(self._calls.inspect(model, recipe, timeout))

    def profile(self, model: Any, against: Any = None, timeout: float | None = None) -> Profile:
        """Measures a model, and `against` alternately with it. Arguments and errors as `prune`."""
        return run(self._calls.profile(model, against, timeout))

    def health(self, timeout: float | None = None) -> bool:
        """Whether the server takes calls now (`timeout` in seconds). Raises ServerError."""
        return run(self._calls.health(timeout))


class _Transport:
    """Blocks, and so never suspends. Every call is cancelled when an exception (Ctrl-C) ends it."""

    def __init__(self, channel: grpc.Channel, target: str) -> None:
        self.target = target
        pruning = pruning_pb2_grpc.PruningStub(channel)
        blobs = bytestream_pb2_grpc.ByteStreamStub(channel)
        self._methods: dict[str, Any] = {
            "Prune": pruning.Prune,
            "Inspect": pruning.Inspect,
            "Profile": pruning.Profile,
            "Check": health_pb2_grpc.HealthStub(channel).Check,
            "Read": blobs.Read,
            "Write": blobs.Write,
            "QueryWriteStatus": blobs.QueryWriteStatus,
        }

    async def unary(self, method: str, request: Any, timeout: float | None) -> Any:
        return self._wait(self._methods[method].future(request, timeout=timeout))

    async def stream(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        call = self._methods[method](request, timeout=timeout)
        try:
            for response in call:
                yield response
        finally:
            call.cancel()

    async def write(self, requests: Iterator[Any], timeout: float | None) -> Any:
        return self._wait(self._methods["Write"].future(requests, timeout=timeout))

    async def blocking(self, function: Callable[..., _T], *args: Any) -> _T:
        return function(*args)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    @staticmethod
    def _wait(call: Any) -> Any:
        try:
            return call.result()
        finally:
            call.cancel()
