"""Log lines: for people, or one JSON object each, with the ids of what they belong to.

What runs inside a call logs with the call's ids, without being told them: they travel in context
variables, which tasks and threads made with `asyncio.to_thread` inherit.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

from secateur.service.config import LogFormat

_ids: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "ids", default=types.MappingProxyType({})
)


def set_up(level: str, form: LogFormat) -> None:
    """Sends this process' log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form is LogFormat.JSON else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def add_ids(**ids: str) -> None:
    """Adds ids (request, client, operation …) to what this task, and those it starts, will log."""
    _ids.set({**_ids.get(), **ids})


def fields(**values: Any) -> dict[str, Any]:
    """`extra` of a log call whose values are fields of the JSON object."""
    return {"fields": values}


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        words = [f"{name}={value}" for name, value in _details(record).items()]
        return " ".join([super().formatMessage(record), *words])


class _Json(logging.Formatter):
    # lines of many machines are read together
    converter = time.gmtime  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_details(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _details(record: logging.LogRecord) -> dict[str, Any]:
    return {**_ids.get(), **getattr(record, "fields", {})}
