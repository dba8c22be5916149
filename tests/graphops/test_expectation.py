"""Repair without data: means from BatchNormalizations, against closed forms and against data."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import scipy.stats
from laws import check_law
from nets import Net

import secateur
from secateur.errors import Code, Refused
from secateur.graphops.calibration.moments import linear_maps
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.repair.expectation import Means

WIDE = 8
SCALE = np.array([1, -2, 0.5, 0, 3, 1, 0.1, 2], np.float32)
SHIFT = np.array([0, 1, -1, 2, -3, 4, 0.3, -0.5], np.float32)


def normalised(net: Net, x: str) -> str:
    """BatchNormalization of 8 channels."""
    vectors = [net.const(SCALE), net.const(SHIFT), net.floats(WIDE), net.floats(WIDE, low=0.5)]
    return net.op("BatchNormalization", x, *vectors)


def means(net: Net) -> np.ndarray | None:
    """Of what the last convolution or product reads."""
    opened = open_model(net.bytes())
    coupling = couple(opened.model, infer_shapes(opened.model, None), secateur.Recipe())
    view = list(linear_maps(opened.model, coupling.shapes))[-1]
    line = coupling.axes(str(view.node.inputs[0].name))[view.x_axis]  # type: ignore[union-attr]
    return Means(opened.model, coupling, 0).along(view, line)


def relu(mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """E max(0, N(mean, spread²)), as it stands in the papers."""
    spread = np.maximum(np.abs(spread), 1e-12)
    return spread * scipy.stats.norm.pdf(mean / spread) + mean * scipy.stats.norm.cdf(mean / spread)


def up_to_conv(net: Net) -> str:
    return net.conv(net.input("x", ["N", 3, 6, 6]), 3, WIDE)


def test_the_mean_after_relu_is_the_closed_form() -> None:
    net = Net()
    net.output(net.conv(net.op("Relu", normalised(net, up_to_conv(net))), WIDE, 4))
    assert np.allclose(means(net), relu(SHIFT, SCALE), atol=5e-3 * 3)


def test_the_mean_after_relu6_is_the_closed_form() -> None:
    net = Net()
    clipped = net.op(
        "Clip", normalised(net, up_to_conv(net)), net.const(np.float32(0)), net.const(np.float32(6))
    )
    net.output(net.conv(clipped, WIDE, 4))
    assert np.allclose(means(net), relu(SHIFT, SCALE) - relu(SHIFT - 6, SCALE), atol=5e-3 * 3)


def test_any_activation_and_residual_sums() -> None:
    net = Net()
    x = up_to_conv(net)
    y = normalised(net, x)
    y = net.op("Mul", y, net.op("Sigmoid", y))  # SiLU, as exporters spell it
    y = net.op("Relu", net.op("Add", y, normalised(net, net.conv(x, WIDE, WIDE))))
    net.output(net.conv(y, WIDE, 4))
    draw = np.random.default_rng(0)
    a, b = (SHIFT + np.abs(SCALE) * draw.standard_normal((200_000, WIDE)) for _ in range(2))
    expected = np.maximum(a / (1 + np.exp(-a)) + b, 0).mean(axis=0)
    assert np.allclose(means(net), expected, atol=0.1)


def test_a_mean_over_space_is_spread_as_the_channels_are() -> None:
    net = Net()
    y = net.op("Relu", normalised(net, up_to_conv(net)))
    net.output(net.dense(net.op("Flatten", net.op("GlobalAveragePool", y)), WIDE, 4))
    assert np.allclose(means(net), relu(SHIFT, SCALE), atol=5e-3 * 3)
    net = Net()
    y = net.op("Relu", normalised(net, up_to_conv(net)))
    net.output(net.dense(net.op("Flatten", y), WIDE * 36, 4))
    assert np.allclose(means(net), np.repeat(relu(SHIFT, SCALE), 36), atol=5e-3 * 3)


@pytest.mark.parametrize("way", ["Conv", "MaxPool", "input"])
def test_what_batch_normalisation_does_not_tell_is_not_known(way: str) -> None:
    net = Net()
    x = up_to_conv(net)
    if way == "Conv":
        y = net.op("Relu", x)
    elif way == "MaxPool":
        y = net.op("MaxPool", normalised(net, x), kernel_shape=[2, 2])
    else:
        bright = net.op("ReduceMean", net.inputs[0].name, axes=[1, 2, 3])
        y = net.op("Add", normalised(net, x), bright)
    net.output(net.conv(y, WIDE, 4))
    assert means(net) is None


def trained(bias: bool = True) -> tuple[bytes, np.ndarray]:
    """A net whose BatchNormalizations hold the statistics of its inputs."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((256, 3, 6, 6)).astype(np.float32)
    net = Net()
    y = net.input("x", ["N", 3, 6, 6])
    for inner in (3, 16):
        y = net.conv(y, inner, 16, bias=False)
        here = onnx.load_from_string(_ending_in(net, y))
        values = onnx.reference.ReferenceEvaluator(here).run(None, {"x": x})[0]
        statistics = [values.mean(axis=(0, 2, 3)), values.var(axis=(0, 2, 3))]
        scale, shift = net.floats(16, low=0.5), net.floats(16, low=0.5)
        y = net.op("BatchNormalization", y, scale, shift, *map(net.const, statistics))
        y = net.op("Relu", y)
    net.output(net.conv(y, 16, 4, bias=bias))
    return net.bytes(), x


def _ending_in(net: Net, name: str) -> bytes:
    model = net.model()
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return bytes(model.SerializeToString())


def prune(model: bytes, **fields: Any) -> secateur.Result:
    recipe = secateur.Recipe.parse({"target": {"channels": 0.5}, **fields})
    return secateur.prune(model, recipe, measure_latency=False)


@pytest.mark.parametrize("bias", [True, False])
def test_the_outputs_keep_their_means(bias: bool) -> None:
    source, x = trained(bias)
    goal, bare, repaired = (
        onnx.reference.ReferenceEvaluator(onnx.load_from_string(model)).run(None, {"x": x})[0]
        for model in (source, prune(source, repair=False).model, prune(source).model)
    )

    def moved(y: np.ndarray) -> float:
        return float(np.abs((y - goal).mean(axis=(0, 2, 3))).max())

    assert moved(repaired) < 0.2 * moved(bare)
    assert np.square(repaired - goal).mean() < 0.7 * np.square(bare - goal).mean()


def test_the_report_says_what_was_done() -> None:
    source, _ = trained()
    report = prune(source).report
    assert [(one.channels, one.folded) for one in report.folded] == [(8, 8), (8, 8)]
    assert not report.repair
    assert prune(source, repair=True).model == prune(source).model


def test_without_repair_the_law_is_kept() -> None:
    source, _ = trained()
    bare = prune(source, repair=False)
    assert not bare.report.folded
    assert check_law(source, bare).difference < 1e-5
    assert check_law(source, prune(source)).difference > 1e-2


def test_asked_for_with_nothing_to_go_by_it_is_refused() -> None:
    net = Net()
    net.output(net.conv(net.op("Relu", up_to_conv(net)), WIDE, 4))
    report = prune(net.bytes()).report
    assert [(one.channels, one.folded) for one in report.folded] == [(4, 0)]
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), repair=True)
    assert caught.value.refusal.code is Code.INVALID_CALIBRATION
