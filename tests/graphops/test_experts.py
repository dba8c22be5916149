"""Mixtures of experts: whole experts are units, and go with their columns of the router."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from laws import FLOAT32, Analysis, lawful, prune
from nets import Net
from onnx import TensorProto, helper, numpy_helper

from secateur import Recipe
from secateur.errors import Code, Refused
from secateur.graphops.surgery.cut import cut
from secateur.graphops.verify.law import check_law
from secateur.plan import Plan

E, D, H, T, K = 6, 8, 12, 10, 2  # experts, width, width inside, tokens, experts of a token

Mixture = Callable[[Net, str, str], str]  # tokens (T, D), logits (T, E) → (T, D)


def model(mixture: Mixture, router: np.ndarray | None = None, ir: int | None = None) -> bytes:
    """Tokens → a dense layer → the mixture → a dense layer; the router's bias is `router`."""
    net = Net(ir=ir)
    net.domains["com.microsoft"] = 1
    x = net.op("Tanh", net.dense(net.input("x", [T, D]), D, D))
    logits = net.op("MatMul", x, net.floats(D, E, name="router"))
    if router is not None:
        logits = net.op("Add", logits, net.const(router.astype(np.float32), "bias"))
    y = mixture(net, x, logits)
    net.output(net.dense(net.op("Tanh", net.dense(y, D, 7)), 7, 3))
    return net.bytes()


def _all(net: Net, x: str) -> str:
    """Every expert on every token, (E, T, D)."""
    inner = net.op("MatMul", net.op("Unsqueeze", x, net.ints(0)), net.floats(E, D, H, name="W1"))
    return net.op("MatMul", net.op("Tanh", inner), net.floats(E, H, D, name="W2"))


def _sum(net: Net, gates: str, y: str) -> str:
    """(T, E), (E, T, D) → (T, D)."""
    gates = net.op("Unsqueeze", net.op("Transpose", gates, perm=[1, 0]), net.ints(2))
    return net.op("ReduceSum", net.op("Mul", gates, y), net.ints(0), keepdims=0)


def _top(net: Net, logits: str) -> list[str]:
    """Weights and numbers of the experts that go on, (T, K)."""
    weights = net.op("Softmax", logits, axis=-1)
    return net.ops("TopK", weights, net.ints(K), outputs=2, axis=-1, name="top")


def soft(net: Net, x: str, logits: str) -> str:
    return _sum(net, net.op("Softmax", logits, axis=-1), _all(net, x))


def scattered(net: Net, x: str, logits: str) -> str:
    weights, chosen = _top(net, logits)
    nothing = net.op("ConstantOfShape", net.ints(T, E))
    return _sum(net, net.op("ScatterElements", nothing, chosen, weights, axis=1), _all(net, x))


def renormalised(net: Net, x: str, logits: str) -> str:
    weights, chosen = net.ops("TopK", logits, net.ints(K), outputs=2, axis=-1, name="top")
    weights = net.op("Softmax", weights, axis=-1)
    nothing = net.op("Mul", logits, net.const(np.float32(0)))
    return _sum(net, net.op("ScatterElements", nothing, chosen, weights, axis=1), _all(net, x))


def _masked(net: Net, x: str, weights: str, mask: str) -> str:
    gates = net.op("Mul", mask, net.op("Unsqueeze", weights, net.ints(-1)))
    return _sum(net, net.op("ReduceSum", gates, net.ints(1), keepdims=0), _all(net, x))


def one_hot(net: Net, x: str, logits: str) -> str:
    weights, chosen = _top(net, logits)
    bits = net.const(np.array([0, 1], np.float32))
    mask = net.op("OneHot", chosen, net.const(np.array(E)), bits, axis=-1)
    return _masked(net, x, weights, mask)


def compared(net: Net, x: str, logits: str) -> str:
    weights, chosen = _top(net, logits)
    mask = net.op("Equal", net.op("Unsqueeze", chosen, net.ints(-1)), net.const(np.arange(E)))
    return _masked(net, x, weights, net.op("Cast", mask, to=TensorProto.FLOAT))


