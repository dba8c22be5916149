"""secateur.v1.Pruning: messages to files, a job to a worker, files to messages."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from secateur import _wire
from secateur.errors import Code, Refusal, raised, refuse
from secateur.report import Inspection, Profile, Progress, Report
from secateur.service.blobs import BlobName, BlobStore
from secateur.service.errors import CallError
from secateur.service.pool import WorkerPool
from secateur.v1 import pruning_pb2, pruning_pb2_grpc, report_pb2


class Pruning(pruning_pb2_grpc.PruningServicer):  # type: ignore[misc]
    """The methods. Each has a folder of its own while it runs.

    Args:
        pool: who does the work.
        store: where files come from and go to.
    """

    def __init__(self, pool: WorkerPool, store: BlobStore) -> None:
        self._pool = pool
        self._store = store

    async def Prune(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Prunes a model: progress, then the result."""
        async with self._folder() as folder:
            job = {"call": "prune", "folder": str(folder), "recipe": _recipe(request)}
            await self._place(request.model, folder / "model.onnx", Code.INVALID_MODEL)
            job["calibration"] = await self._place_calibration(request, folder)
            job["plan"] = request.HasField("plan")
            if job["plan"]:
                await self._place(request.plan, folder / "plan.json", Code.INVALID_PLAN)
            async with contextlib.aclosing(self._run(job)) as steps:  # type: ignore[type-var]
                async for step in steps:
                    message = _wire.to_wire(step, report_pb2.Progress())
                    yield pruning_pb2.PruneResponse(progress=message)
            yield pruning_pb2.PruneResponse(result=await self._result(folder))

    async def StartPrune(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Not available yet: operations are to be durable, and nothing here is."""
        text = "StartPrune is not available in this version; use Prune"
        raise CallError(grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED", text)

    async def Inspect(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tells what can go."""
        async with self._folder() as folder:
            job = {"call": "inspect", "folder": str(folder), "recipe": _recipe(request)}
            await self._place(request.model, folder / "model.onnx", Code.INVALID_MODEL)
            await self._finish(job)
            found = await asyncio.to_thread(_load, folder / "inspection.json", Inspection)
            message = _wire.to_wire(found, report_pb2.Inspection())
            return pruning_pb2.InspectResponse(inspection=message)

    async def Profile(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Measures."""
        async with self._folder() as folder:
            job = {"call": "profile", "folder": str(folder)}
            await self._place(request.model, folder / "model.onnx", Code.INVALID_MODEL)
            job["against"] = request.HasField("against")
            if job["against"]:
                await self._place(request.against, folder / "against.onnx", Code.INVALID_MODEL)
            await self._finish(job)
            found = await asyncio.to_thread(_load, folder / "profile.json", Profile)
            return pruning_pb2.ProfileResponse(profile=_wire.to_wire(found, report_pb2.Profile()))

    # ---- in ----

    @contextlib.asynccontextmanager
    async def _folder(self) -> AsyncIterator[pathlib.Path]:
        folder = await asyncio.to_thread(self._store.new_job)
        try:
            yield folder
        finally:
            await asyncio.to_thread(self._store.end_job, folder)

    async def _place(self, payload: Any, target: pathlib.Path, code: Code) -> None:
        """Makes a payload a file. Raises Refused with `code` when nothing was sent."""
        sent = payload.WhichOneof("content")
        if sent == "inline":
            await asyncio.to_thread(target.write_bytes, payload.inline)
        elif sent == "blob":
            blob = BlobName.of(payload.blob.sha256, payload.blob.size_bytes)
            await asyncio.to_thread(self._store.link, blob, target)
        else:
            raise refuse(code, f"the request carries no {target.name}", expected="inline or blob")

    async def _place_calibration(self, request: Any, folder: pathlib.Path) -> str | None:
        """Name in `folder` of the calibration data: a file, or a folder when several were sent."""
        if not request.HasField("calibration"):
            return None
        parts = request.calibration.parts
        names = [_file_name(part.name) for part in parts]
        if len(set(names)) != len(names):
            raise refuse(Code.INVALID_CALIBRATION, "two calibration files have the same name")
        home = folder / "calibration"
        home.mkdir()
        for part, name in zip(parts, names, strict=True):
            await self._place(part.content, home / name, Code.INVALID_CALIBRATION)
        return f"calibration/{names[0]}" if len(names) == 1 else "calibration"

    # ---- work ----

    async def _run(self, job: dict[str, Any]) -> AsyncIterator[Progress]:
        """Steps of a job; ends when its files are there.

        Raises:
            Refused: the engine refused. CallError: the worker died. RuntimeError: a defect of ours.
        """
        async with contextlib.aclosing(self._pool.run(job)) as messages:  # type: ignore[type-var]
            async for message in messages:
                if "progress" in message:
                    yield Progress.model_validate(message["progress"])
                elif "refused" in message:
                    raise raised(Refusal.model_validate(message["refused"]))
                elif "failed" in message:
                    raise RuntimeError(f"in the worker: {message['failed']}")

    async def _finish(self, job: dict[str, Any]) -> None:
        async with contextlib.aclosing(self._run(job)) as steps:  # type: ignore[type-var]
            async for _ in steps:
                pass

    # ---- out ----

    async def _result(self, folder: pathlib.Path) -> Any:
        report = await asyncio.to_thread(_load, folder / "report.json", Report)
        return pruning_pb2.PruneResult(
            model=await self._payload(folder / "result.onnx"),
            plan=await self._payload(folder / "result.json"),
            report=_wire.to_wire(report, report_pb2.Report()),
        )

    async def _payload(self, path: pathlib.Path) -> Any:
        if path.stat().st_size <= _wire.INLINE_LIMIT:
            return pruning_pb2.Payload(inline=await asyncio.to_thread(path.read_bytes))
        # hashed here, though the worker knows: a worker is not trusted with the names of blobs
        blob = await asyncio.to_thread(self._store.adopt, path)
        return pruning_pb2.Payload(blob=pruning_pb2.Blob(sha256=blob.sha256, size_bytes=blob.size))


def _recipe(request: Any) -> dict[str, Any] | None:
    """The request's recipe, validated before anything else is done; None when it has none."""
    if not request.HasField("recipe"):
        return None
    return _wire.recipe_from_wire(request.recipe).model_dump(mode="json")


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
