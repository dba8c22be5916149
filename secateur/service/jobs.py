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
from secateur.result import WEIGHTS_NAME
from secateur.service import telemetry
from secateur.service.blobs import BlobName, BlobStore
from secateur.service.config import ServerConfig
from secateur.service.operations import Repository
from secateur.service.pool import WorkerPool
from secateur.v1 import pruning_pb2, report_pb2

_MODEL = "model.onnx"
_CODES = {  # of refusals, by what of a request they are about
    "model": Code.INVALID_MODEL,
    "against": Code.INVALID_MODEL,
    "calibration": Code.INVALID_CALIBRATION,
    "labels": Code.INVALID_LABELS,
    "plan": Code.INVALID_PLAN,
}
_SAMPLES = ("calibration", "labels")  # fields that are files of samples
_MAX_NAME = 200  # bytes of a file's name; file systems take 255


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
        self._check(request)
        key = await asyncio.to_thread(key_of, request)
        known = await self.known(client, key)
        if known is not None:
            yield known
            return
        async with self._folder() as folder:
            job = self._job("prune", folder, recipe=_recipe(request))
            job["model"] = await self._place_model(client, request.model, folder / "model")
            job["sha256"] = request.model.blob.sha256 or None  # checked when it came
            job["external_data"] = bool(request.model.external_data)
            for kind in _SAMPLES:
                job[kind] = await self._place_samples(client, request, kind, folder)
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
        self._check(request)
        async with self._folder() as folder:
            job = self._job("inspect", folder, recipe=_recipe(request))
            job["model"] = await self._place_model(client, request.model, folder / "model")
            job["external_data"] = bool(request.model.external_data)
            job["calibration"] = await self._place_samples(client, request, "calibration", folder)
            await self._finish(client, job)
            found: Inspection = await asyncio.to_thread(
                _load, folder / "inspection.json", Inspection
            )
            return found

    async def profile(self, client: str, request: Any) -> Profile:
        """What a ProfileRequest asks for."""
        self._check(request)
        async with self._folder() as folder:
            job = self._job("profile", folder)
            job["model"] = await self._place_model(client, request.model, folder / "model")
            job["external_data"] = bool(request.model.external_data)
            job["against"] = None
            if request.HasField("against"):
                home = folder / "against"
                job["against"] = await self._place_model(client, request.against, home)
                job["external_data"] |= bool(request.against.external_data)
            await self._finish(client, job)
            found: Profile = await asyncio.to_thread(_load, folder / "profile.json", Profile)
            return found

    # ---- in ----

    async def lasting(self, client: str, request: Any) -> Any:
        """A StartPruneRequest, checked, that can be worked on later: every payload is a blob.

        Raises:
            Refused: it lacks or misnames something. CallError: NOT_FOUND for a blob not here.
        """
        self._check(request)
        _recipe(request)
        lasting = pruning_pb2.StartPruneRequest()
        lasting.CopyFrom(request)
        for kind in _SAMPLES:
            _samples_names(lasting, kind)
        _external_names(lasting.model)
        for name, payload in _payloads(lasting):
            sent = payload.WhichOneof("content")
            if sent is None:
                raise _nothing_sent(_CODES[name], name)
            if sent == "inline":
                blob = await asyncio.to_thread(self._store.adopt_bytes, client, payload.inline)
                payload.blob.CopyFrom(_message(blob))
            else:
                await asyncio.to_thread(self._store.get, client, _blob(payload))
        return lasting

    def _check(self, request: Any) -> None:
        """Refuses what is too large or misplaced before it is looked at. Raises Refused."""
        sizes = dict.fromkeys(_CODES, 0)
        for name, payload in _payloads(request):
            sizes[name] += _size(payload)
            inner = any(file.content.external_data for file in payload.external_data)
            if inner or (payload.external_data and name in (*_SAMPLES, "plan")):
                text = f"{name} has external data where only a model may have any"
                raise refuse(_CODES[name], text)
        most = self._config.max_model_bytes
        for name, limit in (
            ("model", most),
            ("against", most),
            *((kind, self._config.max_calibration_bytes) for kind in _SAMPLES),
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
        folder = self._store.new_job()  # not in a thread: a call cancelled meanwhile would leave it
        try:
            yield folder
        finally:  # to its end, even if the call is cancelled once more
            await asyncio.shield(asyncio.to_thread(self._store.end_job, folder))

    async def _place(
        self,
        client: str,
        payload: Any,
        target: pathlib.Path,
        code: Code,
        *,
        copy: bool = False,
    ) -> None:
        """Makes a payload a file. Raises Refused with `code` when nothing was sent."""
        sent = payload.WhichOneof("content")
        if sent == "inline":
            await asyncio.to_thread(target.write_bytes, payload.inline)
        elif sent == "blob":
            place = self._store.copy if copy else self._store.link
            await asyncio.to_thread(place, client, _blob(payload), target)
        else:
            raise _nothing_sent(code, target.name)

    async def _place_model(self, client: str, payload: Any, home: pathlib.Path) -> str:
        """Makes a model and its external data files in a folder of theirs; gives its own name."""
        home.mkdir()
        await self._place(client, payload, home / _MODEL, Code.INVALID_MODEL)
        names = _external_names(payload)
        for part, name in zip(payload.external_data, names, strict=True):
            # onnx_ir refuses files with several hard links: they may be anybody's
            await self._place(client, part.content, home / name, Code.INVALID_MODEL, copy=True)
        return f"{home.name}/{_MODEL}"

    async def _place_samples(
        self, client: str, request: Any, kind: str, folder: pathlib.Path
    ) -> str | None:
        """Name in `folder` of the samples: a file, or a folder when several were sent."""
        if not request.HasField(kind):
            return None
        names = _samples_names(request, kind)
        home = folder / kind
        home.mkdir()
        for part, name in zip(getattr(request, kind).parts, names, strict=True):
            await self._place(client, part.content, home / name, _CODES[kind])
        return f"{kind}/{names[0]}" if len(names) == 1 else kind

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
        model = await self._payload(client, folder / "result.onnx")
        weights = folder / WEIGHTS_NAME
        if weights.exists():
            content = await self._payload(client, weights)
            model.external_data.add(name=WEIGHTS_NAME, content=content)
        return pruning_pb2.PruneResult(
            model=model,
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
    asked = {
        "version": secateur.__version__,
        "model": _digest(request.model),
        "recipe": recipe,
        **{kind: _digests(request, kind) for kind in _SAMPLES},
        "plan": _digest(request.plan) if request.HasField("plan") else None,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _digests(request: Any, kind: str) -> list[Any] | None:
    """What stands for the samples of a request, as JSON takes it; None when it has none."""
    if not request.HasField(kind):
        return None
    return [(part.name, _digest(part.content)) for part in getattr(request, kind).parts]


def blobs_of(message: Any) -> list[str]:
    """SHA-256 of the blobs that a StartPruneRequest or a PruneResult refers to."""
    return [payload.blob.sha256 for _, payload in _payloads(message) if payload.HasField("blob")]


def _payloads(message: Any) -> Iterator[tuple[str, Any]]:
    """(name, payload) of everything that a request or a result carries."""
    for name in ("model", "against", "plan"):
        # a model must be there, sent or not
        if name == "model" or (
            name in message.DESCRIPTOR.fields_by_name and message.HasField(name)
        ):
            payload = getattr(message, name)
            yield name, payload
            for file in payload.external_data:
                yield name, file.content
    for name in _SAMPLES:
        if name in message.DESCRIPTOR.fields_by_name:
            for part in getattr(message, name).parts:
                yield name, part.content


def _digest(payload: Any) -> Any:
    """What stands for a payload's content, as JSON takes it."""
    if payload.external_data:
        files = {file.name: _digest(file.content) for file in payload.external_data}
        return [_digest_alone(payload), files]
    return _digest_alone(payload)


def _digest_alone(payload: Any) -> str:
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


def _samples_names(request: Any, kind: str) -> list[str]:
    """Names of the files of samples, all different and without folders."""
    names = [part.name or f"{kind}.npz" for part in getattr(request, kind).parts]
    return _plain_names(names, kind, _CODES[kind])


def _external_names(model: Any) -> list[str]:
    """Names of a model's external data files, all different and without folders."""
    names = [file.name for file in model.external_data]
    return _plain_names([_MODEL, *names], "external data", Code.INVALID_MODEL)[1:]


def _plain_names(names: list[str], kind: str, code: Code) -> list[str]:
    """`names`, if they are plain names of different files. Raises Refused with `code`."""
    for name in names:
        plain = name == pathlib.PurePath(name).name and "\\" not in name and "\0" not in name
        if not name or not plain or len(name.encode()) > _MAX_NAME:
            raise refuse(
                code,
                f"the name of {kind} file {name[:_MAX_NAME]!r} must have no folders",
                expected=f"a name of at most {_MAX_NAME} bytes",
                found=name[:_MAX_NAME],
                hint="Give the name alone; the server keeps the files of a request side by side.",
            )
    if len(set(names)) != len(names):
        raise refuse(code, f"two {kind} files have the same name", hint="Rename one.")
    return names


def _load(path: pathlib.Path, kind: Any) -> Any:
    return kind.model_validate(json.loads(path.read_bytes()))
