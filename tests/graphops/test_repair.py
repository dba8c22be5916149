"""Criteria that see data, allocation and repair: by brute force, and on nets with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import Net

import secateur
from secateur.errors import Code, Refused
from secateur.graphops.calibration.network import Network
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.criteria.reconstruction import Consumer, eliminate
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.planning import allocation
from secateur.graphops.planning.sensitivity import Curve
from secateur.graphops.planning.steps import Steps
from secateur.graphops.repair.fit import Sums, choose
from secateur.graphops.repair.repair import repairable, stands


def consumer(weight: np.ndarray, rows: np.ndarray, per_unit: int, damping: float = 0.0) -> Consumer:
    covariance = np.cov(rows.T, bias=True) + damping * np.eye(rows.shape[1])
    columns = np.arange(rows.shape[1]).reshape(-1, per_unit)
    return Consumer(weight.copy(), np.linalg.inv(covariance), damping, columns, 1.0)


def best_fit_error(weight: np.ndarray, rows: np.ndarray, kept: np.ndarray) -> float:
    """Least squares with an intercept, by NumPy."""
    y = rows @ weight.T
    if not kept.size:
        return float(y.var(axis=0).sum())
    design = np.concatenate([rows[:, kept], np.ones((len(rows), 1))], axis=1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    return float(((y - design @ solution) ** 2).mean(axis=0).sum())


# -- reconstruction ----------------------------------------------------------------------------


@pytest.mark.parametrize("per_unit", [1, 3])
def test_loss_is_what_least_squares_cannot_take_over(per_unit: int) -> None:
    draw = np.random.default_rng(0)
    units = 5
    rows = draw.standard_normal((400, units * per_unit)) @ draw.standard_normal(
        (units * per_unit, units * per_unit)
    )
    weight = draw.standard_normal((4, units * per_unit))
    scores = eliminate([consumer(weight, rows, per_unit)], units)
    order = np.argsort(scores)
    left = list(range(units))
    for unit in order:
        # greedy: of all that are left, the one whose loss is least
        def error(gone: int, rest: list[int] = left) -> float:
            kept = [u * per_unit + e for u in rest if u != gone for e in range(per_unit)]
            return best_fit_error(weight, rows, np.array(kept, int))

        assert unit == min(left, key=error)
        assert scores[unit] == pytest.approx(error(unit), rel=1e-6)
        left.remove(unit)


def test_a_unit_that_others_can_replace_goes_first_whatever_its_weights() -> None:
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((500, 4))
    rows[:, 2] = 5 * rows[:, 0] - rows[:, 1] + 1e-4 * rows[:, 2]
    scores = eliminate([consumer(np.diag([1.0, 1.0, 100.0, 0.1]), rows, 1)], 4)
    assert np.argmin(scores) in (0, 1, 2)
    assert np.sort(scores)[0] < 1e-2


@pytest.mark.parametrize("per_unit", [1, 2])
def test_damping_is_no_loss(per_unit: int) -> None:
    draw, damping = np.random.default_rng(0), 0.01
    half = draw.standard_normal((500, 2 * per_unit))
    rows = np.concatenate([half, 2 * half, 0.05 * draw.standard_normal((500, per_unit))], axis=1)
    weight = draw.standard_normal((3, 5 * per_unit))
    scores = eliminate([consumer(weight, rows, per_unit, damping)], 5)
    gone = np.argsort(scores)
    assert {*gone[:2]} in ({0, 1}, {0, 3}, {2, 1}, {2, 3})  # one of each pair
    assert scores[gone[1]] < 0.1 * scores[gone[2]]
    noisy = rows + 1e-6 * draw.standard_normal(rows.shape)
    undamped = eliminate([consumer(weight, noisy, per_unit)], 5)
    assert np.allclose(np.sort(scores)[2:], np.sort(undamped)[2:], rtol=0.1)


def test_consumers_count_together() -> None:
    rows = np.random.default_rng(0).standard_normal((500, 2))
    first, second = np.array([[1.0, 0.1]]), np.array([[0.0, 3.0]])
    both = eliminate([consumer(first, rows, 1), consumer(second, rows, 1)], 2)
    assert both[0] < both[1]
    assert eliminate([consumer(first, rows, 1)], 2)[0] > eliminate([consumer(first, rows, 1)], 2)[1]


# -- allocation --------------------------------------------------------------------------------


class _Coupling:
    """As much of a coupling as allocation looks at."""

    def __init__(self, sizes: list[int]) -> None:
        starts = np.cumsum([1, *sizes])
        self.count = sum(sizes)
        self.groups = [
            type("Group", (), {"units": np.arange(s, s + n, dtype=np.int32)})
            for s, n in zip(starts, sizes, strict=False)
        ]


def test_the_cheapest_drift_goes_first_and_prices_follow_what_has_gone() -> None:
    coupling: Any = _Coupling([4, 4])
    scores = np.array([0, 1, 2, 3, 4, 1, 2, 3, 4], float)
    steps = Steps(
        groups=np.array([0, 0, 0, 1, 1, 1]),
        left=np.array([3, 2, 1] * 2),
        units=np.concatenate([group.units[:3] for group in coupling.groups]),
        ends=np.arange(1, 7),
    )
    curves = {0: Curve((0, 2), (0.0, 0.01)), 1: Curve((0, 2), (0.0, 1.0))}
    order = allocation.arrange(
        steps, coupling, scores, curves, lambda keep: float(keep[1:5].sum() * keep[5:].sum())
    )
    assert order.groups.tolist() == [0, 0, 0, 1, 1, 1]
    for index in range(2):  # within a group, the order of the scores
        assert order.left[order.groups == index].tolist() == [3, 2, 1]
    dear = {0: curves[1], 1: curves[0]}
    order = allocation.arrange(steps, coupling, scores, dear, lambda keep: float(keep.sum()))
    assert order.groups.tolist() == [1, 1, 1, 0, 0, 0]
    # the units of a step go with it
    assert order.units.tolist() == [5, 6, 7, 1, 2, 3]


# -- fits --------------------------------------------------------------------------------------


def sums(rows: np.ndarray, y: np.ndarray) -> Sums:
    found = Sums.zeros(1, rows.shape[1], y.shape[1])
    found.add(rows[None].astype(np.float32), y[None].astype(np.float32))
    return found


def test_a_fit_finds_the_weights_and_the_bias() -> None:
    draw = np.random.default_rng(0)
    rows, truth = draw.standard_normal((600, 6)) + 2, draw.standard_normal((3, 6))
    y = rows @ truth.T + 7
    start = np.zeros((1, 3, 6))
    fitted = choose(
        sums(rows[:400], y[:400]), sums(rows[400:], y[400:]), start, np.zeros((1, 3)), biased=True
    )
    assert np.allclose(fitted.weight[0], truth, atol=1e-2)
    assert np.allclose(fitted.bias, 7, atol=5e-2)
    assert fitted.after < 1e-5 < fitted.before


def test_a_fit_that_does_not_help_is_undone() -> None:
    draw = np.random.default_rng(0)
    rows, truth = draw.standard_normal((120, 40)), draw.standard_normal((1, 2, 40))
    y = rows @ truth[0].T + 30 * draw.standard_normal(
        (120, 2)
    )  # far more noise than there is to fit
    y[60:] = rows[60:] @ truth[0].T
    fitted = choose(
        sums(rows[:60], y[:60]), sums(rows[60:], y[60:]), truth, np.zeros((1, 2)), biased=True
    )
    assert fitted.damping is None
    assert fitted.weight is truth
    assert fitted.before == fitted.after


def test_error_is_the_mean_square() -> None:
    draw = np.random.default_rng(0)
    rows, y = draw.standard_normal((50, 4)), draw.standard_normal((50, 3))
    weight, bias = draw.standard_normal((1, 3, 4)), draw.standard_normal((1, 3))
    expected = ((rows @ weight[0].T + bias[0] - y) ** 2).mean(axis=0).sum()
    assert sums(rows, y).error(weight, bias) == pytest.approx(expected, rel=1e-5)


# -- whole models ------------------------------------------------------------------------------


def redundant(bias: bool = True) -> bytes:
    """A residual net whose inner channels come in proportional pairs: half of them say it all."""
    net, draw = Net(), np.random.default_rng(1)
    x = net.op("Relu", net.op("Conv", net.input("x", ["N", 3, 6, 6]), net.floats(8, 3, 3, 3)))

    def conv(y: str, weight: np.ndarray) -> str:
        inputs = [y, net.const(weight.astype(np.float32), f"w{len(net.nodes)}")]
        if bias:
            inputs.append(net.floats(weight.shape[0]))
        return net.op("Conv", *inputs)

    for _ in range(2):
        half = draw.standard_normal((6, 8, 1, 1))
        y = net.op(
            "Conv",
            x,
            net.const(np.concatenate([half, 2 * half]).astype(np.float32), f"h{len(net.nodes)}"),
        )
        x = net.op("Add", conv(net.op("Relu", y), draw.standard_normal((8, 12, 1, 1)) / 4), x)
    net.output(net.dense(net.op("Flatten", net.op("GlobalAveragePool", x)), 8, 4))
    return net.bytes()


def images(count: int = 64) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((count, 3, 6, 6)).astype(np.float32)}


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_left_takes_over_what_it_can(bias: bool) -> None:
    model = redundant(bias)
    graph = onnx.load_from_string(model).graph
    stem = next(tensor.name for tensor in graph.initializer if tensor.dims[1:2] == [3])
    recipe = secateur.Recipe(target={"channels": 0.5}, ignore=(stem,))  # the stream stays
    whole = secateur.prune(model, recipe, calibration=images(), measure_latency=False)
    bare = secateur.prune(
        model,
        recipe.model_copy(update={"repair": False}),
        calibration=images(),
        measure_latency=False,
    )
    assert whole.report.verification.drift[0].relative_error < 2e-3
    assert bare.report.verification.drift[0].relative_error > 2e-2
    assert whole.report.repair
    assert all(step.error_after <= step.error_before for step in whole.report.repair)
    assert not bare.report.repair


def test_where_the_original_stands_all_that_is_aimed_at_is_still_there() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4))
    branch = net.conv(net.op("Relu", net.conv(x, 4, 6)), 6, 4)
    y = net.op("Relu", net.op("Add", branch, net.conv(x, 4, 4)))  # both end in the sum
    net.output(net.conv(y, 4, 2))  # which nothing reads
    net.output(net.conv(y, 4, 3))
    opened = open_model(net.bytes())
    coupling = couple(opened.model, infer_shapes(opened.model))
    feeds = images(2)
    network = Network(opened.model, [feeds])
    found = repairable(opened.model, coupling.shapes)
    wanted = [target.end.observed for target in found]
    session = onnxruntime.InferenceSession(with_outputs(net.bytes(), wanted))
    places = stands(opened.model, wanted)
    assert [node is None for node in places] == [False] * 4 + [True] * 2
    for place, (stand, expected) in enumerate(zip(places, session.run(wanted, feeds), strict=True)):
        if stand is not None:
            network.advance(stand)
        left = network.piece(wanted[place:]).run(0)
        assert np.allclose(left[wanted[place]], expected, atol=1e-5)


def test_a_piece_knows_the_sizes_that_all_it_is_fed_have() -> None:
    """Where the rank of a size is not known, ONNX Runtime takes `sizes` for empty."""
    net = Net()
    x = net.op("Relu", net.input("x", ["N", 2, "H", "W"]))
    height = net.op("Gather", net.op("Shape", x), net.const(np.array(2)), axis=0)
    side = net.op("Unsqueeze", height, net.ints(0))
    sizes = net.op("Concat", net.ints(1, 2), side, side, axis=0)
    places = net.op("Resize", net.floats(1, 2, 4, 4), "", "", sizes, mode="cubic")
    net.output(net.op("Add", x, places))
    opened = open_model(net.bytes())
    batches = [{"x": np.ones((2, 2, size, size), np.float32)} for size in (6, 5)]
    network = Network(opened.model, batches)
    network.advance(next(node for node in opened.model.graph if node.op_type == "Unsqueeze"))
    y = str(opened.model.graph.outputs[0].name)
    session = onnxruntime.InferenceSession(net.bytes())
    for batch, feeds in enumerate(batches):
        assert np.allclose(network.piece([y]).run(batch)[y], session.run([y], feeds)[0])
    shapes = [value.type.tensor_type.shape.dim for value in network.graph([y])[0].graph.input]
    assert [[dim.dim_value for dim in shape] for shape in shapes] == [[2, 2, 0, 0], []]


def with_outputs(model: bytes, names: list[str]) -> bytes:
    """The model, giving other tensors too."""
    proto = onnx.load_from_string(model)
    given = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in given
    )
    return proto.SerializeToString()


def test_the_same_call_gives_the_same_bytes() -> None:
    recipe = secateur.Recipe(target={"macs": 0.6}, seed=5)
    first, again = (
        secateur.prune(redundant(), recipe, calibration=images(), measure_latency=False)
        for _ in range(2)
    )
    assert first.model == again.model
    assert first.report.sensitivity


def test_weights_in_constant_nodes_are_refitted_alike() -> None:
    model = onnx.load_from_string(redundant())
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    recipe = secateur.Recipe(target={"macs": 0.5})
    drifts = [
        secateur.prune(source, recipe, calibration=images(), measure_latency=False)
        .report.verification.drift[0]
        .relative_error
        for source in (redundant(), model)
    ]
    assert drifts[1] == pytest.approx(drifts[0], rel=1e-3)


def test_measured_scope_spares_what_the_output_needs() -> None:
    result = secateur.prune(
        redundant(),
        secateur.Recipe(target={"macs": 0.7}),
        calibration=images(),
        measure_latency=False,
    )
    curves = {curve.group: curve for curve in result.report.sensitivity}
    assert all(curve.drift[0] == 0 and curve.removed[0] == 0 for curve in curves.values())
    assert all(np.all(np.diff(curve.drift) >= 0) for curve in curves.values())
    shares = {g.id: g.kept / g.units for g in result.report.groups}
    stream = next(g.id for g in result.report.groups if g.units == 8)
    assert shares[stream] >= max(share for name, share in shares.items() if name != stream)


def test_trial_cuts_may_take_sizes_from_inputs_that_nothing_else_reads_any_more() -> None:
    """Heads and batch are one axis, by a size computed there: after a cut, from the input's."""
    net = Net()
    x = net.op("Relu", net.dense(net.input("x", ["N", 5, 8]), 8, 12))
    asked, told = (net.op("Reshape", net.dense(x, 12, 8), net.ints(-1, 5, 4, 2)) for _ in range(2))

    def one_axis(value: str) -> str:
        value = net.op("Transpose", value, perm=[0, 2, 1, 3])
        outer = net.op("Gather", net.op("Shape", value), net.ints(0, 1))
        size = net.op("ReduceProd", outer, axes=[0], keepdims=1)
        return net.op("Reshape", value, net.op("Concat", size, net.ints(-1, 2), axis=0))

    keys = net.op("Transpose", one_axis(told), perm=[0, 2, 1])
    y = net.op("MatMul", net.op("MatMul", one_axis(asked), keys), one_axis(told))
    y = net.op("Transpose", net.op("Reshape", y, net.ints(-1, 4, 5, 2)), perm=[0, 2, 1, 3])
    net.output(net.dense(net.op("Reshape", y, net.ints(0, 5, 8)), 8, 3))
    data = {"x": np.random.default_rng(0).standard_normal((40, 5, 8)).astype(np.float32)}
    recipe = secateur.Recipe(target={"macs": 0.6})
    result = secateur.prune(net.bytes(), recipe, calibration=data, measure_latency=False)
    kinds = {group.kind for group in result.report.groups if group.kept < group.units}
    assert kinds == {"channel", "head"}


