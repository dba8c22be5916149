"""Writes docs/operator_table.md: what the engine knows of every operator.

    python scripts/operator_table.py

Run it after adding a rule; a test holds the committed page to it.
"""

from __future__ import annotations

import pathlib
from collections import defaultdict
from collections.abc import Iterator

import onnx

from secateur.graphops import rules
from secateur.graphops.model.spelling import SPELT

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "operator_table.md"
OLDEST = 7  # older opsets than that are not promised

_INTRODUCTION = """\
# Operators

Written by `scripts/operator_table.py`; do not edit. Every operator of `ai.onnx` from opset {oldest}
to opset {newest} has a rule, or a reason to have none. An operator without a rule is pruned
around: what reaches it stays whole, and the report names it with the reason given here.

*Opsets* are the versions at which the operator's definition changed. *Family* says how channels
pass; [operators.md](operators.md) tells what the families are. Files are in
`secateur/graphops/rules/`. Operators that say the same as a plain one, on integers or joined to an
activation, are spelt out to be read as that one, and written as they were.
"""


def opsets_of(domain: str) -> dict[str, list[int]]:
    """Operator → versions at which it was defined anew, of those that onnx knows."""
    found: dict[str, set[int]] = defaultdict(set)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == domain:
            found[schema.name].add(schema.since_version)
    return {name: sorted(versions) for name, versions in sorted(found.items())}


def known(domain: str) -> dict[str, list[rules.Rule]]:
    """Operator → its rules."""
    found: dict[str, list[rules.Rule]] = defaultdict(list)
    for rule in rules.all_rules():
        if rule.domain == domain:
            found[rule.op_type].append(rule)
    return dict(found)


def _file(rule: rules.Rule) -> str:
    return f"{rule.couple.__module__.rpartition('.')[2]}.py"


def _spelt(domain: str) -> dict[str, str]:
    """Operator → what the table says of it, of those that are spelt with one on floats."""
    return {
        name: f"as {plain} | model/spelling"
        for (home, name), plain in SPELT.items()
        if home == domain
    }


def _joined(values: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _ruled(found: list[rules.Rule]) -> str:
    return f"{_joined(r.family for r in found)} | {_joined(_file(r) for r in found)}"


def page() -> str:
    """The whole page."""
    ruled, opsets = known(""), opsets_of("")
    spelt = _spelt("")
    newest = onnx.defs.onnx_opset_version()
    lines = [_INTRODUCTION.format(oldest=OLDEST, newest=newest)]
    lines += ["## ai.onnx", "", "| operator | opsets | family | file |", "|---|---|---|---|"]
    for name, versions in opsets.items():
        if name in ruled:
            said = ", ".join(map(str, versions))
            lines.append(f"| {name} | {said} | {_ruled(ruled[name])} |")
        elif name in spelt:
            lines.append(f"| {name} | {', '.join(map(str, versions))} | {spelt[name]} |")
    lines += ["", "## ai.onnx, without a rule on purpose", ""]
    lines += ["| operator | opsets | reason |", "|---|---|---|"]
    for (domain, name), sentence in sorted(rules.all_reasons().items()):
        if not domain and name not in spelt:
            lines.append(f"| {name} | {', '.join(map(str, opsets.get(name, [])))} | {sentence} |")
    lines += ["", "## Other domains", "", "| operator | family | file |", "|---|---|---|"]
    for domain in sorted({rule.domain for rule in rules.all_rules()} - {""}):
        said = {name: _ruled(found) for name, found in known(domain).items()} | _spelt(domain)
        lines += [f"| {domain}::{name} | {said[name]} |" for name in sorted(said)]
    beyond = sorted(set(ruled) - set(opsets))
    lines += [f"| {n} (as ONNX Runtime writes it) | {_ruled(ruled[n])} |" for n in beyond]
    lines += ["", "## Other domains, without a rule on purpose", ""]
    lines += ["| operator | reason |", "|---|---|"]
    for (domain, name), sentence in sorted(rules.all_reasons().items()):
        if domain and (domain, name) not in SPELT:
            lines.append(f"| {domain}::{name} | {sentence} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
