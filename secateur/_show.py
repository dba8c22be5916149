"""What the command line shows to people."""

from __future__ import annotations

import collections
import contextlib
import datetime
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pydantic
import rich.console
import rich.markup
import rich.progress
import rich.table
import typer

from secateur.errors import Refused, SecateurError
from secateur.operation import Operation
from secateur.report import (
    Cost,
    Drift,
    Frozen,
    Group,
    Inspection,
    Profile,
    Progress,
    ProgressCallback,
    Region,
    Report,
    Stage,
)

if TYPE_CHECKING:
    from secateur.result import Result

_ROWS = 30  # of a table; a person reads no more, and --json has all
_REASONS = 8


def plain(value: pydantic.BaseModel) -> Any:
    """`value` as JSON's types. JSON has no NaN or infinity: they become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return finite(value.model_dump(mode="json"))


# ---- while it runs -----------------------------------------------------------------------------


@contextlib.contextmanager
def progress() -> Iterator[ProgressCallback]:
    """Shows progress on standard error: a bar on a terminal, a line per stage elsewhere."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description:<10}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[message]}", markup=False),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=1.0, message="")

        def tell(step: Progress) -> None:
            name = step.stage.lower()
            bar.update(task, description=name, completed=step.fraction, message=step.message)

        yield tell


def _lines() -> ProgressCallback:
    last: Stage | None = None

    def tell(step: Progress) -> None:
        nonlocal last
        if step.stage is not last:
            text = f"{step.fraction:4.0%}  {step.stage.lower():<9} {step.message}".rstrip()
            typer.echo(text, err=True)
            last = step.stage

    return tell


def error(problem: SecateurError, as_json: bool) -> None:
    """Shows why nothing came of it: text on standard error, or JSON on standard output."""
    if as_json:
        if isinstance(problem, Refused):
            value = problem.refusal.model_dump(mode="json")
        else:
            value = {"code": type(problem).__name__, "message": str(problem)}
        typer.echo(json.dumps({"error": value}))
        return
    console = rich.console.Console(stderr=True, soft_wrap=True, highlight=False)
    if not isinstance(problem, Refused):
        console.print(f"error: {problem}", style="red", markup=False)
        return
    refusal = problem.refusal
    console.print(f"{refusal.code}: {refusal.message}", style="bold red", markup=False)
    for name, text in (("expected", refusal.expected), ("found", refusal.found)):
        if text:
            console.print(f"  {name}: {text}", style="red", markup=False)
    for node in refusal.nodes[:_REASONS]:
        console.print(f"  at {node}", style="red", markup=False)
    if len(refusal.nodes) > _REASONS:
        console.print(f"  and {len(refusal.nodes) - _REASONS} more", style="red")
    if refusal.hint:
        console.print(f"  {refusal.hint}", markup=False)


# ---- answers -----------------------------------------------------------------------------------


def result(found: Result, out: pathlib.Path, as_json: bool) -> None:
    """Shows what was written to `out`."""
    if as_json:
        digest = hashlib.sha256(found.model).hexdigest()
        document = {"output": str(out), "sha256": digest, "report": plain(found.report)}
        typer.echo(json.dumps(document))
    else:
        report(found.report, out)


def report(found: Report, out: pathlib.Path) -> None:
    """Shows what a prune gave."""
    console = _console()
    console.print(_costs("original", found.before, "pruned", found.after))
    checked = found.verification
    samples = "calibration samples" if checked.from_calibration else "random inputs"
    sizes = ", ".join(str(size) for size in checked.batch_sizes)
    console.print(f"ran in ONNX Runtime on {checked.samples} {samples}, batch size {sizes}")
    for stage in found.stage_drift[:-1]:
        console.print(f"after {stage.stage}:")
        _drift(console, stage.drift)
        console.print(f"after {found.stage_drift[-1].stage}:")
    _drift(console, checked.drift)
    for line in accuracies(found):
        console.print(line, markup=False)
    for one in found.removed:
        region = one.region
        text = f"left out: {len(region.layers)} layers between {region.entry} and {region.exit}"
        console.print(text, markup=False)
    if found.vocabulary:
        console.print(
            f"{len(found.vocabulary)} tokens are left; --report FILE.json gives their old ids"
        )
    for stream in found.rotated:
        text = f"{stream.needed} of {stream.channels} channels say 0.99 of {stream.group}"
        console.print(f"in another basis, {text}", markup=False)
    for product in found.factored:
        sizes = f"{product.inputs} to {product.rank} to {product.outputs} channels"
        console.print(f"split: {product.node}, {sizes}", markup=False)
    for division in found.divisions:
        drift = "out of reach" if division.drift is None else f"drift {division.drift:.3g}"
        if division.final_drift is not None:
            drift += f", {division.final_drift:.3g} with the whole repair"
        chosen = ", taken" if division.chosen else ""
        parts = f"{division.regions} regions, {division.factored} products split"
        console.print(f"{parts}, units for the rest: {drift}{chosen}")
    if found.folded:
        console.print(folded(found), markup=False)
    _frozen(console, found.frozen)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    console.print(f"wrote {out}", markup=False)


