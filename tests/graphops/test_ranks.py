"""Low rank: the best split there is, exactly what it says, under budgets, replayed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from nets import Net
from onnx import helper, numpy_helper

import secateur
import secateur.graphops
from secateur.errors import Code, Refused
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.planning import ranks
from secateur.plan import FactoredProduct, Plan

WIDTH = 32


def low(net: Net, out: int, entries: int, rank: int) -> np.ndarray:
    """A matrix of nearly that rank."""
    product = net.draw.standard_normal((out, rank)) @ net.draw.standard_normal((rank, entries))
    noise = 0.02 * net.draw.standard_normal((out, entries))
    return (product / np.sqrt(rank * entries) + noise).astype(np.float32)


def dense(rank: int = 6, op_type: str = "MatMul") -> bytes:
    """Three products, the one in the middle nearly of a low rank."""
    net = Net()
    x = net.op("Relu", net.dense(net.input("x", ["N", 8]), 8, WIDTH))
    weight = low(net, WIDTH, WIDTH, rank)
    if op_type == "Gemm":
        x = net.op("Gemm", x, net.const(weight), net.floats(WIDTH), transB=1, alpha=0.5)
    else:
        x = net.op("Add", net.op("MatMul", x, net.const(weight.T.copy())), net.floats(WIDTH))
    net.output(net.dense(net.op("Relu", x), WIDTH, 4))
    return net.bytes()


def convolutional(rank: int = 6) -> bytes:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, WIDTH, 3))
    weight = net.const(low(net, WIDTH, WIDTH, rank)[..., None, None])
    x = net.op("Conv", x, weight, net.floats(WIDTH), strides=[2, 2], pads=[1, 1, 1, 1])
    net.output(net.conv(net.op("Relu", x), WIDTH, 4))
    return net.bytes()


SOURCES = {
    "MatMul": lambda: dense(),
    "Gemm": lambda: dense(op_type="Gemm"),
    "Conv": convolutional,
}


def samples(source: bytes, count: int = 128) -> dict[str, np.ndarray]:
    draw, value = np.random.default_rng(1), onnx.load_from_string(source).graph.input[0]
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
    return {"x": draw.standard_normal((count, *shape)).astype(np.float32)}


def prune(source: bytes, calibration: Any = None, **fields: Any) -> secateur.Result:
    recipe = secateur.Recipe.parse({"granularity": ["rank"], **fields})
    return secateur.graphops.prune(source, recipe, calibration=calibration, measure_latency=False)


def run(model: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = open_session(model, lean=True).run(None, feeds)[0]
    return found


def offered(source: bytes, feeds: dict[str, np.ndarray] | None = None) -> list[ranks.Candidate]:
    model = open_model(source).model
    coupling = couple(model, infer_shapes(model))
    return ranks.candidates(model, coupling, {}, (), () if feeds is None else [feeds], 0)


@pytest.mark.parametrize("kind", sorted(SOURCES))
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_result_equals_the_original_with_a_weight_of_that_rank(
    kind: str, calibrated: bool
) -> None:
    source = SOURCES[kind]()
    feeds = samples(source)
    given = feeds if calibrated else None
    result = prune(source, given, target={"params": 0.8}, repair=False)
    (one,) = result.plan.factored
    (told,) = result.report.factored
    assert (told.inputs, told.rank, told.outputs) == (WIDTH, one.rank, WIDTH)
    after = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load_from_string(result.model).graph.initializer
    }
    inner, outer = after[f"{one.output}_inner"], after[f"{one.output}_outer"]
    reference = onnx.load_from_string(source)
    node = next(node for node in reference.graph.node if one.output in node.output)
    old = next(tensor for tensor in reference.graph.initializer if tensor.name == node.input[1])
    if kind == "Conv":
        product = np.einsum("or,ri->oi", outer[..., 0, 0], inner[..., 0, 0])[..., None, None]
    else:
        product = inner @ (outer.T if kind == "Gemm" else outer)
        product = product.T if kind == "Gemm" else product
    assert np.linalg.matrix_rank(np.squeeze(product), tol=1e-3) == one.rank
    old.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(product), old.name))
    wanted = run(reference.SerializeToString(), feeds)
    np.testing.assert_allclose(run(result.model, feeds), wanted, atol=1e-4)
    assert result.report.after.params == sum(
        array.size for array in after.values() if array.dtype.kind == "f"
    )
    assert result.report.after.params <= 0.8 * result.report.before.params


def test_no_other_matrix_of_that_rank_loses_less_on_the_data() -> None:
    source = dense()
    feeds = samples(source)
    feeds["x"][:, 4:] *= 0.1  # directions that hardly occur
    (found,) = (one for one in offered(source, feeds) if one.weight.shape == (WIDTH, WIDTH))
    x = activations(source, feeds)
    y = x @ found.weight.T
    for rank in (2, 5, 12):
        factors = found.factors(rank)
        loss = np.square(y - x @ (factors.outer @ factors.inner).T).sum() / np.square(y).sum()
        assert loss == pytest.approx(found.losses[rank], rel=0.05, abs=1e-6)
        best = np.linalg.svd(y, compute_uv=False)
        assert loss == pytest.approx(np.square(best[rank:]).sum() / np.square(best).sum(), rel=0.05)
        u, s, v = np.linalg.svd(found.weight)
        plain = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert loss <= np.square(y - x @ plain.T).sum() / np.square(y).sum() * (1 + 1e-6)


def activations(source: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What the product in the middle reads."""
    proto = onnx.load_from_string(source)
    name = next(node.output[0] for node in proto.graph.node if node.op_type == "Relu")
    del proto.graph.output[:]
    proto.graph.output.append(helper.ValueInfoProto(name=name))
    return run(proto.SerializeToString(), feeds).astype(np.float64)