def test_trial_cuts_begin_where_a_state_of_their_size_is_made() -> None:
    """The initial state of a recurrent layer comes before a layer that its trial does not touch."""
    net = Net()
    x = net.input("x", ["N", 5, 4])
    batch = net.op("Gather", net.op("Shape", x), net.ints(0))
    size = net.op("Concat", net.ints(1), batch, net.ints(12), axis=0)
    state = net.op("Expand", net.const(np.zeros((), np.float32)), size)
    rows = net.op("Transpose", net.op("Relu", net.dense(x, 4, 6)), perm=[1, 0, 2])
    weights = (net.floats(1, 36, 6), net.floats(1, 36, 12), net.floats(1, 72))
    y = net.op("GRU", rows, *weights, "", state, hidden_size=12)
    net.output(net.dense(net.op("Squeeze", y, net.ints(1)), 12, 3))
    data = {"x": np.random.default_rng(0).standard_normal((40, 5, 4)).astype(np.float32)}
    recipe = secateur.Recipe(target={"macs": 0.6})
    result = secateur.prune(net.bytes(), recipe, calibration=data, measure_latency=False)
    assert any(group.units == 12 and group.kept < 12 for group in result.report.groups)


def test_tied_weights_stay_tied() -> None:
    net = Net()
    shared = net.floats(8, 8)
    x = net.op("Relu", net.op("MatMul", net.input("x", ["N", 6]), net.floats(6, 8)))
    x = net.op("Relu", net.op("MatMul", x, shared))
    x = net.op("Relu", net.op("MatMul", x, shared))
    net.output(net.dense(x, 8, 3))
    data = {"x": np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)}
    result = secateur.prune(
        net.bytes(),
        secateur.Recipe(target={"channels": 0.5}),
        calibration=data,
        measure_latency=False,
    )
    graph = onnx.load_from_string(result.model).graph
    assert sum(shared in node.input for node in graph.node) == 2


