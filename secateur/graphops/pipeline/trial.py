"""What a choice of units comes to when it is carried out: in bytes, time and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnxruntime as ort

from secateur.errors import Code, refuse
from secateur.graphops.calibration import Feeds, Samples
from secateur.graphops.model.aside import LARGE
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.writing import Serialised, serialise
from secateur.graphops.pipeline.analysed import Analysed, examples, one_sample
from secateur.graphops.planning.steps import Mask
from secateur.graphops.profile import measure
from secateur.graphops.quantise.quantise import quantise
from secateur.graphops.repair.expectation import fold
from secateur.graphops.repair.repair import make_room
from secateur.graphops.sparsity.sparsify import sparsify
from secateur.graphops.sparsity.storage import store_sparse
from secateur.graphops.surgery.cut import cut
from secateur.recipe import Recipe

_SECONDS = 0.6  # of timing a choice: twice of it differ by one or two in a hundred


class Trial:
    """Carries out choices of units for targets that the coupling cannot count.

    Args:
        analysed: the model.
        recipe: what comes after the cut.
        samples: of calibration, where there are any.
        meter: how memory is measured.
        tell: called with a share of the work that is done; how much there is shows at its end.
    """

    def __init__(
        self,
        analysed: Analysed,
        recipe: Recipe,
        samples: Samples | None,
        meter: measure.MemoryMeter,
        tell: Callable[[float], None],
    ) -> None:
        self._analysed = analysed
        self._recipe = recipe
        self._seen = () if samples is None else samples.seen
        self._meter = meter
        self._tell = tell
        self._left = 1.0

    def size(self, keep: Mask) -> int:
        """Bytes of the file, at most."""
        return self._written(keep).size

    def latency(self, keep: Mask) -> float:
        """Median time of a run as a share of the original's, of one sample, in turns."""
        analysed, written = self._analysed, self._written(keep)
        together = analysed.opened.size <= LARGE
        first, second = measure.alternate(
            [
                (lambda: self._original) if together else self._open_original,
                functools.partial(open_session, written.runnable),
            ],
            self._sample,
            seconds=_SECONDS,
            together=together,
        )
        self._told()
        return second.p50_ms / first.p50_ms

    def memory(self, keep: Mask) -> int:
        """Bytes by which a fresh process grows over a run of one sample."""
        return self._grown(self._written(keep))

    @functools.cached_property
    def memory_before(self) -> int:
        """The same of the original.

        Raises:
            Refused: `INVALID_TARGET` where this system does not tell.
        """
        return self._grown(serialise(self._analysed.opened.model))

    def _grown(self, written: Serialised) -> int:
        found = measure.memory_of(written.runnable, self._sample, self._meter)
        if found is None:
            raise refuse(
                Code.INVALID_TARGET,
                "this system does not tell how much memory a process takes",
                expected="a target that can be measured here",
                found="memory",
                hint="size=… is close to it.",
            )
        self._told()
        return found

    @functools.cached_property
    def _sample(self) -> Feeds:
        return one_sample(self._analysed, (self._seen or examples(self._analysed))[0])

    @functools.cached_property
    def _original(self) -> ort.InferenceSession:
        return self._open_original()

    def _open_original(self) -> ort.InferenceSession:
        return open_session(serialise(self._analysed.opened.model).runnable)

    def _told(self) -> None:
        self._left *= 0.8
        self._tell(1.0 - self._left)

    def _written(self, keep: Mask) -> Serialised:
        """As written in the end, but for the numbers.

        Weights go by magnitude and scales come from one batch, which changes no count of either.
        """
        analysed, recipe = self._analysed, self._recipe
        pruned, _ = cut(analysed.opened.model, analysed.coupling, keep, analysed.copies)
        if recipe.repair and self._seen:
            make_room(pruned, analysed.coupling)
        elif recipe.repair:
            fold(analysed.opened.model, analysed.coupling, pruned, keep, recipe.seed)
        if not recipe.sparse_initializers:
            serialised = serialise(pruned)
        else:
            plain = recipe.model_copy(update={"weight_criterion": "magnitude"})
            weights = sparsify(pruned, analysed.coupling.shapes, plain, ())
            serialised, _ = store_sparse(serialise(pruned), weights)
        if recipe.quantize is not None:
            serialised = quantise(serialised, recipe.quantize, self._seen[:1])
        return serialised
