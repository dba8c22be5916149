"""Fits behind activations that are flat beyond a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from nets import Net
from onnx.reference import ReferenceEvaluator

import secateur
from secateur.graphops import repair, rules
from secateur.graphops.model.opening import open_model
from secateur.graphops.repair.fit import Sums, choose
from secateur.graphops.repair.interval import Intervals, loosen

CASES = [
    ("Relu", 17, {}, (), (0.0, np.inf)),
    ("HardSwish", 17, {}, (), (-3.0, np.inf)),
    ("HardSigmoid", 17, {}, (), (-2.5, 2.5)),
    ("HardSigmoid", 17, {"alpha": 0.5, "beta": 0.25}, (), (-0.5, 1.5)),
    ("Clip", 17, {}, (-1.0, 6.0), (-1.0, 6.0)),
    ("Clip", 17, {}, (0.5,), (0.5, np.inf)),
    ("Clip", 6, {"min": -0.5, "max": 0.5}, (), (-0.5, 0.5)),
]


@pytest.mark.parametrize(("op_type", "opset", "attributes", "constants", "bounds"), CASES)
def test_operators_are_flat_where_their_rules_say(
    op_type: str,
    opset: int,
    attributes: dict[str, float],
    constants: tuple[float, ...],
    bounds: tuple[float, float],
) -> None:
    net = Net(opset)
    given = [net.const(np.float32(value)) for value in constants]
    net.output(net.op(op_type, net.input("x", [5]), *given, **attributes))
    node = open_model(net.bytes()).model.graph[0]
    rule = rules.find("", op_type, opset)
    assert rule is not None and rule.flat is not None
    low, high = rule.flat(node) or (np.nan, np.nan)
    assert (low, high) == pytest.approx(bounds)
    evaluate = ReferenceEvaluator(onnx.load_from_string(net.bytes())).run
    for bound, away in ((low, -1.0), (high, 1.0)):
        if np.isfinite(bound):
            x = (bound + away * np.array([0, 1, 5, 20, -0.1])).astype(np.float32)
            (y,) = evaluate(None, {"x": x})
            assert np.allclose(y[:4], y[0], atol=1e-6)
            assert abs(y[4] - y[0]) > 1e-3  # and no further than that


@pytest.mark.parametrize(("values", "bounds"), [([6.0], (-np.inf, 6.0)), ([6.0, 7.0], None)])
def test_a_bound_is_one_number(values: list[float], bounds: tuple[float, float] | None) -> None:
    net = Net()
    net.output(net.op("Clip", net.input("x", [2]), "", net.const(np.float32(values))))
    rule = rules.find("", "Clip", 17)
    assert rule is not None and rule.flat is not None
    assert rule.flat(open_model(net.bytes()).model.graph[0]) == bounds


@pytest.mark.parametrize("zero", [np.uint8(10), np.int8(-3)])
def test_beyond_its_integers_range_what_is_quantised_is_flat(zero: np.generic) -> None:
    net = Net()
    scale = np.float32(0.5)
    net.output(net.op("QuantizeLinear", net.input("x", [4]), net.const(scale), net.const(zero)))
    model = open_model(net.bytes()).model
    (node,) = model.graph
    rule = rules.of(node, model.opset_imports)
    assert rule is not None and rule.flat is not None
    bounds = rule.flat(node)
    assert bounds is not None
    x = np.array([bounds[0] - 9, bounds[0], bounds[1], bounds[1] + 9], np.float32)
    y = ReferenceEvaluator(onnx.load_from_string(net.bytes())).run(None, {"x": x})[0]
    limits = np.iinfo(zero.dtype)
    assert y.tolist() == [limits.min, limits.min, limits.max, limits.max]


def test_bounds_that_are_computed_are_not_known() -> None:
    net = Net()
    net.output(net.op("Clip", net.input("x", [5]), net.input("low", [])))
    node = open_model(net.bytes()).model.graph[0]
    rule = rules.find("", "Clip", 17)
    assert rule is not None and rule.flat is not None and rule.flat(node) is None


def problem(count: int, seed: int) -> tuple[np.ndarray, ...]:
    """x, y and what is added to y: y follows W·x + b above the flat part only."""
    draw = np.random.default_rng(seed)
    truth = np.random.default_rng(9).standard_normal((3, 20))
    x = draw.standard_normal((count, 20)).astype(np.float32)
    rest = draw.standard_normal((count, 3)).astype(np.float32)
    given = x @ truth.T + 0.5
    y = np.where(given + rest > 0, given, -rest - 9 * draw.random((count, 3)))
    return x[None], y[None].astype(np.float32), rest[None]


def gathered(seed: int) -> tuple[Sums, Intervals]:
    sums, rows = Sums.zeros(1, 20, 3), Intervals.room((0.0, np.inf), (1, 3, 20), 4)
    assert rows is not None
    for batch in range(4):
        x, y, rest = problem(500, 10 * seed + batch)
        sums.add(x, y)
        rows.add(x, y, rest)
    return sums, rows


def test_a_fit_need_not_follow_what_is_flattened() -> None:
    (seen, learnt), (held, judges) = gathered(1), gathered(2)
    weight, bias = np.zeros((1, 3, 20)), np.zeros((1, 3))
    plain = choose(seen, held, weight, bias, biased=True)
    loose = loosen(plain, (seen, held), (learnt, judges), weight, bias)
    x, y, rest = problem(2000, 77)

    def error(weight: np.ndarray, bias: np.ndarray) -> float:
        given = x[0] @ weight[0].T + bias[0] + rest[0]
        wanted = np.maximum(y[0] + rest[0], 0)
        return float(np.square(np.maximum(given, 0) - wanted).mean())

    assert error(loose.weight, loose.bias) < 0.2 * error(plain.weight, plain.bias)
    assert loose.after < 0.5 * plain.after
    assert loose.after < loose.before


def test_the_error_is_the_distance_to_the_interval() -> None:
    rows = Intervals.room((0.0, 2.0), (1, 1, 16), 1)
    assert rows is not None
    y = np.array([-1.0, 1.0, 3.0, 2.5], np.float32)[None, :, None]
    rest = np.array([0.0, 0.0, 0.0, -1.0], np.float32)[None, :, None]
    rows.add(np.zeros((1, 4, 16), np.float32), y, rest)
    weight = np.zeros((1, 1, 16))
    # y + rest is below, inside, above and inside the bounds
    for given, distances in ((-5.0, (0, 6, 7, 7.5)), (4.0, (4, 3, 0, 1.5))):
        error = rows.error(weight, np.full((1, 1), given))
        assert error == pytest.approx(np.mean(np.square(distances)))


def test_few_rows_and_narrow_nodes_are_not_loosened() -> None:
    assert Intervals.room((0.0, np.inf), (512, 1, 9), 16) is None
    assert Intervals.room((0.0, np.inf), (1, 64, 6000), 16) is None


def test_a_pruned_network_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair.joint, "_WORK", 0)  # layers together make up for much of it
    net, draw = Net(seed=3), np.random.default_rng(0)
    x = net.op("Relu", net.op("Conv", net.input("x", ["N", 3, 8, 8]), net.floats(32, 3, 3, 3)))
    bias = net.const(np.full(8, -0.6, np.float32))  # most of the output is flattened
    net.output(net.op("Relu", net.op("Conv", x, net.floats(8, 32, 3, 3), bias)))
    smooth = draw.standard_normal((256, 3, 4, 4)).repeat(2, 2).repeat(2, 3)
    # whatever is chosen: reconstruction leaves less of the kind to make up for
    recipe = secateur.Recipe(target={"channels": 0.25}, scope="local", criterion="wanda")

    def drift() -> Any:
        result = secateur.prune(
            net.bytes(),
            recipe,
            calibration={"x": smooth.astype(np.float32)},
            measure_latency=False,
        )
        assert all(step.error_after <= step.error_before for step in result.report.repair)
        return result.report.verification.drift[0].relative_error

    with_intervals = drift()
    monkeypatch.setattr(repair.repair, "_flat_beyond", lambda target, opsets: None)
    assert with_intervals < 0.96 * drift()
