"""What the engine found, as a report says it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from secateur.graphops.calibration.curvature import Curvature
from secateur.graphops.calibration.moments import WIDEST
from secateur.graphops.coupling.units import Coupling, UnitGroup
from secateur.graphops.model.graph import node_label
from secateur.graphops.planning import ranks, removal
from secateur.graphops.planning.removal import Offer
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Mask
from secateur.graphops.profile.size import compressed
from secateur.graphops.regions import find as found
from secateur.graphops.rotation.bases import Rotation
from secateur.recipe import Recipe
from secateur.report import (
    Cost,
    Factored,
    Frozen,
    Group,
    Region,
    Removal,
    Rotated,
    Sensitivity,
    SparseWeight,
    Verification,
)

_NEARLY = 0.99  # of what the readers of a stream make of it
_SLOWER = 1.05  # a latency ratio above it is called slower; below, it is noise


def group_record(group: UnitGroup, coupling: Coupling, keep: Mask) -> Group:
    """A group, and how many of its units stay; none where all that they slice is gone."""
    gone = all(coupling.gone(name, keep) for name, _ in group.axes)
    return Group(
        id=group.id,
        kind=group.kind,
        units=int(group.units.size),
        kept=0 if gone else int(keep[group.units].sum()),
        channels_per_unit=max(group.axes.values()),
        tensors=tuple(f"{name}[{axis}]" for name, axis in group.axes),
        normalised_by=group.normalised_by,
    )


def region_records(offer: Offer) -> tuple[Region, ...]:
    """What can be left out whole; then the layers that cannot."""
    places = {node_label(node): place for place, node in enumerate(offer.graph.nodes)}
    held = []
    for refusal in offer.refusals:
        alone = frozenset({places[refusal.node]})
        held.append(
            _region(offer, found.Region(refusal.entry, refusal.exit, alone, alone), refusal.detail)
        )
    return (*(_region(offer, one) for one in offer.regions), *held)


def _region(offer: Offer, one: found.Region, refused: str = "") -> Region:
    saved = offer.costs.of(one.nodes)
    return Region(
        entry=one.entry,
        exit=one.exit,
        layers=tuple(node_label(offer.graph.nodes[place]) for place in sorted(one.layers)),
        macs=round(saved["macs"]),
        params=round(saved["params"]),
        refused=refused,
    )


def rotated_record(group: str, one: Rotation) -> Rotated:
    """A stream that is in another basis."""
    carried = np.cumsum(one.shares)
    return Rotated(
        group=group,
        channels=carried.size,
        needed=min(int(np.searchsorted(carried, _NEARLY)) + 1, carried.size),
    )


def factored_record(one: ranks.Candidate, rank: int) -> Factored:
    """A product that is split."""
    outputs, inputs = one.weight.shape
    return Factored(
        node=node_label(one.view.node),
        inputs=inputs,
        outputs=outputs,
        rank=rank,
        error=float(one.losses[rank]),
    )


def removal_record(offer: Offer, one: removal.Removal) -> Removal:
    """A region that goes."""
    return Removal(region=_region(offer, one.region), influence=one.influence, drift=one.drift)


def frozen_records(coupling: Coupling) -> tuple[Frozen, ...]:
    """What must stay, that which holds most channels first."""
    return tuple(
        Frozen(
            code=item.reason.code,
            node=item.reason.node,
            op_type=item.reason.op_type,
            detail=item.reason.detail,
            channels=item.channels,
        )
        for item in sorted(coupling.frozen, key=lambda item: -item.channels)
    )


def sensitivity_records(coupling: Coupling, curves: Mapping[int, Curve]) -> tuple[Sensitivity, ...]:
    """The drift of trial cuts."""
    return tuple(
        Sensitivity(group=coupling.groups[index].id, removed=curve.gone, drift=curve.drift)
        for index, curve in sorted(curves.items())
    )


def with_zeros(found: Cost, nonzero: int | None, *files: bytes | pathlib.Path) -> Cost:
    """The cost of a model, with what its zeros amount to; compressed where the files are all."""
    sizes = [len(file) if isinstance(file, bytes) else file.stat().st_size for file in files]
    shrunk = compressed(*files) if sum(sizes) == found.bytes else None
    return found.model_copy(update={"nonzero": nonzero, "compressed_bytes": shrunk})


def too_wide(weights: Sequence[SparseWeight], recipe: Recipe) -> tuple[str, ...]:
    """Says where single weights were not ranked as a settled recipe asks."""
    others = [one for one in weights if one.criterion not in ("", recipe.weight_criterion)]
    if not others:
        return ()
    return (
        f"{len(others)} weight matrices are wider than {WIDEST} inputs, too wide for second "
        f"moments: their weights were ranked by magnitude ({_first_of([o.node for o in others])})",
    )


def _first_of(labels: Sequence[str]) -> str:
    return ", ".join([*labels[:5], *(["…"] if len(labels) > 5 else [])])


def unrepaired(left: Sequence[str], with_data: bool) -> tuple[str, ...]:
    """What repair leaves as it is.

    Args:
        left: labels of layers.
        with_data: whether there were data to refit by.
    """
    if not left:
        return ()
    if with_data:
        return (
            f"{len(left)} layers are not repaired: the refit does not know their operator, or this "
            f"form of it ({_first_of(left)})",
        )
    return (
        f"{len(left)} layers have quantised weights that are not repaired: give calibration data; "
        "or prune the model that was quantised, and quantise the result (--quantize)",
    )


def underived(curvature: Curvature) -> tuple[str, ...]:
    """What the criterion did without."""
    if not curvature.missing:
        return ()
    return (
        "criterion reconstruction counts all outputs of a layer alike, for want of derivatives: "
        f"{curvature.missing[:200]}",
    )


def unusual_outputs(checked: Verification) -> tuple[str, ...]:
    """What callers should know of outputs whose sizes the data decide, and of such as say
    nothing."""
    resized = (
        f"output {name!r} was larger or smaller than the original's, as the data decide: times are "
        "of other work, and drift is over the positions that both have"
        for name in checked.resized
    )
    samples = "calibration data" if checked.from_calibration else "random inputs"
    not_finite = (
        f"output {name!r} of the original is NaN or infinite everywhere on {samples}: how far the "
        "result is from it is not known"
        for name in checked.not_finite
    )
    return (*resized, *not_finite)


def warnings_of(before: Cost, after: Cost, target: Mapping[str, float]) -> tuple[str, ...]:
    """What callers should know of the costs."""
    warnings = []
    if before.latency is not None and after.latency is not None:
        ratio = after.latency.p50_ms / before.latency.p50_ms
        if ratio > _SLOWER:
            warnings.append(
                f"the result is slower: {after.latency.p50_ms:.3f} ms against "
                f"{before.latency.p50_ms:.3f} ms (p50), whatever its MACs say"
            )
        if ratio > target.get("latency", math.inf):
            warnings.append(
                f"latency={target['latency']:g} held while units went, and measured again at the "
                f"end it is {ratio:.3f}: this machine is busy, or its time comes in steps"
            )
    if before.peak_memory_bytes and after.peak_memory_bytes and "memory" in target:
        asked = target["memory"]
        limit = asked * before.peak_memory_bytes if asked <= 1 else asked
        if after.peak_memory_bytes > limit:
            warnings.append(
                f"memory={asked:g} held while units went, and measured again at the end the result "
                f"takes {after.peak_memory_bytes} bytes, more than {limit:.0f}"
            )
    if after.nonzero is not None and after.compressed_bytes is not None:
        warnings.append(
            f"{after.nonzero / after.params:.1%} of the weights are not zero. ONNX Runtime's CPU "
            "kernels multiply zeros as any other number: single weights make nothing faster. The "
            f"file takes {after.bytes} bytes, and {after.compressed_bytes} compressed"
        )
    if after.bytes > before.bytes:
        warnings.append(f"the file grew from {before.bytes} to {after.bytes} bytes")
    return tuple(warnings)
