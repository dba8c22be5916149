"""Blobs: files named by the SHA-256 of their content, and the uploads that become blobs.

    FOLDER/blobs/ab/abcd…               whole, checked, read-only
    FOLDER/uploads/TAG-UUID-abcd…-SIZE  what has arrived of an upload; TAG stands for the client
    FOLDER/jobs/ID/                     what one job works on; blobs come in as hard links, so that
                                        removing a blob never takes it from a running job

Who has which blob is a row in the repository, written when the file is in its place and removed
before the file is: a row always has a file. With an object store (`remote`), blobs lie there too,
and the folder holds those that were used lately.

Functions here block; callers in the event loop use threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import pathlib
import re
import shutil
import sys
import threading
import uuid
from dataclasses import dataclass
from typing import IO

import grpc

from secateur.errors import Code, refuse
from secateur.service.errors import CallError
from secateur.service.operations import Repository
from secateur.service.remote import RemoteBlobs, tag

_KEEP_SIZE = 1  # of fallocate(2)
_ROOM_RETRY_S = 30.0  # when to ask again for room on the disk: operations expire meanwhile
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


def _not_stored(error: OSError) -> CallError:
    text = f"the server cannot store it: {error.strerror or error}"
    return CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE", text)


def _bad_name(found: str, expected: str) -> CallError:
    text = f"bad name {found[:200]!r}: expected {expected}"
    return CallError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_RESOURCE_NAME", text)


class Upload:
    """Bytes on their way to being a blob. One writer at a time; a new one ends the one before.

    Attributes:
        blob: what they claim to be.
        committed: bytes that have arrived.
        durable: whether the disk should have them before they are a blob.
    """

    def __init__(
        self, store: BlobStore, client: str, blob: BlobName, aside: pathlib.Path, now: float
    ) -> None:
        self._store = store
        self._client = client
        self._aside = aside
        self._lock = threading.Lock()
        self._writer = 0
        self._hash = hashlib.sha256()
        self.blob = blob
        self.committed = 0
        self.durable = store.durable
        self.touched = now
        if aside.exists():  # of a server before this one
            with aside.open("rb") as file:
                while chunk := file.read(1 << 20):
                    self._hash.update(chunk)
                    self.committed += len(chunk)

    def open(self) -> tuple[int, IO[bytes]]:
        """A new writer: its number and its file. Raises CallError RESOURCE_EXHAUSTED."""
        with self._lock:
            self._writer += 1
            file = self._aside.open("ab")
            try:
                _reserve(file, self.blob.size)
            except OSError as error:
                file.close()
                self._store.forget(self)
                raise _not_stored(error) from error
            return self._writer, file

    def append(
        self, writer: int, file: IO[bytes], parts: list[tuple[int, bytes | memoryview]]
    ) -> None:
        """Adds parts, (offset, content) each, which must start where the upload ends.

        Raises:
            CallError: ABORTED when it does not or another writer has taken over (ask for the
                status, then go on from there); INVALID_ARGUMENT when the blob would be larger than
                it says.
        """
        for offset, data in parts:
            with self._lock:
                self._append(writer, file, offset, data)

    def _append(self, writer: int, file: IO[bytes], offset: int, data: bytes | memoryview) -> None:
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
            raise _not_stored(error) from error
        self._hash.update(data)
        self.committed += len(data)
        self.touched = self._store.now()

    def sync(self, file: IO[bytes]) -> None:
        """Has the disk take what arrived, so that little is left to do at the end."""
        os.fdatasync(file.fileno())

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
                self._store.keep(self._client, self._aside, self.blob)
            finally:
                self._aside.unlink(missing_ok=True)


class BlobStore:
    """Blobs in a folder.

    Args:
        folder: made when it is not there.
        repository: who has which blob.
        max_bytes: of one blob.
        quota: bytes of all blobs and uploads together; above it, the longest unused go.
        ttl_s: seconds after which what nobody used may be removed.
        durable: whether blobs are synced to the disk before they are named.
        remote: the object store in which blobs lie as well.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        repository: Repository,
        *,
        max_bytes: int,
        quota: int,
        ttl_s: float,
        durable: bool,
        remote: RemoteBlobs | None = None,
    ) -> None:
        self._repository = repository
        self._remote = remote
        self._blobs = folder / "blobs"
        self._asides = folder / "uploads"
        self._jobs = folder / "jobs"
        self._max_bytes = max_bytes
        self._quota = quota
        self._ttl_s = ttl_s
        self.durable = durable
        self._uploads: dict[str, Upload] = {}
        self._left_over: dict[str, float] = {}  # uploads of a server before this one: first seen
        self._lock = threading.Lock()  # of the uploads
        self._naming = threading.Lock()  # of what file and row must agree on
        shutil.rmtree(self._jobs, ignore_errors=True)  # of a server that was killed
        for part in (self._blobs, self._asides, self._jobs):
            part.mkdir(parents=True, exist_ok=True)
        self._remove_strays()

    def now(self) -> float:
        """The time by which uploads age."""
        return self._repository.now()

    # ---- reading ----

    def find(self, client: str, blob: BlobName) -> pathlib.Path | None:
        """The file of a client's blob, marked as used now; None when the client has none such."""
        path = self._path(blob.sha256)
        if self._repository.use_blob(client, blob.sha256) == blob.size and path.exists():
            return path
        return self._fetch(client, blob)

    def get(self, client: str, blob: BlobName) -> pathlib.Path:
        """The file of a blob, marked as used now. Raises CallError NOT_FOUND."""
        path = self.find(client, blob)
        if path is None:
            raise _no_blob(blob)
        return path

    def open(self, client: str, blob: BlobName) -> IO[bytes]:
        """A blob to read from, which stays whole until it is closed. Raises as `get`."""
        try:
            return self.get(client, blob).open("rb", buffering=0)
        except FileNotFoundError:  # evicted since
            raise _no_blob(blob) from None

    def link(self, client: str, blob: BlobName, target: pathlib.Path) -> None:
        """Makes a blob appear at `target`, in a job's folder. Raises as `get`."""
        path = self.get(client, blob)
        try:
            os.link(path, target)
        except FileNotFoundError:  # evicted since
            raise _no_blob(blob) from None
        except OSError:  # a file system without hard links
            self.copy(client, blob, target)

    def copy(self, client: str, blob: BlobName, target: pathlib.Path) -> None:
        """Writes a blob to `target`, for readers that take no hard links. Raises as `get`."""
        try:
            shutil.copyfile(self.get(client, blob), target)
        except FileNotFoundError:  # evicted since
            raise _no_blob(blob) from None
        except OSError as error:
            raise _not_stored(error) from error

    # ---- writing ----

    def upload(self, client: str, resource: str, *, create: bool) -> Upload | BlobName:
        """The upload of a resource name, or its blob when that is whole already.

        Raises:
            CallError: INVALID_ARGUMENT for a bad name, NOT_FOUND without `create` when nothing of
                it has arrived, RESOURCE_EXHAUSTED when there is no room for it.
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
        if self.find(client, blob) is not None:
            return blob
        aside = self._asides / f"{tag(client)}-{match['uuid']}-{blob.sha256}-{blob.size}"
        with self._lock:
            known = self._uploads.get(aside.name)
            if known is None and (create or aside.exists()):
                self._make_room(blob.size)
                known = Upload(self, client, blob, aside, self.now())
                self._uploads[aside.name] = known
                self._left_over.pop(aside.name, None)
        if known is None:
            text = "nothing of this upload has arrived"
            raise CallError(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", text)
        return known

    def adopt(self, client: str, path: pathlib.Path) -> BlobName:
        """Makes the file at `path` a client's blob; `path` is gone after."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        blob = BlobName(digest, path.stat().st_size)
        if self.find(client, blob) is None:
            with self._lock:
                self._make_room(blob.size)
            self.keep(client, path, blob)
        return blob

    def adopt_bytes(self, client: str, content: bytes) -> BlobName:
        """Makes `content` a client's blob."""
        aside = self._asides / f"{tag(client)}-{uuid.uuid4()}-inline"
        try:
            aside.write_bytes(content)
            return self.adopt(client, aside)
        except OSError as error:
            raise _not_stored(error) from error
        finally:
            aside.unlink(missing_ok=True)

    def keep(self, client: str, path: pathlib.Path, blob: BlobName) -> None:
        """Names a file, whose content was checked, as a client's blob."""
        try:
            if self._remote is not None:
                self._remote.put(client, blob.sha256, path)
            self._name(client, path, blob)
        except OSError as error:
            raise _not_stored(error) from error

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
        """Removes blobs and uploads that nobody used for a while, and no operation needs."""
        self._evict(unused_s=self._ttl_s)
        if self._repository.lease_s is not None:
            self._remove_strays()
        now = self.now()
        with self._lock:
            idle = [u for u in self._uploads.values() if u.touched < now - self._ttl_s]
            kept = set(self._uploads)
        for upload in idle:
            self.forget(upload)
        for path in self._asides.iterdir():
            if path.name not in kept and (
                self._left_over.setdefault(path.name, now) < now - self._ttl_s
            ):
                path.unlink(missing_ok=True)
                del self._left_over[path.name]

    # ---- files ----

    def _path(self, sha256: str) -> pathlib.Path:
        return self._blobs / sha256[:2] / sha256

    def _fetch(self, client: str, blob: BlobName) -> pathlib.Path | None:
        """A blob's file from the object store; None when it is not there either."""
        if self._remote is None or self._remote.size(client, blob.sha256) != blob.size:
            return None
        known = self._repository.use_blob(client, blob.sha256)  # then its room is counted
        with self._lock:
            self._make_room(0 if known == blob.size else blob.size)
        aside = self._asides / f"{tag(client)}-{uuid.uuid4()}-fetched"
        try:
            self._remote.fetch(client, blob.sha256, aside)
            with aside.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.sha256:
                    return None
            self._name(client, aside, blob)
        except OSError as error:
            raise _not_stored(error) from error
        finally:
            aside.unlink(missing_ok=True)
        return self._path(blob.sha256)

    def _name(self, client: str, path: pathlib.Path, blob: BlobName) -> None:
        target = self._path(blob.sha256)
        path.chmod(0o444)
        if self.durable:
            sync(path)
        with self._naming:
            target.parent.mkdir(exist_ok=True)
            # a second name until the row is there: an upload that is killed here can go on
            try:
                os.link(path, target)
            except FileExistsError:
                pass  # the same content
            except OSError:  # a file system without hard links
                path.replace(target)
            if self.durable:
                sync(target.parent)
                sync(self._blobs)
            self._repository.add_blob(client, blob.sha256, blob.size)
        path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Evicts until `size` more bytes fit. Raises CallError RESOURCE_EXHAUSTED."""
        arriving = sum(upload.blob.size for upload in self._uploads.values())
        excess = self._repository.stored() + arriving + size - self._quota
        if excess > 0:
            self._evict(at_least=excess)
            excess = self._repository.stored() + arriving + size - self._quota
        if excess > 0:
            text = f"the server's {self._quota} bytes for blobs are in use by {excess} too many"
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            raise CallError(code, "DISK_QUOTA", text, retry_s=_ROOM_RETRY_S)

    def _remove_strays(self) -> None:
        """Removes files without a row: one of a server that was killed in between, or one whose row
        another server took away that shares them."""
        with self._naming:
            known = self._repository.blobs()
            for path in self._blobs.glob("*/*"):
                if path.name not in known:
                    path.unlink()

    def _evict(self, *, unused_s: float = 0.0, at_least: int | None = None) -> None:
        with self._naming:
            for sha256 in self._repository.evict(unused_s=unused_s, at_least=at_least):
                with contextlib.suppress(FileNotFoundError):
                    self._path(sha256).unlink()


def _no_blob(blob: BlobName) -> CallError:
    text = f"blob {blob.sha256} of {blob.size} bytes is not here; upload it first"
    return CallError(grpc.StatusCode.NOT_FOUND, "BLOB_NOT_FOUND", text)


def _reserve(file: IO[bytes], size: int) -> None:
    """Has the file system find all room of a file at once, which takes it half the time.

    The file is not longer for it. A system that cannot do this finds room as it is written.

    Raises:
        OSError: there is no such room.
    """
    if sys.platform != "linux":
        return
    disk, has = os.fstatvfs(file.fileno()), os.fstat(file.fileno()).st_blocks * 512
    # asked first: some file systems give all that they have before they say no
    if size - has > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    libc = ctypes.CDLL(None)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    libc.fallocate(file.fileno(), _KEEP_SIZE, 0, size)


def sync(path: pathlib.Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
