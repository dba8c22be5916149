"""A program: prints the bytes by which its process grows while it loads and runs a model.

    python -P peak.py MODEL FEEDS.npz

A program of its own, run by path, because the process has to be a fresh one that has loaded
nothing else. The high-water mark is of the process's own address space: getrusage would count what
the parent held when it forked.
"""

from __future__ import annotations

import ctypes
import pathlib
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _peak() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main(model: str, feeds_path: str) -> None:
    """Measures one model with one set of inputs."""
    import numpy as np
    import onnxruntime as ort

    feeds = dict(np.load(feeds_path, allow_pickle=False))
    before = _peak()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, feeds)
    print(_peak() - before)  # noqa: T201 - this is the answer


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    main(sys.argv[1], sys.argv[2])
