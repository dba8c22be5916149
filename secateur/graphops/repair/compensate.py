"""Compensation: the best weights for what is left, from moments of the original alone.

    W ← W·S_·K·(S_KK)⁻¹        b ← b + W_old·μ − W_new·μ_K        S = Cov(x) + δI, μ = E[x]

K: the entries of x that stay. One closed formula per consumer and no forward pass: it is what
least squares gives where nothing before the node has changed. Trial cuts are judged after it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.moments import linear_maps, weight_of
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.repair.fit import Matrix, ridge
from secateur.graphops.repair.target import Target

Mask = npt.NDArray[np.bool_]


def compensate(pruned: ir.Model, observed: Observed, keep: Mask) -> None:
    """Refits, in place, the consumers that lost entries.

    Args:
        pruned: cut from the model that was observed.
        observed: moments of the original.
        keep: per unit whether it stays.
    """
    places = {node: place for place, node in enumerate(pruned.graph)}
    for view in linear_maps(pruned, observed.coupling.shapes, quantised=True):
        name = str(view.node.outputs[0].name)
        original = observed.consumers.get(name)
        line = None if original is None else observed.line(original)
        if original is None or line is None or keep[line].all():
            continue
        target = Target.of(view, places)
        stay = keep[line[original.channels(line.size)]]  # (groups, k)
        if (
            target is None
            or target.shared
            or view.groups != original.groups
            or np.ptp(stay.sum(axis=1))
        ):
            continue  # whole groups went: what is left reads what it read
        weight, shift = _refitted(observed, name, stay)
        outputs = observed.coupling.axes(name).get(original.y_axis)
        if outputs is not None:
            rows = keep[outputs].reshape(view.groups, -1)
            weight = np.stack([w[r] for w, r in zip(weight, rows, strict=True)])
            shift = np.stack([s[r] for s, r in zip(shift, rows, strict=True)])
        old = target.end.numbers()
        target.write(
            pruned.graph, weight, shift if old is None else old.reshape(shift.shape) + shift
        )


def _refitted(observed: Observed, name: str, stay: Mask) -> tuple[Matrix, Matrix]:
    """W (groups, out, kept) and how much b moves (groups, out), all outputs still there."""
    moments, whole = observed.moments[name], weight_of(observed.consumers[name])
    kept = np.nonzero(stay)[1].reshape(len(stay), -1)
    columns, rows = kept[:, None], kept[..., None]
    covariance = np.take_along_axis(moments.damped(), columns, axis=2)
    left = np.take_along_axis(covariance, rows, axis=1)
    weight = ridge(np.take_along_axis(whole, columns, axis=2), left, whole @ covariance, 0.0)
    mean = moments.mean()[..., None]
    shift = whole @ mean - weight @ np.take_along_axis(mean, rows, axis=1)
    return weight, shift[..., 0]
