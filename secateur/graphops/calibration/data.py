"""Calibration data: unlabelled samples for the model's inputs, read in a stream."""

from __future__ import annotations

import contextlib
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.errors import Code, Refused, refuse
from secateur.graphops.model.graph import real_inputs
from secateur.graphops.model.shapes import Shapes, infer_shapes

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
CalibrationSource = str | os.PathLike[str] | Mapping[str, Array]
Expected = Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]]

_T = TypeVar("_T")

BATCH = 32  # samples run together at most, where the model does not say
_BATCH_BYTES = 4 << 20  # of their inputs: what is computed from them is many times as large
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
        places: which of all samples those of each judged batch are.
        held_back: whether those are others; false where there are too few.
    """

    seen: tuple[Feeds, ...]
    judged: tuple[Feeds, ...]
    places: tuple[npt.NDArray[np.int64], ...]
    held_back: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Arrays by name: as they were handed in, or an `.npz` file that is read when asked for.

    Attributes:
        content: the arrays, or the path.
    """

    content: Mapping[str, Array] | pathlib.Path

    @property
    def name(self) -> str:
        """Of the file; empty where there is none."""
        return self.content.name if isinstance(self.content, pathlib.Path) else ""

    def names(self) -> list[str]:
        """Of the arrays; of a file, none is read."""
        if not isinstance(self.content, pathlib.Path):
            return list(self.content)
        with _opened(self.content) as archive:
            return list(archive.files)

    def read(self) -> Mapping[str, Array]:
        """All arrays. Raises Refused: `INVALID_CALIBRATION` when the file cannot be read."""
        if not isinstance(self.content, pathlib.Path):
            return self.content
        with _opened(self.content) as archive:
            return {name: archive[name] for name in archive.files}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Checked calibration data.

    Attributes:
        parts: arrays by input name; of files, one is read at a time.
        batch: samples per batch; fixed by the model where its batch axis is.
        expected: input name → (dtype, shape with None for free axes).
        axes: input name → the axis along which samples lie (`sample_axes`); none for an input
            that comes once for all of them.
    """

    parts: tuple[Part, ...]
    batch: int
    expected: Expected
    axes: Mapping[str, int]

    def draw(self) -> Samples:
        """At most `MOST_SAMPLES` samples, and `MOST_BYTES`, spread evenly over all of them.

        One part is in memory at a time; a remainder that a fixed batch cannot take is left out.
        Where the batch is free there are enough batches for some to be kept back.

        Raises:
            Refused: `INVALID_CALIBRATION` when a part does not fit the inputs.
        """
        counts = [_count(part, self) for part in self.parts]
        total = sum(counts)
        one = self._bytes_of_one()
        most = min(total, MOST_SAMPLES, max(MOST_BYTES // max(one, 1), 1))
        wanted = np.unique(np.linspace(0, total - 1, most).round().astype(np.int64))
        size = self.batch
        if not self.is_fixed():
            size = max(min(size, most // _BATCHES, _BATCH_BYTES // max(one, 1)), 1)
        batches: list[Feeds] = []
        places: list[npt.NDArray[np.int64]] = []
        for part, count, start in zip(self.parts, counts, np.cumsum([0, *counts]), strict=False):
            mine = wanted[(wanted >= start) & (wanted < start + count)] - start
            if not mine.size:
                continue
            arrays = part.read()
            self.check(arrays, part.name)
            for first in range(0, mine.size, size):
                chosen = mine[first : first + size]
                if chosen.size < size and self.is_fixed():
                    break
                batches.append(self.feeds(arrays, chosen))
                places.append(chosen + start)
        seen, judged = hold_back(batches, _BACK)
        return Samples(seen, judged, hold_back(places, _BACK)[1], len(seen) < len(batches))

    def count(self) -> int:
        """Samples in all parts. Raises Refused as `draw`."""
        return sum(_count(part, self) for part in self.parts)

    def check(self, arrays: Mapping[str, Array], name: str) -> int:
        """How many samples the arrays of the part called `name` hold. Raises Refused as `draw`."""
        return _check(arrays, self.expected, self.axes, name)

    def feeds(self, arrays: Mapping[str, Array], places: npt.NDArray[np.int64]) -> Feeds:
        """The samples of a part at some places, as one batch."""
        return {
            name: arrays[name].take(places, self.axes[name]) if name in self.axes else arrays[name]
            for name in self.expected
        }

    def is_fixed(self) -> bool:
        """Whether the model takes batches of `batch` samples only."""
        return _fixed(self.expected, self.axes) is not None

    def _bytes_of_one(self) -> int:
        """Of one sample of the first part."""
        arrays = self.parts[0].read()
        return sum(
            arrays[name].nbytes // (arrays[name].shape[self.axes[name]] if name in self.axes else 1)
            for name in self.expected
        )


def hold_back(batches: Sequence[_T], every: int) -> tuple[tuple[_T, ...], tuple[_T, ...]]:
    """Batches to learn from, and every so-manieth to judge by; both all of them if too few."""
    held = tuple(batch for place, batch in enumerate(batches) if place % every == every - 1)
    if not held:
        return tuple(batches), tuple(batches)
    rest = tuple(batch for place, batch in enumerate(batches) if place % every != every - 1)
    return rest, held


def sample_axes(graph: ir.Graph) -> dict[str, int]:
    """Along which axis the samples of an input lie, by its name, those along axis 0 first.

    That is axis 0, or the one that bears the name of another input's axis 0: states of recurrent
    layers come as (layers, batch, units). Scalars have none.
    """
    shapes = {str(value.name): tuple(value.shape or ()) for value in real_inputs(graph)}
    names = {name: [_name(dim) for dim in shape] for name, shape in shapes.items() if shape}
    batches = {axes[0] for axes in names.values()} - {""}
    found = {
        name: next((place for place, axis in enumerate(axes) if axis in batches), 0)
        for name, axes in names.items()
    }
    return dict(sorted(found.items(), key=lambda one: one[1]))


def batch_axes(graph: ir.Graph, shapes: Shapes) -> dict[str, int]:
    """Along which axis the samples of an input lie, by its name, where the batch is free."""
    pairs = shapes.inputs
    return {
        name: axis
        for name, axis in sample_axes(graph).items()
        if pairs[name][0][axis] != pairs[name][1][axis]
    }


def _name(dim: int | ir.SymbolicDim) -> str:
    return str(dim.value or "") if isinstance(dim, ir.SymbolicDim) else ""


def sample_count(feeds: Feeds) -> int:
    """Samples in one set of feeds; scalars are the same for all of them."""
    return next((array.shape[0] for array in feeds.values() if array.ndim), 1)


def first_batches(batches: Sequence[Feeds], samples: int) -> tuple[Feeds, ...]:
    """As many of them as hold so many samples; all where they hold fewer."""
    held = np.cumsum([0, *map(sample_count, batches)])
    return tuple(batch for before, batch in zip(held, batches, strict=False) if before < samples)


def alike(batches: Iterable[Feeds]) -> list[int]:
    """Which of them have the commonest shapes."""
    shapes = [tuple(sorted((name, a.shape) for name, a in batch.items())) for batch in batches]
    common = max(shapes, key=shapes.count)
    return [place for place, shape in enumerate(shapes) if shape == common]


def evenly(samples: Sequence[Feeds], most: int) -> list[Feeds]:
    """So many of them at most, from the first to the last."""
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), most)).round().astype(int)
    return [samples[place] for place in chosen.tolist()]


def open_calibration(source: CalibrationSource, model: ir.Model) -> Calibration:
    """Opens a `.npz`, a folder of them, or arrays by name, and checks the first part.

    Args:
        source: the data.
        model: that they are for.

    Raises:
        Refused: `INVALID_CALIBRATION`, naming the input, what was expected and what was found.
    """
    expected, graph = {}, model.graph
    for value in real_inputs(graph):
        dims = tuple(dim if isinstance(dim, int) and dim > 0 else None for dim in value.shape or ())
        expected[str(value.name)] = ((value.dtype or ir.DataType.FLOAT).numpy(), dims)
    parts = parts_of(source)
    first = parts[0].read()
    axes = _along_samples(sample_axes(graph), expected, first)
    expected = {name: expected[name] for name in (*axes, *expected)}
    fixed = _fixed(expected, axes)
    if fixed is None and axes and _takes_single_samples(model, axes):
        fixed = 1
        for name, axis in axes.items():
            dtype, dims = expected[name]
            expected[name] = dtype, (*dims[:axis], 1, *dims[axis + 1 :])
    calibration = Calibration(parts, fixed or BATCH, expected, axes)
    calibration.check(first, "")
    return calibration


def _along_samples(
    axes: Mapping[str, int], expected: Expected, arrays: Mapping[str, Array]
) -> dict[str, int]:
    """Without the inputs that come once for all samples, as tables do that exporters make inputs
    of: as long as the model says, where others hold another number of samples."""
    lengths = {
        name: np.shape(arrays[name])[axis]
        for name, axis in axes.items()
        if name in arrays and axis < np.ndim(arrays[name])
    }
    once = {name for name, length in lengths.items() if length == expected[name][1][axes[name]]}
    counts = {length for name, length in lengths.items() if name not in once}
    counts = counts or {min(lengths.values(), default=0)}
    return {
        name: axis for name, axis in axes.items() if name not in once or lengths[name] in counts
    }


def parts_of(source: CalibrationSource) -> tuple[Part, ...]:
    """A `.npz`, those of a folder, or arrays by name. Raises Refused: a folder holds none."""
    if isinstance(source, Mapping):
        return (Part({str(name): np.asarray(array) for name, array in source.items()}),)
    path = pathlib.Path(source)
    parts = tuple(map(Part, sorted(path.glob("*.npz")))) if path.is_dir() else (Part(path),)
    if not parts:
        raise refuse(
            Code.INVALID_CALIBRATION,
            f"folder {path} holds no .npz files",
            expected="at least one .npz file",
            found="none",
        )
    return parts


# What NumPy raises on a file that is cut short, damaged, or something else altogether.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            yield archive
    except _UNREADABLE as error:
        raise refuse(
            Code.INVALID_CALIBRATION,
            f"file {path.name} cannot be read: {error}",
            expected="an .npz file with arrays by name, samples along axis 0",
        ) from None


def _fixed(expected: Expected, axes: Mapping[str, int]) -> int | None:
    """How many samples the model takes together, None where any number."""
    sizes = (expected[name][1][axis] for name, axis in axes.items())
    return next((size for size in sizes if size is not None), None)


def _takes_single_samples(model: ir.Model, axes: Mapping[str, int]) -> bool:
    """Whether a batch that is free by name is written down inside as one."""
    inputs = infer_shapes(model).inputs
    return all(inputs[name][0][axis] == inputs[name][1][axis] == 1 for name, axis in axes.items())


def _count(part: Part, calibration: Calibration) -> int:
    """Samples in a part; of a file, the headers are read and no array."""
    expected, axes = calibration.expected, calibration.axes
    if not isinstance(part.content, pathlib.Path):
        return sample_count({name: part.content[name] for name in expected})
    try:
        with zipfile.ZipFile(part.content) as archive:
            for name in expected:
                with archive.open(f"{name}.npy") as member:
                    version = np.lib.format.read_magic(member)
                    header = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        header = np.lib.format.read_array_header_2_0
                    shape = header(member)[0]
                if name in axes:
                    return int(shape[axes[name]])
    except (KeyError, IndexError, *_UNREADABLE):
        _check(part.read(), expected, axes, part.name)  # says what is wrong with it
        raise
    return 1


def _check(
    arrays: Mapping[str, Array], expected: Expected, axes: Mapping[str, int], where: str
) -> int:
    """Raises unless the arrays fit; returns the number of samples."""
    if not set(expected) <= set(arrays):
        raise _invalid("", "arrays for the model's inputs", sorted(expected), sorted(arrays), where)
    counts = {}
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype != dtype:
            raise _invalid(name, "the dtype", dtype, array.dtype, where)
        fits = array.ndim == len(shape) and all(
            want is None or want == have or axis == axes.get(name)
            for axis, (want, have) in enumerate(zip(shape, array.shape, strict=True))
        )
        if not fits:
            wanted = ["any" if want is None else want for want in shape]
            if name in axes:
                wanted[axes[name]] = "N"
            raise _invalid(name, "the shape", wanted, list(array.shape), where)
        if not array.size:
            raise _invalid(name, "the number of samples", "at least 1", 0, where)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise _invalid(name, "the values", "finite numbers", f"{bad} NaN or infinite", where)
        if name in axes:
            counts[name] = array.shape[axes[name]]
    if len(set(counts.values())) > 1:
        raise _invalid("", "the number of samples", "the same for every input", counts, where)
    count = next(iter(counts.values()), 1)
    fixed = _fixed(expected, axes)
    if fixed is not None and count < fixed:
        raise _invalid("", "the number of samples", f"at least the batch of {fixed}", count, where)
    return count


def _invalid(name: str, what: str, expected: object, found: object, where: str) -> Refused:
    subject = f"input {name!r}" if name else "the samples"
    place = f" in {where}" if where else ""
    return refuse(
        Code.INVALID_CALIBRATION,
        f"{subject}{place}: {what} is wrong",
        nodes=(name,) if name else (),
        expected=expected,
        found=found,
    )
