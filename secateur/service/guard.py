"""Limits on what one job may take: time, memory, disk. Over any, its worker is killed, alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pathlib
import re
import signal
import stat
import sys
import time
from types import TracebackType

from secateur.errors import Code, Refused, refuse
from secateur.service.config import ServerConfig
from secateur.service.errors import CallError

log = logging.getLogger("secateur.service")

_LOOK_S = 0.1  # between two looks at a worker
_LOOKS_PER_DISK = 10  # one in so many looks at its files, too
_AT_ONCE = 2  # an allocation that brings a process above this many times its memory fails at once
_SPARE_ADDRESSES = 16 << 30  # bytes: libraries, stacks, models mapped from files
_OWN = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


class Guard:
    """Watches over one job; a context that turns the death it caused into a refusal.

    Args:
        pid: the worker's process id, and its process group's.
        home: its folder.
        config: what a job may take.
    """

    def __init__(self, pid: int, home: pathlib.Path, config: ServerConfig) -> None:
        self._pid = pid
        self._home = home
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
        for look in itertools.count(1):
            await asyncio.sleep(_LOOK_S)
            self._refused = self._time_or_memory(end)
            if self._refused is None and look % _LOOKS_PER_DISK == 0:
                self._refused = await asyncio.to_thread(self._disk)
            if self._refused is not None:
                break
        log.warning("worker %d is killed: %s", self._pid, self._refused)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def _time_or_memory(self, end: float) -> Refused | None:
        if time.monotonic() > end:
            text = "the job took longer than this server allows, in seconds"
            return _exceeded(text, f"{self._config.job_s:g}", "more")
        taken, most = memory_of(self._pid), self._config.job_memory_bytes
        if taken > most:
            text = "the job took more memory than this server allows, in bytes"
            return _exceeded(text, most, taken)
        return None

    def _disk(self) -> Refused | None:
        taken, most = disk_of(self._pid, self._home), self._config.job_disk_bytes
        if taken > most:
            text = "the job took more of the disk than this server allows, in bytes"
            return _exceeded(text, most, taken)
        return None


def _exceeded(text: str, most: object, found: object) -> Refused:
    return refuse(
        Code.LIMIT_EXCEEDED,
        text,
        expected=f"at most {most}",
        found=found,
        hint="Prune it in process: the command without --server.",
    )


def memory_of(pid: int) -> int:
    """Bytes of memory that are a process' own: not files that it maps. 0 where nobody can tell."""
    try:
        found = _OWN.findall(pathlib.Path(f"/proc/{pid}/status").read_bytes())
    except OSError:
        return 0
    return sum(map(int, found)) * 1024


def disk_of(pid: int, home: pathlib.Path) -> int:
    """Bytes that a process fills of the disk: its home, and what it has open without a name."""
    files = [pathlib.Path(folder, name) for folder, _, names in os.walk(home) for name in names]
    with contextlib.suppress(OSError):
        files += pathlib.Path(f"/proc/{pid}/fd").iterdir()
    taken = 0
    for path in files:
        with contextlib.suppress(OSError):  # gone since
            in_home = path.is_relative_to(home)
            found = path.lstat() if in_home else path.stat()
            # a blob has a second name: it is not the job's
            if stat.S_ISREG(found.st_mode) and found.st_nlink == in_home:
                taken += found.st_blocks * 512
    return taken


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
