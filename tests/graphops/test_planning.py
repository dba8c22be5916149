"""Targets, scopes, rounding and what the planner may not do; MACs against another counter."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from laws import Analysis, Mask, lawful, prune
from nets import Net, attention

import secateur
from secateur.errors import Code, Refused
from secateur.graphops.criteria import CRITERIA, Context
from secateur.graphops.planning import cost, planner
from secateur.graphops.planning.normalisers import normalisers

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"


def small_net() -> bytes:
    """Three convolutions of uneven widths, a shortcut and a dense end: 10 + 7 + 6 units."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 10, 3))
    x = net.op("Relu", net.op("Add", x, net.conv(net.op("Relu", net.conv(x, 10, 7, 3)), 7, 10)))
    y = net.op("Flatten", net.op("GlobalAveragePool", net.conv(x, 10, 6)))
    net.output(net.dense(net.op("Relu", y), 6, 4))
    return net.bytes()


def transformer() -> bytes:
    net = Net()
    x = net.dense(net.input("x", [2, 5, 6]), 6, 12)
    x = net.op("Add", x, attention(net, x, 12, heads=4, size=3, tokens=5))
    y = net.op("LayerNormalization", x, net.floats(12, low=0.5), net.floats(12))
    net.output(net.op("Add", x, net.dense(net.op("Relu", net.dense(y, 12, 20)), 20, 12)))
    return net.bytes()


class Planned:
    """What the planner decides for a recipe, without cutting anything."""

    def __init__(self, source: bytes, **fields: Any) -> None:
        analysis = Analysis.of(source)
        self.coupling = analysis.coupling
        self.recipe = secateur.Recipe(round_to=fields.pop("round_to", 1), **fields).settled(False)
        context = Context(analysis.model, self.coupling, None, self.recipe.seed)
        self.scores = CRITERIA[self.recipe.criterion](context)
        self.params = cost.count_params(analysis.model)
        self.keep = planner.choose(self.coupling, self.scores, self.recipe, self.params)
        self.whole = np.ones_like(self.keep)

    def fraction(self, target: str, keep: Mask | None = None) -> float:
        """What is kept of a target's quantity."""
        keep = self.keep if keep is None else keep
        if target == "channels":
            return float(keep[1:].mean())
        count = cost.macs(self.coupling) if target == "macs" else cost.params(self.coupling)
        return count.of(keep) / count.of(self.whole)

    def meets(self, keep: Mask) -> bool:
        return all(self.fraction(t, keep) <= f + 1e-12 for t, f in self.recipe.target.items())


SCOPES = ("local", "global")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fraction", [0.93, 0.7, 0.5, 0.31])
@pytest.mark.parametrize("target", ["macs", "params"])
@pytest.mark.parametrize("build", [small_net, transformer])
def test_a_budget_is_met_and_no_removed_unit_could_stay(
    build: Any, target: str, fraction: float, scope: str
) -> None:
    planned = Planned(build(), target={target: fraction}, scope=scope, criterion="random")
    assert planned.fraction(target) <= fraction
    _nothing_can_be_given_back(planned)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("seed", range(4))
def test_several_targets_hold_together(scope: str, seed: int) -> None:
    target = {"macs": 0.45, "params": 0.5}
    planned = Planned(small_net(), target=target, scope=scope, criterion="random", seed=seed)
    assert planned.meets(planned.keep)
    _nothing_can_be_given_back(planned)


def _nothing_can_be_given_back(planned: Planned) -> None:
    """By brute force: with any one removed unit back, a target breaks."""
    for unit in np.flatnonzero(~planned.keep):
        keep = planned.keep.copy()
        keep[unit] = True
        assert not planned.meets(keep), f"unit {unit} went for nothing"


def test_a_budget_takes_the_least_of_each_group_first() -> None:
    planned = Planned(small_net(), target={"macs": 0.5}, criterion="l2")
    for group in planned.coupling.groups:
        gone, stays = (
            group.units[~planned.keep[group.units]],
            group.units[planned.keep[group.units]],
        )
        if gone.size:
            assert planned.scores[gone].max() <= planned.scores[stays].min()


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.34, 0.1])
def test_local_channels_is_a_share_of_every_group(fraction: float) -> None:
    planned = Planned(small_net(), target={"channels": fraction})
    for group in planned.coupling.groups:
        kept = int(planned.keep[group.units].sum())
        assert kept == max(1, int(np.floor(fraction * group.units.size + 1e-9)))


def test_global_channels_ranks_all_units_together() -> None:
    planned = Planned(small_net(), target={"channels": 0.5}, scope="global")
    kept = planned.keep[1:].sum()
    assert kept == planned.keep[1:].size // 2
    shares = {planned.keep[group.units].mean() for group in planned.coupling.groups}
    assert len(shares) > 1


