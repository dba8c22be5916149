"""What a program of ours keeps of the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
from secateur import _malloc

{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
for _ in range(20):
    bytes(8 << 20).upper()
print(faults() - before)
"""


def _faults(first: str) -> int:
    """Pages that a fresh process is given anew while it uses and frees 20 pairs of 8 MiB."""
    command = [sys.executable, "-c", _PROGRAM.format(first=first)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is told, nobody else")
def test_freed_blocks_are_used_again() -> None:
    assert _faults("_malloc.keep_freed(32 << 20, 256 << 20)") < _faults("") / 5


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur import _malloc

    monkeypatch.setattr(_malloc.ctypes, "CDLL", lambda name: object())
    _malloc.keep_freed(32 << 20, 256 << 20)
