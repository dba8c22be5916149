"""The result of a prune, the same from a server and in process."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from secateur.plan import Plan
from secateur.report import Report

WEIGHTS_NAME = "model.onnx.data"  # as the model of a Result calls the file of its weights


@dataclass(frozen=True, slots=True)
class Result:
    """A pruned model with its evidence.

    Attributes:
        model: the serialised ONNX model.
        plan: what was kept; replaying it gives the same bytes.
        report: costs, groups, what stayed and why, and the verification.
        weights: the file that holds its weights, where they are too large for one ONNX file.
    """

    model: bytes
    plan: Plan
    report: Report
    weights: WeightsFile | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to `path`, complete or not at all.

        A model too large for one file gets its weights beside it, in `<path>.data`.

        Raises:
            OSError: the folder cannot be written to.
        """
        if self.weights is None:
            write_atomically(path, self.model)
            return
        beside = pathlib.Path(f"{os.fspath(path)}.data")
        with _aside(beside) as aside:
            shutil.copyfile(self.weights.path, aside)
        write_atomically(path, self.weights.named(self.model, beside.name))


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """Weights of a model in a file of their own, in the format of ONNX external data.

    Attributes:
        path: of the file, in a temporary folder that goes when this object does.
    """

    path: pathlib.Path

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.path.parent, ignore_errors=True)

    @classmethod
    def new(cls) -> WeightsFile:
        """One in a temporary folder of its own, still to be written."""
        return cls(pathlib.Path(tempfile.mkdtemp(prefix="secateur-"), WEIGHTS_NAME))

    def named(self, model: bytes, name: str) -> bytes:
        """The model with its weights looked for in the file `name` beside it."""
        import onnx

        proto = onnx.ModelProto.FromString(model)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name
        return proto.SerializeToString(deterministic=True)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that `path` appears complete or not at all (write aside, sync, rename)."""
    with _aside(pathlib.Path(path)) as aside, aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _aside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file beside `target` that takes its place if the block ends well, and goes otherwise."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(descriptor)
    aside = pathlib.Path(name)
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        aside.replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        raise
