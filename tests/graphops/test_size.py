"""The target `size`: of the file that is written, whatever comes after the cut."""

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
from secateur.graphops.verify.law import check_law

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
CALIBRATION = DIGITS / "calibration.npz"
SPARSE = {"granularity": ["channel", "weight"], "sparsity": "0.8", "sparse_initializers": True}


def prune(source: Any, calibration: Any = None, **fields: Any) -> secateur.Result:
    recipe = secateur.Recipe.parse(fields)
    return secateur.graphops.prune(source, recipe, calibration=calibration, measure_latency=False)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
@pytest.mark.parametrize(
    ("share", "fields"),
    [
        (0.6, {}),
        (0.5, {"scope": "global"}),
        (0.4, {"quantize": "fp16"}),
        (0.3, {"quantize": "int8_dynamic"}),
        (0.3, SPARSE),
    ],
    ids=["plain", "global", "fp16", "int8", "sparse"],
)
def test_the_file_is_no_larger_and_nearly_as_large(
    name: str, share: float, fields: dict[str, Any]
) -> None:
    path = DIGITS / f"{name}.onnx"
    original = path.stat().st_size
    result = prune(path, target={"size": share}, criterion="l2", **fields)
    assert len(result.model) == result.report.after.bytes <= share * original
    # what a step takes: a rounding step of the widest group at most
    assert len(result.model) > share * original - 0.08 * original


def test_one_step_more_would_be_too_large() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 40, 3))
    net.output(net.conv(x, 40, 4))
    source = net.bytes()
    limit = len(source) // 2
    result = prune(source, target={"size": limit}, round_to=1)
    unit = 4 * (3 * 9 + 1 + 4)  # one channel: of both weights and the bias
    assert limit - unit - 8 < len(result.model) <= limit  # 8: lengths written in fewer bytes
    assert check_law(source, result).difference < 1e-5
    again = secateur.graphops.prune(source, plan=result.plan, measure_latency=False)
    assert again.model == result.model


def test_int8_by_calibration_and_repair_are_counted() -> None:
    path = DIGITS / "digits_cnn.onnx"
    result = prune(path, CALIBRATION, target={"size": 0.4}, quantize="int8")
    assert result.report.repair
    assert len(result.model) <= 0.4 * path.stat().st_size
    plain = prune(path, CALIBRATION, target={"channels": 1.0}, quantize="int8")
    assert len(plain.model) > 0.4 * path.stat().st_size


def test_biases_that_repair_adds_are_counted() -> None:
    net = Net()
    x = net.input("x", ["N", 3, 6, 6])
    for channels, out in ((3, 24), (24, 24), (24, 24)):
        x = net.op("Relu", net.conv(x, channels, out, bias=False))
    net.output(net.conv(x, 24, 4, bias=False))
    source = net.bytes()
    draw = np.random.default_rng(0)
    data = {"x": draw.standard_normal((64, 3, 6, 6)).astype(np.float32)}
    result = prune(source, data, target={"size": 0.6}, round_to=1)
    convs = [n for n in onnx.load_from_string(result.model).graph.node if n.op_type == "Conv"]
    assert any(len(node.input) == 3 for node in convs)
    assert len(result.model) <= 0.6 * len(source)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("4MiB", 4 << 20), ("500 kB", 500_000), ("1.5KiB", 1536), ("7000", 7000)],
)
def test_sizes_are_read(text: str, value: float) -> None:
    assert secateur.Recipe.parse({"target": {"size": text}}).target == {"size": value}


@pytest.mark.parametrize("text", ["4 furlongs", "-1", "", "MiB", "1e3", "0", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Refused) as caught:
        secateur.Recipe.parse({"target": {"size": text}})
    assert caught.value.refusal.code is Code.INVALID_TARGET


def test_a_size_out_of_reach_names_the_closest_in_bytes() -> None:
    path = DIGITS / "digits_cnn.onnx"
    with pytest.raises(Refused) as caught:
        prune(path, target={"size": 900})
    refusal = caught.value.refusal
    assert refusal.code is Code.UNREACHABLE_TARGET
    closest = int(refusal.found.split()[0])
    assert len(prune(path, target={"size": closest}).model) == closest


def test_sizes_that_cannot_be_foreseen_are_refused() -> None:
    for fields in ({**SPARSE, "scope": "global"}, {"granularity": ["layer", "channel"]}):
        with pytest.raises(Refused) as caught:
            prune(DIGITS / "digits_cnn.onnx", CALIBRATION, target={"size": 0.5}, **fields)
        assert caught.value.refusal.code is Code.INVALID_RECIPE
