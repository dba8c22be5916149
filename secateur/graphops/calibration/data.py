"""Calibration data: unlabelled samples for the model's inputs, read in a stream."""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
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

BATCH = 32  # samples run together, where the model does not say
MOST_SAMPLES = 1024  # more change nothing that can be seen
MOST_BYTES = 512 << 20  # of samples in memory
_BATCHES = 16  # to have at least, where the batch is free
_BACK = 8  # every eighth is kept back for the evidence


@dataclass(frozen=True, slots=True)
class Samples:
    """What is run for criteria and repair, and what is kept back to judge the result.

    Attributes:
        seen: batches that statistics and fits are made of.
        judged: batches that nothing but the verification runs.
        held_back: whether those are others; false where there are too few.
    """

    seen: tuple[Feeds, ...]
    judged: tuple[Feeds, ...]
    held_back: bool


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

    def draw(self) -> Samples:
        """At most `MOST_SAMPLES` samples, and `MOST_BYTES`, spread evenly over all of them.

        One part is in memory at a time; a remainder that a fixed batch cannot take is left out.
        Where the batch is free there are enough batches for some to be kept back.

        Raises:
            Refused: `INVALID_CALIBRATION` when a part does not fit the inputs.
        """
        counts = [_count(part, self.expected) for part in self.parts]
        total = sum(counts)
        one = self._bytes_of_one()
        most = min(total, MOST_SAMPLES, max(MOST_BYTES // max(one, 1), 1))
        wanted = np.unique(np.linspace(0, total - 1, most).round().astype(np.int64))
        size = self.batch if self._is_fixed() else min(self.batch, max(most // _BATCHES, 1))
        batches: list[Feeds] = []
        for part, count, start in zip(self.parts, counts, np.cumsum([0, *counts]), strict=False):
            mine = wanted[(wanted >= start) & (wanted < start + count)] - start
            if not mine.size:
                continue
            arrays = _read(part) if isinstance(part, pathlib.Path) else part
            _check(arrays, self.expected, part.name if isinstance(part, pathlib.Path) else "")
            for first in range(0, mine.size, size):
                chosen = mine[first : first + size]
                if chosen.size < size and self._is_fixed():
                    break
                batches.append(
                    {
                        name: arrays[name][chosen] if arrays[name].ndim else arrays[name]
                        for name in self.expected
                    }
                )
        seen, judged = hold_back(batches, _BACK)
        return Samples(seen, judged, held_back=len(seen) < len(batches))

    def _bytes_of_one(self) -> int:
        """Of one sample of the first part."""
        first = self.parts[0]
        arrays = _read(first) if isinstance(first, pathlib.Path) else first
        chosen = [arrays[name] for name in self.expected]
        return sum(a.nbytes // a.shape[0] if a.ndim else a.nbytes for a in chosen)

    def _is_fixed(self) -> bool:
        return any(shape and shape[0] is not None for _, shape in self.expected.values())


def hold_back(batches: Sequence[Feeds], every: int) -> tuple[tuple[Feeds, ...], tuple[Feeds, ...]]:
    """Batches to learn from, and every so-manieth to judge by; both all of them if too few."""
    held = tuple(batch for place, batch in enumerate(batches) if place % every == every - 1)
    if not held:
        return tuple(batches), tuple(batches)
    rest = tuple(batch for place, batch in enumerate(batches) if place % every != every - 1)
    return rest, held


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


def _count(
    part: Mapping[str, Array] | pathlib.Path,
    expected: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]],
) -> int:
    """Samples in a part; of a file, the headers are read and no array."""
    if isinstance(part, Mapping):
        return sample_count({name: part[name] for name in expected})
    try:
        with zipfile.ZipFile(part) as archive:
            for name in expected:
                with archive.open(f"{name}.npy") as member:
                    version = np.lib.format.read_magic(member)
                    header = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        header = np.lib.format.read_array_header_2_0
                    shape = header(member)[0]
                if shape:
                    return int(shape[0])
    except (KeyError, *_UNREADABLE):
        _check(_read(part), expected, part.name)  # says what is wrong with it
        raise
    return 1


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
