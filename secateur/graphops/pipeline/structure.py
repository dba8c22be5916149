"""A model without the regions that go and with the products split that are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from secateur.graphops.calibration import Samples
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.pipeline.analysed import Analysed, shapes_of
from secateur.graphops.pipeline.records import factored_record, removal_record
from secateur.graphops.planning import cost, ranks, removal
from secateur.graphops.planning.removal import Offer
from secateur.graphops.surgery.bypass import bypass
from secateur.graphops.surgery.split import split
from secateur.plan import FactoredProduct, RemovedRegion
from secateur.recipe import Recipe
from secateur.report import Factored, Removal


@dataclass(frozen=True, slots=True)
class Structure:
    """A model without the regions that go and with the products split that are, analysed anew.

    Attributes:
        rest: itself.
        removed, factored: what a plan says of both.
        removals, losses: what the report says of both.
    """

    rest: Analysed
    removed: tuple[RemovedRegion, ...] = ()
    factored: tuple[FactoredProduct, ...] = ()
    removals: tuple[Removal, ...] = ()
    losses: tuple[Factored, ...] = ()

    def without(
        self,
        offer: Offer,
        going: Sequence[removal.Removal],
        samples: Samples | None,
        recipe: Recipe,
    ) -> Structure:
        """Leaves regions out."""
        if not going:
            return self
        entries = removal.entries(one.region for one in going)
        rest = self._again(bypass(self.rest.opened.model, entries), samples, recipe)
        removed = tuple(
            RemovedRegion(entry=r.entry, exit=r.exit, nodes=offer.names(r))
            for r in (one.region for one in going)
        )
        removals = tuple(removal_record(offer, one) for one in going)
        return replace(self, rest=rest, removed=removed, removals=removals)

    def split(
        self,
        offered: Sequence[ranks.Candidate],
        chosen: ranks.Ranks,
        samples: Samples | None,
        recipe: Recipe,
    ) -> Structure:
        """Splits products."""
        if not chosen:
            return self
        going = [one for one in offered if one.name in chosen]
        factors = {one.name: one.factors(chosen[one.name]) for one in going}
        rest = self._again(split(self.rest.opened.model, factors), samples, recipe)
        factored = tuple(FactoredProduct(output=o.name, rank=chosen[o.name]) for o in going)
        losses = tuple(factored_record(one, chosen[one.name]) for one in going)
        return replace(self, rest=rest, factored=factored, losses=losses)

    def _again(self, model: ir.Model, samples: Samples | None, recipe: Recipe) -> Analysed:
        opened = replace(self.rest.opened, model=model)
        coupling = couple(model, shapes_of(opened, samples), recipe)
        return replace(self.rest, opened=opened, coupling=coupling)


def offer_of(analysed: Analysed, recipe: Recipe) -> Offer:
    """The regions of a model."""
    return Offer.of(
        analysed.graph, analysed.coupling, analysed.copies, analysed.params, recipe.ignore
    )


def observe(analysed: Analysed, samples: Samples, recipe: Recipe) -> Observed:
    """What the model's tensors are on the samples that may be learnt from."""
    return Observed(analysed.opened.model, analysed.coupling, samples.seen, recipe.seed)


def candidates_of(
    analysed: Analysed, recipe: Recipe, samples: Samples | None
) -> list[ranks.Candidate]:
    """Products that may be split."""
    learnt = () if samples is None else observe(analysed, samples, recipe).learnt
    return ranks.candidates(
        analysed.opened.model,
        analysed.coupling,
        analysed.copies,
        recipe.ignore,
        learnt,
        recipe.seed,
    )


def meets(analysed: Analysed, recipe: Recipe) -> bool:
    """Whether the regions that went meet the budgets without any unit."""
    coupling = analysed.coupling
    keep = np.ones(coupling.count + 1, np.bool_)
    left = {
        "macs": cost.macs(coupling).of(keep) / max(analysed.macs, 1),
        "params": cost.params(coupling).of(keep) / max(analysed.params, 1),
    }
    return all(left[budget] <= recipe.target.get(budget, 1.0) for budget in left)


def by_ranks(
    structure: Structure,
    samples: Samples | None,
    recipe: Recipe,
    tell: Callable[[float], None] = lambda share: None,
) -> Structure:
    """Splits products until the targets are met. Raises Refused: `UNREACHABLE_TARGET`."""
    rest = structure.rest
    offered = candidates_of(rest, recipe, samples)
    path = ranks.path(
        rest.opened.model,
        rest.coupling,
        offered,
        ranks.goals(rest.coupling, offered, recipe, rest.costs),
        recipe,
        None if samples is None else observe(rest, samples, recipe),
        tell,
    )
    return structure.split(offered, path[-1], samples, recipe)
