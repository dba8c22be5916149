"""Calibration data: unlabelled samples for the model's inputs, read in a stream."""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.errors import Code, Refused, refuse
from secateur.graphops.model.shapes import real_inputs

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
CalibrationSource = str | os.PathLike[str] | Mapping[str, Array]

BATCH = 32


@dataclass(frozen=True, slots=True)
class Calibration:
    """Checked calibration data.

    Attributes:
        parts: arrays by input name, or `.npz` files that are opened one at a time.
        batch: samples per batch; fixed by the model where its batch axis is.
        expected: input name → (dtype, shape with None for free axes).
    """

    parts: tuple[Mapping[str, Array] | pathlib.Path, ...]
    batch: int
    expected: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]]

    def batches(self) -> Iterator[Feeds]:
        """Feeds of at most `batch` samples, in order; a remainder that a fixed batch cannot
        take is left out.

        Raises:
            Refused: `INVALID_CALIBRATION` when a part does not fit the inputs.
        """
        for part in self.parts:
            arrays = _read(part) if isinstance(part, pathlib.Path) else part
            count = _check(
                arrays, self.expected, part.name if isinstance(part, pathlib.Path) else ""
            )
            for start in range(0, count, self.batch):
                stop = min(start + self.batch, count)
                if stop - start < self.batch and self._is_fixed():
                    break
                yield {
                    # A scalar (a sample rate) is the same for every sample.
                    name: arrays[name][start:stop] if arrays[name].ndim else arrays[name]
                    for name in self.expected
                }

    def _is_fixed(self) -> bool:
        return any(shape and shape[0] is not None for _, shape in self.expected.values())


def sample_count(feeds: Feeds) -> int:
    """Samples in one set of feeds; scalars are the same for all of them."""
    return next((array.shape[0] for array in feeds.values() if array.ndim), 1)


def open_calibration(source: CalibrationSource, graph: ir.Graph) -> Calibration:
    """Opens a `.npz`, a folder of them, or arrays by name, and checks the first part.

    Raises:
        Refused: `INVALID_CALIBRATION`, naming the input, what was expected and what was found.
    """
    expected = {}
    for value in real_inputs(graph):
        dims = tuple(dim if isinstance(dim, int) and dim > 0 else None for dim in value.shape or ())
        expected[str(value.name)] = ((value.dtype or ir.DataType.FLOAT).numpy(), dims)
    parts: tuple[Mapping[str, Array] | pathlib.Path, ...]
    if isinstance(source, Mapping):
        parts = ({str(name): np.asarray(array) for name, array in source.items()},)
    else:
        path = pathlib.Path(source)
        parts = tuple(sorted(path.glob("*.npz"))) if path.is_dir() else (path,)
        if not parts:
            raise refuse(
                Code.INVALID_CALIBRATION,
                f"calibration folder {path} holds no .npz files",
                expected="at least one .npz file",
                found="none",
            )
    fixed = [shape[0] for _, shape in expected.values() if shape and shape[0] is not None]
    calibration = Calibration(parts, int(fixed[0]) if fixed else BATCH, expected)
    first = parts[0]
    _check(_read(first) if isinstance(first, pathlib.Path) else first, expected, "")
    return calibration


# What NumPy raises on a file that is cut short, damaged, or something else altogether.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def _read(path: pathlib.Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            return {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise refuse(
            Code.INVALID_CALIBRATION,
            f"calibration file {path.name} cannot be read: {error}",
            expected="an .npz file with one array per model input, samples along axis 0",
        ) from None


def _check(
    arrays: Mapping[str, Array],
    expected: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]],
    where: str,
) -> int:
    """Raises unless the arrays fit; returns the number of samples."""
    if set(arrays) < set(expected) or not set(expected) <= set(arrays):
        raise _invalid("", "arrays for the model's inputs", sorted(expected), sorted(arrays), where)
    counts = {}
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype != dtype:
            raise _invalid(name, "the dtype", dtype, array.dtype, where)
        fits = array.ndim == len(shape) and all(
            want is None or want == have
            for want, have in zip(shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            wanted = ["any" if want is None else want for want in shape]
            wanted[:1] = ["N"] if shape else []
            raise _invalid(name, "the shape", wanted, list(array.shape), where)
        if not array.size:
            raise _invalid(name, "the number of samples", "at least 1", 0, where)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise _invalid(name, "the values", "finite numbers", f"{bad} NaN or infinite", where)
        if array.ndim:
            counts[name] = array.shape[0]
    if len(set(counts.values())) > 1:
        raise _invalid("", "the number of samples", "the same for every input", counts, where)
    count = next(iter(counts.values()), 1)
    fixed = [shape[0] for _, shape in expected.values() if shape and shape[0] is not None]
    if fixed and count < fixed[0]:
        raise _invalid(
            "", "the number of samples", f"at least the batch of {fixed[0]}", count, where
        )
    return count


def _invalid(name: str, what: str, expected: object, found: object, where: str) -> Refused:
    subject = f"input {name!r}" if name else "calibration data"
    place = f" in {where}" if where else ""
    return refuse(
        Code.INVALID_CALIBRATION,
        f"{subject}{place}: {what} is wrong",
        nodes=(name,) if name else (),
        expected=expected,
        found=found,
    )
