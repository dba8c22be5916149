"""Models that take fewer sizes than they say, and models whose outputs' sizes the data decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from laws import lawful, prune
from nets import INT64, Net

from secateur.errors import Code, Refused
from secateur.graphops.model.runtime import open_session
from secateur.graphops.verify.verify import run_original, verify


def baked(batch: int) -> onnx.ModelProto:
    """A batch that is free by name, and written down in a Reshape."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 4, 4]), 3, 8))
    rows = net.op("Transpose", net.op("Reshape", x, net.ints(batch, 8, 16)), perm=[0, 2, 1])
    channels = net.op("Gather", net.op("Shape", rows), net.ints(2))
    flat = net.op("Reshape", rows, net.op("Concat", net.ints(-1), channels, axis=0))
    net.output(net.dense(flat, 8, 3))
    return net.model()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_is_not_as_free_as_it_says(batch: int) -> None:
    result = lawful(baked(batch), target={"channels": 0.5})
    assert result.report.verification.batch_sizes == (batch,)
    assert not result.report.verification.resized
    assert len(result.plan.kept) == 3


def test_data_go_one_by_one_where_no_other_batch_suits() -> None:
    data = {"x": np.random.default_rng(0).standard_normal((64, 3, 4, 4)).astype(np.float32)}
    result = prune(baked(1), target={"channels": 0.5}, calibration=data, repair=True)
    assert result.report.verification.batch_sizes == (1,)
    assert result.report.verification.samples == 8
    assert result.report.repair


def test_no_batch_suits() -> None:
    with pytest.raises(Refused) as caught:
        prune(baked(7))
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN
    assert "'x': [2, 3, 4, 4]" in caught.value.refusal.found


@pytest.mark.parametrize("criterion", ["reconstruction", "rms", None])
def test_data_of_a_batch_that_does_not_suit(criterion: str | None) -> None:
    data = np.random.default_rng(0).standard_normal((7, 3, 4, 4)).astype(np.float32)
    with pytest.raises(Refused) as caught:
        prune(baked(2), criterion=criterion, calibration={"x": data}, repair=True)
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN


def found_by_the_data() -> Net:
    """The places where the last channel is positive: as many as there are."""
    net = Net(seed=3)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16, 3))
    map_ = net.conv(x, 16, 1)
    places = net.op(
        "Transpose", net.op("NonZero", net.op("Greater", map_, net.const(np.float32(0))))
    )
    net.output(net.op("GatherND", map_, places))
    net.output(places, dtype=INT64)
    return net


def test_as_many_outputs_as_the_data_say() -> None:
    model = found_by_the_data().model()
    result = lawful(model, target={"channels": 0.5})
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    sizes = [
        open_session(content, lean=True).run(None, feeds)[0].shape
        for content in (model.SerializeToString(), result.model)
    ]
    assert sizes[0] != sizes[1], "the case shows nothing"
    checked = result.report.verification
    assert [one.output for one in checked.drift] == list(checked.resized)
    assert any("as the data decide" in warning for warning in result.report.warnings)


def test_as_long_as_the_data_say() -> None:
    """As text to speech: predicted durations, summed up, are the length of what comes out."""
    net = Net(seed=4)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6]), 3, 16, rank=3))
    durations = net.op("Ceil", net.op("Exp", net.conv(x, 16, 1, rank=3)))
    total = net.op(
        "Cast",
        net.op("ReduceMax", net.op("ReduceSum", durations, net.ints(2), keepdims=0), keepdims=0),
        to=INT64,
    )
    length = net.op("Reshape", total, net.ints(1))
    mean = net.op("ReduceMean", x, axes=[2], keepdims=1)
    sizes = net.op("Concat", net.ints(1), net.ints(1), length, axis=0)
    net.output(net.conv(net.op("Expand", mean, sizes), 16, 2, rank=3))
    model = net.model()
    result = lawful(model, target={"channels": 0.5})
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6)).astype(np.float32)}
    longest = [
        open_session(content, lean=True).run(None, feeds)[0].shape[2]
        for content in (model.SerializeToString(), result.model)
    ]
    assert longest[0] != longest[1], "the case shows nothing"


def test_other_sizes_still_fail() -> None:
    def model(width: Any) -> bytes:
        net = Net()
        net.output(
            net.op("Relu", net.conv(net.input("x", ["N", 3, "H", 4]), 3, 2, pads=[0, 0, *width]))
        )
        return net.bytes()

    feeds = {"x": np.zeros((1, 3, 4, 4), np.float32)}
    samples = run_original(model([0, 0]), [feeds], False, by_data={"relu_4": (2,)})
    assert verify(model([1, 0]), samples).drift  # along the axis that the data decide
    with pytest.raises(Refused) as caught:
        verify(model([0, 1]), samples)
    assert caught.value.refusal.code is Code.VERIFICATION_FAILED


def test_layers_that_read_as_many_rows_as_the_data_say() -> None:
    """As experts do, of which each reads the tokens that chose it."""
    net = Net()
    x = net.op("Reshape", net.input("x", ["N", 6, 8]), net.ints(-1, 8))
    positive = net.op(
        "Greater", net.op("Gather", x, net.const(0), axis=1), net.const(np.float32(0))
    )
    rows = net.op("Gather", x, net.op("Squeeze", net.op("NonZero", positive), net.ints(0)), axis=0)
    for inner, outer in ((8, 24), (24, 24), (24, 24), (24, 24)):
        rows = net.op("Relu", net.dense(rows, inner, outer))
    net.output(net.dense(net.op("ReduceMean", rows, axes=[0]), 24, 4))
    data = np.random.default_rng(0).standard_normal((64, 6, 8)).astype(np.float32)
    result = prune(net.model(), target={"channels": 0.5}, calibration={"x": data}, repair=True)
    assert any(step.error_after < step.error_before for step in result.report.repair)


@pytest.mark.parametrize("data", [False, True])
def test_an_output_that_is_nowhere_finite_has_no_drift(data: bool) -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 16)
    net.output(net.conv(net.op("Relu", x), 16, 3))
    sunk = net.op("Sqrt", net.op("Sub", net.op("Sigmoid", x), net.const(np.float32(2))))
    net.output(net.conv(sunk, 16, 3))
    calibration = {"x": np.random.default_rng(0).standard_normal((32, 4, 6, 6)).astype(np.float32)}
    result = prune(net.bytes(), calibration=calibration if data else None)
    checked = result.report.verification
    assert len(checked.drift) == len(checked.not_finite) == 1
    assert checked.drift[0].output != checked.not_finite[0]
    (warning,) = [one for one in result.report.warnings if "NaN or infinite" in one]
    assert checked.not_finite[0] in warning
    assert ("calibration data" in warning) == data
