"""Routing: how often a router chooses an expert, over calibration data.

    f(e) = share of the tokens whose k chosen experts are e among others

or, where a softmax weighs all experts and leaves none out, the mean of its weights. One of the
measures compared by Lu et al.: Not All Experts are Equal, ACL 2024.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secateur.graphops.calibration.network import Network
from secateur.graphops.coupling.facts import Contraction
from secateur.graphops.criteria.context import Context, Scores


def routing(context: Context, scores: Scores) -> Scores:
    """The scores, those of experts replaced by how often they are chosen.

    What a criterion says of channels says little of whole experts: one that no token reaches may
    have the largest weights. Without calibration data, and where the router is in the body of a
    loop, the scores stay.
    """
    experts = [group.units for group in context.coupling.groups if group.kind == "expert"]
    if context.observed is None or not experts:
        return scores
    network = Network(context.observed.model, context.observed.learnt)
    chosen, weighed = context.zeros(), context.zeros()
    for contraction in context.coupling.contractions:
        value = contraction.node.inputs[contraction.index]
        if (
            value is None
            or contraction.chosen is None
            or contraction.node.graph is not context.model.graph
        ):
            continue
        line = context.coupling.axes(str(value.name)).get(contraction.axis)
        if line is None or not np.isin(line, np.concatenate(experts)).any():
            continue
        shares = _shares(network, contraction, str(value.name))
        total = chosen if contraction.chosen else weighed
        total += np.bincount(line, weights=shares, minlength=total.size)
    result = scores.copy()
    for units in experts:
        found = chosen if chosen[units].any() else weighed
        if found[units].any():
            result[units] = found[units]
    return result


def _shares(network: Network, contraction: Contraction, name: str) -> npt.NDArray[np.float64]:
    """How often each position is chosen, or its mean weight."""
    network.advance(contraction.node)
    piece = network.piece([name])
    total, rows = np.zeros(0), 0
    for batch in range(network.batches):
        values = piece.run(batch)[name].astype(np.float64)
        x = np.moveaxis(values, contraction.axis, -1).reshape(-1, values.shape[contraction.axis])
        total = _routed(x, contraction.chosen or 0).sum(axis=0) + (total if rows else 0)
        rows += x.shape[0]
    return total / max(rows, 1)


def _routed(x: npt.NDArray[np.float64], chosen: int) -> npt.NDArray[np.float64]:
    """1 where a position of (rows, positions) is chosen, else 0; or softmax(x)."""
    if not chosen:
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))
    order = np.argsort(-x if chosen > 0 else x, axis=1, kind="stable")[:, : abs(chosen)]
    taken = np.zeros_like(x)
    np.put_along_axis(taken, order, 1.0, axis=1)
    return taken
