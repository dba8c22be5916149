"""What callers hand in (paths, bytes, model objects, arrays) as content that can be sent.

Nothing heavy is imported unless an object of that library was given.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import mmap
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import google.protobuf.message

from secateur.errors import Code, refuse


class Source:
    """Bytes to send: held, or in a file that is read only while they are sent.

    Attributes:
        size: in bytes.
    """

    def __init__(self, content: bytes | pathlib.Path) -> None:
        self._content = content
        self.size = len(content) if isinstance(content, bytes) else content.stat().st_size

    def read(self) -> bytes:
        """All of it."""
        return self._content if isinstance(self._content, bytes) else self._content.read_bytes()

    def sha256(self) -> str:
        """SHA-256 in lower-case hexadecimal digits."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        # in one call, which leaves the interpreter to other threads
        if isinstance(self._content, bytes):
            return hashlib.sha256(self._content).hexdigest()
        with _mapped(self._content) as content:
            return hashlib.sha256(content).hexdigest()

    def chunks(self, offset: int, size: int) -> Iterator[bytes]:
        """The bytes from `offset` on, `size` of them at a time; nothing when none are left."""
        with self._open() as file:
            file.seek(offset)
            while chunk := file.read(size):
                yield chunk

    def _open(self) -> Any:
        if isinstance(self._content, bytes):
            return io.BytesIO(self._content)
        return self._content.open("rb")


def model_source(model: Any) -> tuple[Source, list[tuple[str, Source]]]:
    """The serialised form of a model, and (name, content) of the files of its external data.

    Args:
        model: a path, bytes, ModelProto, `onnx_ir.Model` or `gs.Graph`; only beside a path may
            other files lie.

    Raises:
        Refused: `INVALID_MODEL` when a path cannot be read; `MISSING_EXTERNAL_DATA` when a file
            that it names is not there.
        TypeError: it is none of these.
    """
    if isinstance(model, (str, os.PathLike)):
        path = pathlib.Path(model)
        source = _model_file(path)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            beside.submit(source.sha256)  # whoever sends a large one asks for it
            return source, _external_files(path)
    return _model_value(model), []


def _model_value(model: Any) -> Source:
    if isinstance(model, (bytes, bytearray, memoryview)):
        return Source(bytes(model))
    package = type(model).__module__.partition(".")[0]
    if package == "onnx_ir":
        import onnx_ir

        model = onnx_ir.to_proto(model)
    elif package == "onnx_graphsurgeon":
        import onnx_graphsurgeon

        model = onnx_graphsurgeon.export_onnx(model)
    if hasattr(model, "SerializeToString") and hasattr(model, "graph"):
        return Source(model.SerializeToString(deterministic=True))  # as in process
    raise TypeError(
        f"a model is a path, bytes, an onnx.ModelProto, an onnx_ir.Model or an "
        f"onnx_graphsurgeon.Graph, not {type(model).__name__}"
    )


def samples_sources(samples: Any, kind: str) -> list[tuple[str, Source]]:
    """(file name, content) of each part: an `.npz`, those of a folder, or a mapping of arrays.

    Args:
        samples: the path or mapping.
        kind: `calibration` or `labels`.

    Raises:
        Refused: `INVALID_CALIBRATION` or `INVALID_LABELS` when a path cannot be read, a folder
            holds none, or an array holds objects.
    """
    code = Code[f"INVALID_{kind.upper()}"]
    if isinstance(samples, Mapping):
        return [(f"{kind}.npz", Source(_npz(samples, code)))]
    path = pathlib.Path(samples)
    if path.is_dir():
        parts = sorted(path.glob("*.npz"))
        if not parts:  # in the engine's words, as below
            raise refuse(
                code,
                f"folder {path} holds no .npz files",
                expected="at least one .npz file",
                found="none",
            )
    else:
        parts = [path]
    return [(part.name, _samples_file(part, code)) for part in parts]


# What cannot be read is refused here in the words of the engine, which tries it in process.


def _model_file(path: pathlib.Path) -> Source:
    try:
        return _file(path)
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror or error}"
        hint = "Check the path, and that the file may be read."
        raise refuse(Code.INVALID_MODEL, text, hint=hint) from None


def _external_files(path: pathlib.Path) -> list[tuple[str, Source]]:
    """The files beside a model that hold its external data.

    What a model calls by a name that is not a plain file's beside it is not sent: the server then
    refuses it, in the engine's words.
    """
    with _mapped(path) as content:
        if content.find(b"location") < 0:  # external data has an entry of that name
            return []
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
    except google.protobuf.message.DecodeError:  # the server says what is wrong with it
        return []
    files = {}
    for tensor in _external_tensors(proto):
        name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        beside = path.resolve().parent / name
        if name != pathlib.PurePath(name).name or beside.is_symlink():
            continue
        if not beside.is_file():
            raise refuse(
                Code.MISSING_EXTERNAL_DATA,
                f"file {name!r} of tensor {tensor.name!r} is missing or too short",
                nodes=(tensor.name,),
                expected=f"a file beside {path.name}",
                found="no such file",
                hint="Put the data file beside the model.",
            )
        files[name] = Source(beside)
    return sorted(files.items())


def _external_tensors(message: Any) -> Iterator[Any]:
    """The tensors with external data anywhere in a message of ONNX."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        if message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, google.protobuf.message.Message) else value:
                yield from _external_tensors(part)


def _samples_file(path: pathlib.Path, code: Code) -> Source:
    try:
        return _file(path)
    except OSError as error:
        raise refuse(
            code,
            f"file {path.name} cannot be read: {error}",
            expected="an .npz file with arrays by name, samples along axis 0",
        ) from None


@contextlib.contextmanager
def _mapped(path: pathlib.Path) -> Iterator[bytes | mmap.mmap]:
    """The content of a file, which is not read at once."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # that cannot be mapped
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def _file(path: pathlib.Path) -> Source:
    with path.open("rb"):  # a folder or an unreadable file fails here, not while sending
        return Source(path)


def _npz(arrays: Mapping[str, Any], code: Code) -> bytes:
    """The `.npz` of `arrays`. By hand, since `numpy.savez` takes names as keyword arguments."""
    import numpy as np

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                try:
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
                except ValueError as error:
                    raise refuse(
                        code,
                        f"array {name!r}: {error}",
                        nodes=(name,),
                        expected="an array of numbers",
                        found=np.asanyarray(array).dtype,
                    ) from None
    return content.getvalue()