def test_without_data_it_is_plain_svd() -> None:
    (found,) = (one for one in offered(dense()) if one.weight.shape == (WIDTH, WIDTH))
    u, s, v = np.linalg.svd(found.weight)
    factors = found.factors(5)
    np.testing.assert_allclose(factors.outer @ factors.inner, (u[:, :5] * s[:5]) @ v[:5], atol=1e-6)
    assert found.losses[5] == pytest.approx(np.square(s[5:]).sum() / np.square(s).sum())


@pytest.mark.parametrize("target", [{"macs": 0.7}, {"params": 0.75}, {"macs": 0.9, "params": 0.8}])
def test_budgets_are_met_and_no_rank_less(target: dict[str, float]) -> None:
    source = dense()
    result = prune(source, samples(source), target=target, round_to=1, repair=False)
    before, after = result.report.before, result.report.after
    kept = {"macs": after.macs / before.macs, "params": after.params / before.params}
    assert all(kept[key] <= share for key, share in target.items())
    one_rank = {"macs": 2 * WIDTH / before.macs, "params": 2 * WIDTH / before.params}
    assert any(kept[key] + one_rank[key] > share for key, share in target.items())


def test_the_product_of_low_rank_is_split_and_not_the_other() -> None:
    net = Net()
    x = net.op("Relu", net.dense(net.input("x", ["N", 8]), 8, WIDTH))
    full = np.linalg.qr(net.draw.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    x = net.op("Relu", net.op("MatMul", x, net.const(full)))
    name = net.op("MatMul", x, net.const(low(net, WIDTH, WIDTH, 4)))
    net.output(net.dense(net.op("Relu", name), WIDTH, 4))
    for calibration in (None, samples(net.bytes())):
        result = prune(net.bytes(), calibration, target={"macs": 0.8}, repair=False)
        assert [one.output for one in result.plan.factored] == [name]


def test_repair_refits_what_is_behind() -> None:
    source = dense(rank=20)
    feeds = samples(source, 512)
    drifts = []
    for repair in (False, True):
        result = prune(source, feeds, target={"macs": 0.6}, repair=repair)
        drifts.append(result.report.verification.drift[0].relative_error)
        assert bool(result.report.repair) == repair
    assert drifts[1] < drifts[0]


def test_a_plan_replays() -> None:
    source = dense()
    result = prune(source, target={"macs": 0.7})
    plan = Plan.from_json(result.plan.to_json())
    again = secateur.graphops.prune(source, plan=plan, measure_latency=False)
    assert again.model == result.model
    assert again.plan == result.plan
    for other in ({"rank": 0}, {"rank": WIDTH}, {"output": "nothing"}):
        changed = plan.factored[0].model_copy(update=other)
        wrong = plan.model_copy(update={"factored": (changed,)})
        with pytest.raises(Refused) as caught:
            secateur.graphops.prune(source, plan=wrong, measure_latency=False)
        assert caught.value.refusal.code is Code.INVALID_PLAN


def test_beside_channels_the_best_division_is_taken_and_replays() -> None:
    source = dense(rank=3)
    feeds = samples(source, 256)
    kinds = ["channel", "rank"]
    result = prune(source, feeds, granularity=kinds, target={"macs": 0.6}, round_to=1)
    found = result.report.divisions
    (chosen,) = (one for one in found if one.chosen)
    assert chosen.drift == min(one.drift for one in found if one.drift is not None)
    assert {one.factored for one in found} == {0, 1}
    assert len(result.plan.factored) == chosen.factored
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    again = secateur.graphops.prune(
        source, plan=result.plan, calibration=feeds, measure_latency=False
    )
    assert again.model == result.model


def test_shared_ignored_and_small_weights_stay() -> None:
    net = Net()
    shared = net.const(low(net, WIDTH, WIDTH, 4))
    x = net.op("MatMul", net.input("x", ["N", WIDTH]), shared)
    x = net.op("MatMul", net.op("Relu", x), shared)
    kept = net.op("MatMul", net.op("Relu", x), net.const(low(net, WIDTH, WIDTH, 4)))
    net.output(net.dense(net.op("Relu", kept), WIDTH, 4))
    weight = net.initializers[1].name
    assert prune(net.bytes(), target={"params": 0.99}).plan.factored == (
        FactoredProduct(
            output=kept, rank=prune(net.bytes(), target={"params": 0.99}).plan.factored[0].rank
        ),
    )
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), target={"params": 0.99}, ignore=[weight])
    assert caught.value.refusal.code is Code.NOTHING_TO_PRUNE


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"target": {"channels": 0.5}}, Code.INVALID_RECIPE),
        ({"target": {"size": 0.5}}, Code.INVALID_RECIPE),
        ({"target": {"layers": 0.5}}, Code.INVALID_RECIPE),
        ({"target": {"macs": 0.5}, "criterion": "l2"}, Code.INVALID_RECIPE),
        ({"target": {"macs": 0.5}, "granularity": ["layer", "rank"]}, Code.INVALID_CALIBRATION),
        ({"target": {"macs": 0.01}}, Code.UNREACHABLE_TARGET),
        ({"target": {"macs": 0.5}, "granularity": ["rank", "channel"]}, Code.INVALID_CALIBRATION),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], code: Code) -> None:
    with pytest.raises(Refused) as caught:
        prune(dense(), **fields)
    assert caught.value.refusal.code is code


