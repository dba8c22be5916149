"""Accuracy: how often original and result answer what labels say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.errors import Code, refuse
from secateur.graphops.calibration.labelled import Labelled
from secateur.graphops.model.runtime import does_not_run, open_session
from secateur.report import Accuracy

Array = npt.NDArray[Any]

_MOST_RANKED = 5  # top-5, as ImageNet is scored


@dataclass(slots=True)
class Hits:
    """Right answers of one output.

    Attributes:
        count: labels that were scored.
        first: those whose class has the highest score.
        near: those whose class has one of the five highest; None where there are no more classes.
    """

    count: int = 0
    first: int = 0
    near: int | None = 0

    def add(self, name: str, output: Array, labels: Array) -> None:
        """Scores one batch.

        Args:
            name: of the output.
            output: class numbers in the shape of the labels; or scores, with an axis of classes
                more than the labels have, the last one or, of images, axis 1. Its samples after
                those that have labels are left out.
            labels: class numbers, samples along axis 0; those below zero are left out.

        Raises:
            Refused: `INVALID_LABELS` when the shapes do not agree, or a label is of no class.
        """
        output, known = output[: len(labels)] if output.ndim else output, labels >= 0
        self.count += int(known.sum())
        if output.dtype.kind in "iu" and output.shape == labels.shape:
            self.first += int((output == labels)[known].sum())
            self.near = None
            return
        scores = np.moveaxis(output, _class_axis(name, output, labels), -1)[known]
        wanted = labels[known].astype(np.int64)
        classes = scores.shape[-1]
        if wanted.size and int(wanted.max()) >= classes:
            raise refuse(
                Code.INVALID_LABELS,
                f"a label is of no class of output {name!r}, which has {classes}",
                nodes=(name,),
                expected=f"0 to {classes - 1}; below zero: not scored",
                found=int(wanted.max()),
            )
        places = _places(scores, wanted)
        self.first += int((places == 0).sum())
        if self.near is not None and classes > _MOST_RANKED:
            self.near += int((places < _MOST_RANKED).sum())
        else:
            self.near = None


def _places(scores: Array, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many classes stand before the wanted one, shape (n,); of equals, those that come first.

    Args:
        scores: (n, classes).
        wanted: (n,).
    """
    own = np.take_along_axis(scores, wanted[:, None], axis=-1)
    above = ~(scores <= own)  # NaN stands before all
    tied = (scores == own) & (np.arange(scores.shape[-1]) < wanted[:, None])
    places: npt.NDArray[np.int64] = (above | tied).sum(axis=-1)
    return places


def _class_axis(name: str, output: Array, labels: Array) -> int:
    shape = output.shape
    for axis in (len(shape) - 1, 1):
        fits = 0 < axis < len(shape) and shape[:axis] + shape[axis + 1 :] == labels.shape
        if fits and shape[axis] > 1 and output.dtype.kind == "f":
            return axis
    raise refuse(
        Code.INVALID_LABELS,
        f"labels do not fit output {name!r}, {output.dtype} of shape {list(shape)}",
        nodes=(name,),
        expected="its shape without an axis of two or more classes: the last one, or axis 1",
        found=f"shape {list(labels.shape)}",
        hint="Labels are class numbers, one where the output has a score for every class.",
    )


@dataclass(frozen=True, slots=True)
class Scored:
    """An original that was scored, for a result to be compared with.

    Attributes:
        labelled: what both are scored on.
        original: its hits, by output.
    """

    labelled: Labelled
    original: Mapping[str, Hits]

    @classmethod
    def of(cls, model: bytes | str, labelled: Labelled) -> Scored:
        """Scores the original.

        Raises:
            Refused: `INVALID_LABELS` when the labels do not fit what it puts out,
                `MODEL_DOES_NOT_RUN` with ONNX Runtime's message.
        """
        original = _score(model, labelled)
        for name, hits in original.items():
            if not hits.count:
                raise refuse(
                    Code.INVALID_LABELS,
                    f"no label of output {name!r} is to be scored",
                    nodes=(name,),
                    expected="some that are not below zero",
                    found=0,
                )
        return cls(labelled, original)

    def against(self, model: bytes | str) -> tuple[Accuracy, ...]:
        """Scores a result beside it."""
        found = _score(model, self.labelled)
        return tuple(
            Accuracy(
                output=name,
                labels=hits.count,
                top1_before=hits.first / hits.count,
                top1_after=found[name].first / hits.count,
                top5_before=_share(hits),
                top5_after=_share(found[name]),
                from_calibration=self.labelled.from_calibration,
                held_back=self.labelled.held_back,
            )
            for name, hits in self.original.items()
        )


def _share(hits: Hits) -> float | None:
    return None if hits.near is None else hits.near / hits.count


def _score(model: bytes | str, labelled: Labelled) -> dict[str, Hits]:
    hits: dict[str, Hits] = defaultdict(Hits)
    session = None
    for feeds, labels in labelled.batches():
        try:
            session = session or open_session(model)
        except Exception as error:
            raise does_not_run(error, feeds) from None
        found = session.run(list(labels), feeds)
        for (name, wanted), output in zip(labels.items(), found, strict=True):
            hits[name].add(name, np.asarray(output), wanted)
    return dict(hits)