def inspection(found: Inspection) -> None:
    """Shows what can go in a model: groups that look alike share a row.

    `units` is how many each of them has, `width` the channels that one unit takes.
    """
    console = _console()
    cost = found.cost
    console.print(
        f"{_count(cost.macs)} MACs, {_count(cost.params)} params, {_bytes(cost.bytes)}; "
        f"{len(found.groups)} groups"
    )
    console.print(_groups(found.groups))
    _frozen(console, found.frozen)
    if found.sensitivity:
        console.print("drift of the outputs when the least important units of one group go:")
        console.print(_sensitivity(found))
    _regions(console, found.regions)


def profile(found: Profile, model: pathlib.Path, against: pathlib.Path | None) -> None:
    """Shows what a model costs."""
    console = _console()
    if found.against is None:
        console.print(_costs(model.name, found.model, None, None))
        return
    names = (against.name if against is not None else "against", model.name)
    console.print(_costs(names[0], found.against, names[1], found.model))
    if found.latency_ratio is not None:
        text = f"{names[1]} takes {found.latency_ratio:.3g} × the time of {names[0]}"
        console.print(text, markup=False)
    _drift(console, found.drift)


def operations(found: list[Operation]) -> None:
    """Shows operations, a line each: whole, because the names are to be copied."""
    for one in found:
        words = [one.name, f"{one.state:<9}", f"came {_time(one.create_time)}"]
        if one.queue_position is not None:
            words.append(f"{one.queue_position} before it")
        if one.progress is not None:
            words.append(f"{one.progress.stage.lower()} {one.progress.fraction:.0%}")
        if one.end_time is not None:
            words.append(f"ended {_time(one.end_time)}")
        elif one.estimated_end_time is not None:
            words.append(f"ends about {_time(one.estimated_end_time)}")
        typer.echo("  ".join(words))


def operation(found: Operation, as_json: bool) -> None:
    """Shows how an operation stands."""
    if as_json:
        typer.echo(json.dumps(plain(found)))
        return
    operations([found])
    if found.error:
        _console().print(f"error: {found.error}", markup=False)


def _time(moment: datetime.datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _console() -> rich.console.Console:
    return rich.console.Console(highlight=False, soft_wrap=True)


def _costs(first: str, one: Cost, second: str | None, other: Cost | None) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column(rich.markup.escape(first), justify="right")
    if other is not None:
        table.add_column(rich.markup.escape(second or ""), justify="right")
        table.add_column("kept", justify="right")
    for name, get, show in MEASURES:
        values = [get(cost) for cost in (one, other) if cost is not None]
        if all(value is None for value in values):
            continue
        cells = ["–" if value is None else show(value) for value in values]
        if other is not None:
            a, b = values
            cells.append(f"{b / a:.1%}" if a and b is not None else "–")
        table.add_row(name, *cells)
    return table


def _groups(groups: Iterable[Group]) -> rich.table.Table:
    alike: dict[tuple[Any, ...], list[Group]] = collections.defaultdict(list)
    for group in groups:
        alike[group.kind, group.units, group.channels_per_unit].append(group)
    rows = sorted(alike.items(), key=lambda row: -row[0][1] * row[0][2] * len(row[1]))
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ("groups", "units", "width"):
        table.add_column(name, justify="right")
    for name in ("kind", "for example"):
        table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=40)
    for (kind, units, width), members in rows[:_ROWS]:
        example = members[0].tensors[0] if members[0].tensors else members[0].id
        cells = (str(len(members)), str(units), str(width), kind, example)
        table.add_row(*(rich.markup.escape(cell) for cell in cells))
    if len(rows) > _ROWS:
        table.add_row("…", "", "", "", f"{len(rows) - _ROWS} more kinds; see --json")
    return table


_LEVELS = "▁▂▃▄▅▆▇█"
_LEAST = 1e-4  # drift at the foot of a curve; each step up is half a power of ten


