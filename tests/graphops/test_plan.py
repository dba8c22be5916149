"""The plan as a value: golden, replayable, refused when it does not fit, true to the tensors.

The golden plans say what a prune of the digit models decides. After a deliberate change of the
coupling or the planning, write them anew and read the difference:

    SECATEUR_REGENERATE_GOLDEN=1 python -m pytest tests/graphops/test_plan.py
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import onnx
import pytest
from laws import prune
from nets import Net
from onnx import numpy_helper

import secateur
from secateur.errors import Code, Refused
from secateur.plan import KeptTensor, Plan

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
GOLDEN = pathlib.Path(__file__).parent / "golden"
RECIPES: dict[str, dict[str, Any]] = {
    "digits_cnn": {"target": {"macs": 0.5}},
    "digits_transformer": {"target": {"channels": 0.5}, "criterion": "l1"},
}


@pytest.fixture(scope="module", params=sorted(RECIPES))
def pruned(request: pytest.FixtureRequest) -> tuple[pathlib.Path, secateur.Result]:
    path = DIGITS / f"{request.param}.onnx"
    return path, prune(path, repair=None, **RECIPES[request.param])  # every default


def test_golden(pruned: tuple[pathlib.Path, secateur.Result]) -> None:
    path, result = pruned
    golden = GOLDEN / f"{path.stem}.plan.json"
    found = json.loads(result.plan.to_json())
    if os.environ.get("SECATEUR_REGENERATE_GOLDEN"):
        golden.write_text(json.dumps(found, indent=1) + "\n")
        pytest.skip(f"wrote {golden.name}")
    assert found == json.loads(golden.read_text()), f"another plan than {golden.name}"


def test_a_golden_plan_replays(pruned: tuple[pathlib.Path, secateur.Result]) -> None:
    path, result = pruned
    plan = Plan.load(GOLDEN / f"{path.stem}.plan.json")
    assert prune(path, plan=plan).model == result.model


def test_golden_of_whole_layers() -> None:
    path, golden = (
        DIGITS / "digits_transformer.onnx",
        GOLDEN / "digits_transformer_layers.plan.json",
    )
    recipe = secateur.Recipe(granularity=("layer",), target={"layers": 0.8}, repair=False)
    found = secateur.prune(
        path, recipe, calibration=DIGITS / "calibration.npz", measure_latency=False
    )
    if os.environ.get("SECATEUR_REGENERATE_GOLDEN"):
        golden.write_text(json.dumps(json.loads(found.plan.to_json()), indent=1) + "\n")
        pytest.skip(f"wrote {golden.name}")
    assert found.plan == Plan.load(golden), f"another plan than {golden.name}"
    assert secateur.prune(path, plan=Plan.load(golden), measure_latency=False).model == found.model


def test_replay_gives_the_same_bytes(pruned: tuple[pathlib.Path, secateur.Result]) -> None:
    path, result = pruned
    again = prune(path, plan=Plan.from_json(result.plan.to_json()))
    assert again.model == result.model
    assert again.plan == result.plan


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_kept_entries_are_exact_slices(name: str) -> None:
    path = DIGITS / f"{name}.onnx"
    result = prune(path, repair=False, **RECIPES[name])
    before, after = weights(onnx.load(path)), weights(onnx.load_from_string(result.model))
    assert result.plan.kept
    for entry in result.plan.kept:
        expected = before[entry.source]
        for axis, indices in entry.axes.items():
            assert list(indices) == sorted(set(indices))
            assert len(indices) < expected.shape[axis]
            expected = np.take(expected, indices, axis=axis)
        assert np.array_equal(after[entry.tensor], expected)
    untouched = set(before) & set(after) - {entry.tensor for entry in result.plan.kept}
    floats = [name for name in untouched if before[name].dtype.kind == "f"]
    assert floats
    for name in floats:
        assert np.array_equal(before[name], after[name])


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Initializers and outputs of Constant nodes, by name."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def test_nodes_that_stay_keep_the_names_of_their_outputs(
    pruned: tuple[pathlib.Path, secateur.Result],
) -> None:
    path, result = pruned
    before = {name for node in onnx.load(path).graph.node for name in node.output}
    after = {
        name for node in onnx.load_from_string(result.model).graph.node for name in node.output
    }
    assert len(after - before) == 0


def test_a_plan_of_constants_names_their_outputs() -> None:
    net = Net()
    weight = net.constant(net.draw.standard_normal((8, 4, 1, 1)).astype(np.float32))
    x = net.op("Conv", net.input("x", [2, 4, 6, 6]), weight)
    net.output(net.conv(net.op("Relu", x), 8, 3))
    result = prune(net.bytes())
    assert weight in {entry.tensor for entry in result.plan.kept}
    assert prune(net.bytes(), plan=result.plan).model == result.model


def test_a_plan_survives_shared_vectors() -> None:
    net = Net()
    shared, x = net.floats(8), net.input("x", [2, 4, 6, 6])
    a = net.op("Relu", net.op("Conv", x, net.floats(8, 4, 1, 1), shared))
    b = net.op("Relu", net.op("Conv", a, net.floats(8, 8, 1, 1), shared))
    c = net.op("Relu", net.op("Conv", b, net.floats(8, 8, 1, 1), net.op("Identity", shared)))
    net.output(net.conv(c, 8, 3))
    result = prune(net.bytes(), criterion="random")
    assert len([entry for entry in result.plan.kept if entry.source == shared]) == 3
    assert prune(net.bytes(), plan=result.plan).model == result.model


# -- refused -----------------------------------------------------------------------------------


def refusal(source: Any, plan: Plan) -> secateur.Refusal:
    with pytest.raises(Refused) as caught:
        prune(source, plan=plan)
    assert caught.value.refusal.code is Code.INVALID_PLAN
    return caught.value.refusal


def model_and_plan() -> tuple[bytes, Plan]:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8))
    net.output(net.conv(net.op("Relu", net.conv(x, 8, 6)), 6, 3))
    return net.bytes(), prune(net.bytes()).plan


def changed(plan: Plan, place: int, **fields: Any) -> Plan:
    """The plan with one entry changed."""
    entries = list(plan.kept)
    entries[place] = KeptTensor(**{**entries[place].model_dump(), **fields})
    return plan.model_copy(update={"kept": tuple(entries)})


def test_a_plan_for_another_model_is_refused() -> None:
    source, plan = model_and_plan()
    other = Net(seed=1)
    x = other.op("Relu", other.conv(other.input("x", [2, 4, 6, 6]), 4, 8))
    other.output(other.conv(other.op("Relu", other.conv(x, 8, 6)), 6, 3))
    found = refusal(other.bytes(), plan)
    assert plan.source in found.expected
    assert found.found != plan.source
    assert prune(source, plan=plan).plan == plan


def test_a_plan_that_keeps_part_of_a_unit_is_refused() -> None:
    source, plan = model_and_plan()
    first = plan.kept[0]
    kept = first.axes[0]
    moved = (*kept[:-1], next(i for i in range(8) if i not in kept))
    found = refusal(source, changed(plan, 0, axes={**first.axes, 0: tuple(sorted(moved))}))
    assert found.nodes


def test_a_plan_that_lacks_a_tensor_is_refused() -> None:
    source, plan = model_and_plan()
    refusal(source, plan.model_copy(update={"kept": plan.kept[1:]}))


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor": "no such"},
        {"axes": {7: (0, 1)}},
        {"axes": {0: (0, 99)}},
        {"axes": {0: (-1, 2)}},
        {"axes": {-4: (0, 1, 2, 3)}},
        {"axes": {0: ()}},
    ],
    ids=["tensor", "axis", "index beyond", "negative index", "negative axis", "nothing left"],
)
def test_a_plan_that_names_what_is_not_there_is_refused(fields: dict[str, Any]) -> None:
    source, plan = model_and_plan()
    refusal(source, changed(plan, 0, **fields))


def test_a_plan_that_cuts_the_kernel_is_refused() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8, 3))
    net.output(net.conv(x, 8, 3))
    plan = prune(net.bytes()).plan
    axes = {**plan.kept[0].axes, 2: (0, 1)}
    refusal(net.bytes(), changed(plan, 0, axes=axes))


def test_a_plan_that_names_another_source_is_refused() -> None:
    source, plan = model_and_plan()
    refusal(source, changed(plan, 0, source=plan.kept[1].tensor))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "not json",
        '{"version": 2}',
        "null",
        '{"version":1,"source":"","kept":[],"x":1}',
    ],
)
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(Refused) as caught:
        Plan.from_json(text)
    assert caught.value.refusal.code is Code.INVALID_PLAN


def test_a_plan_file_that_is_not_there_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(Refused) as caught:
        Plan.load(tmp_path / "none.json")
    assert caught.value.refusal.code is Code.INVALID_PLAN
