"""Every operator has a rule or a reason, and the page that says so is current."""

from __future__ import annotations

import importlib.util
import pathlib
from types import ModuleType

import onnx
import pytest
from onnxruntime.capi._pybind_state import get_all_operator_schema

from secateur.graphops import rules
from secateur.graphops.rules import registry

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "operator_table.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operator_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _in_force() -> set[tuple[str, int]]:
    """(operator, version) for each definition in force at some opset from 7 on."""
    versions: dict[str, list[int]] = _script().opsets_of("")
    return {
        (name, max(7, since))
        for name, all_of_it in versions.items()
        for since, until in zip(all_of_it, [*all_of_it[1:], 1 << 30], strict=True)
        if until > 7
    }


def test_every_operator_has_a_rule_or_a_reason() -> None:
    lacking = [
        f"{name}-{opset}"
        for name, opset in sorted(_in_force())
        if rules.find("", name, opset) is None and rules.reason("", name) is None
    ]
    assert not lacking


def test_no_operator_has_both_a_rule_and_a_reason() -> None:
    newest = onnx.defs.onnx_opset_version()
    both = [n for (d, n) in rules.all_reasons() if rules.find(d, n, newest) is not None]
    assert both == ["Scan"], "which had another form at opset 8"


def test_reasons_are_given_for_operators_that_exist() -> None:
    contrib = {(schema.domain, schema.name) for schema in get_all_operator_schema()}
    assert not {
        (domain, name)
        for (domain, name) in rules.all_reasons()
        if not ((domain, name) in contrib or onnx.defs.has(name, domain))
    }, "reasons for operators that neither onnx nor ONNX Runtime knows"


def test_a_reason_is_given_once() -> None:
    with pytest.raises(ValueError, match="explained twice"):
        registry.explain("Unique", "for no reason")


def test_the_page_is_current() -> None:
    script = _script()
    committed = script.PAGE.read_text(encoding="utf-8")
    assert committed == script.page(), "run scripts/operator_table.py"