def _sensitivity(found: Inspection) -> rich.table.Table:
    """One row per group, the most sensitive first."""
    units = {group.id: group.units for group in found.groups}
    table = rich.table.Table(box=None, pad_edge=False)
    table.add_column("group", overflow="ellipsis", no_wrap=True, max_width=40)
    table.add_column("units", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("gone: drift")
    rows = sorted(found.sensitivity, key=lambda one: -one.drift[-1])
    for one in rows[:_ROWS]:
        curve = "".join(
            _LEVELS[min(max(round(2 * math.log10(max(d, _LEAST) / _LEAST)), 0), len(_LEVELS) - 1)]
            for d in one.drift[1:]
        )
        points = zip(one.removed[1:], one.drift[1:], strict=True)
        text = "  ".join(f"{gone}: {drift if drift > 1e-9 else 0:.2g}" for gone, drift in points)
        table.add_row(rich.markup.escape(one.group), str(units[one.group]), curve, text)
    if len(rows) > _ROWS:
        table.add_row("…", "", "", f"{len(rows) - _ROWS} more groups; see --json")
    return table


def _drift(console: rich.console.Console, drift: tuple[Drift, ...]) -> None:
    for one in drift[:_REASONS]:
        text = f"drift of {one.output}: {one.relative_error:.2e} relative, cosine {one.cosine:.5f}"
        if one.top1_agreement is not None:
            text += f", same top-1 in {one.top1_agreement:.1%}"
        if one.kl is not None:
            text += f", KL {one.kl:.2e}"
        console.print(text, markup=False)
    if len(drift) > _REASONS:
        console.print(f"and {len(drift) - _REASONS} more outputs")


def folded(found: Report) -> str:
    """What repair did without data."""
    known = [one for one in found.folded if one.folded]
    text = (
        "no calibration data: nothing was refitted; "
        f"{len(known)} of {len(found.folded)} layers got the means of what they no longer read"
    )
    if len(known) < len(found.folded):
        text += " (no BatchNormalization tells them for the others)"
    return text


def accuracies(found: Report) -> Iterator[str]:
    """A sentence per output that was scored."""
    for one in found.accuracy:
        text = f"accuracy of {one.output}: {one.top1_before:.2%} → {one.top1_after:.2%} top-1"
        if one.top5_before is not None and one.top5_after is not None:
            text += f", {one.top5_before:.2%} → {one.top5_after:.2%} top-5"
        kind = "labels"
        if one.from_calibration:
            kind = f"labels of {'held-back ' if one.held_back else ''}calibration samples"
        yield f"{text}, by {one.labels} {kind}"


def _frozen(console: rich.console.Console, frozen: tuple[Frozen, ...]) -> None:
    """The reasons that keep most, counted over the places where they arise."""
    channels: collections.Counter[tuple[str, str, str]] = collections.Counter()
    places: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for one in frozen:
        key = (one.code, one.op_type, one.detail if not one.op_type else "")
        channels[key] += one.channels
        places[key].append(one.node)
    for key, kept in channels.most_common(_REASONS):
        what = " ".join(part for part in key if part)
        where = [node for node in places[key] if node]
        at = f" at {where[0]}" if where else ""
        also = f" and {len(where) - 1} more" if len(where) > 1 else ""
        console.print(f"stays: {kept} channels, {what}{at}{also}", markup=False)
    if len(channels) > _REASONS:
        console.print(f"and {len(channels) - _REASONS} more reasons; see --json")


def _regions(console: rich.console.Console, regions: tuple[Region, ...]) -> None:
    """Parts that can go whole, the smallest first; and layers that are in none."""
    offered = [one for one in regions if not one.refused]
    held = [one for one in regions if one.refused]
    console.print(f"{len(offered)} regions can be left out whole; {len(held)} layers are in none")
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ("layers", "MACs", "params"):
        table.add_column(name, justify="right")
    for name in ("from", "to"):
        table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=40)
    smallest = sorted(offered, key=lambda one: len(one.layers))[:_REASONS]
    for one in smallest:
        cells = (str(len(one.layers)), _count(one.macs), _count(one.params), one.entry, one.exit)
        table.add_row(*map(rich.markup.escape, cells))
    if offered:
        console.print(table)
    if len(offered) > len(smallest):
        console.print(f"and {len(offered) - len(smallest)} more regions; see --json")
    for one in held[:_REASONS]:
        console.print(f"in no region: {one.layers[0]}: {one.refused}", markup=False)
    if len(held) > _REASONS:
        console.print(f"and {len(held) - _REASONS} more layers; see --json")


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


# (what, its value in a Cost or None, how it is written)
MEASURES: tuple[tuple[str, Any, Any], ...] = (
    ("MACs", lambda cost: cost.macs, _count),
    ("params", lambda cost: cost.params, _count),
    ("not zero", lambda cost: cost.nonzero, _count),
    ("size", lambda cost: cost.bytes, _bytes),
    ("compressed", lambda cost: cost.compressed_bytes, _bytes),
    ("latency p50", lambda cost: cost.latency and cost.latency.p50_ms, _milliseconds),
    ("latency p95", lambda cost: cost.latency and cost.latency.p95_ms, _milliseconds),
    ("peak memory", lambda cost: cost.peak_memory_bytes, _bytes),
)
