"""What calls and operations have in common: messages to files, a job to a worker, files to values.

Each job has a folder of its own while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import pathlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import secateur
from secateur import _wire
from secateur.errors import Code, Refusal, raised, refuse
from secateur.recipe import Recipe
from secateur.report import Inspection, Profile, Progress, Report
from secateur.service import telemetry
from secateur.service.blobs import BlobName, BlobStore
from secateur.service.config import ServerConfig
from secateur.service.operations import Repository
from secateur.service.pool import WorkerPool
from secateur.v1 import pruning_pb2, report_pb2


class Jobs:
    """The work behind every method.

    Args:
        pool: who does it.
        store: where files come from and go to.
        repository: what was done before.
        config: limits, and whether a prune that was done before is answered from there.
    """

    def __init__(
        self, pool: WorkerPool, store: BlobStore, repository: Repository, config: ServerConfig
    ) -> None:
        self._pool = pool
        self._store = store
        self._repository = repository
        self._config = config

    async def prune(self, client: str, request: Any) -> AsyncIterator[Any]:
        """Progress any number of times, then a PruneResult whose payloads are blobs.

        Args:
            client: who asks.
            request: a PruneRequest, or a StartPruneRequest.
        """
        self._check_sizes(request)
        key = await asyncio.to_thread(key_of, request)
        known = await self.known(client, key)
        if known is not None:
            yield known
            return
        async with self._folder() as folder:
            job = self._job("prune", folder, recipe=_recipe(request))
            await self._place(client, request.model, folder / "model.onnx", Code.INVALID_MODEL)
            job["calibration"] = await self._place_calibration(client, request, folder)
            job["plan"] = request.HasField("plan")
            if job["plan"]:
                await self._place(client, request.plan, folder / "plan.json", Code.INVALID_PLAN)
            async with contextlib.aclosing(self._run(client, job)) as steps:  # type: ignore[type-var]
                async for step in steps:
                    yield step
            result = await self._result(client, folder)
        content = result.SerializeToString()
        await asyncio.to_thread(self._repository.remember, client, key, content, blobs_of(result))
        yield result

    async def known(self, client: str, key: str) -> Any:
        """The PruneResult of the same request before, payloads as blobs; None when there is none.

        The same model, recipe, calibration data, plan and version give the same bytes.
        """
        if not self._config.cache:
            return None
        content = await asyncio.to_thread(self._repository.recall, client, key)
        telemetry.CACHE.labels("miss" if content is None else "hit").inc()
        return None if content is None else pruning_pb2.PruneResult.FromString(content)

    async def inspect(self, client: str, request: Any) -> Inspection:
        """What an InspectRequest asks for."""
        self._check_sizes(request)
        async with self._folder() as folder:
            job = self._job("inspect", folder, recipe=_recipe(request))
            await self._place(client, request.model, folder / "model.onnx", Code.INVALID_MODEL)
            await self._finish(client, job)
            found: Inspection = await asyncio.to_thread(
                _load, folder / "inspection.json", Inspection
            )
            return found

    async def profile(self, client: str, request: Any) -> Profile:
        """What a ProfileRequest asks for."""
        self._check_sizes(request)
        async with self._folder() as folder:
            job = self._job("profile", folder)
            await self._place(client, request.model, folder / "model.onnx", Code.INVALID_MODEL)
            job["against"] = request.HasField("against")
            if job["against"]:
                target = folder / "against.onnx"
                await self._place(client, request.against, target, Code.INVALID_MODEL)
            await self._finish(client, job)
            found: Profile = await asyncio.to_thread(_load, folder / "profile.json", Profile)
            return found

    # ---- in ----

    async def lasting(self, client: str, request: Any) -> Any:
        """A StartPruneRequest, checked, that can be worked on later: every payload is a blob.

        Raises:
            Refused: it lacks or misnames something. CallError: NOT_FOUND for a blob not here.
        """
        self._check_sizes(request)
        _recipe(request)
        lasting = pruning_pb2.StartPruneRequest()
        lasting.CopyFrom(request)
        _calibration_names(lasting)
        wanted = Code.INVALID_MODEL, Code.INVALID_CALIBRATION, Code.INVALID_PLAN
        for name, payload in _payloads(lasting):
            sent = payload.WhichOneof("content")
            if sent is None:
                code = next((c for c in wanted if name in c.lower()), Code.INVALID_MODEL)
                raise _nothing_sent(code, name)
            if sent == "inline":
                blob = await asyncio.to_thread(self._store.adopt_bytes, client, payload.inline)
                payload.blob.CopyFrom(_message(blob))
            else:
                await asyncio.to_thread(self._store.get, client, _blob(payload))
        return lasting

    def _check_sizes(self, request: Any) -> None:
        """Refuses what is too large before it is looked at. Raises Refused."""
        sizes = {"model": 0, "against": 0, "calibration": 0, "plan": 0}
        for name, payload in _payloads(request):
            sizes[name] += _size(payload)
        most = self._config.max_model_bytes
        for name, limit in (
            ("model", most),
            ("against", most),
            ("calibration", self._config.max_calibration_bytes),
        ):
            if sizes[name] > limit:
                raise refuse(
                    Code.LIMIT_EXCEEDED,
                    f"the request's {name} is larger than this server takes, in bytes",
                    expected=f"at most {limit}",
                    found=sizes[name],
                )

    def _job(self, call: str, folder: pathlib.Path, **more: Any) -> dict[str, Any]:
        """What a worker is told."""
        config = self._config
        limits = {
            "max_nodes": config.max_nodes,
            "max_decompressed_bytes": config.max_decompressed_bytes,
        }
        return {"call": call, "folder": str(folder), **limits, **more}

    @contextlib.asynccontextmanager
    async def _folder(self) -> AsyncIterator[pathlib.Path]:
        folder = await asyncio.to_thread(self._store.new_job)
        try:
            yield folder
        finally:
            await asyncio.to_thread(self._store.end_job, folder)

    async def _place(self, client: str, payload: Any, target: pathlib.Path, code: Code) -> None:
        """Makes a payload a file. Raises Refused with `code` when nothing was sent."""
        sent = payload.WhichOneof("content")
        if sent == "inline":
            await asyncio.to_thread(target.write_bytes, payload.inline)
        elif sent == "blob":
            await asyncio.to_thread(self._store.link, client, _blob(payload), target)
        else:
            raise _nothing_sent(code, target.name)

    async def _place_calibration(
        self, client: str, request: Any, folder: pathlib.Path
    ) -> str | None:
        """Name in `folder` of the calibration data: a file, or a folder when several were sent."""
        if not request.HasField("calibration"):
            return None
        names = _calibration_names(request)
        home = folder / "calibration"
        home.mkdir()
        for part, name in zip(request.calibration.parts, names, strict=True):
            await self._place(client, part.content, home / name, Code.INVALID_CALIBRATION)
        return f"calibration/{names[0]}" if len(names) == 1 else "calibration"

    # ---- work ----

    async def _run(self, client: str, job: dict[str, Any]) -> AsyncIterator[Progress]:
        """Steps of a job; ends when its files are there.

        Raises:
            Refused: the engine refused. CallError: the worker died. RuntimeError: a defect of ours.
        """
        with telemetry.JobWatch(job["call"]) as watch:
            async with contextlib.aclosing(self._pool.run(client, job)) as messages:  # type: ignore[type-var]
                async for message in messages:
                    if "progress" in message:
                        step = Progress.model_validate(message["progress"])
                        watch.stage(step.stage)
                        yield step
                    elif "refused" in message:
                        raise raised(Refusal.model_validate(message["refused"]))
                    elif "failed" in message:
                        raise RuntimeError(f"in the worker: {message['failed']}")

    async def _finish(self, client: str, job: dict[str, Any]) -> None:
        async with contextlib.aclosing(self._run(client, job)) as steps:  # type: ignore[type-var]
            async for _ in steps:
                pass

    # ---- out ----

    async def _result(self, client: str, folder: pathlib.Path) -> Any:
        report = await asyncio.to_thread(_load, folder / "report.json", Report)
        return pruning_pb2.PruneResult(
            model=await self._payload(client, folder / "result.onnx"),
            plan=await self._payload(client, folder / "result.json"),
            report=_wire.to_wire(report, report_pb2.Report()),
        )

    async def _payload(self, client: str, path: pathlib.Path) -> Any:
        # hashed here, though the worker knows: a worker is not trusted with the names of blobs
        blob = await asyncio.to_thread(self._store.adopt, client, path)
        return pruning_pb2.Payload(blob=_message(blob))

    async def inlined(self, client: str, result: Any) -> Any:
        """A PruneResult with small payloads in the message, for who is waiting for them now."""
        answer = pruning_pb2.PruneResult()
        answer.CopyFrom(result)
        for payload in (answer.model, answer.plan):
            if payload.blob.size_bytes <= _wire.INLINE_LIMIT:
                path = await asyncio.to_thread(self._store.get, client, _blob(payload))
                payload.inline = await asyncio.to_thread(path.read_bytes)
        return answer


def key_of(request: Any) -> str:
    """What is asked for, as 64 hexadecimal digits: equal when the result must be.

    Raises:
        Refused: the recipe is not one.
    """
    recipe = _recipe(request)
    if recipe is None and not request.HasField("plan"):
        recipe = Recipe().model_dump(mode="json")
    parts = [(part.name, _digest(part.content)) for part in request.calibration.parts]
    asked = {
        "version": secateur.__version__,
        "model": _digest(request.model),
        "recipe": recipe,
        "calibration": parts if request.HasField("calibration") else None,
        "plan": _digest(request.plan) if request.HasField("plan") else None,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def blobs_of(message: Any) -> list[str]:
    """SHA-256 of the blobs that a StartPruneRequest or a PruneResult refers to."""
    return [payload.blob.sha256 for _, payload in _payloads(message) if payload.HasField("blob")]


def _payloads(message: Any) -> Iterator[tuple[str, Any]]:
    """(name, payload) of everything that a request or a result carries."""
    yield "model", message.model  # sent or not: it must be
    for name in ("against", "plan"):
        if name in message.DESCRIPTOR.fields_by_name and message.HasField(name):
            yield name, getattr(message, name)
    if "calibration" in message.DESCRIPTOR.fields_by_name:
        for part in message.calibration.parts:
            yield "calibration", part.content


def _digest(payload: Any) -> str:
    if payload.WhichOneof("content") == "inline":
        return hashlib.sha256(payload.inline).hexdigest()
    return str(payload.blob.sha256)


def _size(payload: Any) -> int:
    return len(payload.inline) or int(payload.blob.size_bytes)


def _blob(payload: Any) -> BlobName:
    return BlobName.of(payload.blob.sha256, payload.blob.size_bytes)


def _message(blob: BlobName) -> Any:
    return pruning_pb2.Blob(sha256=blob.sha256, size_bytes=blob.size)


def _nothing_sent(code: Code, name: str) -> Exception:
    return refuse(code, f"the request carries no {name}", expected="inline or blob")


def _recipe(request: Any) -> dict[str, Any] | None:
    """The request's recipe, validated before anything else is done; None when it has none."""
    if not request.HasField("recipe"):
        return None
    return _wire.recipe_from_wire(request.recipe).model_dump(mode="json")


def _calibration_names(request: Any) -> list[str]:
    """Names of the calibration files, all different and without folders."""
    names = [_file_name(part.name) for part in request.calibration.parts]
    if len(set(names)) != len(names):
        raise refuse(Code.INVALID_CALIBRATION, "two calibration files have the same name")
    return names


def _file_name(name: str) -> str:
    """`name`, when it is the plain name of a file."""
    name = name or "calibration.npz"
    if name != pathlib.PurePath(name).name or "\\" in name or "\0" in name or len(name) > 200:
        raise refuse(
            Code.INVALID_CALIBRATION,
            "a calibration file's name must have no folders",
            expected="a name of at most 200 characters",
            found=name[:200],
        )
    return name


def _load(path: pathlib.Path, kind: Any) -> Any:
    return kind.model_validate(json.loads(path.read_bytes()))
