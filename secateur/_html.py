"""A report as one HTML page that needs nothing else: no script, no network, no second file."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

import secateur
from secateur._show import MEASURES, accuracies, folded
from secateur.report import Report, Stage

_STYLE = """
:root { color-scheme: light dark; --bar: #5b8c5a; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { overflow-wrap: anywhere; }
.warn { border-left: 4px solid #c80; padding-left: .8rem; }
.bar { background: var(--line); width: 9rem; height: .7rem; }
.bar div { background: var(--bar); height: 100%; }
"""


def page(report: Report, title: str) -> str:
    """The page, for the model file called `title`."""
    name = html.escape(title)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{name}: pruning report</title>',
        f"<style>{_STYLE}</style></head><body><h1>{name}</h1>",
        *(f'<p class="warn">{html.escape(warning)}</p>' for warning in report.warnings),
        "<h2>Cost</h2>",
        _costs(report),
        "<h2>Drift</h2>",
        _drift(report),
        *(f"<p>{html.escape(line)}</p>" for line in accuracies(report)),
        f"<h2>Groups</h2><p>{len(report.groups)} groups of channels or heads that go together.</p>",
        _groups(report),
        *_removed(report),
        *_rotated(report),
        *_factored(report),
        *_divisions(report),
        *_sensitivity(report),
        *_repair(report),
        "<h2>What stays, and why</h2>",
        _frozen(report),
        "<h2>Time</h2>",
        _table(
            ("Stage", "Seconds"),
            # a report from a server has lost their order: protobuf's maps have none
            ((s.lower(), f"{report.seconds[s]:.2f}") for s in Stage if s in report.seconds),
            numbers=(1,),
        ),
        f"<footer>secateur {html.escape(secateur.__version__)}</footer></body></html>\n",
    ]
    return "\n".join(parts)


def _costs(report: Report) -> str:
    rows = []
    for name, get, show in MEASURES:
        before, after = get(report.before), get(report.after)
        if before is None and after is None:
            continue
        texts = ["–" if value is None else show(value) for value in (before, after)]
        share = after / before if before and after is not None else None
        kept = "–" if share is None else f"{share:.1%}"
        rows.append((name, *texts, kept, "" if share is None else _bar(share)))
    return _table(("", "Original", "Pruned", "Kept", ""), rows, numbers=(1, 2, 3))


def _drift(report: Report) -> str:
    checked = report.verification
    source = "calibration samples" if checked.from_calibration else "random inputs"
    sizes = ", ".join(map(str, checked.batch_sizes))
    stages = [(stage.stage, stage.drift) for stage in report.stage_drift] or [("", checked.drift)]
    rows = (
        (
            f"<code>{html.escape(one.output)}</code>{f' after {stage}' if stage else ''}",
            f"{one.relative_error:.2e}",
            f"{one.cosine:.5f}",
            "–" if one.top1_agreement is None else f"{one.top1_agreement:.1%}",
            "–" if one.kl is None else f"{one.kl:.2e}",
        )
        for stage, drift in stages
        for one in drift
    )
    apart = " that nothing was fitted or measured on" if checked.held_back else ""
    said = f"<p>Ran in ONNX Runtime on {checked.samples} {source}{apart}, batch size {sizes}.</p>"
    heads = ("Output", "Relative error", "Cosine", "Same top-1", "KL")
    return said + _table(heads, rows, numbers=(1, 2, 3, 4))


_WIDTH, _HEIGHT = 120, 36  # of a curve, in pixels
_DECADES = (1e-4, 1.0)  # drift at its foot and its head; the scale is logarithmic


def _sensitivity(report: Report) -> list[str]:
    """A curve per group: drift of the outputs against the share of its units that is gone."""
    if not report.sensitivity:
        return []
    units = {group.id: group.units for group in report.groups}
    foot, head = _DECADES
    rows = []
    for one in sorted(report.sensitivity, key=lambda one: -one.drift[-1]):
        points = []
        for gone, drift in zip(one.removed, one.drift, strict=True):
            level = math.log(min(max(drift, foot), head) / foot) / math.log(head / foot)
            points.append(f"{gone / units[one.group] * _WIDTH:.1f},{_HEIGHT * (1 - level):.1f}")
        curve = (
            f'<svg width="{_WIDTH}" height="{_HEIGHT + 2}" role="img" aria-label="drift">'
            f'<polyline points="{" ".join(points)}" fill="none" stroke="#5b8c5a" '
            'stroke-width="2"/></svg>'
        )
        told = ", ".join(
            f"{gone}: {drift:.2g}"
            for gone, drift in zip(one.removed[1:], one.drift[1:], strict=True)
        )
        rows.append((f"<code>{html.escape(one.group)}</code>", curve, told))
    said = (
        "<p>Drift of the outputs when the least important units of one group go and their "
        f"consumers are compensated; the curves reach from {foot:g} to {head:g}, by powers of ten."
    )
    return ["<h2>Sensitivity</h2>", said, _table(("Group", "", "Units gone: drift"), rows)]


def _removed(report: Report) -> list[str]:
    """Every region that went whole."""
    if not report.removed:
        return []
    rows = (
        (
            f"<code>{html.escape(one.region.entry)}</code>",
            f"<code>{html.escape(one.region.exit)}</code>",
            str(len(one.region.layers)),
            "–" if one.influence is None else f"{one.influence:.2e}",
            "–" if one.drift is None else f"{one.drift:.2e}",
        )
        for one in report.removed
    )
    heads = ("From", "To", "Layers", "Influence", "Drift so far")
    return ["<h2>Left out whole</h2>", _table(heads, rows, numbers=(2, 3, 4))]


def _rotated(report: Report) -> list[str]:
    """Every stream that was cut in another basis."""
    if not report.rotated:
        return []
    rows = (
        (f"<code>{html.escape(one.group)}</code>", str(one.channels), str(one.needed))
        for one in report.rotated
    )
    said = "<p>Channels that only matrix products and sums touch, and how many of the basis that "
    said += "calibration data gave are needed for 0.99 of what reads them."
    heads = ("Group", "Channels", "Needed")
    return ["<h2>Streams in another basis</h2>", said, _table(heads, rows, numbers=(1, 2))]


def _factored(report: Report) -> list[str]:
    """Every product that was split."""
    if not report.factored:
        return []
    rows = (
        (
            f"<code>{html.escape(one.node)}</code>",
            str(one.inputs),
            str(one.rank),
            str(one.outputs),
            f"{one.error:.2e}",
        )
        for one in report.factored
    )
    heads = ("Node", "From", "Through", "To", "Error")
    return ["<h2>Split in two</h2>", _table(heads, rows, numbers=(1, 2, 3, 4))]


def _divisions(report: Report) -> list[str]:
    """What was weighed between regions and units."""
    if not report.divisions:
        return []
    rows = (
        (
            str(one.regions),
            str(one.factored),
            "out of reach" if one.drift is None else f"{one.drift:.2e}",
            "" if one.final_drift is None else f"{one.final_drift:.2e}",
            "taken" if one.chosen else "",
        )
        for one in report.divisions
    )
    said = "<p>Regions left out, products split, and units making up the rest of the budget."
    heads = ("Regions", "Products", "Drift", "With the whole repair", "")
    return ["<h2>Divisions of the budget</h2>", said, _table(heads, rows, numbers=(0, 1, 2, 3))]


def _repair(report: Report) -> list[str]:
    """Every fit, with the error it began with and the one it left."""
    if report.folded:
        return _folded(report)
    if not report.repair:
        return []
    rows = (
        (
            f"<code>{html.escape(s.node)}</code>",
            html.escape(s.method),
            f"{s.error_before:.2e}",
            f"{s.error_after:.2e}",
        )
        for s in report.repair
    )
    said = "<p>Relative error of each node's output on batches that its fit did not see.</p>"
    return [
        "<h2>Repair</h2>",
        said,
        _table(("Node", "Fitted", "Before", "After"), rows, numbers=(2, 3)),
    ]


def _folded(report: Report) -> list[str]:
    """What was done without data."""
    rows = (
        (f"<code>{html.escape(one.node)}</code>", str(one.channels), str(one.folded))
        for one in report.folded
    )
    heads = ("Node", "Inputs that went", "Means moved into its bias")
    said = f"<p>{html.escape(folded(report))}.</p>"
    return ["<h2>Repair</h2>", said, _table(heads, rows, numbers=(1, 2))]


def _groups(report: Report) -> str:
    rows = (
        (
            html.escape(group.kind),
            f"{group.kept} of {group.units}",
            _bar(group.kept / group.units if group.units else 1.0),
            f"<code>{html.escape(', '.join(group.tensors[:4]))}"
            f"{' …' if len(group.tensors) > 4 else ''}</code>",
        )
        for group in report.groups
    )
    return _table(("Kind", "Kept", "", "Tensors"), rows, numbers=(1,))


def _frozen(report: Report) -> str:
    rows = (
        (
            html.escape(one.code),
            f"<code>{html.escape(one.node)}</code>",
            html.escape(one.op_type),
            html.escape(one.detail),
            str(one.channels),
        )
        for one in report.frozen
    )
    return _table(("Reason", "Node", "Operator", "", "Channels"), rows, numbers=(4,))


def _bar(share: float) -> str:
    return f'<div class="bar"><div style="width:{min(max(share, 0.0), 1.0):.1%}"></div></div>'


def _table(
    heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], numbers: tuple[int, ...] = ()
) -> str:
    """A table of cells that are HTML already."""

    def line(tag: str, cells: tuple[str, ...]) -> str:
        kinds = (' class="n"' if i in numbers else "" for i in range(len(cells)))
        made = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>{line('th', heads)}\n{body}</table>"
