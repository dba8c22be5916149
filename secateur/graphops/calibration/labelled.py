"""Labels: of calibration samples, or with samples of their own; only the evidence reads them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration.data import (
    Array,
    Calibration,
    CalibrationSource,
    Feeds,
    Samples,
    open_calibration,
    parts_of,
)
from secateur.graphops.model.graph import real_inputs

Labels = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Samples, and what a model should answer.

    Attributes:
        batches: gives, from the beginning at each call, the feeds of each batch and labels by
            output; they may be fewer than its samples, and then belong to the first of them.
        from_calibration: whether the samples are calibration samples.
        held_back: whether they are some that nothing was fitted or measured on.
    """

    batches: Callable[[], Iterator[tuple[Feeds, Labels]]]
    from_calibration: bool
    held_back: bool


def open_labels(
    source: CalibrationSource,
    model: ir.Model,
    calibration: Calibration | None,
    samples: Samples | None,
) -> Labelled:
    """Opens labels: a `.npz`, a folder of them, or arrays by name.

    A file with the model's inputs brings samples of its own, all of which are scored. Without them
    its labels are those of all calibration samples, in their order, and what is scored are the
    samples that judge the result.

    Args:
        source: arrays of class numbers, named after the outputs that they are for; of any name
            where there is one array and one output.
        model: that they are for.
        calibration, samples: all calibration samples, and those that were drawn.

    Raises:
        Refused: `INVALID_LABELS`; what fits no sample or no output by now, the rest from `batches`.
    """
    inputs = {str(value.name) for value in real_inputs(model.graph)}
    outputs = tuple(str(value.name) for value in model.graph.outputs)
    with _about_labels():
        parts = parts_of(source)
        if inputs & set(parts[0].names()):
            own = open_calibration(source, model)
            return Labelled(functools.partial(_own_batches, own, outputs), False, False)
    if calibration is None or samples is None:
        raise refuse(
            Code.INVALID_LABELS,
            "labels alone are those of calibration samples, and there are none",
            expected="--calibration PATH, or the model's inputs beside the labels",
            found="neither",
        )
    with _about_labels():
        read = [_labels_in(part.read(), (), outputs) for part in parts]
    if any(labels.keys() != read[0].keys() for labels in read):
        raise refuse(Code.INVALID_LABELS, "the files of labels are for different outputs")
    labels = {name: np.concatenate([one[name] for one in read]) for name in read[0]}
    _check_counts(labels, calibration.count(), "calibration samples")
    batches = functools.partial(_judged_batches, samples, labels)
    return Labelled(batches, True, samples.held_back)


def _own_batches(own: Calibration, outputs: Sequence[str]) -> Iterator[tuple[Feeds, Labels]]:
    """All samples of a file; a last batch that a fixed size leaves short repeats its last one."""
    for part in own.parts:
        with _about_labels():
            arrays = part.read()
            count = own.check(arrays, part.name)
            labels = _labels_in(arrays, tuple(own.expected), outputs)
            _check_counts(labels, count, f"samples of {part.name}" if part.name else "samples")
        for first in range(0, count, own.batch):
            stop = first + own.batch if own.is_fixed() else min(first + own.batch, count)
            places = np.minimum(np.arange(first, stop), count - 1)
            yield own.feeds(arrays, places), {n: a[first:stop] for n, a in labels.items()}


def _judged_batches(samples: Samples, labels: Labels) -> Iterator[tuple[Feeds, Labels]]:
    for feeds, places in zip(samples.judged, samples.places, strict=True):
        yield feeds, {name: array[places] for name, array in labels.items()}


def _labels_in(
    arrays: Mapping[str, Array], inputs: Sequence[str], outputs: Sequence[str]
) -> Labels:
    """The arrays that are not inputs, by the output that each is for."""
    labels = {name: array for name, array in arrays.items() if name not in inputs}
    if len(labels) == 1 and len(outputs) == 1:
        labels = {outputs[0]: next(iter(labels.values()))}
    unknown = tuple(name for name in labels if name not in outputs)
    if unknown or not labels:
        raise refuse(
            Code.INVALID_LABELS,
            "an array of labels is named after the output that it is for",
            nodes=unknown,
            expected=f"some of {', '.join(outputs)}",
            found=", ".join(unknown) or "samples alone",
        )
    for name, array in labels.items():
        if array.dtype.kind not in "iu" or not array.ndim:
            raise refuse(
                Code.INVALID_LABELS,
                f"labels for output {name!r} are class numbers",
                nodes=(name,),
                expected="integers, one or more per sample",
                found=f"{array.dtype}, shape {list(array.shape)}",
            )
    return labels


def _check_counts(labels: Labels, count: int, of: str) -> None:
    for name, array in labels.items():
        if array.shape[0] != count:
            raise refuse(
                Code.INVALID_LABELS,
                f"labels for output {name!r} are not as many as the {of}",
                nodes=(name,),
                expected=count,
                found=array.shape[0],
            )


@contextlib.contextmanager
def _about_labels() -> Iterator[None]:
    """What is wrong with samples that came with labels is said of the labels."""
    try:
        yield
    except Refused as error:
        found = error.refusal
        raise refuse(
            Code.INVALID_LABELS,
            found.message,
            nodes=found.nodes,
            expected=found.expected,
            found=found.found,
            hint=found.hint,
        ) from None
