"""Which matrix products are split in two by rank, and how far: least drift for what is saved.

The best U·V of rank r for y = W·x, by what it does to y, comes from the singular vectors of W·L,
where L·Lᵀ = E[x xᵀ] by Cholesky (Wang, Zheng, Wan, Zhang: SVD-LLM, ICLR 2025):

    W·L = U·Σ·Qᵀ        V = U_rᵀ·W        E‖y − U_r·V·x‖² = Σ σᵢ², i > r

Without calibration data L is the identity: plain SVD, and the loss is of the weights. What a loss
does to the model's outputs is measured at two ranks of every product, run in ONNX Runtime. Steps
are then taken on the lower hull of each product's curve, the least drift for what is saved first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from secateur.errors import Code, refuse
from secateur.graphops.calibration.data import Feeds
from secateur.graphops.calibration.moments import (
    WIDEST,
    collect,
    linear_maps,
    tensor_of,
    weight_of,
    width,
)
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.attributes import integer
from secateur.graphops.model.graph import node_label
from secateur.graphops.model.names import matching
from secateur.graphops.planning import cost
from secateur.graphops.planning.drift import Answers
from secateur.graphops.planning.hull import additive, lower_hull
from secateur.graphops.planning.planner import unreachable
from secateur.graphops.rules.linear import Convolution, LinearMap
from secateur.graphops.surgery.split import Factors, split
from secateur.recipe import Recipe

Ranks = Mapping[str, int]  # output of a node → rank

_SMALLEST = 16  # inputs and outputs of what is worth splitting
_TRIED = (0.75, 0.4)  # of a product's cost, where its drift is measured
_SAMPLES = 64  # that a trial runs on
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a budget that goes by rank
_DAMPING = 1e-6  # of the mean of E[x²]: what few samples cannot tell


@dataclass(frozen=True, slots=True)
class Candidate:
    """A product that may be split.

    Attributes:
        view: the node.
        weight: W, (out, in).
        basis: U, (out, most ranks), by falling loss.
        losses: σ², summed from each rank on and relative to all: entry r is what rank r loses.
    """

    view: LinearMap
    weight: npt.NDArray[np.float64]
    basis: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]

    @property
    def name(self) -> str:
        """Of the node's output."""
        return str(self.view.node.outputs[0].name)

    @property
    def most(self) -> int:
        """The largest rank that saves anything."""
        out, entries = self.weight.shape
        return int(min((out * entries - 1) // (out + entries), self.basis.shape[1]))

    def ranks(self, multiple: int | None) -> list[int]:
        """Those that save something, falling: multiples of a number, by default of 8 or of 4."""
        step = multiple or (8 if min(self.weight.shape) >= 64 else 4)
        return list(range(self.most // step * step, 0, -step))

    def share(self, rank: int) -> float:
        """Of the product's cost that is left."""
        out, entries = self.weight.shape
        return float(rank * (out + entries) / (out * entries))

    def factors(self, rank: int) -> Factors:
        """U and V of a rank."""
        outer = self.basis[:, :rank]
        return Factors(self.view, outer.T @ self.weight, outer)


def candidates(
    model: ir.Model,
    coupling: Coupling,
    copies: Mapping[str, str],
    ignore: Sequence[str],
    learnt: Sequence[Feeds],
    seed: int,
) -> list[Candidate]:
    """The products that may be split, with their decompositions.

    Args:
        model, coupling, copies, ignore: as for `splittable`.
        learnt: calibration batches; none for plain SVD.
        seed: of the positions that are sampled.
    """
    views = splittable(model, coupling, copies, ignore)
    moments = collect(Network(model, learnt), views, seed) if learnt else {}
    found = []
    for view in views:
        weight = weight_of(view)[0]
        name = str(view.node.outputs[0].name)
        white = weight
        if name in moments:
            white = weight @ _root(moments[name].about_zero()[0])
        basis, values, _ = scipy.linalg.svd(white, full_matrices=False, check_finite=False)
        squares = np.append(values**2, 0.0)
        losses = np.cumsum(squares[::-1])[::-1] / max(float(squares.sum()), 1e-300)
        found.append(Candidate(view, weight, basis, losses))
    return found


def splittable(
    model: ir.Model, coupling: Coupling, copies: Mapping[str, str], ignore: Sequence[str]
) -> list[LinearMap]:
    """MatMul, Gemm and 1×1 Conv whose weight is theirs alone, in graph order.

    Args:
        model: normalised.
        coupling: of that model.
        copies: that normalising made: what several nodes share is not split.
        ignore: globs over nodes and initializers that stay.
    """
    shared = {*copies, *copies.values()}
    return [
        view
        for view in linear_maps(model, coupling.shapes)
        if _fits(view) and not _kept(view, shared, ignore)
    ]


def _fits(view: LinearMap) -> bool:
    """Whether a node is one of the three operators, and neither too small nor too large."""
    node, tensor = view.node, tensor_of(view)
    assert tensor is not None
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm", "Conv"):
        return False
    if isinstance(view, Convolution):
        if view.groups != 1 or any(size != 1 for size in view.kernel):
            return False
    elif integer(node, "transA", 0):
        return False
    entries = width(view)
    out = tensor.size // entries
    return min(out, entries) >= _SMALLEST and max(out, entries) <= WIDEST


def _kept(view: LinearMap, shared: set[str], ignore: Sequence[str]) -> bool:
    value = view.node.inputs[view.weight]
    assert value is not None
    names = [str(value.name), view.node.name or ""]
    if len(value.uses()) > 1 or value.name in shared or value.is_graph_input():
        return True
    return matching(ignore, names) is not None


def _root(second: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """L of L·Lᵀ = E[x xᵀ]."""
    damped = second.copy()
    damping = _DAMPING * max(float(np.trace(second)) / len(second), 1e-12)
    while True:
        damped[np.diag_indices_from(damped)] += damping
        try:
            root: npt.NDArray[np.float64] = scipy.linalg.cholesky(damped, lower=True)
        except np.linalg.LinAlgError:  # rounding has left it indefinite
            damping *= 10
        else:
            return root


def missing(coupling: Coupling, recipe: Recipe, before: Mapping[str, float]) -> dict[str, float]:
    """What is still to be saved of a model, by target; those that are met are left out.

    Args:
        coupling: of the model.
        recipe: its targets.
        before: costs of the original, by target.
    """
    keep = np.ones(coupling.count + 1, np.bool_)
    now = {"macs": cost.macs(coupling).of(keep), "params": cost.params(coupling).of(keep)}
    found = {
        key: now[key] - recipe.target[key] * before[key] for key in now if key in recipe.target
    }
    return {key: value for key, value in found.items() if value > 0}


def goals(
    coupling: Coupling, offered: Sequence[Candidate], recipe: Recipe, before: Mapping[str, float]
) -> dict[str, float]:
    """The same where nothing but ranks may save it.

    Raises:
        Refused: `NOTHING_TO_PRUNE` without candidates, `UNREACHABLE_TARGET` where the smallest
            ranks do not meet a target.
    """
    if not offered:
        raise refuse(
            Code.NOTHING_TO_PRUNE,
            "no matrix product can be split in two",
            expected=f"a MatMul, Gemm or 1x1 Conv of {_SMALLEST} inputs and outputs or more, "
            "whose weight no other node reads",
            found="none",
        )
    wanted = missing(coupling, recipe, before)
    saved = dict.fromkeys(wanted, 0.0)
    macs = cost.macs_by_node(coupling)
    for one in offered:
        smallest = min(one.ranks(recipe.round_to), default=0)
        costs = _Saved(one, macs.get(node_label(one.view.node), 0.0), wanted)
        for key, value in (costs.of(smallest) if smallest else {}).items():
            saved[key] += value
    for key, value in saved.items():
        if value < 1:
            left = recipe.target[key] + (1 - value) * wanted[key] / before[key]
            raise unreachable(key, recipe.target[key], left)
    return wanted


def path(
    model: ir.Model,
    coupling: Coupling,
    offered: Sequence[Candidate],
    missing: Mapping[str, float],
    recipe: Recipe,
    observed: Observed | None,
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[Ranks, ...]:
    """Ranks that save no, a quarter, half, three quarters and all of what is to be saved.

    Args:
        model: normalised.
        coupling: of that model.
        offered: its candidates.
        missing: what is to be saved, by target (`macs`, `params`).
        recipe: settled; its rounding.
        observed: the model on calibration data; None: all losses count alike.
        tell: told the share that is done.

    Returns:
        as many of them as can be saved; the first is empty.
    """
    macs = cost.macs_by_node(coupling)
    steps: list[tuple[float, int, int]] = []  # (price, candidate, -rank)
    saved = [_Saved(one, macs.get(node_label(one.view.node), 0.0), missing) for one in offered]
    answers = None if observed is None else Answers(observed, _SAMPLES)
    for place, one in enumerate(offered):
        drift = _drifts(one, model, answers)
        hull = _hull(one, drift, saved[place], one.ranks(recipe.round_to))
        steps += [(price, place, -rank) for price, rank in hull]
        tell((place + 1) / len(offered))
    steps.sort()
    found: list[Ranks] = []
    for share in _SHARES:
        taken, last = dict[int, int](), None
        for _, place, rank in steps:
            if _reached(taken, saved, share):
                break
            taken[place], last = -rank, place
        if not _reached(taken, saved, share):
            break
        if last is not None:  # no further than is needed
            taken[last] = next(
                rank
                for rank in offered[last].ranks(recipe.round_to)
                if _reached({**taken, last: rank}, saved, share)
            )
        found.append({offered[place].name: rank for place, rank in sorted(taken.items())})
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Saved:
    """What splitting one candidate saves."""

    candidate: Candidate
    macs: float
    missing: Mapping[str, float]

    def of(self, rank: int) -> dict[str, float]:
        """Shares of what is to be saved."""
        gone = 1.0 - self.candidate.share(rank)
        costs = {"macs": self.macs, "params": float(self.candidate.weight.size)}
        return {key: gone * costs[key] / max(value, 1e-9) for key, value in self.missing.items()}


def _reached(taken: Mapping[int, int], saved: Sequence[_Saved], share: float) -> bool:
    """Whether ranks by candidate save a share of what is to be saved, of every target."""
    sums: dict[str, float] = {}
    for place, rank in taken.items():
        for key, value in saved[place].of(rank).items():
            sums[key] = sums.get(key, 0.0) + value
    return share <= 0 or (bool(sums) and min(sums.values()) >= share)


def _drifts(
    one: Candidate, model: ir.Model, answers: Answers | None
) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """What losses of one product do to the outputs, between and beyond those that are tried."""
    if answers is None:
        return additive
    answers.network.advance(one.view.node)
    known, drifts = [0.0], [0.0]
    for share in _TRIED:
        rank = max(round(share / one.share(1)), 1)
        changed = answers.network.beside(split(model, {one.name: one.factors(rank)}))
        drift = answers.drift(changed.piece(answers.outputs))
        known.append(float(one.losses[rank]))
        drifts.append(max(drifts[-1], float(additive(drift))))
    steep = drifts[-1] / max(known[-1], 1e-12)

    def drift_of(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        beyond = drifts[-1] + steep * (losses - known[-1])
        return np.where(losses > known[-1], beyond, np.interp(losses, known, drifts))

    return drift_of


def _hull(
    one: Candidate,
    drift_of: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    saved: _Saved,
    choices: Sequence[int],
) -> Iterator[tuple[float, int]]:
    """(drift per share saved, rank), by falling rank, on the lower hull of a product's curve."""
    ranks = np.array(choices, np.int64)
    drift = np.concatenate([[0.0], drift_of(one.losses[ranks])])
    shares = [sum(saved.of(int(rank)).values()) for rank in ranks]
    gain = np.concatenate([[0.0], shares])
    if gain[-1] > 0:
        yield from ((slope, int(ranks[at - 1])) for at, slope in lower_hull(gain, drift))
