"""What an operator may set."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass, field

from secateur._wire import is_loopback


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of one server.

    Attributes:
        listen: `host:port`, port 0 for any free one; or `unix:PATH`.
        workers: jobs that run at once; more wait their turn.
        folder: where blobs and jobs lie; None: a temporary one that goes with the server.
        insecure_public: allow an address that other machines reach, although nobody has to say who
            they are. For containers, whose own network is the wall.
        grace_s: seconds that running calls get to finish when the server is told to stop.
        max_blob_bytes: largest blob taken.
        blob_ttl_s: seconds after which a blob that nobody used is removed.
        jobs_per_worker: jobs after which a worker process is replaced. 1 isolates jobs from one
            another, for a second of imports each.
    """

    listen: str = "127.0.0.1:50051"
    workers: int = field(default_factory=_cores)
    folder: pathlib.Path | None = None
    insecure_public: bool = False
    grace_s: float = 10.0
    max_blob_bytes: int = 4 << 30
    blob_ttl_s: float = 3600.0
    jobs_per_worker: int = 64

    def check(self) -> None:
        """Refuses settings that make no sense or are not safe.

        Raises:
            ValueError: with a sentence that says which and what to do.
        """
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")
        if not self.listen.startswith("unix:"):
            host, colon, port = self.listen.rpartition(":")
            if not colon or not port.isdecimal() or int(port) > 65535:
                raise ValueError(f"listen must be HOST:PORT, not {self.listen!r}")
            # with TLS and tokens, credentials will be the other way to be allowed here
            if not (self.insecure_public or is_loopback(host)):
                raise ValueError(
                    f"{self.listen} can be reached from other machines, and this server asks "
                    "nobody who they are: listen on 127.0.0.1, or say --insecure-public if the "
                    "network around it is closed"
                )
