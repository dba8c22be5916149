"""Does the result run, with the same face, finite, and how far did it move?"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
Axes = Mapping[str, Collection[int]]  # by output


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
        by_data: axes of outputs whose sizes the data decide, not the sizes of the inputs: how many
            boxes are found, how long speech becomes. Another model's answers may differ there.
    """

    feeds: tuple[Feeds, ...]
    outputs: tuple[Outputs, ...]
    names: tuple[str, ...]
    signature: Signature
    from_calibration: bool
    elsewhere: tuple[Feeds, Shapes] | None = None
    by_data: Axes = field(default_factory=dict)


def run_original(
    model: bytes | str,
    feeds: Sequence[Feeds],
    from_calibration: bool,
    perhaps: Feeds | None = None,
    by_data: Axes | None = None,
) -> Answered:
    """Runs the original, the ground that the result is compared with.

    Args:
        model: the original.
        feeds: what it must take all of, if they are calibration samples; else one at least: the
            others are then left out.
        from_calibration: whether they are calibration samples.
        perhaps: feeds of other sizes, which it may refuse; then they are left out.
        by_data: see `Answered`.

    Raises:
        Refused: `MODEL_DOES_NOT_RUN` with ONNX Runtime's message.
    """
    try:
        session = open_session(model, lean=True)
    except Exception as error:
        raise does_not_run(error, feeds[0] if feeds else {}) from None
    taken: list[Feeds] = []
    outputs: list[Outputs] = []
    refusals: list[Refused] = []
    for feed in feeds:
        try:
            outputs.append(session.run(None, feed))
            taken.append(feed)
        except Refused as refused:
            refusals.append(refused)
    if refusals and (from_calibration or not taken):
        raise refusals[0]
    elsewhere: tuple[Feeds, Shapes] | None = None
    if perhaps is not None:
        with contextlib.suppress(Refused):  # whoever gave them did not know
            elsewhere = perhaps, _shapes(session.run(None, perhaps))
    return Answered(
        feeds=tuple(taken),
        outputs=tuple(outputs),
        names=tuple(output.name for output in session.get_outputs()),
        signature=signature(session),
        from_calibration=from_calibration,
        elsewhere=elsewhere,
        by_data=by_data or {},
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
    loose = [samples.by_data.get(name, ()) for name in samples.names]
    meters = [_Meter(name, axes) for name, axes in zip(samples.names, loose, strict=True)]
    batches: list[int] = []
    for feed, wanted in zip(samples.feeds, samples.outputs, strict=True):
        try:
            found = session.run(None, feed)
        except Refused as refused:
            raise _failed(f"the pruned model does not run: {_said(refused)}") from None
        batches.append(sample_count(feed))
        for meter, reference, result in zip(meters, wanted, found, strict=True):
            meter.add(reference, result)
    if samples.elsewhere is not None:
        _check_elsewhere(session, *samples.elsewhere, loose)
    return Verification(
        samples=sum(batches),
        from_calibration=samples.from_calibration,
        held_back=held_back,
        batch_sizes=tuple(sorted(set(batches))),
        drift=tuple(meter.drift() for meter in meters if meter.used),
        resized=tuple(meter.name for meter in meters if meter.resized),
        not_finite=tuple(meter.name for meter in meters if meter.read and not meter.used),
    )


def _shapes(outputs: Outputs) -> Shapes:
    return [array.shape if _is_float(array) else None for array in outputs]


def _is_float(output: Any) -> bool:
    return isinstance(output, np.ndarray) and output.dtype.kind in "fV"


def _said(refused: Refused) -> str:
    """What ONNX Runtime said when it did not run a model."""
    return first_line(refused.__cause__ or refused)


def _agree(found: tuple[int, ...], wanted: tuple[int, ...], loose: Collection[int]) -> bool:
    """Whether two shapes are equal but for some axes."""
    pairs = enumerate(zip(found, wanted, strict=False))
    return len(found) == len(wanted) and all(a == b or axis in loose for axis, (a, b) in pairs)


def _check_elsewhere(
    session: ort.InferenceSession, feed: Feeds, wanted: Shapes, loose: Sequence[Collection[int]]
) -> None:
    """What the numbers are does not matter: nobody says that the model is for them."""
    sizes = {name: list(np.shape(array)) for name, array in feed.items()}
    try:
        found = _shapes(session.run(None, feed))
    except Refused as refused:
        raise _failed(
            f"the pruned model does not run with inputs {sizes}: {_said(refused)}"
        ) from None
    pairs = zip(found, wanted, loose, strict=True)
    if any(a != b and (a is None or b is None or not _agree(a, b, axes)) for a, b, axes in pairs):
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
    """Drift of one output, summed over input sets.

    Along axes whose sizes the data decide, over the positions that both answers have.
    """

    def __init__(self, name: str, loose: Collection[int] = ()) -> None:
        self.name = name
        self._loose = loose
        self.read = self.used = self.resized = False
        self._error = self._reference = self._result = self._dot = 0.0
        self._agree = self._rows = 0
        self._divergence: float | None = 0.0

    def add(self, reference: Any, result: Any) -> None:
        if not _is_float(reference):
            return
        a, b = reference.astype(np.float64), result.astype(np.float64)
        if not _agree(b.shape, a.shape, self._loose):
            raise _failed(f"output {self.name!r} has another shape", a.shape, b.shape)
        self.resized |= a.shape != b.shape
        both = tuple(slice(min(sizes)) for sizes in zip(a.shape, b.shape, strict=True))
        a, b = a[both], b[both]
        if not np.isfinite(b[np.isfinite(a)]).all():
            raise _failed(
                f"output {self.name!r} is not finite", "finite numbers", "NaN or infinity"
            )
        self.read = True
        self.used |= not a.size or bool(np.isfinite(a).any())
        a, b = np.where(np.isfinite(a), a, 0.0), np.where(np.isfinite(b), b, 0.0)
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
