"""The targets `latency` and `memory`: how many units go is measured in ONNX Runtime."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import pytest
from nets import Net

import secateur
import secateur.graphops
from secateur.errors import Code, Refused
from secateur.graphops.model import runtime
from secateur.graphops.pipeline import trial
from secateur.graphops.pipeline.trial import Trial
from secateur.graphops.planning.steps import Mask
from secateur.graphops.profile import measure
from secateur.report import Latency

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
CNN = DIGITS / "digits_cnn.onnx"


def prune(**fields: Any) -> secateur.Result:
    recipe = secateur.Recipe.parse(fields)
    return secateur.graphops.prune(CNN, recipe, measure_latency=False)


def share(_: Trial, keep: Mask) -> float:
    """A machine whose time is in the number of units."""
    return float(keep.mean())


def test_a_plan_repeats_what_a_measurement_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "latency", share)
    result = prune(target={"latency": 0.7})
    assert result.report.after.macs < result.report.before.macs
    again = secateur.graphops.prune(CNN, plan=result.plan, measure_latency=False)
    assert again.model == result.model


def test_a_candidate_is_timed_as_it_will_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []

    def timed(openers: Any, feeds: Any, **_: Any) -> list[Latency]:
        assert [len(array) for array in feeds.values()] == [1]
        for opener in openers:
            opener().run(None, feeds)
        return [Latency(p50_ms=ms, p95_ms=ms, runs=1) for ms in (1.0, 0.4)]

    def open_session(model: bytes) -> Any:
        opened.append(model)
        return runtime.open_session(model)

    monkeypatch.setattr(measure, "alternate", timed)
    monkeypatch.setattr(trial, "open_session", open_session)
    result = prune(target={"latency": 0.5}, quantize="int8_dynamic")
    kinds = [{node.op_type for node in onnx.load_from_string(m).graph.node} for m in opened]
    assert [("DynamicQuantizeLinear" in found) for found in kinds[:2]] == [False, True]
    assert result.report.after.macs == result.report.before.macs  # quantised, it is fast enough


def test_it_is_met_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "latency", share)
    result = prune(target={"latency": 0.6}, round_to=1)
    units = sum(group.units for group in result.report.groups) + 1
    kept = sum(group.kept for group in result.report.groups) + 1
    assert 0.6 * units - 1 < kept <= 0.6 * units


def test_a_time_met_by_chance_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[bytes, int] = {}

    def lucky(self: Trial, keep: Mask) -> float:
        key = np.packbits(keep).tobytes()
        asked[key] = asked.get(key, 0) + 1
        return share(self, keep) - (0.2 if asked[key] == 1 else 0.0)

    monkeypatch.setattr(Trial, "latency", lucky)
    result = prune(target={"latency": 0.6}, round_to=1)
    units = sum(group.units for group in result.report.groups) + 1
    assert sum(group.kept for group in result.report.groups) + 1 <= 0.6 * units


def test_a_target_beside_it_holds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "latency", share)
    before, after = (
        getattr(prune(target={"latency": 0.9, "macs": 0.5}).report, side)
        for side in ("before", "after")
    )
    assert after.macs <= 0.5 * before.macs


def test_out_of_reach_names_the_closest_that_was_measured() -> None:
    with pytest.raises(Refused) as caught:
        prune(target={"latency": 0.001})
    assert caught.value.refusal.code is Code.UNREACHABLE_TARGET
    assert 0.001 < float(caught.value.refusal.found.split()[0]) < 10


def test_a_result_that_is_slower_than_asked_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "latency", share)
    slow = [Latency(p50_ms=ms, p95_ms=ms, runs=9) for ms in (1.0, 0.9)]
    monkeypatch.setattr(measure, "alternate", lambda *_, **__: slow)
    recipe = secateur.Recipe(target={"latency": 0.6})
    warnings = secateur.graphops.prune(CNN, recipe).report.warnings
    assert any("latency=0.6" in text and "0.900" in text for text in warnings)


@pytest.mark.parametrize("target", ["latency", "memory"])
@pytest.mark.parametrize("kind", ["layer", "rank"])
def test_kinds_that_cannot_be_tried_beforehand_are_refused(kind: str, target: str) -> None:
    calibration = DIGITS / "calibration.npz"
    recipe = secateur.Recipe.parse({"target": {target: 0.5}, "granularity": [kind, "channel"]})
    with pytest.raises(Refused) as caught:
        secateur.graphops.prune(CNN, recipe, calibration=calibration)
    assert caught.value.refusal.code is Code.INVALID_RECIPE


def test_with_calibration_the_budget_is_divided_by_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trial, "latency", share)
    recipe = secateur.Recipe(target={"latency": 0.7})
    result = secateur.graphops.prune(CNN, recipe, calibration=DIGITS / "calibration.npz")
    assert result.report.sensitivity
    assert result.report.repair


def wide() -> bytes:
    """A model whose weights take most of its memory: 16 MiB."""
    net = Net()
    x = net.op("Relu", net.op("MatMul", net.input("x", ["N", 1024]), net.floats(1024, 2048)))
    net.output(net.op("MatMul", x, net.floats(2048, 1024)))
    return net.bytes()


def test_memory_is_met_and_reported() -> None:
    recipe = secateur.Recipe(target={"memory": 0.7})
    report = secateur.graphops.prune(wide(), recipe, measure_latency=False).report
    before, after = report.before.peak_memory_bytes, report.after.peak_memory_bytes
    assert before is not None
    assert after is not None
    assert after < before
    assert 0.4 * report.before.params < report.after.params < report.before.params


def test_memory_may_be_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "memory", lambda trial, keep: 1000 * int(keep.sum()))
    result = prune(target={"memory": "0.1MB"}, round_to=1)
    assert sum(group.kept for group in result.report.groups) + 1 == 100


def test_a_system_that_does_not_tell_memory_is_told_apart() -> None:
    recipe = secateur.Recipe(target={"memory": 0.7})
    with pytest.raises(Refused) as caught:
        secateur.graphops.prune(CNN, recipe, memory_meter=lambda model, feeds: None)
    assert caught.value.refusal.code is Code.INVALID_TARGET


def test_a_result_that_takes_more_memory_than_asked_says_so() -> None:
    answers = iter([1000, *[100] * 30])  # the original, and candidates

    def meter(model: str, feeds: str) -> int:
        return next(answers)

    recipe = secateur.Recipe(target={"memory": 0.5})
    result = secateur.graphops.prune(CNN, recipe, measure_latency=False, memory_meter=meter)
    assert any("memory=0.5" in text for text in result.report.warnings)  # now 100 against 100
