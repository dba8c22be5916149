"""Quantisation after pruning: it runs, drifts little, keeps zeros, and leaves nothing behind."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import numpy as np
import onnx
import pytest
from nets import Net
from onnx import numpy_helper

import secateur
from secateur.errors import Code, Refused
from secateur.graphops.model.writing import Serialised
from secateur.graphops.quantise import quantise as stage
from secateur.graphops.quantise.quantise import quantise

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
CALIBRATION = DIGITS / "calibration.npz"
# relative error of the logits; float16 has 11 bits, int8 weights 7 (0.02 to 0.03 were measured)
BOUNDS = {"fp16": 0.005, "int8": 0.06, "int8_dynamic": 0.06}


def prune(source: Any, calibration: Any = CALIBRATION, **fields: Any) -> secateur.Result:
    plain = {"target": {"channels": 0.7}, "criterion": "l2", "scope": "local", "repair": False}
    recipe = secateur.Recipe.parse({**plain, **fields})
    return secateur.prune(source, recipe, calibration=calibration, measure_latency=False)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
@pytest.mark.parametrize("how", ["int8", "int8_dynamic", "fp16"])
def test_it_drifts_little_from_what_was_pruned(name: str, how: str) -> None:
    path = DIGITS / f"{name}.onnx"
    plain = prune(path, target={"channels": 1.0})
    result = prune(path, target={"channels": 1.0}, quantize=how)
    drift = result.report.verification.drift
    assert [stage.stage for stage in result.report.stage_drift] == ["pruning", "quantisation"]
    assert result.report.stage_drift[0].drift == plain.report.verification.drift
    assert result.report.stage_drift[1].drift == drift
    assert 0 < drift[0].relative_error < BOUNDS[how]
    assert drift[0].top1_agreement is not None and drift[0].top1_agreement > 0.95
    assert result.report.after.bytes == len(result.model) < 0.65 * len(plain.model)


@pytest.mark.parametrize("how", ["int8", "int8-dynamic", "fp16"])
def test_it_comes_after_pruning_and_replays(
    how: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = DIGITS / "digits_cnn.onnx"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = prune(path, quantize=how)
    assert first.plan.kept == prune(path).plan.kept
    again = secateur.prune(path, plan=first.plan, calibration=CALIBRATION, measure_latency=False)
    assert again.model == first.model
    assert not list(tmp_path.iterdir())


def test_int8_stands_between_quantise_and_dequantise_and_zeros_stay_zero() -> None:
    result = prune(
        DIGITS / "digits_cnn.onnx",
        granularity=["channel", "weight"],
        sparsity="0.6",
        quantize="int8",
    )
    proto = onnx.load_from_string(result.model)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    weights = [
        numpy_helper.to_array(tensor)
        for tensor in proto.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and np.prod(tensor.dims) > 64
    ]
    assert weights
    for weight in weights:
        assert (weight == 0).mean() >= 0.6
        assert np.abs(weight.astype(int)).max() <= 64


def test_int8_needs_calibration_data() -> None:
    with pytest.raises(Refused) as caught:
        prune(DIGITS / "digits_cnn.onnx", None, quantize="int8")
    assert caught.value.refusal.code is Code.INVALID_CALIBRATION
    assert "int8" in caught.value.refusal.message


def test_scales_found_at_run_time_need_none() -> None:
    result = prune(DIGITS / "digits_cnn.onnx", None, quantize="int8_dynamic")
    assert len(result.model) < 0.6 * (DIGITS / "digits_cnn.onnx").stat().st_size


def test_what_is_quantised_already_is_refused() -> None:
    result = prune(DIGITS / "digits_cnn.onnx", quantize="int8")
    with pytest.raises(Refused) as caught:
        prune(result.model, target={"channels": 1.0}, quantize="int8")
    assert caught.value.refusal.code is Code.INVALID_RECIPE
    assert "quantised already" in caught.value.refusal.message


def test_what_has_nothing_to_quantise_is_refused() -> None:
    net = Net()
    x = net.op("PRelu", net.input("x", [2, 4, 6, 6]), net.floats(4, 1, 1))
    net.output(net.op("Tanh", x))
    with pytest.raises(Refused) as caught:
        quantise(Serialised(net.bytes(), None, 0), "int8_dynamic", ())
    assert caught.value.refusal.code is Code.INVALID_RECIPE
    assert "no operator" in caught.value.refusal.message


def test_sums_keep_their_precision_under_scales_from_data() -> None:
    """As in transformers: one channel of the residual stream is far wider than the others."""
    net = Net(opset=17)
    x = net.input("x", ["N", 16])
    wide = net.const(np.r_[np.float32(300), np.ones(15, np.float32)])
    stream = net.op("Mul", x, wide)
    for _ in range(3):
        normal = net.op("LayerNormalization", stream, net.const(np.ones(16, np.float32)))
        inner = net.op("Relu", net.op("MatMul", normal, net.floats(16, 32)))
        stream = net.op("Add", stream, net.op("MatMul", inner, net.floats(32, 16)))
    net.output(net.op("Slice", stream, net.ints(1), net.ints(16), net.ints(1)))
    calibration = {"x": np.random.default_rng(0).standard_normal((64, 16), np.float32)}
    result = prune(net.bytes(), calibration, target={"channels": 1.0}, quantize="int8")
    assert 0 < result.report.verification.drift[0].relative_error < 0.1


def test_weights_of_convolutions_are_stored_per_channel() -> None:
    """As in depthwise convolutions, whose channels differ in width by far."""
    net = Net(opset=11)
    widths = np.logspace(0, 4, 64, dtype=np.float32).reshape(64, 1, 1, 1)
    x = net.op("Conv", net.input("x", ["N", 8, 8, 8]), net.floats(64, 8, 1, 1))
    weight = net.const(np.random.default_rng(0).standard_normal((64, 1, 3, 3), np.float32) * widths)
    y = net.op("Conv", x, weight, group=64, pads=[1, 1, 1, 1])
    y = net.op("Mul", y, net.const(1 / widths.reshape(64, 1, 1)))
    net.output(net.op("Conv", y, net.floats(4, 64, 1, 1)))
    result = prune(net.bytes(), None, target={"channels": 1.0}, quantize="int8_dynamic")
    assert 0 < result.report.verification.drift[0].relative_error < 0.02
    proto = onnx.load_from_string(result.model)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds == ["Cast", "Mul"] * 3 + ["Conv", "Conv", "Mul", "Conv"]
    again = prune(result.model, None, target={"channels": 0.5})
    assert again.report.after.params < 0.6 * again.report.before.params


@pytest.mark.parametrize("how", ["int8", "int8_dynamic", "fp16"])
def test_weights_among_the_inputs_are_quantised_too(how: str) -> None:
    proto = onnx.load(DIGITS / "digits_cnn.onnx")
    for tensor in proto.graph.initializer:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(value)
    proto.ir_version = 3
    result = prune(proto.SerializeToString(), quantize=how)
    assert result.report.after.bytes < 0.5 * result.report.before.bytes


def test_what_runtime_cannot_load_once_quantised_is_refused() -> None:
    """float16 is nothing that its quantiser takes, and it does not say so."""
    halves = prune(DIGITS / "digits_cnn.onnx", quantize="fp16").model
    with pytest.raises(Refused) as caught:
        prune(halves, target={"channels": 1.0}, quantize="int8_dynamic")
    assert caught.value.refusal.code is Code.INVALID_RECIPE
    assert "cannot load what its quantiser makes" in caught.value.refusal.message


def test_what_is_right_until_it_is_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where numbers leave the range of float16, which hangs on what ONNX Runtime fuses."""
    net = Net()
    net.output(net.conv(net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)), 8, 4))
    real = stage._float16

    def overflowing(proto: onnx.ModelProto) -> onnx.ModelProto:
        result = real(proto)
        for tensor in result.graph.initializer:
            infinite = np.full_like(numpy_helper.to_array(tensor), np.inf)
            tensor.CopyFrom(numpy_helper.from_array(infinite, tensor.name))
        return result

    monkeypatch.setattr(stage, "_float16", overflowing)
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), None, quantize="fp16")
    assert caught.value.refusal.code is Code.INVALID_RECIPE
    assert "is not finite" in caught.value.refusal.message


def test_what_the_quantiser_misreads_stays_in_floats() -> None:
    """Groups of a ConvTranspose, unnamed and beside unnamed nodes, in an opset before axes."""
    net = Net(opset=12)
    x = net.op("Conv", net.input("x", ["N", 4, 6, 6]), net.floats(32, 4, 3, 3), net.floats(32))
    x = net.op("ConvTranspose", x, net.floats(32, 4, 3, 3), net.floats(16), group=4)
    net.output(net.op("Conv", x, net.floats(4, 16, 3, 3), net.floats(4)))
    proto = net.model()
    for node in proto.graph.node:
        node.name = ""
    calibration = {"x": np.random.default_rng(0).standard_normal((32, 4, 6, 6), np.float32)}
    result = prune(proto, calibration, target={"channels": 1.0}, quantize="int8")
    assert 0 < result.report.verification.drift[0].relative_error < 0.05
    weights = {
        one.name: one.data_type for one in onnx.load_from_string(result.model).graph.initializer
    }
    kinds = [kind for name, kind in weights.items() if "quantized" in name and "scale" not in name]
    assert kinds.count(onnx.TensorProto.INT8) >= 2
