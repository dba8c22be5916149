"""How much outputs depend on what is inside: against Jacobians by hand, and what it decides."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from laws import prune
from nets import Net
from onnx import helper

from secateur.graphops.calibration import curvature, derivatives
from secateur.graphops.calibration.derivatives import freeze, opened, reverse
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session


def samples(count: int, *shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)}


def test_of_a_product_it_is_the_squares_of_what_follows() -> None:
    net, after = Net(), np.diag([3.0, 0.5, 0.0]).astype(np.float32)
    z = net.op("MatMul", net.input("x", ["N", 4]), net.floats(4, 3))
    net.output(net.op("MatMul", z, net.const(after)))
    batches = [samples(5, 4), samples(5, 4)]
    found = curvature.measure(open_model(net.bytes()).model, {z: 1}, batches, 0)
    assert not found.missing
    assert np.allclose(found.of[z], [9, 0.25, 0], rtol=1e-5)


def test_of_a_map_it_is_summed_over_positions_that_count() -> None:
    net = Net()
    weight = np.random.default_rng(1).standard_normal((2, 3, 1, 1)).astype(np.float32)
    z = net.op("Conv", net.input("x", ["N", 3, 2, 2]), net.const(weight))
    clipped = net.op("Clip", z, net.const(np.float32(0)), net.const(np.float32(6)))
    net.output(net.op("Mul", clipped, net.const(np.array([[[[2.0]], [[1.0]]]], np.float32))))
    model, feeds = open_model(net.bytes()).model, samples(6, 3, 2, 2)
    found = curvature.measure(model, {z: 1}, [feeds], 0)
    values = open_session(_with_output(net.bytes(), z)).run([z], feeds)[0]
    inside = ((values >= 0) & (values <= 6)).sum(axis=(0, 2, 3)) / 6
    assert inside.min() > 0 and inside.max() < 4
    assert np.allclose(found.of[z], [4 * inside[0], inside[1]], rtol=1e-5)


def _with_output(source: bytes, name: str) -> bytes:
    proto = onnx.load_from_string(source)
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(proto.SerializeToString())


def test_of_all_outputs_together_in_the_mean_over_directions() -> None:
    net, after = Net(), np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    z = net.op("MatMul", net.input("x", ["N", 4]), net.floats(4, 3))
    net.output(net.op("MatMul", z, net.const(after)))
    found = curvature.measure(open_model(net.bytes()).model, {z: 1}, [samples(4000, 4)], 0)
    assert np.allclose(found.of[z], (after**2).sum(axis=1), rtol=0.1)


def test_what_a_clip_lets_through_is_no_choice_of_two() -> None:
    net = Net()
    low, high = net.const(np.float32(-1)), net.const(np.float32(1))
    net.output(net.op("Clip", net.input("x", ["N", 5]), low, high))
    proto, feeds = onnx.load_from_string(net.bytes()), {"x": np.float32([[-3, -1, 0, 0.5, 2]])}
    freeze(proto, feeds)
    (y,) = (value.name for value in proto.graph.output)
    derived = reverse(proto, ["x"], [y])
    assert not {"Where", "ReduceSum"} & {node.op_type for node in derived.graph.node}
    seeds = {f"adj_{y}": np.full((1, 5, 1), 2, np.float32)}
    (slope,) = open_session(derived.SerializeToString()).run(["adj_x"], feeds | seeds)
    assert slope.reshape(-1).tolist() == [0, 2, 2, 2, 0]


def test_what_the_model_hides_stays_hidden() -> None:
    net = Net()
    x = net.input("x", ["N", 3])
    finite = net.op("Log", x)  # of zero it is not
    hidden = net.op(
        "Where", net.op("Greater", x, net.const(np.float32(0))), finite, net.const(np.float32(0))
    )
    net.output(net.op("Mul", hidden, net.op("Tanh", x)))
    proto, feeds = onnx.load_from_string(net.bytes()), {"x": np.float32([[0, 1, 2]])}
    freeze(proto, feeds)
    (y,) = (value.name for value in proto.graph.output)
    derived = reverse(proto, ["x"], [y])
    found = open_session(derived.SerializeToString()).run(
        [y], feeds | {f"adj_{y}": np.ones((1, 3, 1), np.float32)}
    )
    assert np.isfinite(found[0]).all()


def weighed(power: float, *, derived: bool = True) -> bytes:
    """Four units of which two make a strong channel that is made a thousand times weaker, and two a
    weak one that is multiplied with a power."""
    net = Net()
    x = net.op("MatMul", net.input("x", ["N", 4]), net.const(np.eye(4, dtype=np.float32), "units"))
    reads = np.array([[10, 0], [10, 0], [0, 1], [0, 1]], np.float32)
    y = net.op("MatMul", net.op("Tanh", x), net.const(reads))
    if not derived:
        y = net.op("Round", y)
    net.output(net.op("Mul", y, net.const(np.array([[0.001, power]], np.float32))))
    return net.bytes()


@pytest.mark.parametrize(("power", "stay"), [(1.0, (2, 3)), (1e-5, (0, 1))])
def test_units_stay_that_the_outputs_depend_on(power: float, stay: tuple[int, ...]) -> None:
    result = prune(weighed(power), target={"channels": 0.5}, calibration=samples(64, 4))
    (entry,) = (one for one in result.plan.kept if one.tensor == "units")
    assert entry.axes[1] == stay
    assert not any("alike" in warning for warning in result.report.warnings)


def test_without_derivatives_all_that_a_layer_puts_out_counts_alike() -> None:
    source = weighed(1.0, derived=False)
    result = prune(source, target={"channels": 0.5}, calibration=samples(64, 4))
    (entry,) = (one for one in result.plan.kept if one.tensor == "units")
    assert entry.axes[1] == (0, 1)
    (told,) = (warning for warning in result.report.warnings if "alike" in warning)
    assert "derivatives are zero" in told


def weights_among_inputs(monkeypatch: pytest.MonkeyPatch, *, heavy: int = 1) -> None:
    """Has models taken for large."""
    monkeypatch.setattr(derivatives, "LARGE", 10)
    monkeypatch.setattr(derivatives, "_HEAVY", heavy)


@pytest.mark.parametrize("opset", [12, 17])
def test_of_a_large_model_it_is_the_same(monkeypatch: pytest.MonkeyPatch, opset: int) -> None:
    net = Net(opset)
    z = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 5, 3)
    net.output(net.op("MaxPool", net.conv(net.op("Relu", z), 5, 4), kernel_shape=[2, 2]))
    model, batches = open_model(net.bytes()).model, [samples(3, 3, 4, 4)]
    small = curvature.measure(model, {z: 1}, batches, 0)
    weights_among_inputs(monkeypatch)
    assert not opened(model)[0].graph.initializer
    large = curvature.measure(model, {z: 1}, batches, 0)
    assert not large.missing
    assert np.allclose(large.of[z], small.of[z], rtol=1e-5)
    assert not opened(open_model(net.bytes()).model)[0].graph.initializer, "the model was changed"


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "reconstruction"])
def test_units_of_a_large_model(monkeypatch: pytest.MonkeyPatch, criterion: str) -> None:
    recipe = {"target": {"channels": 0.5}, "criterion": criterion}
    data = samples(64, 4)
    small = prune(weighed(1.0), calibration=data, **recipe)
    weights_among_inputs(monkeypatch)
    large = prune(weighed(1.0), calibration=data, **recipe)
    assert large.plan.kept == small.plan.kept
    assert not any("alike" in warning for warning in large.report.warnings)


def test_a_large_model_without_floats_is_not_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    weights_among_inputs(monkeypatch, heavy=1 << 20)
    result = prune(weighed(1.0), target={"channels": 0.5}, calibration=samples(64, 4))
    (told,) = (warning for warning in result.report.warnings if "alike" in warning)
    assert "bytes of weights that are no floats, 10 at most" in told


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [None, 1, -1])
def test_before_opset_13_softmax_takes_all_axes_from_one_on(op: str, axis: int | None) -> None:
    def slopes(opset: int) -> np.ndarray:
        net, given = Net(opset), {} if axis is None else {"axis": axis}
        z = net.op("MatMul", net.input("x", ["N", 3, 4]), net.floats(4, 4))
        if opset < 13:
            net.output(net.op(op, z, **given))
        elif axis == -1:
            net.output(net.op(op, z, axis=-1))
        else:
            net.output(net.op(op, net.op("Reshape", z, net.ints(0, -1)), axis=-1))
        found = curvature.measure(open_model(net.bytes()).model, {z: 2}, [samples(6, 3, 4)], 0)
        assert not found.missing
        return found.of[z]

    assert np.allclose(slopes(9), slopes(13), rtol=1e-4)
    assert np.allclose(slopes(11), slopes(13), rtol=1e-4)


@pytest.mark.parametrize("op", ["MaxPool", "Gather"])
def test_what_is_taken_several_times_counts_as_often_at_any_opset(op: str) -> None:
    def slopes(opset: int) -> np.ndarray:
        net = Net(opset)
        z = net.conv(net.input("x", ["N", 2, 6]), 2, 4, kernel=(3,))
        if op == "MaxPool":
            net.output(net.op(op, z, kernel_shape=[3], strides=[1]))
        else:
            net.output(net.op(op, z, net.ints(0, 2, 2), axis=1))
        found = curvature.measure(open_model(net.bytes()).model, {z: 1}, [samples(6, 2, 6)], 0)
        assert not found.missing
        return found.of[z]

    assert np.allclose(slopes(9), slopes(17), rtol=1e-4)


def test_branches_are_derived() -> None:
    """They are in the graph of derivatives once more, where a name may be there once."""
    net = Net()
    z = net.dense(net.input("x", ["N", 4]), 4, 3)
    bodies = [
        helper.make_graph(
            [helper.make_node(op, [z], [op], op)],
            op,
            [],
            [helper.make_tensor_value_info(op, onnx.TensorProto.FLOAT, ["N", 3])],
        )
        for op in ("Neg", "Abs")
    ]
    flag = net.input("flag", [], onnx.TensorProto.BOOL)
    y = net.op("If", flag, then_branch=bodies[0], else_branch=bodies[1], name="branch")
    net.output(y)
    feeds = {**samples(5, 4), "flag": np.array(True)}
    found = curvature.measure(open_model(net.bytes()).model, {z: 1}, [feeds], 0)
    assert not found.missing
    assert np.allclose(found.of[z], 1)


def test_what_is_quantised_counts_within_the_range_of_its_integers() -> None:
    net, power = Net(), np.array([3.0, 1.0, 0.5], np.float32)
    z = net.op("MatMul", net.input("x", ["N", 4]), net.floats(4, 3))
    scaling = net.const(np.float32(0.01)), net.const(np.uint8(100))
    real = net.op("DequantizeLinear", net.op("QuantizeLinear", z, *scaling), *scaling)
    net.output(net.op("Mul", real, net.const(power)))
    feeds = samples(50, 4)
    values = open_session(_with_output(net.bytes(), z)).run([z], feeds)[0]
    inside = ((values > -1) & (values < 1.55)).mean(axis=0)
    assert inside.min() > 0 and inside.max() < 1
    found = curvature.measure(open_model(net.bytes()).model, {z: 1}, [feeds], 0)
    assert not found.missing
    assert np.allclose(found.of[z], power**2 * inside, rtol=1e-5)


def test_what_is_rounded_has_no_derivative() -> None:
    net = Net()
    z = net.op("MatMul", net.input("x", ["N", 4]), net.floats(4, 3))
    net.output(net.op("Round", z))
    found = curvature.measure(open_model(net.bytes()).model, {z: 1}, [samples(5, 4)], 0)
    assert not found.of
    assert found.missing
