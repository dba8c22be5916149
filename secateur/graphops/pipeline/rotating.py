"""Streams of channels turned into the basis in which fewest of them are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration import Feeds, Samples
from secateur.graphops.calibration.data import first_batches
from secateur.graphops.calibration.moments import WIDEST, collect, width
from secateur.graphops.calibration.network import Network
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.pipeline.analysed import Analysed, shapes_of
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.records import rotated_record
from secateur.graphops.pipeline.structure import observe, offer_of
from secateur.graphops.planning import replay
from secateur.graphops.rotation.bases import rotation
from secateur.graphops.rotation.streams import Stream, find
from secateur.graphops.surgery.rotate import rotate
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Rotated, Stage

_SAMPLES = 32  # that the turned model has to give the original's answers for
_MOST_DRIFT = 1e-6


@dataclass(frozen=True, slots=True)
class Turned:
    """A model with streams in other bases.

    Attributes:
        analysed: itself.
        groups: ids of the groups of units that have been turned, for a plan.
        rotated: what the report says of them.
        warnings: for the report.
    """

    analysed: Analysed
    groups: tuple[str, ...] = ()
    rotated: tuple[Rotated, ...] = ()
    warnings: tuple[str, ...] = ()


def turn(
    analysed: Analysed, samples: Samples | None, recipe: Recipe, plan: Plan | None, clock: Clock
) -> Turned:
    """Turns the streams of a model; those that a plan names, where one is given.

    Args:
        analysed: the model.
        samples: to learn from.
        recipe: settled.
        plan: to replay.
        clock: told of the stage.

    Raises:
        Refused: `INVALID_CALIBRATION` where a plan asks for a basis and there are no data to find
            it by, or the model is another in what they give; `INVALID_PLAN` where it names what is
            no stream.
    """
    wanted = recipe.rotate if plan is None else bool(plan.rotated)
    if not wanted:
        return Turned(analysed)
    joined: Sequence[tuple[str, str]] = ()
    if "layer" in recipe.granularity or (plan is not None and plan.removed):
        joined = [(one.entry, one.exit) for one in offer_of(analysed, recipe).regions]
    coupling = analysed.coupling
    streams = {
        coupling.groups[stream.group].id: stream
        for stream in find(analysed.opened.model, coupling, joined)
        if all(width(view) <= WIDEST for view in stream.readers)
    }
    if plan is not None:
        names = replay.streams_rotated(plan, streams.keys(), analysed.opened.sha256)
        streams = {name: streams[name] for name in names}
    if not streams:
        return Turned(analysed)
    if samples is None:
        raise refuse(
            Code.INVALID_CALIBRATION,
            "the plan was made in a basis that calibration data gave",
            nodes=tuple(streams),
            expected="--calibration PATH",
            found="none",
            hint="Give the data that the plan was made by, or plan with --no-rotate.",
        )
    with clock.stage(Stage.CRITERIA, f"turning {len(streams)} streams"):
        return _turned(analysed, samples, recipe, streams, planned=plan is not None)


def _turned(
    analysed: Analysed,
    samples: Samples,
    recipe: Recipe,
    streams: dict[str, Stream],
    *,
    planned: bool,
) -> Turned:
    observed = observe(analysed, samples, recipe)
    places = {node: place for place, node in enumerate(analysed.graph)}
    readers = [view for stream in streams.values() for view in stream.readers]
    readers.sort(key=lambda view: places[view.node])
    moments = collect(Network(observed.model, observed.learnt), readers, recipe.seed)
    turns = [rotation(one, moments, observed.curvature.of) for one in streams.values()]
    model = rotate(analysed.opened.model, turns)
    drift = _drift(observed.model, model, first_batches(observed.judges, _SAMPLES))
    if not drift <= _MOST_DRIFT and planned:
        raise refuse(
            Code.INVALID_CALIBRATION,
            "in the basis that the data give, the model is another",
            nodes=tuple(streams),
            expected=f"a drift of the outputs of {_MOST_DRIFT:.1g} at most",
            found=f"{drift:.1g}",
            hint="Give the data that the plan was made by.",
        )
    if not drift <= _MOST_DRIFT:
        said = f"streams stay in their basis: in another one the outputs would drift by {drift:.1g}"
        return Turned(analysed, warnings=(said,))
    opened = replace(analysed.opened, model=model)
    coupling = couple(model, shapes_of(opened, samples), recipe)
    return Turned(
        replace(analysed, opened=opened, coupling=coupling),
        tuple(streams),
        tuple(rotated_record(name, one) for name, one in zip(streams, turns, strict=True)),
    )


def _drift(before: ir.Model, after: ir.Model, batches: Sequence[Feeds]) -> float:
    """Σ‖y′ − y‖² / Σ‖y‖² of the outputs."""
    outputs = [str(value.name) for value in before.graph.outputs]
    pieces = [Network(model, batches).piece(outputs) for model in (before, after)]
    error = square = 0.0
    for place in range(len(batches)):
        wanted, found = (piece.run(place) for piece in pieces)
        for name, array in wanted.items():
            if array.dtype.kind == "f":
                y = array.astype(np.float64)
                error += float(((found[name] - y) ** 2).sum())
                square += float((y**2).sum())
    return error / max(square, 1e-30)
