"""What calibration data show of a model, gathered once and only when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration import curvature
from secateur.graphops.calibration.curvature import Curvature
from secateur.graphops.calibration.data import (
    Feeds,
    alike,
    batch_axes,
    evenly,
    hold_back,
    sample_count,
)
from secateur.graphops.calibration.derivatives import is_large, single_samples
from secateur.graphops.calibration.moments import WIDEST, Moments, collect, linear_maps, width
from secateur.graphops.calibration.network import Network
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.rules.linear import LinearMap

HELD_BACK = 5  # every fifth batch judges
_DERIVED = 256  # samples that derivatives are taken of: twice as many tell little more
_DERIVED_OF_LARGE = 32  # one by one, for what a pass holds of each

Tell = Callable[[float], None]


class Observed:
    """A model and the batches that run on it.

    Moments come from most of the batches. The others judge what was learnt from them: of a layer
    with more inputs than there are samples, moments alone would say that it loses nothing.

    Args:
        model: normalised; read only.
        coupling: of that model.
        batches: feeds.
        seed: of the positions that are sampled.
        tell: told the share of the moments that is gathered.
        alike: how many batches in a row are of the same samples.
    """

    def __init__(
        self,
        model: ir.Model,
        coupling: Coupling,
        batches: Sequence[Feeds],
        seed: int,
        tell: Tell = lambda share: None,
        alike: int = 1,
    ) -> None:
        self.model = model
        self.coupling = coupling
        self.batches = batches
        self.learnt, self.judges = hold_back(batches, HELD_BACK)
        self._alike = alike
        self._seed = seed
        self._tell = tell

    def judges_with(self, batch: int) -> bool:
        """Whether fits are judged by that batch: every fifth, and the last."""
        place, count = batch // self._alike, len(self.batches) // self._alike
        return place % HELD_BACK == HELD_BACK - 1 or place == count - 1

    @cached_property
    def consumers(self) -> Mapping[str, LinearMap]:
        """Matrix products whose summed axis can be cut, by the name of their output."""
        return {
            str(view.node.outputs[0].name): view
            for view in linear_maps(self.model, self.coupling.shapes, quantised=True)
            if self.line(view) is not None and width(view) <= WIDEST
        }

    def line(self, view: LinearMap) -> npt.NDArray[np.int32] | None:
        """The unit of each position of the axis that is summed over; None where none can go."""
        x = view.node.inputs[0]
        return self.coupling.axes(str(x.name if x is not None else "")).get(view.x_axis)

    @cached_property
    def moments(self) -> Mapping[str, Moments]:
        """Of x of each consumer, by the name of its output."""
        network = Network(self.model, self.learnt)
        return collect(network, list(self.consumers.values()), self._seed, self._tell)

    @cached_property
    def curvature(self) -> Curvature:
        """How much the outputs depend on each channel that a consumer puts out."""
        axes = {name: view.y_axis for name, view in self.consumers.items()}
        if is_large(self.model):
            free = batch_axes(self.model.graph, self.coupling.shapes)
            batches = single_samples(self.learnt, free, _DERIVED_OF_LARGE)
        else:
            batches = [self.learnt[place] for place in alike(self.learnt)]
            batches = evenly(batches, max(_DERIVED // sample_count(batches[0]), 1))
        return curvature.measure(self.model, axes, batches, self._seed)
