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

from secateur import _trace, _wire
from secateur._calls import Calls, methods, run
from secateur._connect import Metadata, Tls, headers
from secateur.operation import Operation
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Inspection, Profile, ProgressCallback
from secateur.result import Result

_T = TypeVar("_T")


class Client:
    """Talks to a Secateur server; same calls, types and bytes as in process. Thread-safe.

    Args:
        target: `host:port`, or any gRPC target name.
        timeout: of each call with its transfers, in seconds, unless the call says otherwise;
            None: no limit.
        tls: how to connect by TLS; None: without.
        token: what tells the server who calls; only by TLS, or to this machine itself.

    Raises:
        OSError: a file of `tls` cannot be read.
        ValueError: the token would travel readable; a certificate has no key.
    """

    def __init__(
        self,
        target: str,
        timeout: float | None = None,
        *,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        metadata = headers(target, tls, token)
        options = _wire.channel_options(target)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=options)
        self._calls = Calls(_Transport(self._channel, target, metadata), timeout)

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
        *,
        labels: Any = None,
    ) -> Result:
        """Prunes a model on the server.

        Args:
            model: a path, serialised bytes, `onnx.ModelProto`, `onnx_ir.Model` or `gs.Graph`;
                a path may have external data in files beside it.
            recipe: what to prune and how far; None: every default, or the plan's.
            calibration: a path to an `.npz` or a folder of them, or a mapping input → array with
                samples along axis 0.
            plan: a saved plan to replay.
            progress: called with each step, in the calling thread.
            timeout: in seconds, transfers included; None: the client's.
            labels: of the calibration samples, or with samples of their own; given like them, in
                arrays named after outputs. Original and result are scored by them.

        Raises:
            Refused: the request cannot be honoured. VerificationFailed: nor its result.
            ServerError: the server cannot be reached, or failed.
            Cancelled: `timeout` passed.
        """
        return run(self._calls.prune(model, recipe, calibration, labels, plan, progress, timeout))

    def inspect(
        self,
        model: Any,
        recipe: Recipe | None = None,
        calibration: Any = None,
        timeout: float | None = None,
    ) -> Inspection:
        """Tells what can go in a model, what must stay and why. Arguments and errors as `prune`.

        With calibration data, also what a cut of each group does to the outputs.
        """
        return run(self._calls.inspect(model, recipe, calibration, timeout))

    def profile(self, model: Any, against: Any = None, timeout: float | None = None) -> Profile:
        """Measures a model, and `against` alternately with it. Arguments and errors as `prune`."""
        return run(self._calls.profile(model, against, timeout))

    # ---- operations ----

    def start_prune(
        self,
        model: Any,
        recipe: Recipe | None = None,
        calibration: Any = None,
        plan: Plan | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        *,
        labels: Any = None,
    ) -> Operation:
        """Starts a prune that outlives this call, this program and the server's process.

        Args:
            model, recipe, calibration, plan, labels: as for `prune`.
            request_id: a UUID; the same one never starts a second operation. None: a new one,
                with which the call is repeated where that is safe.
            timeout: in seconds, transfers included; None: the client's.

        Raises:
            Refused: the request cannot be honoured, as far as that shows without working on it.
            ServerError: as for `prune`. ServerBusy: come again later.
            Cancelled: `timeout` passed.
        """
        return run(
            self._calls.start_prune(model, recipe, calibration, labels, plan, request_id, timeout)
        )

    def get_operation(self, operation: Operation | str, timeout: float | None = None) -> Operation:
        """How an operation stands now. Raises ServerError when the server does not know it."""
        return run(self._calls.get_operation(operation, timeout))

    def list_operations(
        self,
        filter: str = "",  # noqa: A002
        limit: int | None = None,
        timeout: float | None = None,
    ) -> list[Operation]:
        """Operations of this client, newest first.

        Args:
            filter: `state=…` or `done=true|false`, or both joined by ` AND `; empty: all.
            limit: how many at most; None: all.
            timeout: in seconds; None: the client's.

        Raises:
            ServerError: the filter is not understood, or as for `prune`.
        """
        return run(self._calls.list_operations(filter, limit, timeout))

    def wait_operation(
        self,
        operation: Operation | str,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> Operation:
        """How an operation stands when it has ended, or after `timeout` seconds (None: for ever).

        Args:
            operation: it, or its name.
            progress: called about once a second with the latest step, in the calling thread.
            timeout: in seconds; then `done` of what is returned says whether it has ended.
        """
        return run(self._calls.wait_operation(operation, progress, timeout))

    def cancel_operation(self, operation: Operation | str, timeout: float | None = None) -> None:
        """Ends an operation and its work; nothing happens to one that has ended."""
        run(self._calls.cancel_operation(operation, timeout))

    def delete_operation(self, operation: Operation | str, timeout: float | None = None) -> None:
        """Has the server forget an operation that has ended. Raises ServerError if it has not."""
        run(self._calls.delete_operation(operation, timeout))

    def operation_result(self, operation: Operation | str, timeout: float | None = None) -> Result:
        """What an operation that has ended gave.

        Raises:
            Refused: as `prune` would have. Cancelled: it was, or `timeout` passed.
            ServerError: it failed for another reason, or has not ended.
        """
        return run(self._calls.operation_result(operation, timeout))

    def health(self, timeout: float | None = None) -> bool:
        """Whether the server takes calls now (`timeout` in seconds). Raises ServerError."""
        return run(self._calls.health(timeout))


class _Transport:
    """Blocks, and so never suspends. Every call is cancelled when an exception (Ctrl-C) ends it."""

    def __init__(self, channel: grpc.Channel, target: str, metadata: Metadata) -> None:
        self.target = target
        self._methods = methods(channel)
        self._metadata = metadata

    def _headers(self) -> Metadata:
        return (*self._metadata, *_trace.headers())

    async def unary(self, method: str, request: Any, timeout: float | None) -> Any:
        return self._wait(
            self._methods[method].future(request, timeout=timeout, metadata=self._headers())
        )

    async def stream(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        call = self._methods[method](request, timeout=timeout, metadata=self._headers())
        try:
            for response in call:
                yield response
        finally:
            call.cancel()

    async def write(self, requests: Iterator[bytes], timeout: float | None) -> Any:
        return self._wait(
            self._methods["Write"].future(requests, timeout=timeout, metadata=self._headers())
        )

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
