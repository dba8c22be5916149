"""Blobs: files named by the SHA-256 of their content, and the uploads that become blobs.

    FOLDER/blobs/ab/abcd…           whole, checked, read-only
    FOLDER/uploads/UUID-abcd…-SIZE  what has arrived of an upload
    FOLDER/jobs/ID/                 what one job works on; blobs come in as hard links, so that
                                    removing a blob never takes it from a running job

Functions here block; callers in the event loop use threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from typing import IO

import grpc

from secateur.errors import Code, refuse
from secateur.service.errors import CallError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(r"blobs/(?P<sha256>[0-9a-f]{64})/(?P<size>0|[1-9][0-9]{0,18})")
_UPLOAD = re.compile(r"uploads/(?P<uuid>[0-9a-f-]{36})/(?P<blob>blobs/.*)")


@dataclass(frozen=True, slots=True)
class BlobName:
    """What names a blob: SHA-256 (64 lower-case hexadecimal digits) and size in bytes."""

    sha256: str
    size: int

    @classmethod
    def parse(cls, resource: str) -> BlobName:
        """The blob of a resource name. Raises CallError INVALID_ARGUMENT."""
        match = _BLOB.fullmatch(resource)
        if match is None:
            raise _bad_name(resource, "blobs/{sha256}/{size}")
        return cls(match["sha256"], int(match["size"]))

    @classmethod
    def of(cls, sha256: str, size: int) -> BlobName:
        """The blob of a message's fields. Raises CallError INVALID_ARGUMENT."""
        if not _DIGEST.fullmatch(sha256) or size < 0:
            raise _bad_name(f"{sha256}/{size}", "64 lower-case hexadecimal digits and a size")
        return cls(sha256, size)


def _bad_name(found: str, expected: str) -> CallError:
    text = f"bad name {found[:200]!r}: expected {expected}"
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_RESOURCE_NAME", text)


class Upload:
    """Bytes on their way to being a blob. One writer at a time; a new one ends the one before.

    Attributes:
        blob: what they claim to be.
        committed: bytes that have arrived.
    """

    def __init__(self, store: BlobStore, blob: BlobName, aside: pathlib.Path) -> None:
        self._store = store
        self._aside = aside
        self._lock = threading.Lock()
        self._writer = 0
        self._hash = hashlib.sha256()
        self.blob = blob
        self.committed = 0
        self.touched = time.time()
        if aside.exists():  # of a server before this one
            with aside.open("rb") as file:
                while chunk := file.read(1 << 20):
                    self._hash.update(chunk)
                    self.committed += len(chunk)

    def open(self) -> tuple[int, IO[bytes]]:
        """A new writer: its number and its file."""
        with self._lock:
            self._writer += 1
            return self._writer, self._aside.open("ab")

    def append(self, writer: int, file: IO[bytes], offset: int, data: bytes) -> None:
        """Adds `data`, which must start where the upload ends.

        Raises:
            CallError: ABORTED when it does not or another writer has taken over (ask for the
                status, then go on from there); INVALID_ARGUMENT when the blob would be larger than
                it says.
        """
        with self._lock:
            if writer != self._writer or offset != self.committed:
                text = f"write at offset {offset}, but the upload stands at {self.committed}"
                raise CallError(grpc.StatusCode.ABORTED, "WRONG_OFFSET", text)
            if offset + len(data) > self.blob.size:
                self._store.forget(self)
                text = f"more than the {self.blob.size} bytes that the name states"
                raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "WRONG_SIZE", text)
            try:
                file.write(data)
                file.flush()
            except OSError as error:  # how much was written is not known
                self._store.forget(self)
                text = f"the server cannot store it: {error.strerror}"
                raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE", text) from error
            self._hash.update(data)
            self.committed += len(data)
            self.touched = time.time()

    def finish(self) -> None:
        """Checks what arrived and makes it a blob. Raises CallError INVALID_ARGUMENT."""
        with self._lock:
            self._store.forget(self, keep_file=True)
            try:
                if self.committed != self.blob.size:
                    text = f"{self.committed} bytes arrived, but the name states {self.blob.size}"
                    raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "WRONG_SIZE", text)
                found = self._hash.hexdigest()
                if found != self.blob.sha256:
                    text = f"the bytes have SHA-256 {found}, but the name states {self.blob.sha256}"
                    raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "WRONG_DIGEST", text)
                self._store.keep(self._aside, self.blob)
            finally:
                self._aside.unlink(missing_ok=True)