@pytest.mark.parametrize(
    ("fields", "calibrated", "code"),
    [
        ({"repair": True}, False, Code.INVALID_CALIBRATION),
        ({"scope": "measured", "target": {"macs": 0.5}}, False, Code.INVALID_CALIBRATION),
        ({"criterion": "reconstruction"}, False, Code.INVALID_CALIBRATION),
        ({"scope": "measured", "target": {"channels": 0.5}}, True, Code.INVALID_RECIPE),
    ],
)
def test_what_cannot_be_done_is_refused(fields: Any, calibrated: bool, code: Code) -> None:
    with pytest.raises(Refused) as caught:
        secateur.prune(
            redundant(), secateur.Recipe(**fields), calibration=images() if calibrated else None
        )
    assert caught.value.refusal.code is code


def test_the_report_names_layers_that_no_refit_knows() -> None:
    net = Net()
    x = net.dense(net.input("x", ["N", 5, 8]), 8, 16)
    y = net.op("Einsum", net.op("Relu", x), net.floats(4, 4, 16), equation="btd,hkd->bthk")
    net.output(net.dense(net.op("Reshape", y, net.ints(0, 0, 16)), 16, 3))
    samples = np.random.default_rng(0).standard_normal((64, 5, 8)).astype(np.float32)
    recipe = secateur.Recipe(target={"channels": 0.5})
    result = secateur.prune(net.bytes(), recipe, calibration={"x": samples}, measure_latency=False)
    (text,) = (text for text in result.report.warnings if "are not repaired" in text)
    assert text.startswith("1 layers") and "einsum" in text


def test_what_attention_adds_to_its_scores_is_no_layer() -> None:
    net = Net(23)
    x = net.input("x", ["N", 5, 8])
    q, k, v = (net.dense(x, 8, 32) for _ in range(3))
    y = net.op("Attention", q, k, v, net.floats(1, 4, 5, 5), q_num_heads=4, kv_num_heads=4)
    net.output(net.dense(y, 32, 3))
    samples = np.random.default_rng(0).standard_normal((64, 5, 8)).astype(np.float32)
    recipe = secateur.Recipe(target={"channels": 0.5})
    result = secateur.prune(net.bytes(), recipe, calibration={"x": samples}, measure_latency=False)
    assert [group.kind for group in result.report.groups] == ["head"]
    assert result.report.repair
    assert result.report.warnings == ()
