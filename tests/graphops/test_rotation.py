"""Streams: found where any basis will do, turned without a change, cut where least is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from laws import Analysis, prune
from nets import Net
from rows import ROWS, SUBJECT, Row

from secateur.errors import Code, Refused
from secateur.graphops import rules
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.model.runtime import open_session
from secateur.graphops.pipeline import rotating
from secateur.graphops.rotation.bases import Rotation, rotation
from secateur.graphops.rotation.streams import Stream, find
from secateur.graphops.surgery.rotate import rotate
from secateur.graphops.verify.examples import example_feeds

WIDE = 16
SAMPLES = {"x": np.random.default_rng(0).standard_normal((64, 8, 6, 6)).astype(np.float32)}


def mixed(net: Net, inner: int, kernel: int = 1) -> str:
    """The weight of a convolution to `WIDE` channels, few dimensions of which say nearly all, and
    none of which does."""
    turn, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((WIDE, WIDE)))
    weight = net.draw.standard_normal((WIDE, inner, kernel, kernel)) / np.sqrt(inner * kernel**2)
    strength = 0.5 ** np.arange(WIDE)
    return net.const(np.einsum("on,n,nikl->oikl", turn, strength, weight).astype(np.float32))


def bottleneck(between: Callable[[Net, str], str] = lambda net, y: y) -> bytes:
    """A stream of a convolution, and of a block with a depthwise one inside, read by two."""
    net = Net()
    x = net.op("Conv", net.input("x", ["N", 8, 6, 6]), mixed(net, 8, 3), pads=[1] * 4)
    inner = net.op("Relu", net.conv(x, WIDE, 24))
    inner = net.op("Relu", net.conv(inner, 24, 24, 3, group=24))
    y = net.op("Add", x, net.op("Conv", inner, mixed(net, 24), net.floats(WIDE)))
    y = net.op("GlobalAveragePool", net.op("Relu", net.conv(between(net, y), WIDE, 32, 3)))
    net.output(net.op("Flatten", y))
    return net.bytes()


def streams(source: Any) -> list[Stream]:
    analysis = Analysis.of(source)
    return find(analysis.model, analysis.coupling)


def run(model: ir.Model | bytes, feeds: dict[str, Any]) -> list[np.ndarray]:
    data = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
    return open_session(data).run(None, feeds)


@pytest.mark.parametrize(
    "between",
    [
        lambda net, y: y,
        lambda net, y: net.op("Add", y, net.floats(1, WIDE, 1, 1)),
        lambda net, y: net.op("Sub", net.floats(1, WIDE, 1, 1), y),
        lambda net, y: net.op("Add", y, net.constant(np.ones((WIDE, 1, 1), np.float32))),
        lambda net, y: net.op("Dropout", y),
        lambda net, y: net.op("Concat", y, y, axis=2),
        lambda net, y: net.op("ReduceMean", y, axes=[2, 3]),
        lambda net, y: net.op("ReduceSum", y, net.ints(2)),
        lambda net, y: net.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2]),
        lambda net, y: net.op(
            "Transpose", net.op("Transpose", y, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2]
        ),
    ],
    ids=[
        "alone",
        "constant",
        "from_constant",
        "constant_node",
        "dropout",
        "concat",
        "mean",
        "sum",
        "pool",
        "layout",
    ],
)
def test_a_linear_bottleneck_is_a_stream(between: Callable[[Net, str], str]) -> None:
    (stream,) = streams(bottleneck(between))
    assert len(stream.producers) == 2
    assert len(stream.readers) == 2


@pytest.mark.parametrize(
    "between",
    [
        lambda net, y: net.op("Relu", y),
        lambda net, y: net.op("Mul", y, net.floats(1, WIDE, 1, 1)),
        lambda net, y: net.op("Add", y, net.floats(1)),
        lambda net, y: net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]),
        lambda net, y: net.conv(y, WIDE, WIDE, 3, group=WIDE),
        lambda net, y: net.conv(y, WIDE, WIDE, 3, group=4),
        lambda net, y: net.op("Concat", y, y, axis=1),
        lambda net, y: net.op(
            "BatchNormalization", y, *(net.floats(WIDE, low=0.5) for _ in range(4))
        ),
    ],
    ids=["relu", "scale", "scalar", "max", "depthwise", "grouped", "concat", "normalisation"],
)
def test_what_sees_channels_one_by_one_spoils_it(between: Callable[[Net, str], str]) -> None:
    assert not streams(bottleneck(between))


def test_shared_weights_and_outputs_are_left() -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 8, 6, 6]), 8, 12)
    weight = net.floats(12, 12, 1, 1)
    y = net.op("Add", x, net.op("Conv", net.op("Relu", net.op("Conv", x, weight)), weight))
    net.output(net.conv(y, 12, 4))
    assert not streams(net.bytes())


def test_a_product_inside_a_stream_turns_on_both_sides() -> None:
    """y = x + W·x, with W from the stream to itself."""
    net = Net()
    x = net.dense(net.input("x", ["N", 8]), 8, 12)
    y = net.op("Add", x, net.dense(x, 12, 12))
    net.output(net.dense(y, 12, 4))
    source = net.bytes()
    (stream,) = streams(source)
    assert len(stream.producers) == len(stream.readers) == 2
    turned = rotate(Analysis.of(source).model, [drawn(stream, 12)])
    feeds = {"x": SAMPLES["x"][:4, :, 0, 0]}
    np.testing.assert_allclose(run(turned, feeds)[0], run(source, feeds)[0], rtol=1e-4, atol=1e-4)


def drawn(stream: Stream, width: int) -> Rotation:
    """Any basis, well conditioned."""
    draw = np.random.default_rng(1)
    turn, _ = np.linalg.qr(draw.standard_normal((width, width)))
    there = turn * draw.uniform(0.5, 2.0, width)
    return Rotation(stream, there, np.linalg.inv(there), np.full(width, 1 / width))


def passes(row: Row) -> bool:
    """Whether the row is of an operator that a stream may cross."""
    rule = rules.find(row.domain, row.op, row.opset if not row.domain else 1)
    return row.freezes is None and rule is not None and (rule.additive or rule.moves)


def crossed(row: Row) -> tuple[bytes, list[Stream]]:
    """A row's model, and its streams that cross the operator."""
    net = Net(row.opset)
    if row.domain:
        net.domains[row.domain] = 1
    net.output(row.build(net))
    source = net.bytes()
    analysis = Analysis.of(source)
    (axes,) = (
        analysis.coupling.axes(str(node.outputs[0].name)).values()
        for node in analysis.model.graph
        if node.name == SUBJECT
    )
    units = set(np.concatenate([[0], *axes]).tolist())
    groups = analysis.coupling.groups
    return source, [one for one in streams(source) if units & set(groups[one.group].units.tolist())]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if passes(row)])
