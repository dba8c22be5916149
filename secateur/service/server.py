"""The server's life: start, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import pathlib
import signal
import sqlite3
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import IO, Any

import grpc.aio
from google.longrunning import operations_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from secateur import _trace, _wire
from secateur.errors import ServerError
from secateur.service import auth, telemetry
from secateur.service.admission import Admission
from secateur.service.blobs import BlobStore
from secateur.service.bytestream import ByteStream
from secateur.service.config import ServerConfig
from secateur.service.errors import CallError, ErrorMap
from secateur.service.jobs import Jobs
from secateur.service.longrunning import Operations
from secateur.service.operations import Repository
from secateur.service.pool import WorkerPool
from secateur.service.remote import RemoteBlobs
from secateur.service.runner import Runner
from secateur.service.servicer import Pruning
from secateur.service.shared import SharedRepository
from secateur.v1 import bytestream_pb2, pruning_pb2, pruning_pb2_grpc

log = logging.getLogger("secateur.service")

SERVICES = (
    pruning_pb2.DESCRIPTOR.services_by_name["Pruning"].full_name,
    bytestream_pb2.DESCRIPTOR.services_by_name["ByteStream"].full_name,
    "google.longrunning.Operations",
)

_OPTIONS = (
    *_wire.MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a helper
    ("grpc.keepalive_time_ms", _wire.KEEPALIVE_MS),  # ends the work of a client that vanished
    ("grpc.http2.min_ping_interval_without_data_ms", _wire.KEEPALIVE_MS // 2),
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
        repository, store = _storage(config, folder)
        pool = WorkerPool(config, folder / "workers")
        jobs = Jobs(pool, store, repository, config)
        admission = Admission(
            repository,
            workers=config.workers,
            max_queued=config.max_queued,
            max_jobs_per_client=config.max_jobs_per_client,
        )
        runner = Runner(
            repository,
            jobs,
            admission,
            workers=config.workers,
            max_attempts=config.max_attempts,
        )
        health = health_aio.HealthServicer()
        server = _build(config, Pruning(jobs, runner, admission), runner, store, health)
        address = _bind(server, config.listen, _credentials(config))
        async with (
            _closing(repository),
            _probed(config.health_listen, health),
            _seen(config.metrics_listen, repository),
            _working(pool),
            _forever(runner.run(), stop),
            _forever(_sweep(repository, store, config), stop),
        ):
            await server.start()
            for name in ("", *SERVICES):
                await health.set(name, health_pb2.HealthCheckResponse.SERVING)
            log.info("listening on %s", address)
            if ready is not None:
                ready(address)
            await stop.wait()
            await health.enter_graceful_shutdown()
            if config.lame_duck_s:
                log.info("not serving from in %g s on", config.lame_duck_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(force.wait(), config.lame_duck_s)
            log.info("stopping; calls have %g s to finish", config.grace_s)
            await _drain(server, config.grace_s, force)


def _storage(config: ServerConfig, folder: pathlib.Path) -> tuple[Repository, BlobStore]:
    """Where operations and blobs lie. Raises ServerError."""
    durable = config.folder is not None
    try:
        remote = RemoteBlobs(config.object_store) if config.object_store else None
        repository = _repository(config, folder / "operations.sqlite", durable)
        store = BlobStore(
            folder,
            repository,
            max_bytes=config.max_blob_bytes,
            quota=config.max_stored_bytes,
            ttl_s=config.blob_ttl_s,
            durable=durable,
            remote=remote,
        )
    except (OSError, ValueError, sqlite3.Error, CallError) as error:
        raise ServerError(f"the server's storage cannot be used: {error}") from error
    return repository, store


def _repository(config: ServerConfig, path: pathlib.Path, durable: bool) -> Repository:
    """Where operations are: in a file of this server, or where servers share them."""
    if config.object_store and config.share_operations:
        return SharedRepository(
            config.object_store, ttl_s=config.operation_ttl_s, lease_s=config.lease_s
        )
    return Repository(path, durable=durable, ttl_s=config.operation_ttl_s)


def check(config: ServerConfig) -> None:
    """Refuses a configuration that `serve` would refuse, without serving.

    Raises:
        ValueError: as `ServerConfig.check`. ServerError: a file that it names cannot be used.
    """
    config.check()
    _interceptors(config)
    _credentials(config)


def _interceptors(config: ServerConfig) -> list[grpc.aio.ServerInterceptor]:
    """What every call passes, the outermost first. Raises ServerError."""
    if config.clients is None:
        return [ErrorMap()]
    path = config.clients
    try:
        return [ErrorMap(), auth.Gate(auth.Reloaded((path,), lambda: auth.load_clients(path)))]
    except (OSError, ValueError) as error:
        raise ServerError(str(error)) from None


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS as configured; None: without. Raises ServerError."""
    certificate, key, client_ca = config.tls_certificate, config.tls_key, config.tls_client_ca
    if certificate is None or key is None:
        return None
    paths = tuple(path for path in (certificate, key, client_ca) if path is not None)
    try:
        tls = auth.Reloaded(paths, lambda: auth.load_tls(certificate, key, client_ca))
    except (OSError, ValueError) as error:
        raise ServerError(str(error)) from None
    return auth.server_credentials(tls, ask_clients=client_ca is not None)


def _build(
    config: ServerConfig,
    pruning: Pruning,
    runner: Runner,
    store: BlobStore,
    health: health_aio.HealthServicer,
) -> grpc.aio.Server:
    server = grpc.aio.server(
        interceptors=_interceptors(config),
        options=_OPTIONS,
        maximum_concurrent_rpcs=config.max_calls,
    )
    pruning_pb2_grpc.add_PruningServicer_to_server(pruning, server)
    operations_pb2_grpc.add_OperationsServicer_to_server(Operations(runner), server)
    ByteStream(store).add_to(server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    """Binds the port, and tells the address with the port that was chosen."""
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise ServerError(f"cannot listen on {listen}: {error}") from None
    if listen.startswith("unix:"):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


@contextlib.asynccontextmanager
async def _probed(listen: str | None, health: health_aio.HealthServicer) -> AsyncIterator[None]:
    """Answers health checks, and nothing else, on a port of their own, until the very end."""
    if listen is None:
        yield
        return
    server = grpc.aio.server(options=_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    log.info("health checks on %s", _bind(server, listen, None))
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def _seen(listen: str | None, repository: Repository) -> AsyncIterator[None]:
    """Shows metrics, and sends traces."""
    telemetry.watch(telemetry.OPERATIONS, lambda: repository.count("")[0])
    telemetry.watch(telemetry.STORED, repository.stored)
    flush = _trace.set_up("secateur")
    try:
        with telemetry.exposed(listen):
            yield
    finally:
        await asyncio.to_thread(flush)


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
async def _closing(repository: Repository) -> AsyncIterator[None]:
    try:
        yield
    finally:
        repository.close()


@contextlib.asynccontextmanager
async def _forever(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> AsyncIterator[None]:
    """Has something done beside, until the block ends; sets `stop` should it end before."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.critical("the server cannot go on", exc_info=task.exception())
            stop.set()

    task = asyncio.ensure_future(work)
    task.add_done_callback(ended)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _sweep(repository: Repository, store: BlobStore, config: ServerConfig) -> None:
    """Removes what is old: operations, then blobs that none of them needs any more."""
    while True:
        await asyncio.sleep(min(60.0, config.blob_ttl_s / 4, config.operation_ttl_s / 4))
        try:
            await asyncio.to_thread(repository.expire)
            await asyncio.to_thread(store.sweep)
        except (OSError, sqlite3.Error, CallError):
            log.exception("what is old could not be removed")