def gathered(net: Net, x: str, logits: str) -> str:
    weights, chosen = _top(net, logits)
    first = net.op("Gather", net.floats(E, D, H, name="W1"), chosen)  # (T, K, D, H)
    second = net.op("Gather", net.floats(E, H, D, name="W2"), chosen)
    shift = net.op("Unsqueeze", net.op("Gather", net.floats(E, H), chosen), net.ints(2))
    inner = net.op("MatMul", net.op("Unsqueeze", x, net.ints(1, 2)), first)
    y = net.op("MatMul", net.op("Tanh", net.op("Add", inner, shift)), second)  # (T, K, 1, D)
    y = net.op("Mul", net.op("Squeeze", y, net.ints(2)), net.op("Unsqueeze", weights, net.ints(2)))
    return net.op("ReduceSum", y, net.ints(1), keepdims=0)


def switch(net: Net, x: str, logits: str) -> str:
    weights = net.op("Softmax", logits, axis=-1)
    chosen = net.op("ArgMax", weights, axis=-1, keepdims=0)
    bits = net.const(np.array([0, 1], np.float32))
    mask = net.op("OneHot", chosen, net.const(np.array([E])), bits, axis=-1)
    return _sum(net, net.op("Mul", mask, weights), _all(net, x))


def fused(net: Net, x: str, logits: str, activation: str = "silu", k: int = K) -> str:
    gates = 2 if activation == "swiglu" else 1
    weights = [net.floats(E, gates * H, D, name="W1"), net.floats(E, gates * H)]
    weights += [net.floats(E, D, H, name="W2"), net.floats(E, D)]
    more = {"swiglu_fusion": 1} if gates == 2 else {}
    return net.op(
        "MoE",
        x,
        logits,
        *weights,
        domain="com.microsoft",
        name="top",
        activation_type=activation,
        k=k,
        normalize_routing_weights=1,
        **more,
    )


def gated(net: Net, x: str, logits: str) -> str:
    return fused(net, x, logits, "swiglu")


