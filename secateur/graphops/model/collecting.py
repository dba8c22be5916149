"""Python's garbage collector, held back where it costs more than what it frees."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Holds cyclic collections back; also a decorator.

    Reading and analysing a graph makes hundreds of thousands of objects and drops few. The
    collector walks over all of them again and again: up to half of the time of a large graph.
    What cannot be reached is freed once the collector runs again.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
