"""Layers refitted together, and samples from mirrors: on nets with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from nets import Net

import secateur
from secateur.graphops.calibration.mirrored import mirror, mirror_axis
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.repair import joint
from secateur.graphops.repair.blocks import blocks
from secateur.graphops.repair.repair import repairable


def tower(layers: int = 6, end: str | None = "Softmax", middle: str = "Relu") -> bytes:
    """Dense layers in a row, of 16 inputs to 5 outputs."""
    net = Net()
    x = net.input("x", ["N", 16])
    for _ in range(layers - 1):
        x = net.op(middle, net.dense(x, 16, 16))
    x = net.dense(x, 16, 5)
    net.output(net.op(end, x) if end else x)
    return net.bytes()


def residual() -> bytes:
    """Three residual blocks of two convolutions, behind a stem."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8))
    for _ in range(3):
        x = net.op("Relu", net.op("Add", net.conv(net.op("Relu", net.conv(x, 8, 8)), 8, 8), x))
    net.output(net.dense(net.op("Flatten", net.op("GlobalAveragePool", x)), 8, 4))
    return net.bytes()


def rows(count: int = 400) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)}


def coupling_of(model: ir.Model) -> Coupling:
    return couple(model, infer_shapes(model))


def opened(model: bytes, data: dict[str, np.ndarray], batch: int = 20) -> Observed:
    graph = open_model(model).model
    coupling = coupling_of(graph)
    (name,) = data
    batches = [{name: part} for part in np.split(data[name], range(batch, len(data[name]), batch))]
    return Observed(graph, coupling, batches, seed=0)


def found(model: bytes) -> list[tuple[str, int]]:
    """Of each block, what makes the tensor that leaves it, and how many layers it has."""
    opened = open_model(model).model
    makers = {value.name: node.op_type for node in opened.graph for value in node.outputs}
    made = blocks(opened, repairable(opened, coupling_of(opened).shapes))
    return [(makers[block.end], len(block.targets)) for block in made]


# -- blocks ------------------------------------------------------------------------------------


def test_blocks_end_as_early_as_they_can() -> None:
    assert found(tower(8, "Identity", "Tanh")) == [("Add", 4), ("Add", 4)]


def test_blocks_end_behind_what_is_flat() -> None:
    assert found(tower(8, end=None)) == [("Relu", 4), ("Add", 4)]


def test_the_last_block_ends_before_what_has_no_weights() -> None:
    assert found(tower(8)) == [("Relu", 4), ("Add", 4)]


def test_too_few_layers_for_a_block_are_of_the_one_before() -> None:
    assert found(tower(6)) == [("Add", 6)]
    assert found(tower(3)) == [("Add", 3)]
    assert found(tower(1)) == []


def test_a_block_is_left_by_one_tensor() -> None:
    # stem and two convolutions are three; the fourth is inside a branch
    assert found(residual()) == [("Add", 8)]


# -- the descent -------------------------------------------------------------------------------


def fit_of(model: bytes, data: dict[str, np.ndarray]) -> joint._JointFit:
    """Of the only block, its weights moved away from what they are in the original."""
    observed = opened(model, data)
    moved = observed.model.clone()
    draw = np.random.default_rng(1)
    for value in moved.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.float32:
            noise = 0.1 * draw.standard_normal(array.shape).astype(np.float32)
            value.const_value = ir.Tensor(array + noise, name=value.name)
    keep = np.ones(observed.coupling.count + 1, np.bool_)
    network = Network(moved, observed.batches)
    (block,) = blocks(moved, repairable(moved, observed.coupling.shapes))
    aims = joint._Aims(Network(observed.model, observed.batches), block.end, observed, keep)
    last = len(observed.batches) - 1
    batches = list(range(last)), [last]
    return joint._JointFit(block, network, aims, batches, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (tower(4, middle="Tanh"), rows(60)),
        (
            residual().replace(b"Relu", b"Tanh"),
            {"x": np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)},
        ),
    ],
)
def test_slopes_are_differences_of_the_error(model: bytes, data: dict[str, np.ndarray]) -> None:
    fit = fit_of(model, data)
    (batch,) = fit._judges
    fit._learn(batch)
    for layer in fit.layers:
        for place, name in enumerate(("weight", "bias")):
            if place >= len(layer._moving):
                continue
            slope, array = layer._moving[place].gradient, getattr(layer, name)
            spot = np.unravel_index(np.abs(slope).argmax(), slope.shape)
            errors = []
            for step in (1e-2, -1e-2):
                other = array.copy()
                other[spot] += step
                setattr(layer, name, other)
                errors.append(fit._judge())
            setattr(layer, name, array)
            assert slope[spot] == pytest.approx((errors[0] - errors[1]) / 2e-2, rel=2e-2)