@pytest.mark.parametrize(
    ("normaliser", "first", "second", "other"),
    [
        ("none", 2.0, 10.0, 5.0),
        ("mean", 2 / 2.5, 10 / 25, 5 / 6),
        ("max", 2 / 4, 10 / 40, 5 / 7),
        ("isomorphic", 2 / 8, 5 / 8, 1 / 2),  # ranks among 8 of one structure, 2 of the other
    ],
)
def test_normalisers_make_groups_comparable(
    normaliser: Any, first: float, second: float, other: float
) -> None:
    net = Net()
    x = net.conv(net.conv(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4), 4, 4), 4, 2)
    net.output(net.dense(net.op("Flatten", net.op("GlobalAveragePool", x)), 2, 3))
    coupling = Analysis.of(net.bytes()).coupling
    scores = np.zeros(coupling.count + 1)
    for group, numbers in zip(
        coupling.groups, ([1, 2, 3, 4], [10, 20, 30, 40], [5, 7]), strict=True
    ):
        scores[group.units] = numbers
    scales = normalisers(coupling, scores, normaliser)
    found = [scale(score) for scale, score in zip(scales, (2.0, 10.0, 5.0), strict=True)]
    assert np.allclose(found, [first, second, other])


def test_isomorphic_takes_the_same_share_of_every_structure() -> None:
    source = small_net()
    planned = Planned(
        source, target={"channels": 0.5}, scope="global", criterion="l1", normaliser="isomorphic"
    )
    for group in planned.coupling.groups:  # all three are built differently
        assert abs(planned.keep[group.units].mean() - 0.5) <= 1 / group.units.size


def test_local_budgets_shrink_groups_alike() -> None:
    planned = Planned(small_net(), target={"macs": 0.4}, criterion="random")
    shares = [planned.keep[group.units].mean() for group in planned.coupling.groups]
    assert (
        max(shares) - min(shares) <= 2 / min(g.units.size for g in planned.coupling.groups) + 1e-9
    )


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_rounding_holds_on_the_tensors(name: str, multiple: int) -> None:
    result = lawful(DIGITS / f"{name}.onnx", target={"macs": 0.6}, round_to=multiple)
    proto = onnx.load_from_string(result.model)
    shapes = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    cut = [(entry.tensor, axis) for entry in result.plan.kept for axis in entry.axes]
    assert cut
    for tensor, axis in cut:
        assert shapes[tensor][axis] % multiple == 0


def test_unrounded_counts_are_met_to_the_unit_when_asked() -> None:
    result = prune(DIGITS / "digits_cnn.onnx", target={"macs": 0.5}, round_to=1)
    assert any(group.kept % 4 for group in result.report.groups)
    assert 0.49 < result.report.after.macs / result.report.before.macs <= 0.5


@pytest.mark.parametrize("target", ["macs", "params"])
def test_the_report_counts_what_is_in_the_result(target: str) -> None:
    for source in (small_net(), transformer()):
        result = prune(source, target={target: 0.5}, round_to=1)
        again = secateur.inspect(result.model)
        assert result.report.after.macs == again.cost.macs
        assert result.report.after.params == again.cost.params
        after, before = getattr(result.report.after, target), getattr(result.report.before, target)
        assert after <= 0.5 * before


# -- what stays whatever the target ------------------------------------------------------------


def test_ignored_nodes_and_initializers_stay() -> None:
    net = Net()
    x = net.op("Conv", net.input("x", [2, 4, 6, 6]), net.floats(8, 4, 1, 1), name="stem")
    y = net.op("Conv", net.op("Relu", x), net.floats(8, 8, 1, 1, name="body.weight"))
    z = net.op("Conv", net.op("Relu", y), net.floats(8, 8, 1, 1), name="last")
    net.output(net.conv(z, 8, 3))
    source = net.bytes()
    free = prune(source)
    held = prune(source, ignore=("st*", "body.w*"))
    assert {len(free.report.groups), len(held.report.groups)} == {3, 1}
    assert "IGNORED" in {frozen.code for frozen in held.report.frozen}
    kept = {entry.tensor: set(entry.axes) for entry in held.plan.kept}
    assert "body.weight" not in kept


def test_an_ignore_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(Refused) as caught:
        prune(small_net(), ignore=("no such*",))
    assert caught.value.refusal.code is Code.UNMATCHED_IGNORE
    assert caught.value.refusal.nodes == ("no such*",)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_granularity_says_which_kinds_may_go(kind: str) -> None:
    result = lawful(transformer(), granularity=(kind,))
    for group in result.report.groups:
        assert (group.kept < group.units) == (group.kind == kind)
    assert kind in {group.kind for group in result.report.groups}