def test_no_operator_notices_a_turn(row: Row) -> None:
    """In another basis of a stream that crosses it, a model computes what it did."""
    source, found = crossed(row)
    analysis = Analysis.of(source)
    turns = [drawn(one, analysis.coupling.groups[one.group].units.size) for one in found]
    turned = rotate(analysis.model, turns)
    feeds = example_feeds(analysis.model.graph, analysis.coupling.shapes, seed=0)
    for one, other in zip(run(turned, feeds), run(source, feeds), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_every_operator_that_adds_is_crossed_in_some_row() -> None:
    wanted = {rule.op_type for rule in rules.all_rules() if rule.additive}
    assert wanted <= {row.op for row in ROWS if passes(row) and crossed(row)[1]}


def plain() -> bytes:
    """Nothing but a stream can be cut."""
    net = Net()
    x = net.op("Conv", net.input("x", ["N", 8, 6, 6]), mixed(net, 8, 3), pads=[1] * 4)
    y = net.op("Add", x, net.op("Conv", x, mixed(net, WIDE), net.floats(WIDE)))
    net.output(net.conv(y, WIDE, 6))
    return net.bytes()


def test_the_basis_is_that_in_which_fewest_channels_are_needed() -> None:
    analysis = Analysis.of(plain())
    (stream,) = streams(plain())
    batches = [{"x": part} for part in np.split(SAMPLES["x"], 8)]
    observed = Observed(analysis.model, analysis.coupling, batches, 0)
    found = rotation(stream, observed.moments, {})
    np.testing.assert_allclose(found.there @ found.back, np.eye(WIDE), atol=1e-6)
    assert (np.diff(found.shares) <= 0).all()
    assert found.shares.sum() == pytest.approx(1)
    assert found.shares[:4].sum() > 0.95
    covariances = [observed.moments[name].covariance()[0] for name in observed.moments]
    turned = found.there @ np.mean(covariances, axis=0) @ found.there.T
    np.testing.assert_allclose(turned[:4, :4], np.eye(4), atol=1e-3)  # alone, and all alike


def test_less_is_lost_in_it() -> None:
    drift = {}
    for how in (False, True):
        result = prune(
            plain(), target={"channels": 0.5}, calibration=SAMPLES, rotate=how, repair=True
        )
        drift[how] = result.report.verification.drift[0].relative_error
        assert [len(result.plan.rotated), len(result.report.rotated)] == [how, how]
    assert drift[True] < 0.5 * drift[False]
    (told,) = result.report.rotated
    assert told.group == result.plan.rotated[0]
    assert told.needed < told.channels == WIDE


def test_few_samples_do() -> None:
    few = {"x": SAMPLES["x"][:4]}  # one of them judges
    assert prune(bottleneck(), target={"channels": 0.5}, calibration=few).plan.rotated


def test_it_goes_with_data_and_repair() -> None:
    target = {"channels": 0.5}
    assert prune(plain(), target=target, calibration=SAMPLES).plan.rotated
    assert not prune(plain(), target=target, calibration=SAMPLES, repair=False).plan.rotated
    assert not prune(plain(), target=target).plan.rotated
    ranks = prune(plain(), target={"macs": 0.95}, calibration=SAMPLES, granularity=["rank"])
    assert not ranks.plan.rotated
    with pytest.raises(Refused) as refused:
        prune(plain(), target=target, rotate=True)
    assert refused.value.refusal.code is Code.INVALID_CALIBRATION


def test_a_plan_turns_what_it_names() -> None:
    source = bottleneck()
    result = prune(source, target={"macs": 0.6}, calibration=SAMPLES)
    assert result.plan.rotated
    replayed = prune(source, plan=result.plan, calibration=SAMPLES)
    assert replayed.model == result.model
    assert replayed.plan == result.plan
    with pytest.raises(Refused) as refused:
        prune(source, plan=result.plan)
    assert refused.value.refusal.code is Code.INVALID_CALIBRATION
    wrong = result.plan.model_copy(update={"rotated": ("nothing",)})
    with pytest.raises(Refused) as refused:
        prune(source, plan=wrong, calibration=SAMPLES)
    assert refused.value.refusal.code is Code.INVALID_PLAN


def test_a_basis_in_which_the_model_is_another_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = prune(plain(), target={"channels": 0.5}, calibration=SAMPLES).plan
    monkeypatch.setattr(rotating, "_MOST_DRIFT", 0.0)
    with pytest.raises(Refused) as refused:
        prune(plain(), plan=plan, calibration=SAMPLES)
    assert refused.value.refusal.code is Code.INVALID_CALIBRATION
    result = prune(plain(), target={"channels": 0.5}, calibration=SAMPLES)
    assert not result.plan.rotated
    assert any("stay in their basis" in warning for warning in result.report.warnings)


def test_streams_that_a_region_would_join_are_left() -> None:
    """A convolution from one stream to another of the same width may be left out: what ran in
    one basis would be read in another."""
    net = Net()
    x = net.conv(net.input("x", ["N", 8, 6, 6]), 8, 12)
    y = net.conv(net.conv(x, 12, 12, 3), 12, 4)
    net.output(y)
    analysis = Analysis.of(net.bytes())
    assert len(find(analysis.model, analysis.coupling)) == 2
    (first, second) = (node.outputs[0].name for node in list(analysis.model.graph)[:2])
    assert not find(analysis.model, analysis.coupling, [(str(first), str(second))])
    target = {"macs": 0.7}
    kinds = ["layer", "channel"]
    result = prune(net.bytes(), target=target, granularity=kinds, calibration=SAMPLES)
    assert not result.plan.rotated
