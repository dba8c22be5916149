"""Orders the units and takes as many as the targets ask for.

All candidates form one sequence of steps, each the units that leave one group together (one, or
a rounding step). Local scope orders the steps by the share of their group that is gone after
them, so that every group shrinks alike; global scope by score; measured scope by what they do to
the outputs (see `allocation`). Every target is a prefix of that
sequence, found by bisection; what the last step overshoots is given back where it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from secateur.errors import Code, Refused, refuse
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.planning import allocation, cost
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Mask, Scores, Steps, sequence
from secateur.recipe import BUDGETS, Recipe

# What a target counts of a choice of units, and how much of it the original has.
Measure = tuple[Callable[[Mask], float], float]

_MEASURED = {"latency", "memory"}  # targets that are not the same twice
_CARRIED_OUT = _MEASURED | {"size"}  # that are counted by writing a file


def choose(
    coupling: Coupling,
    scores: Scores,
    recipe: Recipe,
    params_before: int,
    curves: Mapping[int, Curve] | None = None,
    given: Mapping[str, Measure] = MappingProxyType({}),
) -> Mask:
    """Which units stay: the decision that surgery carries out.

    Args:
        coupling: of the model.
        scores: per unit number, entry 0 unused; low goes first.
        recipe: targets, scope, granularity and rounding.
        params_before: of the original, copies that normalising made not counted.
        curves: measured drift by index of the group, for measured scope.
        given: what targets count that the coupling does not know: the `size` of the file, its
            `latency` and `memory`, and `macs` where regions of the original have gone.

    Returns:
        per unit number whether it stays; entry 0 is true.

    Raises:
        Refused: `NOTHING_TO_PRUNE` or `UNREACHABLE_TARGET` with the closest reachable value.
    """
    steps = sequence(coupling, scores, recipe)
    if not len(steps):
        raise refuse(
            Code.NOTHING_TO_PRUNE,
            "no group of channels can be cut",
            nodes=tuple(f.reason.node for f in coupling.frozen[:5] if f.reason.node),
            expected="at least one group with two units that may go",
            found=f"{len(coupling.groups)} groups under this recipe",
            hint="`secateur inspect` lists what is frozen and why.",
        )
    if curves is not None:
        budget = next(target for target in BUDGETS if target in recipe.target)
        measure, _ = _measure(coupling, budget, params_before)
        steps = allocation.arrange(steps, coupling, scores, curves, measure)
    search = _Search(coupling, steps)
    taken = 0
    goals: list[tuple[Callable[[Mask], float], float]] = []
    # what takes long comes last, and begins where the others end
    for target, fraction in sorted(recipe.target.items(), key=lambda one: one[0] in _CARRIED_OUT):
        if target == "layers" or (target == "channels" and recipe.scope == "local"):
            continue
        measure, original = given.get(target) or _measure(coupling, target, params_before)
        if target not in _CARRIED_OUT:
            goals.append((measure, fraction * original))
        taken = search.prefix(target, measure, fraction, original, taken)
    gone = np.zeros(len(steps), np.bool_)
    gone[:taken] = True
    fixed = np.zeros(len(steps), np.bool_)
    if recipe.scope == "local" and "channels" in recipe.target:
        fixed = _local_share(coupling, steps, recipe.target["channels"])
        gone |= fixed
    if not _CARRIED_OUT & set(recipe.target):  # for every step that would take too long
        search.give_back(gone, fixed, goals)
    return search.keep(gone)


def _measure(coupling: Coupling, target: str, params_before: int) -> Measure:
    """What a target counts, and its value for the original."""
    if target in ("size", "memory"):  # near enough to say which steps save most
        constants = cost.constant_bytes(coupling)
        return constants.of, float(constants.of(np.ones(coupling.count + 1, np.bool_)))
    if target == "channels":
        return (lambda keep: float(keep[1:].sum())), float(coupling.count)
    if target == "params":
        return cost.params(coupling).of, float(params_before)
    macs = cost.macs(coupling)  # also for the latency: near enough, as above
    return macs.of, float(macs.of(np.ones(coupling.count + 1, np.bool_)))


def _local_share(coupling: Coupling, steps: Steps, fraction: float) -> Mask:
    """Steps that bring each group down to the share; one unit or rounding step always stays."""
    totals = np.array([group.units.size for group in coupling.groups])[steps.groups]
    return steps.left + steps.sizes > fraction * totals + 1e-9


class _Search:
    """Bisection over prefixes of the sequence."""

    def __init__(self, coupling: Coupling, steps: Steps) -> None:
        self._count = coupling.count
        self._steps = steps

    def keep(self, gone: Mask) -> Mask:
        """The units that stay when the marked steps go."""
        keep = np.ones(self._count + 1, np.bool_)
        keep[self._steps.units[np.repeat(gone, self._steps.sizes)]] = False
        return keep

    def _without(self, steps: int) -> Mask:
        """The units that stay when so many of the first steps go."""
        return self.keep(np.arange(len(self._steps)) < steps)

    def prefix(
        self,
        target: str,
        measure: Callable[[Mask], float],
        fraction: float,
        original: float,
        least: int,
    ) -> int:
        """The fewest steps, `least` or more, that meet a target.

        Raises:
            Refused: `UNREACHABLE_TARGET` when all of them do not.
        """
        limit = fraction * original if fraction <= 1 else fraction
        low, high = least, len(self._steps)
        closest = measure(self._without(high))
        if closest > limit:
            raise unreachable(target, fraction, closest / original if fraction <= 1 else closest)
        while low < high:
            middle = (low + high) // 2
            if measure(self._without(middle)) <= limit:
                high = middle
            else:
                low = middle + 1
            found = low == high < len(self._steps)
            if found and target in _MEASURED and measure(self._without(low)) > limit:
                low, high = low + 1, len(self._steps)  # it was met by chance
        return low

    def give_back(
        self, gone: Mask, fixed: Mask, goals: Sequence[tuple[Callable[[Mask], float], float]]
    ) -> None:
        """Takes back steps, last first, as long as all goals still hold; edits `gone`."""
        if not goals:
            return
        keep, changed = self.keep(gone), True
        while changed:
            changed = False
            places = np.flatnonzero(gone)
            last = dict(zip(self._steps.groups[places].tolist(), places.tolist(), strict=True))
            for place in sorted(last.values(), reverse=True):
                if fixed[place]:
                    continue
                units = self._steps.of(place)
                keep[units] = True  # steps share no unit
                back = all(measure(keep) <= limit for measure, limit in goals)
                keep[units], gone[place] = back, not back
                changed |= back


def unreachable(target: str, fraction: float, closest: float) -> Refused:
    """The refusal of a target that everything that may go does not meet.

    Args:
        target: its name.
        fraction: that was asked for; above 1 a number of bytes.
        closest: what can be reached, likewise.
    """
    in_bytes = fraction > 1
    found = f"{closest:.0f} bytes" if in_bytes else f"{closest:.4f}"
    least = f"{closest:.0f}" if in_bytes else f"{math.ceil(closest * 1000) / 1000:g}"
    return refuse(
        Code.UNREACHABLE_TARGET,
        f"target {target}={fraction:.10g} cannot be reached",
        expected=f"{target} at most {fraction:.10g} {'bytes' if in_bytes else 'of the original'}",
        found=f"{found} with everything gone that may go",
        hint=f"Ask for {target}={least} or more; `secateur inspect` lists what is frozen and why.",
    )
