"""What goes: regions, ranks and units, chosen under one budget or read in a plan."""

from __future__ import annotations

import functools

from secateur.errors import Code, refuse
from secateur.graphops.calibration import Samples
from secateur.graphops.pipeline.analysed import Analysed
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.deciding import decide
from secateur.graphops.pipeline.dividing import Choice, Divide
from secateur.graphops.pipeline.structure import (
    Structure,
    by_ranks,
    candidates_of,
    observe,
    offer_of,
)
from secateur.graphops.planning import ranks, removal, replay
from secateur.graphops.planning.removal import Offer
from secateur.graphops.profile import measure
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Stage


def choose(
    analysed: Analysed,
    recipe: Recipe,
    samples: Samples | None,
    plan: Plan | None,
    clock: Clock,
    memory_meter: measure.MemoryMeter,
) -> tuple[Choice, ...]:
    """Which regions go, what is split, and which units of the rest go; or what a plan says.

    Returns:
        the choice; several where only carrying them out tells which is best.
    """
    if plan is None and {"layer", "rank"} & set(recipe.granularity):
        return _choose_structure(analysed, recipe, samples, clock)
    structure = Structure(analysed)
    if plan is not None and plan.removed:
        offer = offer_of(analysed, recipe)
        regions = replay.regions_removed(plan, offer, analysed.opened.sha256)
        going = [removal.Removal(region) for region in regions]
        structure = structure.without(offer, going, samples, recipe)
    if plan is not None and plan.factored:
        offered = candidates_of(structure.rest, recipe, samples)
        chosen = replay.products_factored(plan, offered, analysed.opened.sha256)
        structure = structure.split(offered, chosen, samples, recipe)
    decision = decide(structure.rest, recipe, samples, plan, clock, memory_meter)
    return (Choice(structure, decision),)


def _choose_structure(
    analysed: Analysed, recipe: Recipe, samples: Samples | None, clock: Clock
) -> tuple[Choice, ...]:
    offer = offer_of(analysed, recipe) if "layer" in recipe.granularity else None
    layers, absent = offer is not None, _absent(analysed, recipe, offer)
    units = not set(recipe.units) <= set(absent)
    if samples is None and (layers or (units and "rank" not in absent)):
        raise refuse(
            Code.INVALID_CALIBRATION,
            "granularity=layer needs calibration data: weights do not say what a layer does"
            if layers
            else "granularity=rank beside units needs calibration data, to weigh one against the "
            "other",
            expected="--calibration PATH",
            found="none",
            hint="Give a few hundred unlabelled samples.",
        )
    structure = Structure(analysed)
    with clock.stage(Stage.PLANNING, ", ".join(f"{k}={v:g}" for k, v in recipe.target.items())):
        tell = functools.partial(clock.tell, Stage.PLANNING)
        if samples is not None and (recipe.units or {"layer", "rank"} <= set(recipe.granularity)):
            return Divide(structure, samples, recipe, offer, absent, tell).run()
        if offer is not None:
            assert samples is not None
            observed = observe(analysed, samples, recipe)
            going = removal.choose(observed, offer, recipe.target, tell)
            structure = structure.without(offer, going, samples, recipe)
        elif not units:
            structure = by_ranks(structure, samples, recipe, tell)
    decision = decide(structure.rest, recipe, samples, None, clock)
    return (Choice(structure, decision, absent=absent),)


def _absent(analysed: Analysed, recipe: Recipe, offer: Offer | None) -> tuple[str, ...]:
    """The kinds that a recipe asks for and the model has none of that may go."""
    coupling = analysed.coupling
    kinds = {group.kind for group in coupling.groups if group.units.size > 1} | {"weight"}
    if offer is not None and offer.regions:
        kinds.add("layer")
    if ranks.splittable(analysed.opened.model, coupling, analysed.copies, recipe.ignore):
        kinds.add("rank")
    return tuple(kind for kind in recipe.granularity if kind not in kinds)
