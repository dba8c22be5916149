"""One budget divided between regions, ranks and units: each division is carried out and judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import Samples
from secateur.graphops.calibration.data import first_batches
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.pipeline.analysed import Analysed
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.deciding import Curves, Decision, decide
from secateur.graphops.pipeline.structure import (
    Structure,
    by_ranks,
    candidates_of,
    meets,
    observe,
)
from secateur.graphops.planning import division, ranks, removal
from secateur.graphops.planning.drift import Answers
from secateur.graphops.planning.planner import unreachable
from secateur.graphops.planning.removal import Offer
from secateur.graphops.repair.repair import repair
from secateur.graphops.surgery.cut import cut
from secateur.recipe import Recipe
from secateur.report import Division

_SAMPLES = 128  # that a division learns from, and as many others that it is judged on


@dataclass(frozen=True, slots=True)
class Choice:
    """What goes, and what was weighed for it.

    Attributes:
        divisions: that were tried; the one that this choice is of is `chosen`.
        absent: kinds asked for of which the model has nothing that may go.
    """

    structure: Structure
    decision: Decision
    divisions: tuple[Division, ...] = ()
    absent: tuple[str, ...] = ()


class Divide:
    """Divides a budget between regions, ranks and units: what drifts least when carried out.

    First the regions, units making up the rest; then, of what they leave, the ranks. Where the
    recipe or the model has no units, ranks make up the rest.

    What is tried is decided from few samples, and the curve of a group is measured once for all
    divisions; what is best is decided again from all samples. Few samples and part of the repair
    may be wrong about it, so that units alone stand beside it, to be carried out as well.
    """

    def __init__(
        self,
        structure: Structure,
        samples: Samples,
        recipe: Recipe,
        offer: Offer | None,
        absent: tuple[str, ...],
        tell: Callable[[float], None],
    ) -> None:
        self._original, self._samples, self._recipe = structure, samples, recipe
        self._observed = observe(structure.rest, samples, recipe)
        self._offer, self._absent = offer, absent
        self._units = not set(recipe.units) <= set(self._absent)
        self._answers = Answers(self._observed, _SAMPLES)
        self._few = replace(samples, seen=first_batches(self._observed.learnt, _SAMPLES))
        self._curves: Curves = {}
        self._tell = tell
        self._refused: Refused | None = None
        self._tried: list[tuple[Structure, float]] = []
        self._best: tuple[float, Choice] | None = None
        self._alone: Choice | None = None

    def run(self) -> tuple[Choice, ...]:
        """The choice that drifts least; and units alone, if they are another.

        Raises:
            Refused: the targets are out of reach for every division.
        """
        structure, kinds = self._original, {*self._recipe.granularity} - {"weight"}
        if kinds <= set(self._absent):
            raise refuse(
                Code.NOTHING_TO_PRUNE,
                "the model has nothing of these kinds that may go",
                expected=f"at least one {' or '.join(self._recipe.granularity)}",
                found="none",
                hint="`secateur inspect` lists what is frozen and why.",
            )
        if self._offer is not None:
            structure = self._regions(structure, self._offer)
        if "rank" in kinds and self._units:
            self._ranks(structure)
        elif "layer" not in kinds:
            self._drift(structure)
        if self._best is None:
            assert self._refused is not None
            raise self._refused
        choices = [self._best[1]]
        if choices[0].structure is not self._original:
            decision = self._decide(choices[0].structure.rest, self._samples)
            choices = [replace(choices[0], decision=decision)]
            if self._alone is not None:
                choices.append(self._alone)
        self._tried.sort(key=lambda tried: (len(tried[0].removed), len(tried[0].factored)))
        return tuple(
            replace(choice, divisions=self._divisions(choice), absent=self._absent)
            for choice in choices
        )

    def _divisions(self, chosen: Choice) -> tuple[Division, ...]:
        """What was tried, for the report."""
        return tuple(
            Division(
                regions=len(structure.removed),
                factored=len(structure.factored),
                drift=drift if math.isfinite(drift) else None,
                chosen=structure is chosen.structure,
            )
            for structure, drift in self._tried
        )

    def _regions(self, structure: Structure, offer: Offer) -> Structure:
        """Tries numbers of regions; returns what is best, or nearest to the targets."""
        path = removal.path(
            self._observed, offer, self._recipe.target, lambda share: self._tell(share / 4)
        )

        def without(place: int) -> Structure:
            return structure.without(offer, path[place], self._samples, self._recipe)

        found = division.search(
            len(path) - 1,
            lambda place: self._drift(without(place)),
            lambda share: self._tell(0.25 + share / 4),
        )
        return without(division.best(found) if self._best else -1)

    def _ranks(self, structure: Structure) -> None:
        """Tries shares of the budget that go by rank."""
        recipe, rest = self._recipe, structure.rest
        offered = candidates_of(rest, recipe, self._samples)
        path = ranks.path(
            rest.opened.model,
            rest.coupling,
            offered,
            ranks.missing(rest.coupling, recipe, rest.costs),
            recipe,
            observe(rest, self._samples, recipe),
            lambda share: self._tell(0.5 + share / 4),
        )

        def drift(place: int) -> float:
            if (
                not path[place]
                and self._best
                and structure.removed == self._best[1].structure.removed
            ):
                return self._best[0]  # tried among the regions
            return self._drift(structure.split(offered, path[place], self._samples, recipe))

        division.search(len(path) - 1, drift, lambda share: self._tell(0.75 + share / 4))

    def _filled(self, structure: Structure) -> Structure:
        """Without units, ranks make up the rest.

        Raises:
            Refused: `UNREACHABLE_TARGET` with the closest value where they cannot.
        """
        recipe, rest = self._recipe, structure.rest
        if self._units or meets(rest, recipe):
            return structure
        if "rank" in recipe.granularity and "rank" not in self._absent:
            return by_ranks(structure, self._samples, recipe)
        wanted = ranks.missing(rest.coupling, recipe, rest.costs)
        key, value = next(iter(wanted.items()))
        raise unreachable(key, recipe.target[key], recipe.target[key] + value / rest.costs[key])

    def _drift(self, structure: Structure) -> float:
        """Of the outputs on batches that no fit has seen; infinite where targets are not met."""
        recipe, rest, drift = self._recipe, structure.rest, math.inf
        try:
            structure = self._filled(structure)
            rest = structure.rest
            given = self._samples if structure is self._original else self._few
            decision = self._decide(rest, given)
        except Refused as refused:
            if refused.refusal.code not in (Code.UNREACHABLE_TARGET, Code.NOTHING_TO_PRUNE):
                raise
            most = max((len(tried.removed) for tried, _ in self._tried), default=0)
            if len(structure.removed) >= most:  # with more gone, targets are nearer
                self._refused = refused
        else:
            pruned, _ = cut(rest.opened.model, rest.coupling, decision.keep, rest.copies)
            if recipe.repair:
                model = self._original.rest.opened.model
                seen = Observed(model, rest.coupling, self._few.seen, recipe.seed)
                repair(pruned, seen, decision.keep, recipe.seed)
            network = Network(pruned, self._answers.batches)
            drift = self._answers.drift(network.piece(self._answers.outputs))
            choice = Choice(structure, decision)
            if structure is self._original:
                self._alone = choice
            if self._best is None or drift < self._best[0]:
                self._best = drift, choice
        self._tried.append((structure, drift))
        return drift

    def _decide(self, rest: Analysed, samples: Samples) -> Decision:
        return decide(rest, self._recipe, samples, None, Clock(None), known=self._curves)
