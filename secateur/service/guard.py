"""Limits on what one job may take: time and memory. Over either, its worker is killed, alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import re
import signal
import sys
import time
from types import TracebackType

from secateur.errors import Code, Refused, refuse
from secateur.service.config import ServerConfig
from secateur.service.errors import CallError

log = logging.getLogger("secateur.service")

_LOOK_S = 0.1  # between two looks at a worker
_AT_ONCE = 2  # an allocation that brings a process above this many times its memory fails at once
_SPARE_ADDRESSES = 16 << 30  # bytes: libraries, stacks, models mapped from files
_OWN = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


class Guard:
    """Watches over one job; a context that turns the death it caused into a refusal.

    Args:
        pid: the worker's process id, and its process group's.
        config: what a job may take.
    """

    def __init__(self, pid: int, config: ServerConfig) -> None:
        self._pid = pid
        self._config = config
        self._refused: Refused | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._task = asyncio.ensure_future(self._watch())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._refused is not None and isinstance(error, CallError):
            raise self._refused from None

    async def _watch(self) -> None:
        end = time.monotonic() + self._config.job_s
        while self._refused is None:
            await asyncio.sleep(_LOOK_S)
            taken = memory_of(self._pid)
            if time.monotonic() > end:
                self._refused = refuse(
                    Code.LIMIT_EXCEEDED,
                    "the job took longer than this server allows, in seconds",
                    expected=f"at most {self._config.job_s:g}",
                    found="more",
                    hint="Prune it in process: the command without --server.",
                )
            elif taken > self._config.job_memory_bytes:
                self._refused = refuse(
                    Code.LIMIT_EXCEEDED,
                    "the job took more memory than this server allows, in bytes",
                    expected=f"at most {self._config.job_memory_bytes}",
                    found=taken,
                    hint="Prune it in process: the command without --server.",
                )
        log.warning("worker %d is killed: %s", self._pid, self._refused)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)


def memory_of(pid: int) -> int:
    """Bytes of memory that are a process' own: not files that it maps. 0 where nobody can tell."""
    try:
        found = _OWN.findall(pathlib.Path(f"/proc/{pid}/status").read_bytes())
    except OSError:
        return 0
    return sum(map(int, found)) * 1024


def limit_allocations(pid: int, memory: int) -> None:
    """Lets the kernel refuse a process what would be far too much before anybody can look."""
    if sys.platform == "linux":
        import resource

        data = memory * _AT_ONCE
        # shared memory is no data, and out of sight once it is unmapped from a worker's pages
        addresses = data + _SPARE_ADDRESSES
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or not ours to limit
            resource.prlimit(pid, resource.RLIMIT_DATA, (data, data))
            resource.prlimit(pid, resource.RLIMIT_AS, (addresses, addresses))
