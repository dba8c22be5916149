"""Each criterion against a case computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from laws import prune
from nets import Net
from onnx import numpy_helper

from secateur.errors import Code, Refused
from secateur.graphops.calibration import open_calibration
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.criteria import CRITERIA, Context
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes

FIRST = np.array([[1, -2, 0], [3, 4, 1], [0, 0, -0.5], [1, 1, 1]], np.float32)  # (4, 3): out, in
SECOND = np.array([[2, -1, 4, 0.5], [-2, 0, 3, 0.5]], np.float32)  # (2, 4)
SCALE = np.array([-3, 0.5, 2, 1], np.float32)


def model(norm: bool = True, second: np.ndarray = SECOND, side: int = 2) -> bytes:
    """Conv (3 → 4) → BatchNormalization → Relu → Conv (4 → rows of second)."""
    net = Net()
    x = net.input("x", ["N", 3, side, side])
    y = net.op("Conv", x, net.const(FIRST.reshape(4, 3, 1, 1), "first"))
    if norm:
        zeros, ones = net.const(np.zeros(4, np.float32)), net.const(np.ones(4, np.float32))
        mean = net.const(np.zeros(4, np.float32))
        y = net.op(
            "BatchNormalization", y, net.const(SCALE, "scale"), zeros, mean, ones, epsilon=0.0
        )
    net.output(net.op("Conv", net.op("Relu", y), net.const(second[:, :, None, None], "second")))
    return net.bytes()


def two_samples(side: int = 2) -> dict[str, np.ndarray]:
    """After scale and Relu the four channels are 0, 1.5, 0, 1 everywhere in the first sample and
    6, 2, 0, 1 in the second."""
    x = np.zeros((2, 3, side, side), np.float32)
    x[0, 0] = x[1, 1] = 1
    return {"x": x}


def scores(
    source: bytes,
    criterion: str,
    calibration: Any = None,
    seed: int = 0,
    reduction: Any = "sum",
) -> np.ndarray:
    """One score per output channel of the first convolution."""
    opened = open_model(source)
    coupling = couple(opened.model, infer_shapes(opened.model))
    observed = None
    if calibration is not None:
        samples = open_calibration(calibration, opened.model).draw()
        drawn = samples.seen + (samples.judged if samples.held_back else ())
        together = {name: np.concatenate([batch[name] for batch in drawn]) for name in drawn[0]}
        # few enough batches, of different sizes, that all of them are learnt from
        count = len(next(iter(together.values())))
        parts = np.array_split(np.arange(count), 4 if count > 8 else 1)
        batches = [{name: a[part] for name, a in together.items()} for part in parts if part.size]
        observed = Observed(opened.model, coupling, batches, seed)
    context = Context(opened.model, coupling, observed, seed, reduction)
    found = CRITERIA[criterion](context)
    return found[coupling.axes("first")[0]]


def test_l1_sums_all_slices_of_a_unit() -> None:
    expected = np.abs(FIRST).sum(axis=1) + np.abs(SECOND).sum(axis=0)
    assert np.allclose(expected, [7, 9, 7.5, 4])
    assert np.allclose(scores(model(), "l1"), expected)


def test_l2_is_the_norm_over_all_slices_of_a_unit() -> None:
    expected = np.sqrt((FIRST**2).sum(axis=1) + (SECOND**2).sum(axis=0))
    assert np.allclose(expected**2, [13, 27, 25.25, 3.5])
    assert np.allclose(scores(model(), "l2"), expected)


def test_bn_scale_is_the_absolute_scale() -> None:
    assert np.allclose(scores(model(), "bn_scale"), [3, 0.5, 2, 1])


def test_bn_scale_needs_a_batch_normalization() -> None:
    with pytest.raises(Refused) as caught:
        prune(model(norm=False), criterion="bn_scale")
    assert caught.value.refusal.code is Code.INVALID_RECIPE


def test_activation_is_the_mean_magnitude_that_consumers_read() -> None:
    x = np.zeros((2, 3, 2, 2), np.float32)
    x[0, 0] = [[1, 2], [3, 4]]
    x[1, 1] = [[-1, 1], [2, -2]]
    features = np.einsum("oi,nihw->nohw", FIRST, x) * SCALE[:, None, None]
    expected = np.maximum(features, 0).mean(axis=(0, 2, 3))
    assert np.allclose(scores(model(), "activation", {"x": x}), expected)
    assert len(set(expected.tolist())) > 2


def test_activation_weighs_samples_alike_whatever_the_batches() -> None:
    x = np.random.default_rng(0).standard_normal((33, 3, 2, 2)).astype(np.float32)
    x[32] *= 50  # alone in the second batch
    features = np.einsum("oi,nihw->nohw", FIRST, x) * SCALE[:, None, None]
    expected = np.maximum(features, 0).mean(axis=(0, 2, 3))
    assert np.allclose(scores(model(), "activation", {"x": x}), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("activation", [3, 1.75, 0, 1]),
        ("rms", [18**0.5, 3.125**0.5, 0, 1]),
        ("apoz", [0.5, 1, 0, 1]),
        ("variance", [9, 0.0625, 0, 0]),
        ("wanda", [4 * 18**0.5, 3.125**0.5, 0, 1]),  # sums of |second|: 4, 1, 7, 1
        ("fluctuation", [8 * 9, 0.0625, 0, 0]),  # sums of second²: 8, 1, 25, 0.5
    ],
)
def test_what_consumers_read(criterion: str, expected: list[float]) -> None:
    assert np.allclose(scores(model(), criterion, two_samples()), expected, atol=1e-6)


def test_a_kernel_reads_a_channel_at_each_of_its_positions() -> None:
    net, draw = Net(), np.random.default_rng(0)
    first = draw.standard_normal((4, 3, 1, 1)).astype(np.float32)
    second = draw.standard_normal((6, 2, 3, 1)).astype(np.float32)  # two groups of channels
    x = net.input("x", ["N", 3, 5, 5])
    y = net.op("Conv", x, net.const(first, "first"))
    net.output(net.op("Conv", y, net.const(second, "second"), group=2))
    data = draw.standard_normal((8, 3, 5, 5)).astype(np.float32)
    features = np.einsum("oi,nihw->nohw", first[:, :, 0, 0], data)
    expected = np.zeros(4)
    for channel in range(4):
        for row in range(3):  # of the kernel; it stands at three places
            seen = features[:, channel, row : row + 3]
            group = channel // 2
            weights = second[3 * group : 3 * group + 3, channel % 2, row, 0]
            expected[channel] += seen.var() * (weights**2).sum()
    found = scores(net.bytes(), "fluctuation", {"x": data})
    # the outputs stay, so the same channel of both groups goes
    assert np.allclose(found, np.tile(expected.reshape(2, 2).sum(axis=0), 2), rtol=1e-4)


def test_lamp_is_the_share_of_what_is_left() -> None:
    squares = [13, 27, 25.25, 3.5]
    expected = [13 / (13 + 27 + 25.25), 1, 25.25 / (27 + 25.25), 3.5 / sum(squares)]
    assert np.allclose(scores(model(), "lamp"), expected)


def test_fpgm_is_the_distance_to_the_others() -> None:
    expected = [
        sum(np.linalg.norm(FIRST[u] - FIRST[v]) for v in range(4))
        + sum(np.linalg.norm(SECOND[:, u] - SECOND[:, v]) for v in range(4))
        for u in range(4)
    ]
    assert np.allclose(scores(model(), "fpgm"), expected)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", [7, 9, 7.5, 4]),
        ("mean", [3.5, 4.5, 3.75, 2]),
        ("max", [4, 8, 7, 3]),
        ("first", [3, 8, 0.5, 3]),
    ],
)
def test_reductions_of_the_tensors_of_a_unit(reduction: str, expected: list[float]) -> None:
    assert np.allclose(scores(model(), "l1", reduction=reduction), expected)
    result = prune(model(), criterion="l1", reduction=reduction)
    stays = next(entry for entry in result.plan.kept if entry.tensor == "first").axes[0]
    assert min(expected[unit] for unit in stays) >= sorted(expected)[2]


# -- derivatives -------------------------------------------------------------------------------


def test_taylor_is_the_mean_absolute_derivative_of_the_spread() -> None:
    # y − ȳ is ∓(5.75, −6) at each of four positions; times the columns of second and the features
    assert np.allclose(scores(model(), "taylor", two_samples()), [282, 40.25, 0, 0.5], atol=1e-3)


def test_fisher_is_half_the_mean_squared_derivative_of_the_outputs() -> None:
    # one output at one position: whatever its sign, (v·J)² is J²
    source = model(second=SECOND[:1], side=1)
    expected = [(2 * 6) ** 2 / 4, (1.5**2 + 2**2) / 4, 0, 2 * 0.5**2 / 4]
    assert np.allclose(scores(source, "fisher", two_samples(1)), expected, atol=1e-5)


def test_derivatives_are_those_of_scaling_what_consumers_read() -> None:
    """Through a residual, a depthwise convolution, a strided slice and two consumers, against
    differences."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (draw.standard_normal(shape) / 2).astype(np.float32)

    first, deep, point, last = normal(4, 3, 1, 1), normal(4, 1, 3, 3), normal(4, 4, 1, 1), normal(4)

    def source(gates: np.ndarray) -> bytes:
        net = Net()
        x = net.input("x", ["N", 3, 8, 8])
        stem = net.op("Sigmoid", net.op("Conv", x, net.const(first, "first")))
        bounds = ([0, 7], [9, -9], [2, 3], [2, -2])  # of 8 × 8: every other row, and column back
        stem = net.op("Slice", stem, *(net.const(np.array(b, np.int64)) for b in bounds))
        wide = net.op("Conv", stem, net.const(deep, "deep"), group=4, pads=[1, 1, 1, 1])
        scaled = point * gates[:, None, None].astype(np.float32)
        wide = net.op("Conv", wide, net.const(scaled, "point"))
        y = net.op("Sigmoid", net.op("Add", stem, wide))
        weight = (last * gates.astype(np.float32)).reshape(1, 4, 1, 1)
        net.output(net.op("Conv", y, net.const(weight, "last")))
        return net.bytes()

    data = draw.standard_normal((3, 3, 8, 8)).astype(np.float32)

    def outputs(gates: np.ndarray) -> np.ndarray:
        session = ort.InferenceSession(source(gates), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": data})[0].astype(np.float64)

    ones, step = np.ones(4), 1e-2
    centre = outputs(ones).mean(axis=0)

    def losses(gates: np.ndarray) -> np.ndarray:
        return 0.5 * ((outputs(gates) - centre) ** 2).sum(axis=(1, 2, 3))

    expected = [
        np.abs(losses(ones + step * one) - losses(ones - step * one)).mean() / (2 * step)
        for one in np.eye(4)
    ]
    assert np.allclose(scores(source(ones), "taylor", {"x": data}), expected, rtol=1e-2)


def test_taylor_needs_two_samples() -> None:
    with pytest.raises(Refused, match="at least 2"):
        scores(model(), "taylor", {"x": two_samples()["x"][:1]})


def test_operators_without_a_derivative_are_named() -> None:
    net = Net()
    x = net.input("x", ["N", 3, 2, 2])
    y = net.op("Conv", x, net.const(FIRST.reshape(4, 3, 1, 1), "first"))
    y = net.op("Conv", y, net.const(SECOND[:, :, None, None], "second"))
    region = net.const(np.array([[0, 0, 0, 1, 1]], np.float32), "region")
    net.output(net.op("MaxRoiPool", y, region, pooled_shape=[1, 1]))
    with pytest.raises(Refused, match="MaxRoiPool"):
        scores(net.bytes(), "taylor", {"x": two_samples()["x"]})


def test_an_index_has_no_derivative() -> None:
    net = Net()
    x = net.input("x", ["N", 3, 2, 2])
    y = net.op("Conv", x, net.const(FIRST.reshape(4, 3, 1, 1), "first"))
    y = net.op("Conv", y, net.const(SECOND[:, :, None, None], "second"))
    net.output(net.op("ArgMax", y, axis=1), onnx.TensorProto.INT64)
    with pytest.raises(Refused, match="no output is of floats"):
        scores(net.bytes(), "fisher", two_samples())


@pytest.mark.parametrize(
    "criterion",
    ["activation", "rms", "apoz", "variance", "wanda", "fluctuation", "taylor", "fisher"],
)
def test_what_needs_calibration_data(criterion: str) -> None:
    with pytest.raises(Refused) as caught:
        prune(model(), criterion=criterion)
    assert caught.value.refusal.code is Code.INVALID_CALIBRATION


def test_random_is_uniform_and_hangs_on_the_seed_alone() -> None:
    first, again, other = (scores(model(), "random", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert ((first >= 0) & (first < 1)).all()


@pytest.mark.parametrize(
    ("criterion", "stays"),
    [("l1", (1, 2)), ("l2", (1, 2)), ("bn_scale", (0, 2)), ("activation", (0, 1))],
)
def test_the_least_go_first(criterion: str, stays: tuple[int, ...]) -> None:
    x = np.zeros((1, 3, 2, 2), np.float32)
    x[0, 1] = 1  # the channels become 6, 2, 0 and 1 after scale and Relu
    data = {"x": x} if criterion == "activation" else None
    result = prune(model(), criterion=criterion, calibration=data)
    entry = next(entry for entry in result.plan.kept if entry.tensor == "first")
    assert entry.axes[0] == stays
    after = onnx.load_from_string(result.model)
    left = next(tensor for tensor in after.graph.initializer if tensor.name == "first")
    assert np.array_equal(numpy_helper.to_array(left)[:, :, 0, 0], FIRST[list(stays)])