def test_the_closest_value_of_a_refusal_can_be_reached() -> None:
    with pytest.raises(Refused) as caught:
        prune(dense(), target={"macs": 0.01})
    closest = float(caught.value.refusal.found.split()[0]) + 1e-4
    report = prune(dense(), target={"macs": closest}).report
    assert report.after.macs <= closest * report.before.macs


# -- where one kind has no candidates ----------------------------------------------------------


def outermost(blocks: int = 0) -> bytes:
    """A product between an input and an output: no channel of it can go; and blocks x + f(x) of the
    same width, whose inner channels are too few to be cut."""
    net = Net()
    x = net.input("x", ["N", WIDTH])
    for _ in range(blocks):
        inner = net.op("Tanh", net.op("MatMul", x, net.const(low(net, WIDTH, WIDTH, 4))))
        x = net.op("Add", x, net.op("Mul", inner, net.const(np.float32(0.1))))
    net.output(net.op("MatMul", x, net.const(low(net, WIDTH, WIDTH, 4))))
    return net.bytes()


def spread() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((128, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize(
    "kinds", [["layer", "rank"], ["channel", "rank"], ["layer", "head", "rank"]]
)
def test_ranks_alone_where_there_is_nothing_else(kinds: list[str]) -> None:
    source, target = outermost(), {"params": 0.5}
    result = prune(source, spread(), granularity=kinds, target=target)
    assert len(result.plan.factored) == 1
    assert result.report.after.params <= 0.5 * result.report.before.params
    told = {f"the model has no {kind} that may go" for kind in kinds if kind != "rank"}
    assert told <= set(result.report.warnings)
    assert not any("no rank" in warning for warning in result.report.warnings)
    alone = prune(source, spread(), granularity=["rank"], target=target)
    assert result.model == alone.model


def test_layers_and_ranks_share_a_budget_without_units() -> None:
    source = outermost(blocks=3)
    result = prune(source, spread(), granularity=["layer", "rank"], target={"macs": 0.4})
    assert result.report.after.macs <= 0.4 * result.report.before.macs
    divisions = result.report.divisions
    assert [one.regions for one in divisions] == sorted(one.regions for one in divisions)
    assert {0} < {one.regions for one in divisions}
    assert all(one.factored for one in divisions if one.regions <= 2 and one.drift is not None)
    (chosen,) = (one for one in divisions if one.chosen)
    assert chosen.drift == min(one.drift for one in divisions if one.drift is not None)
    again = secateur.graphops.prune(
        source, plan=result.plan, calibration=spread(), measure_latency=False
    )
    assert again.model == result.model


def test_regions_alone_where_nothing_can_be_split() -> None:
    net = Net()
    x = net.input("x", ["N", 8])
    for _ in range(3):
        x = net.op("Add", x, net.op("MatMul", net.op("Tanh", x), net.floats(8, 8)))
    net.output(x)
    given = {"x": spread()["x"][:, :8]}
    fields: dict[str, Any] = {"granularity": ["layer", "rank"], "target": {"macs": 0.7}}
    result = prune(net.bytes(), given, **fields)
    assert len(result.plan.removed) == 1
    assert "the model has no rank that may go" in result.report.warnings
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), given, **{**fields, "target": {"macs": 0.1}})
    assert caught.value.refusal.code is Code.UNREACHABLE_TARGET
    assert caught.value.refusal.found.startswith("0.3333")


def test_nothing_of_any_kind_is_refused() -> None:
    net = Net()
    net.output(net.op("MatMul", net.input("x", ["N", 8]), net.floats(8, 4)))
    given = {"x": spread()["x"][:, :8]}
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), given, granularity=["layer", "rank", "channel"], target={"macs": 0.5})
    assert caught.value.refusal.code is Code.NOTHING_TO_PRUNE
    assert "layer or rank or channel" in caught.value.refusal.expected


def test_without_data_the_one_kind_there_is_needs_no_weighing() -> None:
    fields: dict[str, Any] = {"granularity": ["rank", "channel"], "target": {"params": 0.5}}
    result = prune(outermost(), **fields)
    assert len(result.plan.factored) == 1
    assert "the model has no channel that may go" in result.report.warnings
    net = Net()
    x = net.op("Relu", net.dense(net.input("x", ["N", 8]), 8, 8))  # too small to be split
    net.output(net.dense(x, 8, 4))
    result = prune(net.bytes(), **fields)
    assert result.plan.kept and not result.plan.factored
    assert "the model has no rank that may go" in result.report.warnings
    assert result.report.after.params <= 0.5 * result.report.before.params
