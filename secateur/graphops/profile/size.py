"""What a model's files shrink to."""

from __future__ import annotations

import pathlib
import zlib

_PART = 1 << 20  # bytes read at once


def compressed(*parts: bytes | pathlib.Path) -> int:
    """Bytes after zlib, at its default level, of contents and files one after another."""
    stream = zlib.compressobj()
    size = 0
    for part in parts:
        if isinstance(part, bytes):
            size += len(stream.compress(part))
            continue
        with part.open("rb") as file:
            while piece := file.read(_PART):
                size += len(stream.compress(piece))
    return size + len(stream.flush())
