"""Scale and shift where a refit does not apply: known answers, and undone where no help."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from nets import Net

import secateur
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.repair import fit
from secateur.graphops.repair.fit import Sums
from secateur.graphops.repair.repair import repairable
from secateur.graphops.repair.target import Correction


def tokens(count: int = 64, width: int = 6) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {"x": draw.standard_normal((count, 5, width)).astype(np.float32)}


def run(model: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, feeds)[0]
    return found


def prune(model: bytes, data: dict[str, np.ndarray], **fields: Any) -> secateur.Result:
    recipe = secateur.Recipe.parse({"target": {"channels": 0.5}, **fields})
    return secateur.prune(model, recipe, calibration=data, measure_latency=False)


NORMALISATIONS = {  # op, rank of the input, parameters, attributes
    "LayerNormalization": (3, "scale bias", {}),
    "LayerNormalization without bias": (3, "scale", {}),
    "BatchNormalization": (4, "scale bias mean variance", {}),
    "InstanceNormalization": (4, "scale bias", {}),
    "GroupNormalization": (4, "scale bias", {"num_groups": 2}),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_what_was_scaled_and_shifted_is_taken_back(name: str) -> None:
    """The parameters of a node are disturbed; from what it should put out they are found again."""
    rank, parameters, attributes = NORMALISATIONS[name]
    net = Net(opset=21)
    x = net.input("x", ["N", 5, 8] if rank == 3 else ["N", 8, 5, 5])
    inputs = [net.floats(8, low=0.5, name=parameter) for parameter in parameters.split()]
    net.output(net.op(name.split()[0], x, *inputs, **attributes))
    opened = open_model(net.bytes())
    graph = opened.model.graph
    (correction,) = repairable(opened.model, infer_shapes(opened.model, None))
    assert isinstance(correction, Correction)
    assert correction.method == ("scale_shift" if "bias" in parameters else "scale")
    shape = (32, 5, 8) if rank == 3 else (32, 8, 5, 5)
    data = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    wanted = {key: graph.initializers[key].const_value.numpy() for key in parameters.split()}  # type: ignore[union-attr]
    goal = run(net.bytes(), data)
    for tensor in net.initializers:
        if tensor.name in ("scale", "bias"):
            moved = wanted[tensor.name] * 3 + (0.25 if tensor.name == "bias" else 0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved.astype(np.float32), tensor.name))
    disturbed = open_model(net.bytes())
    (correction,) = repairable(disturbed.model, infer_shapes(disturbed.model, None))
    y = run(net.bytes(), data)
    axis = correction.y_axis
    assert axis == (2 if rank == 3 else 1)
    aim = np.moveaxis(goal, axis, -1).reshape(-1, 8).T[..., None]
    rows = correction.rows(y, y.shape, np.arange(aim.shape[1]))
    seen, held = (Sums.zeros(8, 1, 1) for _ in range(2))
    half = aim.shape[1] // 2
    seen.add(rows[:, :half], aim[:, :half])
    held.add(rows[:, half:], aim[:, half:])
    fitted = correction.fit(seen, held)
    assert fitted.after < 1e-6 < fitted.before
    correction.write(disturbed.model.graph, fitted.weight, fitted.bias)
    for key in ("scale", "bias"):
        if key in wanted:
            found = disturbed.model.graph.initializers[key].const_value.numpy()  # type: ignore[union-attr]
            assert np.allclose(found, wanted[key], atol=1e-3)


def test_a_shift_that_does_not_help_is_undone() -> None:
    draw = np.random.default_rng(0)
    y = draw.standard_normal((3, 40, 1)).astype(np.float32)
    seen, held = (Sums.zeros(3, 1, 1) for _ in range(2))
    seen.add(y, y + 1)
    held.add(y, y - 1)
    one, zero = np.ones((3, 1, 1)), np.zeros((3, 1))
    fitted = fit.shift(seen, held, one, zero)
    assert fitted.damping is None and fitted.before == fitted.after
    assert fitted.bias is zero
    held = Sums.zeros(3, 1, 1)
    held.add(y, y + 1)
    fitted = fit.shift(seen, held, one, zero)
    assert np.allclose(fitted.bias, 1, atol=1e-6) and fitted.after < 1e-6


def tied() -> bytes:
    """Two layers that share a weight, each with a bias of its own, after one that can be cut."""
    net = Net()
    shared = net.floats(16, 6)
    x = net.input("x", ["N", 5, 6])
    for _ in range(2):
        y = net.op("Exp", net.dense(x, 6, 16))
        x = net.op("Tanh", net.op("Add", net.op("MatMul", y, shared), net.floats(6)))
    net.output(x)
    return net.bytes()


def test_a_weight_that_is_shared_stays_and_its_biases_are_corrected() -> None:
    result = prune(tied(), tokens())
    steps = [step for step in result.report.repair if step.method == "shift"]
    assert steps and all(step.error_after < step.error_before for step in steps)
    graph = onnx.load_from_string(result.model).graph
    (shared,) = [t for t in graph.initializer if list(t.dims) == [8, 6]]
    assert sum(shared.name in node.input for node in graph.node) == 2
    bare = prune(tied(), tokens(), repair=False)
    drift = [one.report.verification.drift[0].relative_error for one in (result, bare)]
    assert drift[0] < 0.8 * drift[1]


def test_a_normalisation_across_fewer_channels_is_corrected() -> None:
    net = Net()
    x = net.dense(net.input("x", ["N", 5, 6]), 6, 16)
    y = net.op("LayerNormalization", x, net.floats(16, low=0.5), net.floats(16))
    net.output(net.dense(net.op("Relu", y), 16, 4))
    steps = {step.method: step for step in prune(net.bytes(), tokens()).report.repair}
    assert steps["scale_shift"].error_after < steps["scale_shift"].error_before
    assert steps["refit"].error_after < steps["refit"].error_before


def batch_norm(net: Net, x: str) -> str:
    vectors = [net.floats(12), net.floats(12), net.floats(12), net.floats(12, low=0.5)]
    return net.op("BatchNormalization", x, *vectors)


@pytest.mark.parametrize("straight", [True, False])
def test_batch_normalisation_after_a_refit_has_nothing_to_correct(straight: bool) -> None:
    net, draw = Net(), np.random.default_rng(0)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12))
    y = net.conv(x, 12, 12)
    if not straight:
        y = net.op("Tanh", y)
    y = net.op("Relu", batch_norm(net, y))
    net.output(net.conv(y, 12, 3))
    data = {"x": draw.standard_normal((64, 3, 6, 6)).astype(np.float32)}
    report = prune(net.bytes(), data).report
    assert any(step.method == "refit" for step in report.repair)
    assert any(step.method == "scale_shift" for step in report.repair) is not straight
