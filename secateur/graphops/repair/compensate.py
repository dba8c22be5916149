"""Compensation: the best weights for what is left, from moments of the original alone.

    W ← W·S_·K·(S_KK + δI)⁻¹        b ← b + W_old·μ − W_new·μ_K        S = Cov(x), μ = E[x]

K: the entries of x that stay. One closed formula per consumer and no forward pass: what least
squares gives where nothing before the node has changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.moments import Moments, linear_maps, weight_of
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.repair.repair import _Target, _numbers, _write
from secateur.graphops.repair.fit import _solve
from secateur.graphops.rules.linear import LinearMap

Mask = npt.NDArray[np.bool_]
_DAMPING = 1e-3


def compensate(pruned, coupling, keep, originals: Mapping[str, LinearMap], moments, network=None):
    count = 0
    place = {node: i for i, node in enumerate(pruned.graph)}
    for view in linear_maps(pruned, coupling.shapes):
        name = str(view.node.outputs[0].name)
        first = originals.get(name)
        if first is None or first.node not in moments:
            continue
        line = coupling.axes(str(first.node.inputs[0].name)).get(first.x_axis)
        if line is None or keep[line].all():
            continue
        channels = first.channels(line.size)
        stay = keep[line[channels]]  # (groups, k)
        weight = weight_of(first)
        if (stay.sum(axis=1) != stay.sum(axis=1)[0]).any() or view.groups != first.groups:
            continue
        outs = coupling.axes(str(first.node.outputs[0].name)).get(first.y_axis)
        target = _Target.of(view, place)
        m = moments[first.node]
        cov, mean = m.covariance(), m.mean()
        new, shift = [], []
        for g in range(view.groups):
            k = np.flatnonzero(stay[g])
            s = cov[g][np.ix_(k, k)].copy()
            s[np.diag_indices_from(s)] += _DAMPING * max(np.trace(s) / len(s), 1e-12)
            c = weight[g] @ cov[g][:, k]
            w0 = weight[g][:, k]
            w = w0 + _solve(s, (c - w0 @ cov[g][np.ix_(k, k)]).T).T
            new.append(w); shift.append(weight[g] @ mean[g] - w @ mean[g][k])
        new, shift = np.stack(new), np.stack(shift)
        if outs is not None and not keep[outs].all():
            o = keep[outs].reshape(view.groups, -1)
            new = np.stack([new[g][o[g]] for g in range(view.groups)]); shift = np.stack([shift[g][o[g]] for g in range(view.groups)])
        if new.shape != weight_of(view).shape:
            continue
        bias = np.zeros_like(shift)
        if target.biased:
            if target.bias is not None: bias = _numbers(target.bias).reshape(shift.shape)
            bias = bias + shift
        _write(pruned.graph, view, target, new, bias)
        count += 1
    return count
