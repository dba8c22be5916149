"""A choice carried out: surgery, repair and sparsity."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration import Samples
from secateur.graphops.calibration.mirrored import mirror, mirror_axis
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.pipeline.analysed import Analysed
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.dividing import Choice
from secateur.graphops.repair.expectation import fold
from secateur.graphops.repair.joint import refit_together
from secateur.graphops.repair.repair import quantised, repair
from secateur.graphops.sparsity.sparsify import sparsify
from secateur.graphops.surgery.cut import cut
from secateur.plan import KeptTensor
from secateur.recipe import Recipe
from secateur.report import Folded, RepairStep, SparseWeight, Stage


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """A choice, carried out: the pruned model, and what each stage says of it.

    Attributes:
        quantised: layers whose weights repair had to leave as they were.
    """

    choice: Choice
    model: ir.Model
    kept: tuple[KeptTensor, ...]
    repair: tuple[RepairStep, ...] = ()
    folded: tuple[Folded, ...] = ()
    quantised: int = 0
    sparse_weights: tuple[SparseWeight, ...] = ()


def carry_out(
    analysed: Analysed,
    choice: Choice,
    samples: Samples | None,
    recipe: Recipe,
    asked: Recipe,
    clock: Clock,
) -> CarriedOut:
    """Surgery, repair and sparsity.

    Args:
        analysed: the model as it was given.
        choice: what to carry out.
        samples: to learn from.
        recipe: settled.
        asked: as it was before.
        clock: told of the stages.

    Raises:
        Refused: `INVALID_CALIBRATION` where repair was asked for and has nothing to go by.
    """
    with clock.stage(Stage.SURGERY, f"{int((~choice.decision.keep).sum())} units go"):
        done = _cut(choice, analysed)
    if recipe.repair and samples is None:
        with clock.stage(Stage.REPAIR, "moving means into biases"):
            done = replace(done, folded=_fold(done, asked))
    elif recipe.repair and choice.decision.observed is not None:
        with clock.stage(Stage.REPAIR, "refitting what is left"):
            done = replace(done, repair=_refit(done, analysed, recipe, clock))
    coupling = choice.structure.rest.coupling
    if recipe.sparsity is not None:
        with clock.stage(Stage.SPARSITY, f"{recipe.sparsity} by {recipe.weight_criterion}"):
            seen = () if samples is None else samples.seen
            tell = functools.partial(clock.tell, Stage.SPARSITY)
            sparse_weights = sparsify(done.model, coupling.shapes, recipe, seen, tell)
            done = replace(done, sparse_weights=sparse_weights)
    if recipe.repair and done.kept:
        fitted_by = None if samples is None else coupling.shapes
        done = replace(done, quantised=quantised(done.model, fitted_by))
    return done


def _cut(choice: Choice, analysed: Analysed) -> CarriedOut:
    rest = choice.structure.rest
    model, kept = cut(rest.opened.model, rest.coupling, choice.decision.keep, analysed.copies)
    return CarriedOut(choice, model, kept)


def _refit(
    done: CarriedOut, analysed: Analysed, recipe: Recipe, clock: Clock
) -> tuple[RepairStep, ...]:
    """Refits what is left by calibration data, layer by layer and then block by block."""
    choice, model = done.choice, analysed.opened.model
    assert choice.decision.observed is not None
    batches = choice.decision.observed.batches
    axis = mirror_axis(model, batches)
    if axis is not None:
        batches = [one for batch in batches for one in (batch, mirror(batch, axis))]
    coupling, alike = choice.structure.rest.coupling, 1 if axis is None else 2
    original = Observed(model, coupling, batches, recipe.seed, alike=alike)
    given = done.model, original, choice.decision.keep, recipe.seed

    def tell(half: int) -> Callable[[float], None]:
        return lambda share: clock.tell(Stage.REPAIR, (half + share) / 2)

    return repair(*given, tell(0)) + refit_together(*given, tell(1))


def _fold(done: CarriedOut, asked: Recipe) -> tuple[Folded, ...]:
    """Repair without data; refused where it was asked for and there is nothing to go by."""
    rest, keep = done.choice.structure.rest, done.choice.decision.keep
    found = fold(rest.opened.model, rest.coupling, done.model, keep, asked.seed)
    if asked.repair and not keep.all() and not any(one.folded for one in found):
        raise refuse(
            Code.INVALID_CALIBRATION,
            "no BatchNormalization tells the mean of anything that went, to repair by without data",
            nodes=tuple(one.node for one in found),
            expected="--calibration PATH",
            found="none",
            hint="Give a few hundred unlabelled samples, or leave out --repair.",
        )
    return found
