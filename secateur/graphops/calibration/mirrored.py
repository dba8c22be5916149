"""Mirror images of samples, where the model takes them for samples.

Whether a picture may be mirrored is not for us to know, but the model shows it: what it puts out
for the mirrored samples is nearly what it puts out for them as they are. (Photographs pass along
their width and not along their height; text and spectra along neither.) Fits then see twice the
samples, with the original's own values for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.calibration.data import Array, Feeds, sample_count
from secateur.graphops.calibration.network import Network
from secateur.graphops.model.graph import real_inputs

_SAMPLES = 64  # to try it on
_LEAST_SIZE = 8  # of an axis: colours are no direction
_MOST = 0.15  # E‖f(Mx) − f(x)‖² / Var f(x): about .1 along the width of photographs


def mirror_axis(model: ir.Model, batches: Sequence[Feeds]) -> int | None:
    """The axis along which mirrored samples are as good as samples; None where there is none.

    Args:
        model: the original, with one input of floats, samples along its axis 0.
        batches: feeds.
    """
    inputs = real_inputs(model.graph)
    if len(inputs) != 1:
        return None
    (name,) = (str(value.name) for value in inputs)
    first = batches[0][name]
    if first.dtype.kind != "f" or first.ndim < 3:
        return None
    tried = batches[: -(-_SAMPLES // sample_count(batches[0]))]
    if any(batch[name].shape[1:] != first.shape[1:] for batch in tried):
        return None
    axes = [axis for axis in range(1, first.ndim) if first.shape[axis] >= _LEAST_SIZE]
    answers = _answers(model, [*tried, *(mirror(batch, axis) for axis in axes for batch in tried)])
    if answers is None:
        return None
    plain, *mirrored = np.split(answers, len(axes) + 1)
    if len(plain) < 2:
        return None
    spread = max(float(plain.var(axis=0, dtype=np.float64).sum()), 1e-30)
    errors = {
        axis: float(np.square(one - plain).sum(axis=1, dtype=np.float64).mean()) / spread
        for axis, one in zip(axes, mirrored, strict=True)
    }
    best = min(errors, key=lambda axis: errors[axis], default=None)
    return best if best is not None and errors[best] < _MOST else None


def mirror(batch: Feeds, axis: int) -> Feeds:
    """The mirror images of samples."""
    return {name: np.ascontiguousarray(np.flip(array, axis)) for name, array in batch.items()}


def _answers(model: ir.Model, batches: Sequence[Feeds]) -> Array | None:
    """What leaves the model, flat, sample by sample; None where they have no rows of their own."""
    names = [str(value.name) for value in model.graph.outputs]
    network = Network(model, batches)
    piece, rows = network.piece(names), []
    for batch, feeds in enumerate(batches):
        count, found = sample_count(feeds), piece.run(batch)
        arrays = [found[name] for name in names if found[name].dtype.kind == "f"]
        if not arrays or any(array.shape[:1] != (count,) for array in arrays):
            return None
        rows.append(np.concatenate([array.reshape(count, -1) for array in arrays], axis=1))
    return np.concatenate(rows)
