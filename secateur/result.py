"""The result of a prune, the same from a server and in process."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from dataclasses import dataclass

from secateur.plan import Plan
from secateur.report import Report


@dataclass(frozen=True, slots=True)
class Result:
    """A pruned model with its evidence.

    Attributes:
        model: the serialised ONNX model.
        plan: what was kept; replaying it gives the same bytes.
        report: costs, groups, what stayed and why, and the verification.
    """

    model: bytes
    plan: Plan
    report: Report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to `path`, complete or not at all.

        Raises:
            OSError: the folder cannot be written to.
        """
        write_atomically(path, self.model)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that `path` appears complete or not at all (write aside, sync, rename)."""
    target = pathlib.Path(path)
    descriptor, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        pathlib.Path(aside).chmod(0o666 & ~umask)
        pathlib.Path(aside).replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            pathlib.Path(aside).unlink()
        raise
