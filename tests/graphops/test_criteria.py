"""Each criterion against a case computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
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


def model(norm: bool = True) -> bytes:
    """Conv (3 → 4) → BatchNormalization → Relu → Conv (4 → 2)."""
    net = Net()
    x = net.input("x", ["N", 3, 2, 2])
    y = net.op("Conv", x, net.const(FIRST.reshape(4, 3, 1, 1), "first"))
    if norm:
        zeros, ones = net.const(np.zeros(4, np.float32)), net.const(np.ones(4, np.float32))
        mean = net.const(np.zeros(4, np.float32))
        y = net.op(
            "BatchNormalization", y, net.const(SCALE, "scale"), zeros, mean, ones, epsilon=0.0
        )
    net.output(net.op("Conv", net.op("Relu", y), net.const(SECOND.reshape(2, 4, 1, 1), "second")))
    return net.bytes()


def scores(source: bytes, criterion: str, calibration: Any = None, seed: int = 0) -> np.ndarray:
    """One score per output channel of the first convolution."""
    opened = open_model(source)
    coupling = couple(opened.model, infer_shapes(opened.model))
    observed = None
    if calibration is not None:
        samples = open_calibration(calibration, opened.model.graph).draw()
        batches = samples.seen + (samples.judged if samples.held_back else ())
        observed = Observed(opened.model, coupling, batches, seed)
    found = CRITERIA[criterion](Context(opened.model, coupling, observed, seed))
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


def test_activation_needs_calibration_data() -> None:
    with pytest.raises(Refused) as caught:
        prune(model(), criterion="activation")
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
