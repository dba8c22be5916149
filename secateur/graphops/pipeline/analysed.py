"""A model opened and analysed: what every stage after has in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from secateur.graphops.calibration import Feeds, Samples
from secateur.graphops.calibration.data import batch_axes
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.normalise import normalise
from secateur.graphops.model.opening import ModelSource, OpenedModel
from secateur.graphops.model.shapes import Shapes, infer_shapes
from secateur.graphops.model.writing import serialise
from secateur.graphops.planning import cost
from secateur.graphops.verify.examples import example_feeds
from secateur.recipe import Recipe

Opener = Callable[[ModelSource], OpenedModel]


@dataclass(frozen=True, slots=True)
class Analysed:
    """An opened model with everything that does not depend on a target.

    Where regions or tokens have gone, `params`, `macs` and `nonzero` are still of the original.
    """

    opened: OpenedModel
    copies: dict[str, str]
    coupling: Coupling
    params: int
    macs: int
    nonzero: int | None

    @property
    def graph(self) -> ir.Graph:
        """Of the model."""
        return self.opened.model.graph

    @property
    def costs(self) -> dict[str, float]:
        """Of the original, by budget."""
        return {"macs": float(self.macs), "params": float(self.params)}


def analyse(opened: OpenedModel, samples: Samples | None, recipe: Recipe) -> Analysed:
    """Shapes, coupling and costs; the model is normalised first, in place."""
    params = cost.count_params(opened.model)
    nonzero = None if recipe.sparsity is None else cost.count_nonzero(opened.model)
    copies = dict(normalise(opened.model))
    coupling = couple(opened.model, shapes_of(opened, samples), recipe)
    macs = cost.macs(coupling).of(np.ones(coupling.count + 1, np.bool_))
    return Analysed(opened, copies, coupling, params, macs, nonzero)


def shapes_of(opened: OpenedModel, samples: Samples | None) -> Shapes:
    """Shapes with the sizes of the samples, where there are any."""
    given = None
    if samples is not None:
        given = {name: array.shape for name, array in samples.seen[0].items()}
    return infer_shapes(opened.model, given)


def examples(analysed: Analysed) -> list[Feeds]:
    """Random inputs of two batch sizes, for want of calibration data."""
    shapes = analysed.coupling.shapes
    feeds = [example_feeds(analysed.graph, shapes, seed=0)]
    if any(first != second for first, second in shapes.inputs.values()):
        feeds.append(example_feeds(analysed.graph, shapes, seed=1, batch=1))
    return feeds


def other_sizes(analysed: Analysed) -> Feeds | None:
    """Random inputs of other sizes than `examples`, where more than the batch is free. The model
    need not take them."""
    shapes = analysed.coupling.shapes
    if all(first[1:] == second[1:] for first, second in shapes.inputs.values()):
        return None
    return example_feeds(analysed.graph, shapes, seed=2, batch=1, other_sizes=True)


def one_sample(analysed: Analysed, feeds: Feeds) -> Feeds:
    """The first sample of each input whose batch is free."""
    axes = batch_axes(analysed.graph, analysed.coupling.shapes)
    return {
        name: array.take([0], axes[name]) if name in axes else array
        for name, array in feeds.items()
    }


def runnable(model: ModelSource, opened: OpenedModel) -> bytes | str:
    """The original as ONNX Runtime takes it: its path where there is one."""
    if isinstance(model, str | os.PathLike):
        return str(os.fspath(model))
    if isinstance(model, bytes):
        return model
    return serialise(opened.model).runnable
