"""Does the result run, with the same face, finite, and how far did it move?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import scipy.special

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import Feeds, sample_count
from secateur.graphops.model.runtime import does_not_run, first_line, open_session
from secateur.graphops.surgery.vocabulary import Vocabulary
from secateur.report import Drift, Verification

Outputs = list[npt.NDArray[Any]]
Shapes = list[tuple[int, ...] | None]


@dataclass(frozen=True, slots=True)
class Answered:
    """Inputs and what the original answered.

    Attributes:
        feeds: input sets, of one or more batch sizes.
        outputs: the original's answers.
        names: of the outputs.
        signature: names, types and shapes of inputs and outputs.
        from_calibration: whether the feeds are calibration samples.
        elsewhere: feeds of other sizes, and the shapes of the original's answers, None for those
            that are no floats; None where it takes no other sizes.
    """

    feeds: tuple[Feeds, ...]
    outputs: tuple[Outputs, ...]
    names: tuple[str, ...]
    signature: Signature
    from_calibration: bool
    elsewhere: tuple[Feeds, Shapes] | None = None


def run_original(
    model: bytes | str,
    feeds: Sequence[Feeds],
    from_calibration: bool,
    perhaps: Feeds | None = None,
) -> Answered:
    """Runs the original, the ground that the result is compared with.

    Args:
        model: the original.
        feeds: what it must take.
        from_calibration: whether they are calibration samples.
        perhaps: feeds of other sizes, which it may refuse; then they are left out.

    Raises:
        Refused: `MODEL_DOES_NOT_RUN` with ONNX Runtime's message.
    """
    feeds, outputs, tried = list(feeds), [], feeds[0] if feeds else {}
    try:
        session = open_session(model, lean=True)
        for tried in feeds:
            outputs.append(session.run(None, tried))
    except Exception as error:
        raise does_not_run(error, tried) from None
    elsewhere: tuple[Feeds, Shapes] | None = None
    if perhaps is not None:
        with contextlib.suppress(Exception):  # of many kinds; whoever gave them did not know
            elsewhere = perhaps, _shapes(session.run(None, perhaps))
    return Answered(
        feeds=tuple(feeds),
        outputs=tuple(outputs),
        names=tuple(output.name for output in session.get_outputs()),
        signature=signature(session),
        from_calibration=from_calibration,
        elsewhere=elsewhere,
    )


def without_tokens(samples: Answered, vocabulary: Vocabulary) -> Answered:
    """The same for a model that knows fewer tokens: its feeds, and answers for what it knows."""
    kept = [name in vocabulary.outputs for name in samples.names]
    sizes = dict.fromkeys(vocabulary.outputs, vocabulary.ids.size)
    return replace(
        samples,
        feeds=tuple(vocabulary.new(feed) for feed in samples.feeds),
        outputs=tuple(
            [
                np.take(array, vocabulary.ids, -1) if of_tokens else array
                for array, of_tokens in zip(arrays, kept, strict=True)
            ]
            for arrays in samples.outputs
        ),
        signature=tuple(
            (name, kind, (*shape[:-1], sizes[name]) if name in sizes else shape)
            for name, kind, shape in samples.signature
        ),
    )


def verify(model: bytes | str, samples: Answered, held_back: bool = False) -> Verification:
    """Runs the result on the same inputs.

    Args:
        model: the result.
        samples: inputs, and the original's answers.
        held_back: whether nothing was fitted or measured on those inputs.

    Raises:
        VerificationFailed: it does not load or run, has other inputs or outputs, or gives
            numbers that are not finite where the original's are.
    """
    try:
        session = open_session(model, lean=True)
    except Exception as error:
        raise _failed(f"ONNX Runtime cannot load the pruned model: {first_line(error)}") from None
    found_signature = signature(session)
    if not _same_face(found_signature, samples.signature):
        raise _failed(
            "the pruned model has other inputs or outputs", samples.signature, found_signature
        )
    meters = [_Meter(name) for name in samples.names]
    batches: list[int] = []
    for feed, wanted in zip(samples.feeds, samples.outputs, strict=True):
        try:
            found = session.run(None, feed)
        except Exception as error:
            raise _failed(f"the pruned model does not run: {first_line(error)}") from None
        batches.append(sample_count(feed))
        for meter, reference, result in zip(meters, wanted, found, strict=True):
            meter.add(reference, result)
    if samples.elsewhere is not None:
        _check_elsewhere(session, *samples.elsewhere)
    return Verification(
        samples=sum(batches),
        from_calibration=samples.from_calibration,
        held_back=held_back,
        batch_sizes=tuple(sorted(set(batches))),
        drift=tuple(meter.drift() for meter in meters if meter.used),
    )


def _shapes(outputs: Outputs) -> Shapes:
    return [array.shape if _is_float(array) else None for array in outputs]


def _is_float(output: Any) -> bool:
    return isinstance(output, np.ndarray) and output.dtype.kind in "fV"


def _check_elsewhere(session: ort.InferenceSession, feed: Feeds, wanted: Shapes) -> None:
    """What the numbers are does not matter: nobody says that the model is for them."""
    sizes = {name: list(np.shape(array)) for name, array in feed.items()}
    try:
        found = _shapes(session.run(None, feed))
    except Exception as error:
        raise _failed(
            f"the pruned model does not run with inputs {sizes}: {first_line(error)}"
        ) from None
    if found != wanted:
        raise _failed(f"outputs have other shapes with inputs {sizes}", wanted, found)


Signature = tuple[tuple[str, str, tuple[int | str | None, ...]], ...]


def signature(session: ort.InferenceSession) -> Signature:
    """(name, type, shape) of every input and output."""
    items = [*session.get_inputs(), *session.get_outputs()]
    return tuple((item.name, item.type, tuple(item.shape or ())) for item in items)


def _same_face(found: Signature, wanted: Signature) -> bool:
    """Whether names, types and fixed sizes agree. ONNX Runtime infers symbolic sizes of outputs
    from the graph, and may know more of one model than of the other."""
    if [item[:2] for item in found] != [item[:2] for item in wanted]:
        return False
    for (_, _, have), (_, _, want) in zip(found, wanted, strict=True):
        sizes = [(a, b) for a, b in zip(have, want, strict=False)]
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes):
            return False
    return True


class _Meter:
    """Drift of one output, summed over input sets."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.used = False
        self._error = self._reference = self._result = self._dot = 0.0
        self._agree = self._rows = 0
        self._divergence: float | None = 0.0

    def add(self, reference: Any, result: Any) -> None:
        if not _is_float(reference):
            return
        a, b = reference.astype(np.float64), result.astype(np.float64)
        if a.shape != b.shape:
            raise _failed(f"output {self.name!r} has another shape", a.shape, b.shape)
        if not np.isfinite(b[np.isfinite(a)]).all():
            raise _failed(
                f"output {self.name!r} is not finite", "finite numbers", "NaN or infinity"
            )
        a, b = np.where(np.isfinite(a), a, 0.0), np.where(np.isfinite(b), b, 0.0)
        self.used = True
        self._error += float(((a - b) ** 2).sum())
        self._reference += float((a**2).sum())
        self._result += float((b**2).sum())
        self._dot += float((a * b).sum())
        if a.ndim and a.shape[-1] > 1 and a.size:
            same = a.argmax(axis=-1) == b.argmax(axis=-1)
            self._agree += int(same.sum())
            self._rows += int(same.size)
            if self._divergence is not None and _is_distribution(a) and _is_distribution(b):
                safe = np.maximum(b, np.finfo(np.float32).tiny)
                self._divergence += float(scipy.special.rel_entr(a, safe).sum())
            else:
                self._divergence = None

    def drift(self) -> Drift:
        scale = np.sqrt(self._reference * self._result)
        return Drift(
            output=self.name,
            relative_error=float(np.sqrt(self._error / self._reference))
            if self._reference
            else 0.0,
            cosine=self._dot / scale if scale else 1.0,
            top1_agreement=self._agree / self._rows if self._rows else None,
            kl=self._divergence / self._rows
            if self._rows and self._divergence is not None
            else None,
        )


def _is_distribution(array: npt.NDArray[np.float64]) -> bool:
    """Whether every row along the last axis holds probabilities."""
    return bool((array >= 0).all() and (np.abs(array.sum(axis=-1) - 1) < 1e-3).all())


def drift_between(
    names: Iterable[str], wanted: Sequence[Outputs], found: Sequence[Outputs]
) -> tuple[Drift, ...]:
    """Drift of each floating-point output between two models' answers to the same inputs."""
    meters = [_Meter(name) for name in names]
    for references, results in zip(wanted, found, strict=True):
        for meter, reference, result in zip(meters, references, results, strict=True):
            meter.add(reference, result)
    return tuple(meter.drift() for meter in meters if meter.used)


def _failed(message: str, expected: object = "", found: object = "") -> Refused:
    return refuse(
        Code.VERIFICATION_FAILED,
        message,
        expected=expected,
        found=found,
        hint="Nothing was written. Please report this with the model's structure.",
    )
