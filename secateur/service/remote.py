"""Blobs in an object store that several servers may share: S3, Google, Azure, or a folder.

    PREFIX/blobs/TAG/abcd…   TAG stands for the client: who has no such blob does not see it

Nothing is ever removed here. How long blobs lie is the bucket's lifecycle rule, which must not be
shorter than operations last. Credentials come from the environment, as each provider documents.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from secateur.service.errors import CallError

log = logging.getLogger("secateur.service")

_T = TypeVar("_T")
_RETRY_S = 5.0
_BUFFER = 8 << 20  # bytes that travel at once


def tag(client: str) -> str:
    """What stands for a client in the names of files: hexadecimal digits, whatever it is called."""
    return hashlib.sha256(client.encode()).hexdigest()[:16]


def open_store(url: str, patience_s: float | None = None) -> Any:
    """The store of obstore behind `s3://bucket/prefix`, `gs://…`, `az://…` or `file:///folder`.

    Args:
        url: which.
        patience_s: seconds after which a request has failed, and is not made again; None: what
            suits large contents.

    Raises:
        ValueError: the URL is not understood, or obstore is not installed.
    """
    try:
        import obstore.store
    except ImportError:
        raise ValueError("an object store needs obstore: pip install secateur[store]") from None
    options: dict[str, Any] = {"client_options": {}}
    # the providers' own programs allow plain HTTP where their endpoint variable says so
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["client_options"]["allow_http"] = True
    if patience_s is not None:
        patience = datetime.timedelta(seconds=patience_s)
        options["client_options"]["timeout"] = patience
        options["retry_config"] = {"retry_timeout": patience}
    if url.startswith("file:"):
        options = {"mkdir": True}
    try:
        return obstore.store.from_url(url, **options)
    except Exception as error:  # each provider has errors of its own
        raise ValueError(f"the object store {url} cannot be used: {error}") from None


class RemoteBlobs:
    """The blobs under one URL, for which see `open_store`, and what that raises."""

    def __init__(self, url: str) -> None:
        self._store = open_store(url)

    def size(self, client: str, sha256: str) -> int | None:
        """Bytes of a client's blob; None when it is not there. Raises CallError, as all here."""
        import obstore

        def head() -> int | None:
            try:
                return int(obstore.head(self._store, _name(client, sha256))["size"])
            except FileNotFoundError:
                return None

        return reached(head)

    def put(self, client: str, sha256: str, path: pathlib.Path) -> None:
        """Stores a file. What is there already has the same content and stays."""
        import obstore

        if self.size(client, sha256) == path.stat().st_size:
            return
        # in parts: memory does not grow with the file, and it appears when all parts are there
        reached(
            lambda: obstore.put(
                self._store, _name(client, sha256), path, use_multipart=True, chunk_size=_BUFFER
            )
        )

    def fetch(self, client: str, sha256: str, target: pathlib.Path) -> None:
        """Writes a blob to `target`."""
        import obstore

        def get() -> None:
            stream = obstore.get(self._store, _name(client, sha256)).stream(min_chunk_size=_BUFFER)
            with target.open("wb") as file:
                for chunk in stream:
                    file.write(chunk)

        reached(get)


def _name(client: str, sha256: str) -> str:
    return f"blobs/{tag(client)}/{sha256}"


def reached(call: Callable[[], _T]) -> _T:
    """What a call of obstore gives. Raises CallError UNAVAILABLE when it fails."""
    import obstore.exceptions

    try:
        return call()
    except (obstore.exceptions.BaseError, FileNotFoundError) as error:  # no such bucket, say
        log.warning("the object store failed: %s", error)
        text = "the server's object store cannot be reached"
        code = grpc.StatusCode.UNAVAILABLE
        raise CallError(code, "OBJECT_STORE", text, retry_s=_RETRY_S) from error
