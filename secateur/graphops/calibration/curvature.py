"""How much the outputs depend on each channel of a tensor inside.

    g(c) = mean over samples of  Σ over positions  (vᵀ ∂y/∂z_c)²        v = ±1, drawn anew

z is the tensor and y are the outputs. An error e in z moves the outputs by J·e, J = ∂y/∂z, and
‖J·e‖² = eᵀ (JᵀJ) e: the Gauss-Newton matrix, of which g is the diagonal (Hutchinson, 1990), summed
over the positions of a channel. Li et al. (BRECQ, ICLR 2021) weigh errors inside by the diagonal of
the Fisher information likewise; without labels the loss is the distance from the original outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from secateur.graphops.calibration.data import Array, Feeds, sample_count
from secateur.graphops.calibration.derivatives import (
    Jacobian,
    NoDerivative,
    add_shift,
    opened,
)
from secateur.graphops.model.runtime import open_session

_SHIFT = "secateur_shift_"


@dataclass(frozen=True, slots=True)
class Curvature:
    """What was found.

    Attributes:
        of: g, shape (channels,), by the name of the tensor; of those that outputs depend on.
        missing: why there is nothing; empty where there is.
    """

    of: Mapping[str, npt.NDArray[np.float64]]
    missing: str = ""


def measure(
    model: ir.Model, axes: Mapping[str, int], batches: Sequence[Feeds], seed: int
) -> Curvature:
    """g of tensors of the main graph, where derivatives can be taken.

    Args:
        model: read only.
        axes: of the channels, by the name of the tensor.
        batches: feeds of one shape.
        seed: of v.
    """
    if not axes:
        return Curvature({})
    try:
        return Curvature(_curvature(model, axes, batches, seed))
    except NoDerivative as error:
        return Curvature({}, str(error))


def _curvature(
    model: ir.Model, axes: Mapping[str, int], batches: Sequence[Feeds], seed: int
) -> dict[str, npt.NDArray[np.float64]]:
    proto, weights = opened(model)
    names = [str(name) for node in proto.graph.node for name in node.output if name in axes]
    fed = [{**weights, **batch} for batch in batches]
    gates = _insert_shifts(proto, _values(proto, names, fed[0]))
    jacobian = Jacobian(proto, gates, fed)
    samples = sum(map(sample_count, batches))
    found = {name: np.zeros(gates[f"{_SHIFT}{name}"].shape[axes[name]]) for name in names}
    for slopes in jacobian.draws(seed):
        for name, total in found.items():
            rows = np.moveaxis(slopes[f"{_SHIFT}{name}"], axes[name], 0).reshape(total.size, -1)
            total += (rows.astype(np.float64) ** 2).sum(axis=1) / samples
    if not all(np.isfinite(total).all() for total in found.values()):
        raise NoDerivative("derivatives are not finite")
    found = {name: total for name, total in found.items() if total.any()}
    if not found:  # behind what rounds, nothing has one
        raise NoDerivative("derivatives are zero")
    return found


def _values(proto: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    """Tensors on one batch."""
    inner = onnx.ModelProto()
    inner.CopyFrom(proto)
    del inner.graph.output[:]
    inner.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = open_session(inner.SerializeToString(), lean=True).run(None, feeds)
    return dict(zip(names, found, strict=True))


def _insert_shifts(proto: onnx.ModelProto, values: Mapping[str, Array]) -> dict[str, Array]:
    """Adds a new input to each tensor, in place; zeros for all of them."""
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    zeros = {}
    for node in nodes:
        proto.graph.node.append(node)
        for name in node.output:
            if name in values:
                shift = f"{_SHIFT}{name}"
                zeros[shift] = np.zeros_like(values[name])
                kind = onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype)
                add_shift(proto.graph, name, shift, kind, values[name].shape)
    return zeros