def pruned(model: bytes, data: Any, **fields: Any) -> secateur.Result:
    recipe = secateur.Recipe(**{"target": {"macs": 0.5}, **fields})
    return secateur.prune(model, recipe, calibration=data, measure_latency=False)


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers one by one only."""
    monkeypatch.setattr(joint, "_WORK", 0)


def joint_steps(result: secateur.Result) -> list[Any]:
    return [step for step in result.report.repair if step.method == "joint"]


@pytest.mark.parametrize("model", [tower(), tower(middle="Tanh")])
def test_layers_together_drift_less(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned(model, rows())
    alone(monkeypatch)
    bare = pruned(model, rows())
    assert joint_steps(whole)
    assert all(step.error_after < step.error_before for step in joint_steps(whole))
    assert not joint_steps(bare)
    drifts = [one.report.verification.drift[0].relative_error for one in (whole, bare)]
    assert drifts[0] < 0.95 * drifts[1]
    assert whole.report.after == bare.report.after


def test_progress_goes_on_and_its_time_is_that_of_both() -> None:
    told: list[secateur.Progress] = []
    recipe = secateur.Recipe(target={"macs": 0.5})
    result = secateur.prune(
        tower(8), recipe, calibration=rows(), measure_latency=False, progress=told.append
    )
    fractions = [one.fraction for one in told]
    assert fractions == sorted(fractions)
    assert len(joint_steps(result)) > 0
    assert sum(one.message == "refitting what is left" for one in told) == 1


def test_the_same_call_gives_the_same_bytes() -> None:
    assert pruned(tower(), rows(), seed=3).model == pruned(tower(), rows(), seed=3).model


def test_a_block_without_derivatives_is_left_to_its_layers() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8))
    for _ in range(3):
        x = net.op("Relu", net.conv(x, 8, 8))
    region = net.const(np.array([[0, 0, 0, 7, 7]], np.float32), "region")
    x = net.op("MaxRoiPool", x, region, pooled_shape=[2, 2])
    x = net.op("Flatten", x)
    net.output(net.dense(x, 32, 4))
    data = {"x": np.random.default_rng(0).standard_normal((160, 3, 8, 8)).astype(np.float32)}
    result = pruned(net.bytes(), data)
    assert result.report.repair
    assert len(joint_steps(result)) <= 1


def test_batches_of_other_shapes_are_left_out(tmp_path: Any) -> None:
    net = Net()
    x = net.input("x", ["N", "T", 16])
    for _ in range(4):
        weight = net.floats(16, 16)
        x = net.op("Relu", net.op("Add", net.op("MatMul", x, weight), net.floats(16)))
    net.output(net.op("MatMul", x, net.floats(16, 4)))
    draw = np.random.default_rng(0)
    for length, count in ((5, 300), (7, 8)):
        array = draw.standard_normal((count, length, 16)).astype(np.float32)
        np.savez(tmp_path / f"{length}.npz", x=array)
    result = pruned(net.bytes(), tmp_path)
    assert joint_steps(result)


# -- mirrors -----------------------------------------------------------------------------------


def filtered(kernel: list[float], high: int = 1) -> ir.Model:
    """The energy of what a kernel along the width finds."""
    net = Net()
    x = net.input("x", ["N", 1, 12, 12])
    weight = np.asarray(kernel, np.float32).reshape(1, 1, high, -1)
    y = net.op("Relu", net.op("Conv", x, net.const(weight, "w")))
    net.output(net.op("Flatten", net.op("GlobalAveragePool", y)))
    return open_model(net.bytes()).model


def slopes_along_the_width(count: int = 64) -> list[dict[str, np.ndarray]]:
    """Pictures that get lighter from left to right, some more and some less."""
    draw = np.random.default_rng(0)
    steep = draw.uniform(0, 2, (count, 1, 1, 1))
    pictures = steep * np.arange(12) + 0.1 * draw.standard_normal((count, 1, 12, 12))
    return [{"x": part.astype(np.float32)} for part in np.split(pictures, 4)]


def test_what_the_model_takes_for_the_same_is_mirrored() -> None:
    batches = slopes_along_the_width()
    assert mirror_axis(filtered([1, 1]), batches) in (2, 3)
    assert mirror_axis(filtered([-1, 1]), batches) == 2  # along the width it would see nothing


def test_nothing_is_mirrored_that_may_not_be() -> None:
    draw = np.random.default_rng(0)
    pictures = draw.standard_normal((64, 1, 12, 12)).astype(np.float32)
    ramp = np.arange(144, dtype=np.float32).reshape(12, 12)
    net = Net()
    net.output(net.op("Flatten", net.op("Mul", net.input("x", ["N", 1, 12, 12]), net.const(ramp))))
    assert mirror_axis(open_model(net.bytes()).model, [{"x": pictures}]) is None
    assert mirror_axis(open_model(tower()).model, [rows(32)]) is None  # no direction in rank 2


def test_a_mirror_image_is_the_samples_backwards() -> None:
    batch = slopes_along_the_width()[0]
    image = mirror(batch, 3)["x"]
    assert np.array_equal(image[..., ::-1], batch["x"])
    assert image.flags.c_contiguous


def test_images_of_what_judges_do_not_teach() -> None:
    observed = opened(tower(), rows(200))
    pairs = [one for batch in observed.batches for one in (batch, batch)]
    twice = Observed(observed.model, observed.coupling, pairs, seed=0, alike=2)
    for batch in range(len(observed.batches)):
        judged = observed.judges_with(batch)
        assert twice.judges_with(2 * batch) == twice.judges_with(2 * batch + 1) == judged
