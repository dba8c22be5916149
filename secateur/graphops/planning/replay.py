"""Replaying a saved plan: from kept indices back to units, checked against the coupling."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from secateur.errors import Code, refuse
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.planning.ranks import Candidate
from secateur.graphops.planning.removal import Offer
from secateur.graphops.regions.find import Region
from secateur.plan import Plan

_ANEW = "`secateur inspect` lists what can go; --save-plan makes a plan of it."


def units_kept(
    plan: Plan, coupling: Coupling, copies: Mapping[str, str], sha256: str
) -> npt.NDArray[np.bool_]:
    """Per unit number whether it stays under a plan.

    Args:
        plan: to replay.
        coupling: of the model it is replayed on.
        copies: name of each vector that normalising made → name of its source.
        sha256: of that model.

    Raises:
        Refused: `INVALID_PLAN` when the plan is for another model, names what the model does not
            have, or keeps part of what goes together.
    """
    _check_source(plan, sha256)
    keep = np.ones(coupling.count + 1, np.bool_)
    stated: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
    for entry in plan.kept:
        source = copies.get(entry.tensor, entry.tensor)
        if entry.source != source:
            raise refuse(
                Code.INVALID_PLAN,
                f"tensor {entry.tensor!r} has another source",
                nodes=(entry.tensor,),
                expected=source,
                found=entry.source,
                hint="Name the source as --save-plan does: of a copy, the constant that it copies.",
            )
        for axis, indices in entry.axes.items():
            units = coupling.axes(entry.tensor).get(axis)
            if units is None or (indices and (min(indices) < 0 or max(indices) >= units.size)):
                raise refuse(
                    Code.INVALID_PLAN,
                    f"axis {axis} of tensor {entry.tensor!r} cannot be cut like this",
                    nodes=(entry.tensor,),
                    expected="a tensor and axis of `secateur inspect`, indices inside it",
                    found=f"{len(indices)} indices",
                    hint=_ANEW,
                )
            mask = np.zeros(units.size, np.bool_)
            mask[list(indices)] = True
            stated[entry.tensor, axis] = mask
            keep[units[~mask]] = False
    _check_consistent(stated, keep, coupling, copies)
    return keep


def streams_rotated(plan: Plan, offered: Collection[str], sha256: str) -> tuple[str, ...]:
    """The streams that are turned into another basis under a plan, by the ids of their groups.

    Args:
        plan: to replay.
        offered: ids of the groups of which any basis will do.
        sha256: of the model.

    Raises:
        Refused: `INVALID_PLAN` when the plan is for another model, or turns other groups.
    """
    _check_source(plan, sha256)
    for group in plan.rotated:
        if group not in offered:
            raise refuse(
                Code.INVALID_PLAN,
                f"the channels of {group!r} cannot be turned into another basis",
                nodes=(group,),
                expected="a group that only matrix products and sums touch",
                found="no such group",
                hint="Make the plan anew with --save-plan.",
            )
    return plan.rotated


def regions_removed(plan: Plan, offer: Offer, sha256: str) -> tuple[Region, ...]:
    """The regions that go under a plan.

    Args:
        plan: to replay.
        offer: the regions of the model it is replayed on.
        sha256: of that model.

    Raises:
        Refused: `INVALID_PLAN` when the plan is for another model, or removes what is no region
            of it, or parts that overlap.
    """
    _check_source(plan, sha256)
    offered = {(one.entry, one.exit): one for one in offer.regions}
    found: list[Region] = []
    for entry in plan.removed:
        one = offered.get((entry.entry, entry.exit))
        if one is None or entry.nodes != offer.names(one):
            raise refuse(
                Code.INVALID_PLAN,
                f"between {entry.entry!r} and {entry.exit!r} lies not what the plan removes",
                nodes=(entry.entry, entry.exit),
                expected="a region of `secateur inspect`, with the nodes that go with it",
                found="no such region" if one is None else f"{len(one.nodes)} nodes",
                hint=_ANEW,
            )
        if any(not one.nodes.isdisjoint(other.nodes) for other in found):
            raise refuse(
                Code.INVALID_PLAN,
                f"the region that ends at {entry.exit!r} overlaps another that the plan removes",
                nodes=(entry.exit,),
                hint="Leave one of the two out of the plan.",
            )
        found.append(one)
    return tuple(found)


def products_factored(plan: Plan, offered: Sequence[Candidate], sha256: str) -> dict[str, int]:
    """Ranks of the products that are split under a plan, by the name of their output.

    Args:
        plan: to replay.
        offered: products of the model that may be split, the regions that go left out.
        sha256: of that model.

    Raises:
        Refused: `INVALID_PLAN` when the plan is for another model, or splits what is no product
            of it, or saves nothing by it.
    """
    _check_source(plan, sha256)
    most = {one.name: one.most for one in offered}
    for entry in plan.factored:
        if not 0 < entry.rank <= most.get(entry.output, 0):
            raise refuse(
                Code.INVALID_PLAN,
                f"product {entry.output!r} cannot be split like this",
                nodes=(entry.output,),
                expected=f"a rank of at most {most[entry.output]}"
                if entry.output in most
                else "a MatMul, Gemm or 1x1 Conv whose weight no other node reads",
                found=f"rank {entry.rank}",
                hint="Leave the product out of the plan, or give it a rank that saves something.",
            )
    return {entry.output: entry.rank for entry in plan.factored}


def _check_source(plan: Plan, sha256: str) -> None:
    if plan.source != sha256:
        raise refuse(
            Code.INVALID_PLAN,
            "the plan was made for another model",
            expected=f"SHA-256 {plan.source}",
            found=sha256,
            hint="Replay it on that model, or make a plan of this one with --save-plan.",
        )


def _check_consistent(
    stated: Mapping[tuple[str, int], npt.NDArray[np.bool_]],
    keep: npt.NDArray[np.bool_],
    coupling: Coupling,
    copies: Mapping[str, str],
) -> None:
    if not keep[0]:
        raise refuse(Code.INVALID_PLAN, "the plan cuts positions that cannot be cut", hint=_ANEW)
    for name in coupling.constants:
        if coupling.gone(name, keep):
            continue
        for axis, units in coupling.axes(name).items():
            mask = keep[units]
            # A copy that was cut as its source is merged back, and then the plan names the source.
            stating = name
            while (stating, axis) not in stated and stating in copies:
                stating = copies[stating]
            said = stated.get((stating, axis))
            if not mask.all() and (said is None or not np.array_equal(said, mask)):
                raise refuse(
                    Code.INVALID_PLAN,
                    f"the plan keeps part of what goes together, at axis {axis} of {name!r}",
                    nodes=(name,),
                    expected=f"{int(mask.sum())} kept of {mask.size}",
                    found="all" if said is None else str(int(said.sum())),
                    hint="Cut it as the other tensors of its group in `secateur inspect --json`.",
                )
            if not mask.any():
                raise refuse(
                    Code.INVALID_PLAN,
                    f"the plan leaves nothing of axis {axis} of {name!r}",
                    nodes=(name,),
                    hint="Keep at least one position.",
                )
