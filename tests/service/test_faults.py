"""A store that is killed, or told that the disk is full, at each of its writes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("mode", "least"), [("kill", 100), ("full", 25), ("shared", 40)])
def test_nothing_is_lost_at_any_write(mode: str, least: int, tmp_path: pathlib.Path) -> None:
    if mode == "shared":
        pytest.importorskip("obstore")
    program = pathlib.Path(__file__).with_name("faults.py")
    done = subprocess.run(
        [sys.executable, program, mode, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == {}
    assert found["points"] >= least  # it was disturbed as often as it writes
