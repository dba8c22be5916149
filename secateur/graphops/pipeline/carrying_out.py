"""A choice carried out: surgery, repair and sparsity; of several, the one that drifts least."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration import Samples
from secateur.graphops.calibration.mirrored import mirror, mirror_axis
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.model.graph import constants
from secateur.graphops.model.spelling import as_given
from secateur.graphops.pipeline.analysed import Analysed
from secateur.graphops.pipeline.clock import Clock
from secateur.graphops.pipeline.dividing import Choice
from secateur.graphops.pipeline.structure import observe
from secateur.graphops.planning.drift import Answers
from secateur.graphops.repair.expectation import fold
from secateur.graphops.repair.joint import refit_together
from secateur.graphops.repair.repair import left, repair
from secateur.graphops.sparsity.sparsify import sparsify
from secateur.graphops.surgery.cut import cut
from secateur.plan import KeptTensor
from secateur.recipe import Recipe
from secateur.report import Folded, RepairStep, SparseWeight, Stage


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """A choice, carried out: the pruned model, and what each stage says of it.

    Attributes:
        left: labels of layers whose weights repair had to leave as they were.
    """

    choice: Choice
    model: ir.Model
    kept: tuple[KeptTensor, ...]
    repair: tuple[RepairStep, ...] = ()
    folded: tuple[Folded, ...] = ()
    left: tuple[str, ...] = ()
    sparse_weights: tuple[SparseWeight, ...] = ()


def carry_out(
    analysed: Analysed,
    choices: Sequence[Choice],
    samples: Samples | None,
    recipe: Recipe,
    asked: Recipe,
    clock: Clock,
) -> CarriedOut:
    """Surgery, repair and sparsity.

    Args:
        analysed: the model as it was given.
        choices: one, or several to take that of which drifts least once it is repaired.
        samples: to learn from; several choices need them.
        recipe: settled.
        asked: as it was before.
        clock: told of the stages.

    Raises:
        Refused: `INVALID_CALIBRATION` where repair was asked for and has nothing to go by.
    """
    going = " or ".join(str(int((~choice.decision.keep).sum())) for choice in choices)
    with clock.stage(Stage.SURGERY, f"{going} units go"):
        found = [_cut(choice, analysed) for choice in choices]
    if recipe.repair and samples is None:
        with clock.stage(Stage.REPAIR, "moving means into biases"):
            found = [replace(one, folded=_fold(one, asked)) for one in found]
    elif recipe.repair and choices[0].decision.observed is not None:
        with clock.stage(Stage.REPAIR, "refitting what is left"):
            model, batches = analysed.opened.model, choices[0].decision.observed.batches
            axis = mirror_axis(model, batches)
            if axis is not None:
                batches = [one for batch in batches for one in (batch, mirror(batch, axis))]
            alike = 1 if axis is None else 2
            for turn, one in enumerate(found):
                coupling = one.choice.structure.rest.coupling
                original = Observed(model, coupling, batches, recipe.seed, alike=alike)
                steps = _refit(one, original, recipe.seed, clock, (turn, len(found)))
                found[turn] = replace(one, repair=steps)
    done = found[0]
    if len(found) > 1:
        assert samples is not None
        done = _least(found, observe(analysed, samples, recipe))
    coupling = done.choice.structure.rest.coupling
    if recipe.sparsity is not None:
        with clock.stage(Stage.SPARSITY, f"{recipe.sparsity} by {recipe.weight_criterion}"):
            seen = () if samples is None else samples.seen
            tell = functools.partial(clock.tell, Stage.SPARSITY)
            sparse_weights = sparsify(done.model, coupling.shapes, recipe, seen, tell)
            done = replace(done, sparse_weights=sparse_weights)
    if recipe.repair and done.kept:
        fitted_by = None if samples is None else coupling.shapes
        done = replace(done, left=left(done.model, fitted_by))
    return _as_given(done)


def _as_given(done: CarriedOut) -> CarriedOut:
    """With the operators that the model had, and what was kept of its own constants."""
    model = as_given(done.model)
    if model is done.model:
        return done
    own = constants(model.graph)
    return replace(done, model=model, kept=tuple(one for one in done.kept if one.tensor in own))


def _cut(choice: Choice, analysed: Analysed) -> CarriedOut:
    rest = choice.structure.rest
    model, kept = cut(rest.opened.model, rest.coupling, choice.decision.keep, analysed.copies)
    return CarriedOut(choice, model, kept)


def _refit(
    done: CarriedOut, original: Observed, seed: int, clock: Clock, turn: tuple[int, int]
) -> tuple[RepairStep, ...]:
    """Refits what is left by calibration data, layer by layer and then block by block.

    Args:
        done: its model is changed.
        original: and the batches to learn from.
        seed: of the positions that are sampled.
        clock: told of the progress.
        turn: which of how many choices this is.
    """
    given = done.model, original, done.choice.decision.keep, seed

    def tell(half: int) -> Callable[[float], None]:
        return lambda share: clock.tell(Stage.REPAIR, (turn[0] + (half + share) / 2) / turn[1])

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


def _least(found: Sequence[CarriedOut], observed: Observed) -> CarriedOut:
    """What drifts least on the samples that no fit has seen; of equals, the first."""
    answers = Answers(observed)
    drifts = [
        answers.drift(Network(one.model, answers.batches).piece(answers.outputs)) for one in found
    ]
    least = found[drifts.index(min(drifts))]
    divisions = list(least.choice.divisions)
    for one, drift in zip(found, drifts, strict=True):
        (place,) = (i for i, division in enumerate(one.choice.divisions) if division.chosen)
        divisions[place] = divisions[place].model_copy(update={"final_drift": drift})
    return replace(least, choice=replace(least.choice, divisions=tuple(divisions)))
