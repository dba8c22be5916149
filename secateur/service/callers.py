"""Who calls. Operations and blobs belong to a client, and no other sees them."""

from __future__ import annotations

from typing import Any


def client_of(context: Any) -> str:
    """The name of the client behind a call; empty for whoever came without credentials."""
    return ""