def test_an_unreachable_target_names_the_closest() -> None:
    with pytest.raises(Refused) as caught:
        prune(small_net(), target={"macs": 0.001})
    refusal = caught.value.refusal
    assert refusal.code is Code.UNREACHABLE_TARGET
    closest = float(refusal.found.split()[0])
    assert 0.001 < closest < 0.2
    reached = prune(small_net(), target={"macs": np.ceil(closest * 1e4) / 1e4 + 1e-4})
    assert [group.kept for group in reached.report.groups] == [1, 1, 1]


def test_nothing_to_prune_says_why() -> None:
    net = Net()
    net.output(net.op("Det", net.op("MatMul", net.input("x", [2, 4, 4]), net.floats(4, 4))))
    with pytest.raises(Refused) as caught:
        prune(net.bytes())
    assert caught.value.refusal.code is Code.NOTHING_TO_PRUNE
    assert caught.value.refusal.nodes


def test_a_target_of_one_keeps_everything() -> None:
    result = prune(small_net(), target={"macs": 1.0})
    assert result.plan.kept == ()
    assert result.report.after.macs == result.report.before.macs


# -- the same again ----------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_the_same_request_gives_the_same_bytes(criterion: str) -> None:
    recipe = {"target": {"macs": 0.5}, "criterion": criterion, "scope": "global"}
    first, second = (prune(DIGITS / "digits_cnn.onnx", **recipe) for _ in range(2))
    assert first.model == second.model
    assert first.plan.to_json() == second.plan.to_json()


def test_another_seed_gives_another_random_choice() -> None:
    plans = {
        prune(small_net(), criterion="random", seed=seed).plan.model_dump_json(include={"kept"})
        for seed in range(4)
    }
    assert len(plans) > 1


_DIGEST = """
import hashlib, sys, secateur
result = secateur.prune(sys.argv[1], secateur.Recipe(target={"macs": 0.5}, scope="global"),
                        measure_latency=False)
print(hashlib.sha256(result.model + result.plan.to_json().encode()).hexdigest())
"""


def test_the_bytes_do_not_hang_on_the_hash_seed() -> None:
    digests = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST, str(DIGITS / "digits_transformer.onnx")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=DIGITS.parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


# -- MACs --------------------------------------------------------------------------------------


def counted(source: onnx.ModelProto, shape: tuple[int, ...]) -> int:
    """MACs of products and convolutions by onnx-tool.

    It counts each added bias as one more operation per output, and every other operator's
    arithmetic too; neither is a multiply-accumulate.
    """
    import onnx_tool

    model = onnx_tool.Model(source, {"verbose": False})
    model.graph.shape_infer({source.graph.input[0].name: np.zeros(shape, np.float32)})
    model.graph.profile()
    total = 0
    for node in model.graph.nodemap.values():
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            total += int(node.macs[0])
            if node.op_type != "MatMul" and len(node.input) > 2:
                total -= int(np.prod(model.graph.tensormap[node.output[0]].get_shape()))
    return total


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_macs_of_trained_models_against_onnx_tool(name: str) -> None:
    source = onnx.load(DIGITS / f"{name}.onnx")
    assert secateur.inspect(source).cost.macs == counted(source, (1, 1, 8, 8))
    result = prune(source, target={"macs": 0.5})
    pruned = onnx.load_from_string(result.model)
    assert result.report.after.macs == counted(pruned, (1, 1, 8, 8))


@pytest.mark.filterwarnings("ignore")
def test_macs_of_a_generated_transformer_against_onnx_tool() -> None:
    source = onnx.load_from_string(transformer())
    assert secateur.inspect(source).cost.macs == counted(source, (2, 5, 6))
    result = prune(source, target={"channels": 0.5})
    pruned = onnx.load_from_string(result.model)
    assert result.report.after.macs == counted(pruned, (2, 5, 6))


def test_macs_of_grouped_and_transposed_convolutions_by_hand() -> None:
    net = Net()
    x = net.conv(net.input("x", [1, 4, 8, 8]), 4, 12, 3, strides=[2, 2])
    x = net.conv(net.conv(x, 12, 12, 3, group=12), 12, 12, 3, group=3)
    x = net.op("ConvTranspose", x, net.floats(12, 8, 2, 2), strides=[2, 2])
    net.output(net.conv(x, 8, 3))
    # Positions × channels out × channels in of one group × kernel. A transposed convolution has
    # the positions of its input: onnx-tool takes those of its output, where most meet zeros.
    convolutions = 16 * 12 * 4 * 9 + 16 * 12 * 1 * 9 + 16 * 12 * 4 * 9 + 64 * 3 * 8
    assert secateur.inspect(net.bytes()).cost.macs == convolutions + 16 * 12 * 8 * 4
