"""The server's life: start, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import pathlib
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import IO

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from secateur import _wire
from secateur.errors import ServerError
from secateur.service.blobs import BlobStore
from secateur.service.bytestream import ByteStream
from secateur.service.config import ServerConfig
from secateur.service.errors import ErrorMap
from secateur.service.pool import WorkerPool
from secateur.service.servicer import Pruning
from secateur.v1 import bytestream_pb2, bytestream_pb2_grpc, pruning_pb2, pruning_pb2_grpc

log = logging.getLogger("secateur.service")

SERVICES = (
    pruning_pb2.DESCRIPTOR.services_by_name["Pruning"].full_name,
    bytestream_pb2.DESCRIPTOR.services_by_name["ByteStream"].full_name,
)

_OPTIONS = (
    *_wire.MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a helper
)


async def serve(config: ServerConfig, ready: Callable[[str], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT; then lets running calls finish, for a while.

    Args:
        config: checked here as well.
        ready: called with the address once the server takes calls, the chosen port in it.

    Raises:
        ValueError: the configuration is refused.
        ServerError: the address or the folder cannot be used.
    """
    config.check()
    stop = asyncio.Event()
    with _home(config) as folder, _signals(stop) as force:
        store = BlobStore(
            folder,
            max_bytes=config.max_blob_bytes,
            ttl_s=config.blob_ttl_s,
            durable=config.folder is not None,
        )
        pool = WorkerPool(config.workers, config.jobs_per_worker)
        health = health_aio.HealthServicer()
        server = _build(pool, store, health)
        address = _bind(server, config)
        async with _working(pool), _sweeping(store, config.blob_ttl_s):
            await server.start()
            for name in ("", *SERVICES):
                await health.set(name, health_pb2.HealthCheckResponse.SERVING)
            log.info("listening on %s", address)
            if ready is not None:
                ready(address)
            await stop.wait()
            log.info("stopping; calls have %g s to finish", config.grace_s)
            await health.enter_graceful_shutdown()
            await _drain(server, config.grace_s, force)


def _build(
    pool: WorkerPool, store: BlobStore, health: health_aio.HealthServicer
) -> grpc.aio.Server:
    # more interceptors (who may, how much, what is measured) come before the error map
    server = grpc.aio.server(interceptors=(ErrorMap(),), options=_OPTIONS)
    pruning_pb2_grpc.add_PruningServicer_to_server(Pruning(pool, store), server)
    bytestream_pb2_grpc.add_ByteStreamServicer_to_server(ByteStream(store), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


def _bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    """Binds the port, and tells the address with the port that was chosen."""
    try:
        port = server.add_insecure_port(config.listen)  # or a secure one, with credentials
    except RuntimeError as error:
        raise ServerError(f"cannot listen on {config.listen}: {error}") from None
    if config.listen.startswith("unix:"):
        return config.listen
    return f"{config.listen.rpartition(':')[0]}:{port}"


async def _drain(server: grpc.aio.Server, grace_s: float, force: asyncio.Event) -> None:
    """Stops the server: running calls may finish until the grace period ends or `force` is set."""
    graceful = asyncio.ensure_future(server.stop(grace_s))
    forced = asyncio.ensure_future(force.wait())
    await asyncio.wait((graceful, forced), return_when=asyncio.FIRST_COMPLETED)
    if not graceful.done():
        await server.stop(None)
    await graceful
    forced.cancel()


@contextlib.contextmanager
def _home(config: ServerConfig) -> Iterator[pathlib.Path]:
    with contextlib.ExitStack() as stack:
        try:
            if config.folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="secateur-")
                folder = pathlib.Path(stack.enter_context(temporary))
            else:
                folder = config.folder
                folder.mkdir(parents=True, exist_ok=True)
                _lock(stack.enter_context((folder / "lock").open("wb")))
        except BlockingIOError:
            raise ServerError(f"another server uses the folder {config.folder}") from None
        except OSError as error:
            raise ServerError(f"the server's folder cannot be used: {error}") from error
        yield folder


def _lock(file: IO[bytes]) -> None:
    """Holds the folder for as long as this process lives: a new server clears away old jobs."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[asyncio.Event]:
    """Sets `stop` on the first SIGTERM or SIGINT, and the event it gives on the second."""
    force = asyncio.Event()

    def on_signal() -> None:
        (force if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    handled = [signal.SIGTERM, signal.SIGINT]
    if threading.current_thread() is not threading.main_thread():
        handled = []  # whoever runs us in a thread has signals of their own
    for number in handled:
        loop.add_signal_handler(number, on_signal)
    try:
        yield force
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def _working(pool: WorkerPool) -> AsyncIterator[None]:
    try:
        await pool.start()
        yield
    finally:
        await pool.close()


@contextlib.asynccontextmanager
async def _sweeping(store: BlobStore, ttl_s: float) -> AsyncIterator[None]:
    async def sweep() -> None:
        while True:
            await asyncio.sleep(min(60.0, ttl_s / 4))
            try:
                await asyncio.to_thread(store.sweep)
            except OSError:
                log.exception("old blobs could not be removed")

    task = asyncio.ensure_future(sweep())
    try:
        yield
    finally:
        task.cancel()
