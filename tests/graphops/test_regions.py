"""Regions: found by dominance alone, refused with reasons, and left out exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import Net, attention

import secateur
import secateur.graphops
from secateur.errors import Code, Refused
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.pipeline import carrying_out
from secateur.graphops.planning import division, removal
from secateur.graphops.regions.find import find
from secateur.graphops.regions.flowgraph import FlowGraph
from secateur.graphops.surgery.bypass import bypass
from secateur.graphops.verify.law import check_law
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Region


def regions(source: bytes, ignore: tuple[str, ...] = ()) -> dict[tuple[str, str], Region]:
    found = secateur.graphops.inspect(source, Recipe(ignore=ignore)).regions
    return {(one.entry, one.exit): one for one in found if not one.refused}


def refusals(source: bytes, ignore: tuple[str, ...] = ()) -> dict[str, str]:
    found = secateur.graphops.inspect(source, Recipe(ignore=ignore)).regions
    return {one.layers[0]: one.refused for one in found if one.refused}


def run(model: onnx.ModelProto | bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    found: list[np.ndarray] = open_session(content, lean=True).run(None, feeds)
    return found


def without(source: bytes, entries: dict[str, str]) -> bytes:
    return bytes(ir.to_proto(bypass(open_model(source).model, entries)).SerializeToString())


# -- what is found -----------------------------------------------------------------------------


def test_a_residual_branch_and_what_is_nested_in_it() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    inner = net.conv(x, 8, 8, 3)
    active = net.op("Relu", inner)
    branch = net.conv(active, 8, 8, 3)
    total = net.op("Add", x, branch)
    net.output(net.conv(total, 8, 4))
    found = regions(net.bytes())
    assert set(found) == {(x, total), (inner, branch), (active, branch)}
    assert found[x, total].layers == (inner, branch)
    assert found[x, total].params == 2 * (8 * 8 * 9 + 8)
    assert found[x, total].macs == 2 * 2 * 8 * 8 * 9 * 36
    assert set(refusals(net.bytes())) == {x, net.nodes[-1].name}


def test_a_transformer_block_its_halves_and_its_norms() -> None:
    net = Net()
    start = net.dense(net.input("x", [2, 4, 6]), 6, 8)

    def norm(value: str) -> str:
        return net.op("LayerNormalization", value, net.floats(8), net.floats(8))

    mixed = net.op("Add", start, attention(net, norm(start), 8, 2, 4, 4))
    inner = net.dense(net.op("Relu", net.dense(norm(mixed), 8, 16)), 16, 8)
    end = net.op("Add", mixed, inner)
    net.output(net.dense(end, 8, 3))
    found = regions(net.bytes())
    assert {(start, mixed), (mixed, end), (start, end)} <= set(found)
    assert len(found[start, mixed].layers) == 4
    assert len(found[start, end].layers) == 6


def test_a_mask_is_a_condition_and_no_second_entry() -> None:
    net = Net()
    x, mask = net.input("x", [2, 4, 8]), net.input("mask", [2, 4])
    wide = net.op("Unsqueeze", net.op("Mul", mask, net.const(np.float32(-9))), net.ints(1))
    stream = net.dense(x, 8, 8)
    ends = []
    for _ in range(2):
        scores = net.op("MatMul", stream, net.op("Transpose", stream, perm=[0, 2, 1]))
        shares = net.op("Softmax", net.op("Add", scores, wide), axis=-1)
        inner = net.dense(net.op("MatMul", shares, stream), 8, 8)
        ends.append(stream)
        stream = net.op("Add", stream, inner)
    net.output(net.dense(stream, 8, 3))
    assert {(ends[0], ends[1]), (ends[1], stream), (ends[0], stream)} <= set(regions(net.bytes()))


def test_a_run_of_equal_convolutions() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    first = net.conv(net.op("Relu", x), 8, 8)
    second = net.op("Relu", first)
    last = net.conv(second, 8, 8)
    net.output(net.conv(last, 8, 2))
    found = regions(net.bytes())
    assert {(x, first), (x, second), (second, last), (x, last)} <= set(found)


def test_a_recurrent_layer_of_equal_width() -> None:
    net = Net()
    x = net.dense(net.input("x", [5, 2, 4]), 4, 8, bias=False)
    weights = [net.floats(1, 24, 8), net.floats(1, 24, 8)]
    y = net.op("GRU", x, *weights, hidden_size=8)
    end = net.op("Squeeze", y, net.ints(1))
    net.output(net.dense(end, 8, 3))
    assert (x, end) in regions(net.bytes())


# -- what is not -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net, x: net.conv(x, 8, 6), "(2, 8, 6, 6) enters and (2, 6, 6, 6) leaves"),
        (lambda net, x: net.conv(x, 8, 8, 3, strides=[2, 2]), "(2, 8, 3, 3) leaves"),
    ],
    ids=["width", "size"],
)
def test_other_shapes_are_refused(make: object, words: str) -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    y = make(net, x)  # type: ignore[operator]
    net.output(net.op("ReduceMean", net.op("Relu", y), axes=[2, 3]))
    assert words in refusals(net.bytes())[y]


def test_a_second_stream_is_refused() -> None:
    net = Net()
    x = net.input("x", [2, 3, 6, 6])
    other, start = net.conv(x, 3, 8), net.conv(x, 3, 8)
    inner = net.conv(start, 8, 8)
    total = net.op("Add", inner, other)
    net.output(net.conv(total, 8, 2))
    assert (start, total) not in regions(net.bytes())
    assert (start, inner) in regions(net.bytes())  # the convolution alone may go


def test_what_is_read_outside_is_refused() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    inner = net.op("Relu", net.conv(x, 8, 5))
    end = net.op("Add", x, net.conv(inner, 5, 8))
    net.output(net.conv(end, 8, 2))
    net.output(inner)
    assert (x, end) not in regions(net.bytes())


def test_other_types_are_refused() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    end = net.op("Cast", net.conv(x, 8, 8), to=onnx.TensorProto.DOUBLE)
    net.output(net.op("Relu", net.op("Sqrt", end)), onnx.TensorProto.DOUBLE)
    assert end not in {pair[1] for pair in regions(net.bytes())}


def test_a_region_that_holds_every_layer_is_refused() -> None:
    net = Net()
    x = net.input("x", [2, 3, 6, 6])
    y = net.conv(x, 3, 3)
    net.output(net.op("Relu", y))
    assert not regions(net.bytes())
    assert refusals(net.bytes())[y] == "it holds every layer of the model"


def test_ignore_keeps_a_region() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    inner = net.conv(x, 8, 8)
    end = net.op("Add", x, inner)
    net.output(net.conv(end, 8, 2))
    assert (x, end) in regions(net.bytes())
    assert not regions(net.bytes(), ignore=(inner,))
    assert "--ignore" in refusals(net.bytes(), ignore=(inner,))[inner]


# -- leaving them out --------------------------------------------------------------------------


def random_net(seed: int) -> Net:
    """Residual blocks, plain runs and concatenations in a random order."""
    net = Net(seed=seed)
    draw = np.random.default_rng(seed)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    for _ in range(draw.integers(2, 6)):
        kind = draw.integers(4)
        if kind == 0:  # residual, its branch of another width
            y = net.op("Relu", net.conv(x, 8, int(draw.integers(2, 9)), 3))
            width = net.initializers[-2].dims[0]
            x = net.op("Add", x, net.conv(y, width, 8))
        elif kind == 1:
            x = net.op("Relu", net.conv(x, 8, 8, 3))
        elif kind == 2:  # a depthwise gate
            x = net.op("Mul", x, net.op("Sigmoid", net.conv(x, 8, 8, 3, group=8)))
        else:
            both = net.op("Concat", net.conv(x, 8, 4), net.conv(x, 8, 4), axis=1)
            x = net.op("Add", net.op("Tanh", both), x)
    net.output(x if draw.random() < 0.3 else net.conv(x, 8, 4))
    return net


@pytest.mark.parametrize("seed", range(12))
def test_every_region_of_random_nets_equals_an_identity(seed: int) -> None:
    source = random_net(seed).bytes()
    opened = open_model(source)
    graph = FlowGraph(opened.model.graph, couple(opened.model, infer_shapes(opened.model)))
    found, _ = find(graph)
    feeds = {"x": np.random.default_rng(seed).standard_normal((3, 3, 6, 6)).astype(np.float32)}
    for one in found:
        proto = onnx.load_from_string(source)
        by_hand = onnx.helper.make_node("Identity", [one.entry], [f"{one.exit}_"])
        place = next(i for i, node in enumerate(proto.graph.node) if one.exit in node.output)
        proto.graph.node.insert(place, by_hand)
        for node in proto.graph.node[place + 1 :]:
            node.input[:] = [f"{name}_" if name == one.exit else name for name in node.input]
            node.output[:] = [f"{n}__old" if n == one.exit else n for n in node.output]
        if one.exit == proto.graph.output[0].name:
            by_hand = onnx.helper.make_node("Identity", [f"{one.exit}_"], [one.exit])
            proto.graph.node.append(by_hand)
        model = without(source, {one.exit: one.entry})
        assert np.array_equal(run(proto, feeds)[0], run(model, feeds)[0])
        left = {name for node in onnx.load_from_string(model).graph.node for name in node.output}
        gone = {name for place in one.nodes for name in graph.writes[place]}
        assert gone - left >= gone - {one.exit}
        assert {name for names in graph.writes for name in names} - gone <= left


def test_a_branch_left_out_equals_its_last_weights_zeroed() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    inner = net.op("Relu", net.conv(x, 8, 5, 3))
    last = net.conv(inner, 5, 8)
    total = net.op("Add", x, last)
    net.output(net.conv(net.op("Relu", total), 8, 4))
    zeroed = net.model()
    names = next(node for node in zeroed.graph.node if last in node.output).input[1:]
    for tensor in zeroed.graph.initializer:
        if tensor.name in names:
            tensor.raw_data = bytes(len(tensor.raw_data))
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    model = without(net.bytes(), {total: x})
    np.testing.assert_allclose(run(zeroed, feeds)[0], run(model, feeds)[0], rtol=1e-6)


def test_a_chain_of_regions_and_a_graph_output() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8)
    first = net.op("Add", x, net.conv(x, 8, 8))
    end = net.op("Add", first, net.conv(first, 8, 8))
    net.output(end)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    model = without(net.bytes(), {first: x, end: first})
    proto = onnx.load_from_string(model)
    assert [node.op_type for node in proto.graph.node] == ["Conv", "Identity"]
    assert proto.graph.output[0].name == end
    only = net.model()
    del only.graph.output[:]
    only.graph.output.append(onnx.ValueInfoProto(name=x))
    assert np.array_equal(run(only, feeds)[0], run(model, feeds)[0])


# -- choosing ----------------------------------------------------------------------------------


def residual(seed: int = 0, blocks: int = 4, idle: int = 2) -> tuple[bytes, list[str]]:
    """Residual blocks, one of which hardly adds anything; and the streams between them."""
    net = Net(seed=seed)
    streams = [net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)]
    for block in range(blocks):
        inner = net.op("Relu", net.conv(streams[-1], 8, 8, 3))
        last = net.conv(inner, 8, 8)
        if block == idle:
            last = net.op("Mul", last, net.const(np.float32(0.01)))
        streams.append(net.op("Add", streams[-1], last))
    net.output(net.conv(streams[-1], 8, 4))
    return net.bytes(), streams


def samples(count: int = 64) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {"x": draw.standard_normal((count, 3, 6, 6)).astype(np.float32)}


def prune(source: bytes, calibration: object = None, **fields: object) -> secateur.Result:
    recipe = secateur.Recipe.parse({"granularity": ["layer"], **fields})
    return secateur.graphops.prune(source, recipe, calibration=calibration, measure_latency=False)  # type: ignore[arg-type]


def test_the_block_that_matters_least_goes() -> None:
    source, streams = residual()
    result = prune(source, samples(), target={"layers": 0.8}, repair=False)
    (one,) = result.plan.removed
    assert (one.entry, one.exit) == (streams[2], streams[3])
    (removal,) = result.report.removed
    assert removal.drift is not None
    assert removal.influence is not None
    assert 0 < removal.drift < 1e-3
    assert 0 <= removal.influence < 1e-3
    assert check_law(source, result).difference < 1e-5


@pytest.mark.parametrize("target", [{"macs": 0.6}, {"params": 0.6}, {"macs": 0.7, "layers": 0.5}])
def test_targets_are_met_from_below_and_no_region_more(target: dict[str, float]) -> None:
    source, _ = residual(blocks=5)
    result = prune(source, samples(), target=target, repair=False)
    report = result.report
    kept = {
        "macs": report.after.macs / report.before.macs,
        "params": report.after.params / report.before.params,
        "layers": 1 - sum(len(one.region.layers) for one in report.removed) / 12,
    }
    assert all(kept[key] <= share for key, share in target.items())
    for one in report.removed:
        back = {
            "macs": kept["macs"] + one.region.macs / report.before.macs,
            "params": kept["params"] + one.region.params / report.before.params,
            "layers": kept["layers"] + len(one.region.layers) / 12,
        }
        assert any(back[key] > share for key, share in target.items())


def test_the_pruned_model_counts_what_the_plan_says() -> None:
    source, _ = residual()
    result = prune(source, samples(), target={"layers": 0.6})
    before, after = onnx.load_from_string(source), onnx.load_from_string(result.model)
    gone = {name for one in result.plan.removed for name in one.nodes}
    outputs = [node.output[0] for node in before.graph.node]
    assert [name for name in outputs if name not in gone] == [n.output[0] for n in after.graph.node]
    read = {name for node in after.graph.node for name in node.input}
    assert {tensor.name for tensor in after.graph.initializer} <= read


def test_repair_takes_over_part_of_what_went() -> None:
    source, _ = residual(idle=-1)
    fields = {"target": {"layers": 0.85}}
    bare = prune(source, samples(256), **fields, repair=False)
    repaired = prune(source, samples(256), **fields)
    assert repaired.plan.removed == bare.plan.removed
    assert repaired.report.repair
    drifts = [one.report.verification.drift[0].relative_error for one in (repaired, bare)]
    assert drifts[0] < 0.8 * drifts[1]


def test_a_plan_replays_without_data() -> None:
    source, _ = residual()
    result = prune(source, samples(), target={"layers": 0.6}, repair=False)
    plan = Plan.from_json(result.plan.to_json())
    again = secateur.graphops.prune(source, plan=plan, measure_latency=False)
    assert again.model == result.model
    assert again.plan == result.plan


def test_a_plan_that_removes_something_else_is_refused() -> None:
    source, _ = residual()
    plan = prune(source, samples(), target={"layers": 0.6}, repair=False).plan
    first = plan.removed[0]
    for other in (
        first.model_copy(update={"exit": first.entry}),
        first.model_copy(update={"nodes": first.nodes[1:]}),
    ):
        changed = plan.model_copy(update={"removed": (other,)})
        with pytest.raises(Refused) as caught:
            secateur.graphops.prune(source, plan=changed, measure_latency=False)
        assert caught.value.refusal.code is Code.INVALID_PLAN
    twice = plan.model_copy(update={"removed": (first, first)})
    with pytest.raises(Refused, match="overlaps"):
        secateur.graphops.prune(source, plan=twice, measure_latency=False)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"target": {"channels": 0.5}}, Code.INVALID_RECIPE),
        ({"target": {"macs": 0.5}, "criterion": "l2"}, Code.INVALID_RECIPE),
        ({"target": {"channels": 0.5}, "granularity": ["layer", "head"]}, Code.INVALID_RECIPE),
        ({"target": {"layers": 0.5}, "granularity": ["channel"]}, Code.INVALID_RECIPE),
        ({"target": {"layers": 0.1}}, Code.UNREACHABLE_TARGET),
    ],
    ids=["channels", "criterion", "combined", "layers of channels", "too far"],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, object], code: Code) -> None:
    source, _ = residual()
    with pytest.raises(Refused) as caught:
        prune(source, samples(), **fields)
    assert caught.value.refusal.code is code


def test_the_closest_value_of_a_refusal_can_be_reached() -> None:
    source, _ = residual()
    with pytest.raises(Refused) as caught:
        prune(source, samples(), target={"layers": 0.1})
    closest = float(caught.value.refusal.found.split()[0])
    assert closest == pytest.approx(2 / 10)
    prune(source, samples(), target={"layers": closest}, repair=False)


def test_layers_need_data() -> None:
    source, _ = residual()
    with pytest.raises(Refused) as caught:
        prune(source, target={"macs": 0.5})
    assert caught.value.refusal.code is Code.INVALID_CALIBRATION


def test_a_model_without_regions_is_refused() -> None:
    net = Net()
    net.output(net.conv(net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)), 8, 4))
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), samples(), target={"macs": 0.5})
    assert caught.value.refusal.code is Code.NOTHING_TO_PRUNE


# -- beside units ------------------------------------------------------------------------------

KINDS = ["layer", "channel", "head"]


def test_idle_regions_go_and_channels_make_up_the_rest() -> None:
    source, streams = residual()
    result = prune(source, samples(), granularity=KINDS, target={"macs": 0.6}, repair=False)
    assert (streams[2], streams[3]) in [(one.entry, one.exit) for one in result.plan.removed]
    assert result.plan.kept
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    assert check_law(source, result).difference < 1e-5
    again = secateur.graphops.prune(source, plan=result.plan, measure_latency=False)
    assert again.model == result.model
    assert again.plan == result.plan


def test_divisions_are_measured_and_the_best_is_taken() -> None:
    source, _ = residual(blocks=5, idle=-1)
    found = prune(source, samples(256), granularity=KINDS, target={"macs": 0.5}).report.divisions
    assert [one.regions for one in found] == sorted({one.regions for one in found})
    assert found[0].regions == 0
    least = min((one for one in found if one.drift is not None), key=lambda one: one.drift)
    compared = [one for one in found if one.final_drift is not None]
    assert compared == ([found[0], least] if least.regions else [])
    (chosen,) = (one for one in found if one.chosen)
    assert chosen == min(compared or [least], key=lambda one: one.final_drift or 0)


@pytest.mark.parametrize("alone", [False, True])
def test_units_alone_are_carried_out_beside_the_best_division(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = residual()
    given = {"granularity": KINDS, "target": {"macs": 0.6}}
    if alone:  # the whole repair does harm where a region went, which few samples did not show

        def refit_together(pruned: ir.Model, *args: Any) -> tuple[()]:
            if len(pruned.graph) < nodes:
                for value in pruned.graph.initializers.values():
                    value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)
            return ()

        nodes = len(onnx.load_from_string(source).graph.node)
        monkeypatch.setattr(carrying_out, "refit_together", refit_together)
    result = prune(source, samples(256), **given)
    found = result.report.divisions
    (chosen,) = (one for one in found if one.chosen)
    compared = {one.regions: one.final_drift for one in found if one.final_drift is not None}
    assert len(compared) == 2
    assert compared[chosen.regions] == min(compared.values())
    assert chosen.regions == len(result.plan.removed)
    assert (chosen.regions == 0) == alone
    if alone:
        units = prune(source, samples(256), target=given["target"], granularity=KINDS[1:])
        assert result.model == units.model


def test_regions_alone_where_units_do_not_reach() -> None:
    source, streams = residual(blocks=3)
    target = {"macs": 0.9}
    kinds = ["layer", "head"]  # there is none
    result = prune(source, samples(), granularity=kinds, target=target, repair=False)
    alone = prune(source, samples(), target=target, repair=False)
    assert [(one.entry, one.exit) for one in alone.plan.removed] == [(streams[2], streams[3])]
    assert result.plan.removed == alone.plan.removed
    assert result.model == alone.model
    assert [one.drift is None for one in result.report.divisions] == [True, False]


def test_layers_and_a_budget_are_both_met() -> None:
    source, _ = residual(blocks=5)
    target = {"layers": 0.7, "params": 0.5}
    report = prune(source, samples(), granularity=KINDS, target=target).report
    assert sum(len(one.region.layers) for one in report.removed) >= 4
    assert report.after.params <= 0.5 * report.before.params
    assert all(one.regions for one in report.divisions)


def test_what_nothing_reaches_is_refused_with_the_closest() -> None:
    source, _ = residual()
    fields = {"granularity": KINDS, "repair": False}
    with pytest.raises(Refused) as caught:
        prune(source, samples(), target={"macs": 0.001}, **fields)
    assert caught.value.refusal.code is Code.UNREACHABLE_TARGET
    closest = float(caught.value.refusal.found.split()[0])
    report = prune(source, samples(), target={"macs": closest + 1e-4}, **fields).report
    assert report.after.macs <= (closest + 1e-4) * report.before.macs


def test_single_weights_go_after_regions() -> None:
    source, streams = residual()
    fields = {"granularity": ["layer", "weight"], "sparsity": "0.5", "target": {"layers": 0.8}}
    result = prune(source, samples(), **fields)
    assert [(one.entry, one.exit) for one in result.plan.removed] == [(streams[2], streams[3])]
    sparse = {one.tensor for one in result.report.sparse_weights}
    graph = onnx.load_from_string(result.model).graph
    arrays = [onnx.numpy_helper.to_array(one) for one in graph.initializer if one.name in sparse]
    zeros = sum(int((array == 0).sum()) for array in arrays)
    assert len(arrays) == len(sparse)
    assert 0.5 <= zeros / sum(array.size for array in arrays) < 0.55


@pytest.mark.parametrize(
    ("drifts", "least", "tried"),
    [
        ([1, 2, 3, 4, 5], 0, {0, 1, 2, 4}),
        ([5, 4, 3, 2, 1], 4, {0, 2, 3, 4}),
        ([5, 1, 3, 4, 5], 1, {0, 1, 2, 3, 4}),
        ([7], 0, {0}),
    ],
)
def test_divisions_are_halved_towards_the_best(
    drifts: list[float], least: int, tried: set[int]
) -> None:
    found = division.search(len(drifts) - 1, lambda count: drifts[count])
    assert set(found) == tried
    assert division.best(found) == least


def test_influence_is_the_same_where_not_all_values_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    source, streams = residual()
    opened = open_model(source)
    coupling = couple(opened.model, infer_shapes(opened.model))
    offer = removal.Offer.of(opened.model.graph, coupling, {}, 1, ())
    observed = Observed(opened.model, coupling, [samples()], 0)
    together = removal.influences(observed, offer)
    monkeypatch.setattr(removal, "HOLD", 0)
    one_by_one = removal.influences(observed, offer)
    assert together.keys() == one_by_one.keys()
    for region, value in together.items():
        assert one_by_one[region] == pytest.approx(value, abs=1e-6)
    least = min(together, key=lambda region: together[region])
    assert (least.entry, least.exit) == (streams[2], streams[3])
