"""Which regions go: greedily, the one that the outputs miss least for what it saves.

A cheap first pass gives every region its *block influence*, 1 − cos(entry, exit) on calibration
samples (Men et al.: ShortGPT, 2024): what a region hardly turns, its removal hardly changes. The
best of them by influence for what they save are then left out one at a time, and the drift of the
model's outputs is measured in ONNX Runtime. The cheapest goes, and what is left is measured again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration.data import Array
from secateur.graphops.calibration.network import HOLD, Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.planning import cost
from secateur.graphops.planning.drift import Answers
from secateur.graphops.planning.planner import unreachable
from secateur.graphops.regions.costs import Costs
from secateur.graphops.regions.find import Refusal, Region, find
from secateur.graphops.regions.flowgraph import FlowGraph
from secateur.graphops.surgery.bypass import bypass

_TRIED = 12  # regions whose drift is measured before one goes
_SAMPLES = 96  # that a trial runs on
_LEAST = 1e-9  # drift below which regions are equal, and what they save decides


@dataclass(frozen=True, slots=True)
class Removal:
    """A region that goes.

    Attributes:
        region: itself.
        influence: 1 − cos(entry, exit), on the original; None where a plan is replayed.
        drift: of the outputs, with this region and those chosen before it gone; None likewise.
    """

    region: Region
    influence: float | None = None
    drift: float | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """The regions of a model and what they cost.

    Attributes:
        graph: of the model.
        regions: that may go.
        refusals: layers that are in none.
        costs: of any set of nodes.
        totals: of the model, by target.
    """

    graph: FlowGraph
    regions: Sequence[Region]
    refusals: Sequence[Refusal]
    costs: Costs
    totals: Mapping[str, float]

    @classmethod
    def of(
        cls,
        graph: ir.Graph,
        coupling: Coupling,
        copies: Mapping[str, str],
        params: int,
        ignore: Sequence[str],
    ) -> Offer:
        """Finds them.

        Args:
            graph: of the model, normalised.
            coupling: of that model.
            copies: that normalising made.
            params: of the original.
            ignore: globs over nodes and initializers that stay.
        """
        flow = FlowGraph(graph, coupling, ignore)
        macs = cost.macs(coupling).of(np.ones(coupling.count + 1, np.bool_))
        totals = {"macs": macs, "params": params, "layers": len(flow.layers)}
        return cls(flow, *find(flow), Costs(flow, copies), totals)

    def names(self, region: Region) -> tuple[str, ...]:
        """First outputs of the nodes of a region, in graph order."""
        return tuple(self.graph.writes[place][0] for place in sorted(region.nodes))

    def left(self, regions: Iterable[Region]) -> dict[str, float]:
        """What the model costs without some regions, by target."""
        saved = self.costs.of(self.graph.gone(entries(regions)))
        return {target: total - saved[target] for target, total in self.totals.items()}


def entries(regions: Iterable[Region]) -> dict[str, str]:
    """exit → entry."""
    return {region.exit: region.entry for region in regions}


def choose(
    observed: Observed,
    offer: Offer,
    target: Mapping[str, float],
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[Removal, ...]:
    """The regions that go where nothing else may, in the order in which they were chosen.

    Args:
        observed: the original.
        offer: its regions.
        target: fractions of the original that are kept; each is met from below.
        tell: told the share that is done.

    Raises:
        Refused: `NOTHING_TO_PRUNE` where there are no regions, `UNREACHABLE_TARGET` with the
            closest value where all that may go do not meet a target.
    """
    if not offer.regions:
        raise refuse(
            Code.NOTHING_TO_PRUNE,
            "no part of the model can be left out whole",
            nodes=tuple(refusal.node for refusal in offer.refusals[:5]),
            expected="a part that ends in the shape in which it begins",
            found=offer.refusals[0].detail if offer.refusals else "no layer with weights",
            hint="`secateur inspect` says of every layer why.",
        )
    return _Search(observed, offer, target, tuple(target)).run(tell)[-1]


def path(
    observed: Observed,
    offer: Offer,
    target: Mapping[str, float],
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[tuple[Removal, ...], ...]:
    """The regions that go where units may make up the rest: one more in each entry.

    From none, or the fewest that meet a target of `layers`, to as many as meet all targets or may
    go at all.

    Args:
        observed, offer, target, tell: as for `choose`.

    Raises:
        Refused: `UNREACHABLE_TARGET` where all that may go do not meet a target of `layers`, which
            nothing else does.
    """
    if not offer.regions and "layers" not in target:
        return ((),)
    return _Search(observed, offer, target, ("layers",)).run(tell)


class _Search:
    """Greedy removal with a new measurement after each.

    Args:
        observed, offer, target: see `choose`.
        alone: targets that only regions can meet.
    """

    def __init__(
        self, observed: Observed, offer: Offer, target: Mapping[str, float], alone: Sequence[str]
    ) -> None:
        self._observed, self._offer = observed, offer
        self._goals = {key: share * offer.totals[key] for key, share in target.items()}
        self._alone = {key: limit for key, limit in self._goals.items() if key in alone}
        self._target = target
        self._by_size = sorted(offer.regions, key=lambda one: (-len(one.nodes), one.exit))

    def run(self, tell: Callable[[float], None]) -> tuple[tuple[Removal, ...], ...]:
        """See `path`; the last entry: see `choose`."""
        self._check_reachable()
        answers = Answers(self._observed, _SAMPLES)
        influence = influences(self._observed, self._offer)
        taken: tuple[Removal, ...] = ()
        found, before = [taken], 0.0
        while not self._met(regions := [one.region for one in taken]):
            trials = [
                (self._price(regions, one, drift, before), drift, one)
                for one, drift in self._measured(answers, regions, influence)
            ]
            if not trials:
                break
            _, before, best = min(trials, key=lambda trial: (trial[0], trial[2].exit))
            removal = Removal(best, influence[best], before)
            rest = (one for one in taken if not one.region.nodes <= best.nodes)
            taken = (*rest, removal)
            found.append(taken)
            tell(1.0 - self._missing([one.region for one in taken]))
        found[-1] = self._given_back(taken)
        return tuple(one for one in found if self._met([each.region for each in one], self._alone))

    # -- targets ---------------------------------------------------------------------------------

    def _met(self, regions: Sequence[Region], goals: Mapping[str, float] | None = None) -> bool:
        """Whether all targets are met, or those given."""
        left = self._offer.left(regions)
        goals = self._goals if goals is None else goals
        return all(left[key] <= limit for key, limit in goals.items())

    def _missing(self, regions: Sequence[Region]) -> float:
        """How far the targets are away, 1 at the start and 0 where all are met."""
        left, totals = self._offer.left(regions), self._offer.totals
        shares = [
            max(left[key] - limit, 0.0) / max(totals[key] - limit, 1e-9)
            for key, limit in self._goals.items()
        ]
        return sum(shares) / len(shares)

    def _with(self, regions: Sequence[Region], one: Region) -> list[Region] | None:
        """The regions with one more; None where it cuts into another, or no layer would stay."""
        rest = []
        for other in regions:
            if one.nodes.isdisjoint(other.nodes):
                rest.append(other)
            elif not other.nodes < one.nodes:
                return None
        together = [*rest, one]
        gone = frozenset[int]().union(*(other.layers for other in together))
        return together if gone < self._offer.graph.layers else None

    def _smallest(self, regions: Sequence[Region]) -> list[Region]:
        """As much gone as may go together with some regions."""
        found = list(regions)
        for one in self._by_size:
            found = self._with(found, one) or found
        return found

    def _check_reachable(self) -> None:
        left = self._offer.left(self._smallest([]))
        for key, limit in self._alone.items():
            if left[key] > limit:
                raise unreachable(key, self._target[key], left[key] / self._offer.totals[key])

    # -- trials ----------------------------------------------------------------------------------

    def _measured(
        self, answers: Answers, regions: Sequence[Region], influence: Mapping[Region, float]
    ) -> list[tuple[Region, float]]:
        """The most promising next regions, with the drift of the outputs when they go too."""
        missing = self._missing(regions)
        ranked = []
        for one in self._offer.regions:
            together = self._with(regions, one)
            if together is not None and (closer := missing - self._missing(together)) > 0:
                ranked.append((influence[one] / closer, one, together))
        ranked.sort(key=lambda item: (item[0], item[1].exit, item[1].entry))
        within_reach = (item for item in ranked if self._met(self._smallest(item[2]), self._alone))
        tried = list(itertools.islice(within_reach, _TRIED))
        model = self._observed.model
        base = bypass(model, entries(regions))
        network = Network(base, answers.batches)
        places = {str(v.name): p for p, node in enumerate(base.graph) for v in node.outputs}
        nodes, writes = list(base.graph), self._offer.graph.writes

        def begins(one: Region) -> int:
            names = (name for place in one.nodes for name in writes[place])
            return min(places[name] for name in names if name in places)

        found = []
        for _, one, together in sorted(tried, key=lambda item: begins(item[1])):
            network.advance(nodes[begins(one)])
            changed = network.beside(bypass(model, entries(together)))
            found.append((one, answers.drift(changed.piece(answers.outputs))))
        return found

    def _price(self, regions: Sequence[Region], one: Region, drift: float, before: float) -> float:
        """Drift that a region adds, for the share of the way to the targets that it goes."""
        together = self._with(regions, one)
        assert together is not None
        closer = self._missing(regions) - self._missing(together)
        return max(drift - before, _LEAST) / closer

    def _given_back(self, taken: tuple[Removal, ...]) -> tuple[Removal, ...]:
        """Without removals that the targets do not need, those with most influence first."""
        for one in sorted(taken, key=lambda one: -(one.influence or 0.0)):
            rest = tuple(other for other in taken if other is not one)
            if self._met([other.region for other in rest]):
                taken = rest
        return taken


def influences(observed: Observed, offer: Offer) -> dict[Region, float]:
    """1 − cos(entry, exit) of each region, on one batch."""
    network = Network(observed.model, observed.batches[:1])
    graph, shapes = offer.graph, offer.graph.coupling.shapes
    names = list(dict.fromkeys(name for one in offer.regions for name in (one.entry, one.exit)))
    together: dict[str, Array] | None = None
    if sum(4 * math.prod(size or 1 for size in shapes.of(name) or ()) for name in names) <= HOLD:
        together = network.piece(names).run(0)
    found = {}
    for one in sorted(offer.regions, key=lambda one: (graph.producer.get(one.entry, -1), one.exit)):
        values = together
        if values is None:
            network.advance(graph.nodes[graph.producer.get(one.entry, -1) + 1])
            values = network.piece([one.entry, one.exit]).run(0)
        found[one] = 1.0 - _cosine(values[one.entry], values[one.exit])
    return found


def _cosine(one: Array, other: Array) -> float:
    a, b = one.reshape(-1).astype(np.float64), other.reshape(-1).astype(np.float64)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale and math.isfinite(scale) else 0.0