class BlobStore:
    """Blobs in a folder.

    Args:
        folder: made when it is not there.
        max_bytes: of one blob.
        ttl_s: seconds after which what nobody used may be removed.
        durable: whether blobs are synced to the disk before they are named.
    """

    def __init__(
        self, folder: pathlib.Path, *, max_bytes: int, ttl_s: float, durable: bool
    ) -> None:
        self._blobs = folder / "blobs"
        self._asides = folder / "uploads"
        self._jobs = folder / "jobs"
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._durable = durable
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()
        shutil.rmtree(self._jobs, ignore_errors=True)  # of a server that was killed
        for part in (self._blobs, self._asides, self._jobs):
            part.mkdir(parents=True, exist_ok=True)

    # ---- reading ----

    def find(self, blob: BlobName) -> pathlib.Path | None:
        """The file of a blob, marked as used now; None when it is not here."""
        path = self._path(blob)
        try:
            os.utime(path)
            return path if path.stat().st_size == blob.size else None
        except FileNotFoundError:
            return None

    def get(self, blob: BlobName) -> pathlib.Path:
        """The file of a blob, marked as used now. Raises CallError NOT_FOUND."""
        path = self.find(blob)
        if path is None:
            text = f"blob {blob.sha256} of {blob.size} bytes is not here; upload it first"
            raise CallError(grpc.StatusCode.NOT_FOUND, "BLOB_NOT_FOUND", text)
        return path

    def link(self, blob: BlobName, target: pathlib.Path) -> None:
        """Makes a blob appear at `target`, in a job's folder. Raises as `get`."""
        path = self.get(blob)
        try:
            os.link(path, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, target)

    # ---- writing ----

    def upload(self, resource: str, *, create: bool) -> Upload | BlobName:
        """The upload of a resource name, or its blob when that is whole already.

        Raises:
            CallError: INVALID_ARGUMENT for a bad name, NOT_FOUND without `create` when nothing of
                it has arrived.
            Refused: `LIMIT_EXCEEDED` for a blob that is too large.
        """
        match = _UPLOAD.fullmatch(resource)
        if match is None:
            raise _bad_name(resource, "uploads/{uuid}/blobs/{sha256}/{size}")
        blob = BlobName.parse(match["blob"])
        if blob.size > self._max_bytes:
            raise refuse(
                Code.LIMIT_EXCEEDED,
                "the blob is larger than this server takes, in bytes",
                expected=f"at most {self._max_bytes}",
                found=blob.size,
            )
        if self.find(blob) is not None:
            return blob
        aside = self._asides / f"{match['uuid']}-{blob.sha256}-{blob.size}"
        with self._lock:
            known = self._uploads.get(aside.name)
            if known is None and (create or aside.exists()):
                known = self._uploads[aside.name] = Upload(self, blob, aside)
        if known is None:
            text = "nothing of this upload has arrived"
            raise CallError(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", text)
        return known

    def adopt(self, path: pathlib.Path) -> BlobName:
        """Makes the file at `path` a blob; `path` is gone after."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        blob = BlobName(digest, path.stat().st_size)
        self.keep(path, blob)
        return blob

    def keep(self, path: pathlib.Path, blob: BlobName) -> None:
        """Names a file, whose content was checked, as a blob."""
        target = self._path(blob)
        target.parent.mkdir(exist_ok=True)
        path.chmod(0o444)
        if self._durable:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        path.replace(target)

    def forget(self, upload: Upload, *, keep_file: bool = False) -> None:
        """Drops an upload, with its file unless told otherwise."""
        with self._lock:
            for name, known in list(self._uploads.items()):
                if known is upload:
                    del self._uploads[name]
                    if not keep_file:
                        (self._asides / name).unlink(missing_ok=True)

    # ---- jobs and age ----

    def new_job(self) -> pathlib.Path:
        """A new private folder."""
        folder = self._jobs / uuid.uuid4().hex
        folder.mkdir(mode=0o700)
        return folder

    def end_job(self, folder: pathlib.Path) -> None:
        """Removes a job's folder, whatever its state."""
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Removes blobs and uploads that nobody used for a while."""
        oldest = time.time() - self._ttl_s
        with self._lock:
            idle = [upload for upload in self._uploads.values() if upload.touched < oldest]
        for upload in idle:
            self.forget(upload)
        for path in (*self._blobs.glob("*/*"), *self._asides.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _path(self, blob: BlobName) -> pathlib.Path:
        return self._blobs / blob.sha256[:2] / blob.sha256
