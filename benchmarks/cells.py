"""Cells of a table, each computed in a process of its own: what one takes, the next finds free.

Those that are done are lines of a file, so that a run which was stopped goes on from there.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Cell = TypeVar("Cell")


def in_process(kind: type[Cell], program: str, arguments: Sequence[str], timeout: float) -> Cell:
    """The cell that `program --cell ARGUMENTS…` prints as JSON in its last line.

    Args:
        kind: a dataclass with a field `failure`, which says why there is nothing else.
        program: path of the benchmark.
        arguments: what the cell is.
        timeout: seconds it may take.
    """
    command = [sys.executable, program, "--cell", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return kind(failure=f"above {timeout:.0f} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return kind(failure=last.removeprefix("secateur.errors."))
    return kind(**json.loads(done.stdout.splitlines()[-1]))


def entries(path: pathlib.Path) -> list[dict[str, Any]]:
    """What earlier runs have added to a file; nothing where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: pathlib.Path, entry: Mapping[str, Any]) -> None:
    """Adds one line to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        print(json.dumps(entry), file=file)
