"""A worker process: imports the engine, then does one job after another.

    stdin    one JSON line per job:  {"call": "prune", "folder": …, "recipe": …}
    stdout   JSON lines: {"ready": {"gaps": …}} once, when the engine is imported; then for each job
             {"progress": …} any number of times and one of {"refused": …}, {"failed": traceback},
             {"done": {}}, when the results are files in the job's folder.
             {"measure": [model, feeds]} asks for the memory that a model takes, which a fresh
             process has to tell and this one cannot start; a line {"bytes": …} on stdin answers.

Run by the pool only, as `python -m secateur.service.worker PARENT HOME`; with MODEL FEEDS besides,
it is that fresh process. See `jail` for what either may do.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pathlib
import queue
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import zipfile
from typing import IO, Any

import secateur
from secateur import _malloc
from secateur.errors import Code, Refusal, Refused, refuse
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Progress
from secateur.result import WEIGHTS_NAME
from secateur.service import jail

_PR_SET_PDEATHSIG = 1

# as protobuf, the C++ library and ONNX Runtime say it
_NO_MEMORY = re.compile(r"Arena alloc failed|bad_alloc|bad allocation|[Ff]ailed to allocate memory")

Job = dict[str, Any]


def main() -> None:
    """Works until the server goes away."""
    parent, home, *model_and_feeds = sys.argv[1:]
    _die_with_parent(int(parent))
    gaps = jail.enter(pathlib.Path(home))
    if model_and_feeds:
        peak = pathlib.Path(secateur.__file__).parent / "graphops" / "profile" / "peak.py"
        runpy.run_path(str(peak))["main"](*model_and_feeds)
        return
    _malloc.keep_freed()
    channel = Channel()
    import secateur.graphops as engine

    gc.freeze()  # what was imported stays: no collection need look at it again
    channel.send({"ready": {"gaps": gaps}})
    while True:
        job = channel.receive()
        folder = pathlib.Path(job["folder"])
        tempfile.tempdir = str(folder)  # what a killed job leaves goes with its folder
        try:
            _CALLS[job["call"]](engine, job, folder, channel)
        except Refused as error:
            refusal = _too_large() if _wants_memory(error.refusal) else error.refusal
            channel.send({"refused": _without_folder(refusal, folder).model_dump(mode="json")})
        except MemoryError:
            channel.send({"refused": _too_large().model_dump(mode="json")})
        except BaseException:  # also what libraries raise to end a process: the server decides
            channel.send({"failed": traceback.format_exc()})
        else:
            channel.send({"done": {}})


# ---- calls -------------------------------------------------------------------------------------


def _prune(engine: Any, job: Job, folder: pathlib.Path, channel: Channel) -> None:
    def tell(progress: Progress) -> None:
        channel.send({"progress": progress.model_dump(mode="json")})

    plan = Plan.load(folder / "plan.json") if job["plan"] else None
    result = engine.prune(
        folder / job["model"],
        _recipe(job),
        calibration=_samples(job, "calibration", folder),
        labels=_samples(job, "labels", folder),
        plan=plan,
        progress=tell,
        external_data=job["external_data"],
        max_nodes=job["max_nodes"],
        sha256=job["sha256"],
        memory_meter=channel.memory,
    )
    if result.weights is not None:
        shutil.move(result.weights.path, folder / WEIGHTS_NAME)
    (folder / "result.onnx").write_bytes(result.model)
    (folder / "result.json").write_text(result.plan.to_json(), encoding="utf-8")
    _write(folder / "report.json", result.report)


def _samples(job: Job, kind: str, folder: pathlib.Path) -> pathlib.Path | None:
    """The file or folder of `calibration` or `labels`; None when none were sent."""
    if not job[kind]:
        return None
    path = folder / str(job[kind])
    _check_decompressed(path, job["max_decompressed_bytes"])
    return path


def _inspect(engine: Any, job: Job, folder: pathlib.Path, channel: Channel) -> None:
    found = engine.inspect(
        folder / job["model"],
        _recipe(job),
        calibration=_samples(job, "calibration", folder),
        external_data=job["external_data"],
        max_nodes=job["max_nodes"],
    )
    _write(folder / "inspection.json", found)


def _profile(engine: Any, job: Job, folder: pathlib.Path, channel: Channel) -> None:
    found = engine.profile(
        folder / job["model"],
        against=folder / job["against"] if job["against"] else None,
        external_data=job["external_data"],
        max_nodes=job["max_nodes"],
        memory_meter=channel.memory,
    )
    _write(folder / "profile.json", found)


_CALLS = {"prune": _prune, "inspect": _inspect, "profile": _profile}


def _recipe(job: Job) -> Recipe | None:
    return None if job["recipe"] is None else Recipe.parse(job["recipe"])


def _check_decompressed(path: pathlib.Path, most: int) -> None:
    """Refuses files of samples that are small but hold large arrays, before any is read."""
    total = 0
    for file in path.iterdir() if path.is_dir() else [path]:
        with contextlib.suppress(zipfile.BadZipFile):  # the engine says what is wrong with it
            total += sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
    if total > most:
        raise refuse(
            Code.LIMIT_EXCEEDED,
            "the samples hold more than this server takes, in bytes when decompressed",
            expected=f"at most {most}",
            found=total,
            hint="Send fewer samples: a few hundred are enough.",
        )


def _wants_memory(refusal: Refusal) -> bool:
    """Whether what a library could not do was to allocate: then the model is not at fault."""
    return _NO_MEMORY.search(refusal.message) is not None


def _too_large() -> Refusal:
    text = "the job asked for more memory at once than this server gives"
    return Refusal(code=Code.LIMIT_EXCEEDED, message=text)


def _write(path: pathlib.Path, value: Any) -> None:
    # not pydantic's own JSON, which writes NaN as null
    path.write_text(json.dumps(value.model_dump(mode="json")), encoding="utf-8")


def _without_folder(refusal: Refusal, folder: pathlib.Path) -> Refusal:
    """`refusal` with paths in the job's folder as bare names: the caller has no other."""
    homes = [
        folder / "model",
        folder / "against",
        folder / "calibration",
        folder / "labels",
        folder,
    ]

    def strip(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(strip(item) for item in value)
        for home in homes:
            value = value.replace(f"{home}{os.sep}", "")
        return value

    fields = ("message", "nodes", "expected", "found", "hint")
    return refusal.model_copy(update={name: strip(getattr(refusal, name)) for name in fields})


# ---- process -----------------------------------------------------------------------------------


def _die_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when the server dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)


class Channel:
    """The pipes from and to the server.

    Takes them away from descriptors 0 and 1: what a library prints must not mix with messages.
    The thread that reads also ends the process group when the pipe ends, for systems whose kernel
    does not, and for children that the kernel does not know to be ours.
    """

    def __init__(self) -> None:
        incoming = os.fdopen(os.dup(0), "rb")
        self._outgoing = os.fdopen(os.dup(1), "wb", buffering=0)
        self._received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        threading.Thread(target=self._read, args=(incoming,), daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message."""
        self._outgoing.write(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message; waits for it."""
        return self._received.get()

    def memory(self, model: str, feeds: str) -> int | None:
        """Bytes that a model takes: a `MemoryMeter`."""
        self.send({"measure": [model, feeds]})
        answer: int | None = self.receive()["bytes"]
        return answer

    def _read(self, incoming: IO[bytes]) -> None:
        for line in incoming:
            self._received.put(json.loads(line))
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


if __name__ == "__main__":
    main()