def quantised(net: Net, x: str, logits: str) -> str:
    def packed(*shape: int) -> str:
        return net.const(net.draw.integers(0, 256, shape).astype(np.uint8), net.name("q"))

    operands = [packed(E, H, D // 2), net.floats(E, H, low=0.01), net.floats(E, H)]
    operands += [packed(E, D, H // 2), net.floats(E, D, low=0.01), net.floats(E, D)]
    return net.op("QMoE", x, logits, *operands, domain="com.microsoft", name="top", k=K)


# -- each expert is a set of nodes of its own --------------------------------------------------


def _expert(net: Net, x: str) -> str:
    return net.dense(net.op("Tanh", net.dense(x, D, H)), H, D)


def _chain(net: Net, parts: list[str]) -> str:
    y = parts[0]
    for part in parts[1:]:
        y = net.op("Add", y, part)
    return y


def _number(net: Net, e: int) -> str:
    return net.const(np.array(e), net.name(f"n{e}"))


def sliced(net: Net, x: str, logits: str) -> str:
    gates = net.op("Softmax", logits, axis=-1)
    bounds = [(net.ints(e), net.ints(e + 1)) for e in range(E)]
    columns = [net.op("Slice", gates, *b, net.ints(1), name=f"take{b[0]}") for b in bounds]
    return _chain(net, [net.op("Mul", column, _expert(net, x)) for column in columns])


def picked(net: Net, x: str, logits: str) -> str:
    _, chosen = net.ops("TopK", logits, net.ints(K), outputs=2, axis=-1, name="top")
    weights = net.op("Softmax", net.op("GatherElements", logits, chosen, axis=1), axis=-1)
    nothing = net.op("ConstantOfShape", net.ints(T, E))
    gates = net.op("ScatterElements", nothing, chosen, weights, axis=1)
    parts = [net.op("Mul", logits, net.const(np.float32(0)))]  # zeros, (T, E)
    parts = [net.op("MatMul", parts[0], net.floats(E, D))]
    for e in range(E):
        column = net.op("Unsqueeze", net.op("Gather", gates, _number(net, e), axis=1), net.ints(1))
        parts.append(net.op("Mul", _expert(net, x), column))
    return _chain(net, parts)


def parted(net: Net, x: str, logits: str) -> str:
    columns = net.ops("Split", net.op("Softmax", logits, axis=-1), outputs=E, axis=-1)
    return _chain(net, [net.op("Mul", column, _expert(net, x)) for column in columns])


def beside(net: Net, x: str, logits: str) -> str:
    gates = net.op("Unsqueeze", net.op("Softmax", logits, axis=-1), net.ints(2))
    outputs = [net.op("Unsqueeze", _expert(net, x), net.ints(1)) for _ in range(E)]
    y = net.op("Mul", gates, net.op("Concat", *outputs, axis=1))  # (T, E, D)
    return net.op("ReduceSum", y, net.ints(1), keepdims=0)


def numbered(net: Net, x: str, logits: str) -> str:
    weights, chosen = _top(net, logits)
    parts = []
    for e in range(E):
        mask = net.op("Cast", net.op("Equal", chosen, _number(net, e)), to=TensorProto.FLOAT)
        gate = net.op("ReduceSum", net.op("Mul", weights, mask), net.ints(1), keepdims=1)
        parts.append(net.op("Mul", gate, _expert(net, x)))
    return _chain(net, parts)


def replaced(net: Net, x: str, logits: str) -> str:
    chosen = net.op("ArgMax", logits, axis=-1, keepdims=1)
    y = net.op("Sub", x, x)
    for e in range(E):
        y = net.op("Where", net.op("Equal", chosen, _number(net, e)), _expert(net, x), y)
    return y


def _written(net: Net, x: str, logits: str, expert: Callable[[int, str], str]) -> str:
    """As Hugging Face's Mixtral: each expert sees only the tokens that chose it."""
    weights, chosen = _top(net, logits)
    bits = net.const(np.array([0, 1], np.int64))
    mask = net.op("OneHot", chosen, net.const(np.array(E)), bits, axis=-1)
    mask = net.op("Transpose", mask, perm=[2, 1, 0])  # (E, K, T)
    y = net.op("Sub", x, x)
    for e in range(E):
        found = net.op("NonZero", net.op("Gather", mask, _number(net, e), axis=0))
        places = net.op("Transpose", found, perm=[1, 0])  # (n, 2): which of the K, which token
        tokens = net.op("Slice", places, net.ints(1), net.ints(2), net.ints(1))
        swapped = net.op("Gather", places, net.ints(1, 0), axis=1)
        gate = net.op("Unsqueeze", net.op("GatherND", weights, swapped), net.ints(1))
        part = net.op("Mul", expert(e, net.op("GatherND", x, tokens)), gate)
        rows = net.op("Add", net.op("GatherND", y, tokens), part)
        y = net.op("ScatterND", y, tokens, rows)
    return y


def written(net: Net, x: str, logits: str) -> str:
    return _written(net, x, logits, lambda e, tokens: _expert(net, tokens))


def tables(net: Net, x: str, logits: str) -> str:
    first, second = net.floats(E, D, H, name="W1"), net.floats(E, H, D, name="W2")

    def expert(e: int, tokens: str) -> str:
        inner = net.op("MatMul", tokens, net.op("Gather", first, _number(net, e), axis=0))
        return net.op("MatMul", net.op("Tanh", inner), net.op("Gather", second, _number(net, e)))

    return _written(net, x, logits, expert)


BRANCHES = [sliced, picked, parted, beside, numbered, replaced, written, tables]
MIXTURES = [soft, scattered, renormalised, one_hot, compared, gathered, switch]
MIXTURES += [fused, gated, quantised, *BRANCHES]


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: mixture.__name__)
def test_experts_go_whole_and_by_the_law(mixture: Mixture) -> None:
    source = model(mixture)
    result = lawful(source, granularity=["expert"], target={"channels": 0.5}, criterion="random")
    (group,) = (group for group in result.report.groups if group.kind == "expert")
    assert (group.units, group.kept) == (E, E // 2)
    assert group.normalised_by, "the router is a named exception"
    assert all(entry.axes.keys() <= {0, 1} for entry in result.plan.kept)
    left = onnx.load_from_string(result.model).graph
    assert {entry.tensor for entry in result.plan.kept} <= {
        tensor.name for tensor in left.initializer
    }
    router = next(entry for entry in result.plan.kept if entry.tensor == "router")
    assert len(router.axes[1]) == E // 2
    for seed in range(3):  # any experts, and channels beside them
        plan = Analysis.of(source).random_plan(seed)
        assert check_law(source, prune(source, plan=plan)).difference < FLOAT32


@pytest.mark.parametrize("mixture", [scattered, gathered, fused, quantised, *BRANCHES])
def test_without_an_expert_is_as_with_its_logit_at_minus_infinity(mixture: Mixture) -> None:
    source = model(mixture, np.zeros(E))
    result = prune(source, granularity=["expert"], target={"channels": 0.5})
    kept = next(entry for entry in result.plan.kept if entry.tensor == "router").axes[1]
    masked = onnx.load_from_string(source)
    bias = next(one for one in masked.graph.initializer if one.name == "bias")
    lowest = np.full(E, -1e30, np.float32)
    lowest[list(kept)] = 0
    bias.CopyFrom(numpy_helper.from_array(lowest, "bias"))
    feeds = {"x": np.random.default_rng(1).standard_normal((T, D)).astype(np.float32)}
    sessions = [ort.InferenceSession(m) for m in (masked.SerializeToString(), result.model)]
    wanted, found = (session.run(None, feeds)[0] for session in sessions)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixture", [scattered, fused])
def test_as_many_experts_stay_as_each_token_needs(mixture: Mixture) -> None:
    source = model(mixture)
    result = lawful(source, granularity=["expert"], target={"channels": 0.1})
    assert [group.kept for group in result.report.groups if group.kind == "expert"] == [K]


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: mixture.__name__)
def test_with_data_the_experts_that_are_chosen_least_go(mixture: Mixture) -> None:
    liked = np.array([0, 9, 0, 8, 7, 0])
    source = model(mixture, liked)
    samples = {"x": np.random.default_rng(0).standard_normal((4 * T, D)).astype(np.float32)}
    result = prune(source, granularity=["expert"], target={"channels": 0.5}, calibration=samples)
    router = next(entry for entry in result.plan.kept if entry.tensor == "router")
    kept = set(router.axes[1])
    assert {1, 3} <= kept if mixture not in (switch, replaced) else 1 in kept
    assert mixture is not soft or kept == {1, 3, 4}


def test_experts_that_no_sample_reaches_are_left_as_they_are() -> None:
    source = model(written, np.array([0, 9, 0, 8, 7, 0]))
    samples = {"x": np.random.default_rng(0).standard_normal((4 * T, D)).astype(np.float32)}
    result = prune(source, target={"channels": 0.7}, granularity=["channel"], calibration=samples)
    after = onnx.load_from_string(result.model).graph.initializer
    assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in after)


def test_experts_whose_numbers_are_an_answer_stay() -> None:
    def told(net: Net, x: str, logits: str) -> str:
        weights, chosen = _top(net, logits)
        net.output(net.op("Identity", chosen), TensorProto.INT64)
        nothing = net.op("ConstantOfShape", net.ints(T, E))
        return _sum(net, net.op("ScatterElements", nothing, chosen, weights, axis=1), _all(net, x))

    with pytest.raises(Refused) as refused:
        prune(model(told), granularity=["expert"], target={"channels": 0.5})
    assert refused.value.refusal.code is Code.NOTHING_TO_PRUNE
    result = lawful(model(told))
    assert ("INDEXED", "top") in {(frozen.code, frozen.node) for frozen in result.report.frozen}


def test_channels_alone_leave_experts() -> None:
    result = lawful(model(fused), granularity=["channel", "head"])
    (group,) = (group for group in result.report.groups if group.kind == "expert")
    assert group.kept == group.units == E


def test_multiply_accumulates_count_the_chosen_experts() -> None:
    def macs(k: int) -> int:
        source = model(lambda net, x, logits: fused(net, x, logits, k=k))
        return prune(source, target={"channels": 1.0}).report.before.macs

    assert macs(3) - macs(2) == T * 2 * D * H


# -- whole branches ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", BRANCHES, ids=lambda mixture: mixture.__name__)
def test_a_branch_goes_with_all_its_nodes_and_is_counted(mixture: Mixture) -> None:
    source = model(mixture)
    result = prune(source, granularity=["expert"], target={"channels": 0.5})
    nodes = onnx.load_from_string(result.model).graph.node
    kinds = [node.op_type for node in onnx.load_from_string(source).graph.node]
    outside = 5 if mixture is picked else 4  # products that belong to no expert
    assert sum(node.op_type == "MatMul" for node in nodes) == outside + 2 * E // 2
    assert kinds.count("MatMul") == outside + 2 * E
    again = prune(result.model, target={"channels": 1.0}).report.before
    assert again.params == result.report.after.params
    if mixture in (written, tables):  # tokens go to the experts that stay
        assert result.report.after.macs > 0.95 * result.report.before.macs
    else:
        assert again.macs == result.report.after.macs
    assert prune(source, plan=result.plan).model == result.model


@pytest.mark.parametrize("mixture", [sliced, written])
def test_channels_go_inside_the_experts_that_stay(mixture: Mixture) -> None:
    result = lawful(model(mixture), target={"channels": 0.5})
    inside = [group.kept for group in result.report.groups if group.units == H]
    assert sorted(inside) == [0] * (E // 2) + [H // 2] * (E // 2)


@pytest.mark.parametrize(
    ("mixture", "target"), [(sliced, "params"), (sliced, "macs"), (written, "params")]
)
def test_budgets_count_branches(mixture: Mixture, target: str) -> None:
    result = lawful(model(mixture), granularity=["expert"], target={target: 0.75}, scope="global")
    before, after = (getattr(c, target) for c in (result.report.before, result.report.after))
    one = (before - 0.9 * before) / before  # an expert holds about a tenth of each
    assert 0.75 - 2 * one < after / before <= 0.75


def test_without_data_the_experts_with_the_least_weights_go() -> None:
    proto = onnx.load_from_string(model(sliced))
    by_name = {tensor.name: tensor for tensor in proto.graph.initializer}
    products = [node.input[1] for node in proto.graph.node if node.op_type == "MatMul"]
    for name in products[6:8]:  # two of the dense layer and the router, then two for each expert
        by_name[name].CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(by_name[name]) / 50, name)
        )
    result = prune(proto, granularity=["expert"], target={"channels": 0.9})
    router = next(entry for entry in result.plan.kept if entry.tensor == "router")
    assert set(range(E)) - set(router.axes[1]) == {2}


def test_an_expert_that_shall_be_ignored_stays() -> None:
    source = model(sliced)
    node = [n for n in onnx.load_from_string(source).graph.node if n.op_type == "Tanh"][1]
    for seed in range(4):
        plan = prune(
            source,
            granularity=["expert"],
            target={"channels": 0.2},
            criterion="random",
            seed=seed,
            ignore=[node.name],
        ).plan
        assert 0 in next(entry for entry in plan.kept if entry.tensor == "router").axes[1]


def _frozen(mixture: Mixture) -> dict[str, str]:
    """Node → detail of what is frozen as taken by its position."""
    result = lawful(model(mixture), target={"channels": 0.5})
    assert all(group.kind != "expert" for group in result.report.groups)
    return {f.node: f.detail for f in result.report.frozen if f.code == "INDEXED"}


def test_weights_listed_as_inputs_go_with_their_branch() -> None:
    result = lawful(model(sliced, ir=3), granularity=["expert"], target={"channels": 0.5})
    graph = onnx.load_from_string(result.model).graph
    assert {tensor.name for tensor in graph.initializer} < {value.name for value in graph.input}
    assert sum(tensor.dims == [D, H] for tensor in graph.initializer) == E // 2


def test_what_two_branches_share_goes_with_both() -> None:
    def shared(net: Net, x: str, logits: str) -> str:
        columns = net.ops("Split", net.op("Softmax", logits, axis=-1), outputs=E, axis=-1)
        h = net.op("Tanh", net.op("MatMul", x, net.floats(D, D, name="shared")))
        parts = [net.op("Mul", column, _expert(net, h)) for column in columns[:2]]
        return _chain(net, [*parts, *(net.op("Mul", c, _expert(net, x)) for c in columns[2:])])

    source = model(shared)
    analysis = Analysis.of(source)
    line = analysis.coupling.axes("router")[1]
    for gone, stays in (([0], True), ([0, 1], False), ([1, 2, 3], True)):
        keep = np.ones(analysis.coupling.count + 1, np.bool_)
        keep[line[gone]] = False
        _, kept = cut(analysis.model, analysis.coupling, keep, analysis.copies)
        plan = Plan(source=analysis.sha256, recipe=Recipe(repair=False), kept=kept)
        result = prune(source, plan=plan)
        assert check_law(source, result).difference < FLOAT32
        tensors = onnx.load_from_string(result.model).graph.initializer
        assert ("shared" in {tensor.name for tensor in tensors}) is stays
        again = prune(result.model, target={"channels": 1.0}).report.before
        assert (again.params, again.macs) == (result.report.after.params, result.report.after.macs)


def test_a_mixture_may_be_the_answer() -> None:
    net = Net()
    x = net.op("Tanh", net.dense(net.input("x", [T, D]), D, D))
    net.output(written(net, x, net.op("MatMul", x, net.floats(D, E))))
    net.output(sliced(net, x, net.op("MatMul", x, net.floats(D, E))))
    result = lawful(net.bytes(), granularity=["expert"], target={"channels": 0.2})
    assert [group.kept for group in result.report.groups if group.kind == "expert"] == [K, 1]


def test_something_made_of_a_zero_is_the_reason() -> None:
    def lifted(net: Net, x: str, logits: str) -> str:
        columns = net.ops("Split", net.op("Softmax", logits, axis=-1), outputs=E, axis=-1, name="s")
        columns = [net.op("Exp", one, name=f"exp{e}") for e, one in enumerate(columns)]
        return _chain(net, [net.op("Mul", column, _expert(net, x)) for column in columns])

    (detail,) = _frozen(lifted).values()
    assert detail.startswith("is taken by its position, and Exp 'exp")


def test_a_branch_that_another_is_multiplied_by_stays_with_it() -> None:
    """Neither is anything without the other: they are one unit, and go by the law."""

    def pairs(net: Net, x: str, logits: str) -> str:
        columns = net.ops("Split", net.op("Sigmoid", logits), outputs=E, axis=-1)
        parts = [net.op("Mul", a, b) for a, b in zip(columns[::2], columns[1::2], strict=True)]
        return _chain(net, [net.op("Mul", part, _expert(net, x)) for part in parts])

    result = lawful(model(pairs), granularity=["expert"], target={"channels": 0.67})
    (group,) = (group for group in result.report.groups if group.kind == "expert")
    assert (group.units, group.kept, group.channels_per_unit) == (3, 2, 2)


def test_what_two_sums_need_keeps_one_branch_of_each() -> None:
    def two(net: Net, x: str, logits: str) -> str:
        columns = net.ops("Split", net.op("Softmax", logits, axis=-1), outputs=E, axis=-1)
        parts = [net.op("Mul", column, _expert(net, x)) for column in columns]
        halves = [_chain(net, parts[:3]), _chain(net, parts[3:])]
        return net.op("Add", *(net.op("Exp", half) for half in halves))

    source = model(two)
    result = lawful(source, granularity=["expert"], target={"channels": 0.01}, criterion="random")
    kept = set(next(e for e in result.plan.kept if e.tensor == "router").axes[1])
    assert kept & {0, 1, 2}
    assert kept & {3, 4, 5}
    for seed in range(4):
        assert check_law(source, prune(source, plan=Analysis.of(source).random_plan(seed)))


def test_a_row_of_a_table_is_no_branch() -> None:
    def typed(net: Net, x: str, logits: str) -> str:
        return net.op("Add", x, net.op("Gather", net.floats(2, D), _number(net, 0), name="row"))

    assert _frozen(typed) == {"row": "is taken by its position"}


def test_a_mixture_by_constants_stays() -> None:
    """Inputs of a weighed sum are no experts: nothing of the data says which counts."""

    def fused(net: Net, x: str, logits: str) -> str:
        weights = net.op("Softmax", net.floats(1, 2), axis=-1)
        columns = net.ops("Split", weights, outputs=2, axis=-1, name="split")
        return _chain(net, [net.op("Mul", column, _expert(net, x)) for column in columns])

    assert _frozen(fused) == {"split": "is taken by its position"}


def test_positions_taken_in_a_body_stay() -> None:
    def turned(net: Net, x: str, logits: str) -> str:
        _number(net, 2)
        number = net.initializers[-1].name
        info = helper.make_tensor_value_info
        nodes = [
            helper.make_node("Gather", [logits, number], ["column"], name="inside", axis=1),
            helper.make_node("Unsqueeze", ["column", net.ints(1)], ["gate"]),
            helper.make_node("Mul", ["gate", x], ["part"]),
        ]
        branch = [
            helper.make_graph(nodes, "a", [], [info("part", TensorProto.FLOAT, [T, D])]),
            helper.make_graph(
                [helper.make_node("Tanh", [x], ["other"])],
                "b",
                [],
                [info("other", TensorProto.FLOAT, [T, D])],
            ),
        ]
        condition = net.input("which", [1], TensorProto.BOOL)
        net.nodes.append(
            helper.make_node("If", [condition], ["y"], then_branch=branch[0], else_branch=branch[1])
        )
        return "y"

    assert _frozen(turned) == {"inside": "is taken by its position"}


# -- in branches and loops ---------------------------------------------------------------------


def _chosen_in_a_branch(net: Net, x: str, logits: str) -> str:
    """The numbers leave both branches of an If, chosen by another TopK in each."""
    net.ints(K)
    count = net.initializers[-1].name

    def branch(name: str, op: str) -> onnx.GraphProto:
        inner = helper.make_node(op, [logits], [f"{name}_x"])
        top = helper.make_node("TopK", [f"{name}_x", count], [f"{name}_v", f"{name}_i"], name=name)
        output = helper.make_tensor_value_info(f"{name}_i", TensorProto.INT64, [T, K])
        return helper.make_graph([inner, top], name, [], [output])

    condition = net.input("which", [1], TensorProto.BOOL)
    branches = {"then_branch": branch("top", "Neg"), "else_branch": branch("other", "Identity")}
    net.nodes.append(helper.make_node("If", [condition], ["numbers"], **branches))
    y = net.op("Gather", net.floats(E, D, name="table"), "numbers")
    return net.op("ReduceMean", y, axes=[1], keepdims=0)


def _chosen_in_a_loop(net: Net, x: str, logits: str) -> str:
    """The numbers are gathered over the turns of a Loop."""
    net.ints(K)
    count = net.initializers[-1].name
    nodes = [
        helper.make_node("Identity", ["go_on"], ["goes_on"]),
        helper.make_node("TopK", ["state", count], ["values", "chosen"], name="top"),
        helper.make_node("Tanh", ["state"], ["next"]),
    ]
    info = helper.make_tensor_value_info
    inputs = [info("turn", TensorProto.INT64, []), info("go_on", TensorProto.BOOL, [])]
    inputs.append(info("state", TensorProto.FLOAT, [T, E]))
    outputs = [info("goes_on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, [T, E])]
    outputs.append(info("chosen", TensorProto.INT64, [T, K]))
    body = helper.make_graph(nodes, "body", inputs, outputs)
    turns, true = net.const(np.array(2)), net.const(np.array(True))
    net.nodes.append(helper.make_node("Loop", [turns, true, logits], ["last", "all"], body=body))
    numbers = net.op("Reshape", net.op("Slice", "all", *map(net.ints, (0, 1, 0))), net.ints(T, K))
    y = net.op("Gather", net.floats(E, D, name="table"), numbers)
    return net.op("ReduceMean", y, axes=[1], keepdims=0)


@pytest.mark.parametrize("mixture", [_chosen_in_a_branch, _chosen_in_a_loop])
def test_numbers_that_leave_a_body_are_an_answer(mixture: Mixture) -> None:
    result = lawful(model(mixture))
    assert all(group.kind != "expert" for group in result.report.groups)
    codes = {frozen.code for frozen in result.report.frozen if frozen.node in ("top", "other")}
    assert codes == {"INDEXED"}


def test_numbers_are_followed_into_a_branch() -> None:
    def read(net: Net, x: str, logits: str) -> str:
        _, chosen = _top(net, logits)
        condition = net.input("which", [1], TensorProto.BOOL)

        def branch(name: str) -> onnx.GraphProto:
            table = net.floats(E, D, name=f"table_{name}")
            node = helper.make_node("Gather", [table, chosen], [f"{name}_y"])
            output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [T, K, D])
            return helper.make_graph([node], name, [], [output])

        branches = {"then_branch": branch("a"), "else_branch": branch("b")}
        net.nodes.append(helper.make_node("If", [condition], ["rows"], **branches))
        return net.op("ReduceMean", "rows", axes=[1], keepdims=0)

    result = lawful(model(read), granularity=["expert"], target={"channels": 0.5})
    cut = {entry.tensor for entry in result.plan.kept}
    assert {"router", "table_a", "table_b"} <= cut
