"""A worker process: imports the engine, then does one job after another.

    stdin    one JSON line per job:  {"call": "prune", "folder": …, "recipe": …}
    stdout   JSON lines: {"ready": {}} once, when the engine is imported; then for each job
             {"progress": …} any number of times and one of {"refused": …}, {"failed": traceback},
             {"done": {}}, when the results are files in the job's folder

Run as `python -m secateur.service.worker PARENT`, by the pool only.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import queue
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any

from secateur.errors import Code, Refusal, Refused, refuse
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Progress

_PR_SET_PDEATHSIG = 1

Job = dict[str, Any]
Send = Callable[[dict[str, Any]], None]


def main() -> None:
    """Works until the server goes away."""
    _die_with_parent(int(sys.argv[1]))
    jobs, send = _channels()
    import secateur.graphops as engine

    send({"ready": {}})
    while True:
        job = jobs.get()
        folder = pathlib.Path(job["folder"])
        tempfile.tempdir = str(folder)  # what a killed job leaves goes with its folder
        try:
            _CALLS[job["call"]](engine, job, folder, send)
        except Refused as error:
            send({"refused": _without_folder(error.refusal, folder).model_dump(mode="json")})
        except BaseException:  # also what libraries raise to end a process: the server decides
            send({"failed": traceback.format_exc()})
        else:
            send({"done": {}})


# ---- calls -------------------------------------------------------------------------------------


def _prune(engine: Any, job: Job, folder: pathlib.Path, send: Send) -> None:
    def tell(progress: Progress) -> None:
        send({"progress": progress.model_dump(mode="json")})

    plan = Plan.load(folder / "plan.json") if job["plan"] else None
    result = engine.prune(
        folder / "model.onnx",
        _recipe(job),
        calibration=folder / job["calibration"] if job["calibration"] else None,
        plan=plan,
        progress=tell,
        external_data=False,
    )
    if result.weights is not None:
        raise refuse(
            Code.LIMIT_EXCEEDED,
            "the pruned model is too large for one ONNX file, and a server sends one",
            expected="less than 2 GiB",
            found=f"{result.report.after.bytes} bytes",
            hint="Prune it in process: the command without --server.",
        )
    (folder / "result.onnx").write_bytes(result.model)
    (folder / "result.json").write_text(result.plan.to_json(), encoding="utf-8")
    _write(folder / "report.json", result.report)


def _inspect(engine: Any, job: Job, folder: pathlib.Path, send: Send) -> None:
    found = engine.inspect(folder / "model.onnx", _recipe(job), external_data=False)
    _write(folder / "inspection.json", found)


def _profile(engine: Any, job: Job, folder: pathlib.Path, send: Send) -> None:
    against = folder / "against.onnx"
    found = engine.profile(
        folder / "model.onnx",
        against=against if job["against"] else None,
        external_data=False,
    )
    _write(folder / "profile.json", found)


_CALLS = {"prune": _prune, "inspect": _inspect, "profile": _profile}


def _recipe(job: Job) -> Recipe | None:
    return None if job["recipe"] is None else Recipe.parse(job["recipe"])


def _write(path: pathlib.Path, value: Any) -> None:
    # not pydantic's own JSON, which writes NaN as null
    path.write_text(json.dumps(value.model_dump(mode="json")), encoding="utf-8")


def _without_folder(refusal: Refusal, folder: pathlib.Path) -> Refusal:
    """`refusal` with paths in the job's folder as bare names: the caller has no other."""
    prefix = f"{folder}{os.sep}"

    def strip(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(strip(item) for item in value)
        return value.replace(prefix, "")

    fields = ("message", "nodes", "expected", "found", "hint")
    return refusal.model_copy(update={name: strip(getattr(refusal, name)) for name in fields})


# ---- process -----------------------------------------------------------------------------------


def _die_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when the server dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)


def _channels() -> tuple[queue.SimpleQueue[Job], Send]:
    """Jobs that arrive, and how to answer.

    Takes the pipes away from descriptors 0 and 1: what a library prints must not mix with messages.
    The thread that reads also ends the process group when the pipe ends, for systems whose kernel
    does not, and for children that the kernel does not know to be ours.
    """
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(incoming, jobs), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        outgoing.write(json.dumps(message).encode() + b"\n")

    return jobs, send


def _read(incoming: IO[bytes], jobs: queue.SimpleQueue[Job]) -> None:
    for line in incoming:
        jobs.put(json.loads(line))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
