"""Whole groups, balanced cuts, and head dimensions: what goes together, and who decides."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from laws import lawful, prune
from nets import Net, attention
from rows import diagonal, gated, merged

import secateur
from secateur.errors import Code, Refused
from secateur.graphops.coupling import grouping
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.grouping import _Base, frozen_components
from secateur.graphops.coupling.labels import FIXED
from secateur.graphops.coupling.units import resolve_rectangles
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.recipe import Recipe


def grouped(groups: int, width: int) -> bytes:
    """A convolution with groups between two dense ones."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 4, 6, 6]), 4, width))
    x = net.op("Relu", net.conv(x, width, width, kernel=3, group=groups))
    net.output(net.conv(x, width, 3))
    return net.bytes()


def normalised(groups: int, width: int, opset: int) -> bytes:
    """Group normalisation between two convolutions: native, or as exporters spell it."""
    net = Net(opset)
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, width, kernel=3)
    if opset >= 18:
        size = width if opset >= 21 else groups
        x = net.op("GroupNormalization", x, net.floats(size), net.floats(size), num_groups=groups)
    else:
        y = net.op("Reshape", x, net.ints(0, groups, -1))
        y = net.op("InstanceNormalization", y, net.floats(groups), net.floats(groups))
        x = net.op("Reshape", y, net.ints(2, width, 6, 6))
        x = net.op("Mul", x, net.floats(width, 1, 1))
    net.output(net.conv(net.op("Relu", x), width, 3))
    return net.bytes()


def test_a_depthwise_convolution_keeps_a_balanced_cut_before_it() -> None:
    """Its groups have one position each: whatever goes before it goes with it."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 4, 6, 6]), 4, 32))
    x = net.op("Relu", net.conv(x, 32, 32, kernel=3, group=2))
    x = net.op("Relu", net.conv(x, 32, 32, kernel=3, group=32))
    net.output(net.conv(x, 32, 3))
    result = lawful(net.bytes(), target={"channels": 0.5})
    assert max(group.units for group in result.report.groups) == 16


def kept(result: secateur.Result, groups: int) -> tuple[int, int]:
    """(groups, channels of each) that the middle layer's input keeps."""
    entries = [e for e in result.plan.kept if e.tensor == "w_1" or 0 in e.axes]
    channels = np.array(entries[0].axes[0])
    width = 4 * groups
    lines = np.isin(np.arange(width), channels).reshape(groups, -1)
    alive = lines[lines.any(axis=1)]
    assert (alive == alive[0]).all(), "a group kept other channels than its neighbour"
    return len(alive), int(alive[0].sum())


@pytest.mark.parametrize(
    ("how", "wanted"), [("whole", (4, 4)), ("balanced", (8, 2)), ("auto", (4, 4))]
)
def test_the_recipe_says_what_a_grouped_convolution_loses(
    how: str, wanted: tuple[int, int]
) -> None:
    result = lawful(grouped(8, 32), grouped=how)
    assert kept(result, 8) == wanted


def test_a_balanced_cut_goes_deeper_and_is_taken_where_it_is_fine_enough() -> None:
    source = grouped(4, 64)  # 16 channels each
    sizes = {
        how: lawful(source, grouped=how).report.after.params
        for how in ("whole", "balanced", "auto")
    }
    assert sizes["balanced"] < sizes["whole"]
    assert sizes["auto"] == sizes["balanced"]


@pytest.mark.parametrize("how", ["whole", "balanced"])
@pytest.mark.parametrize("opset", [17, 18, 21])
def test_group_normalisation(how: str, opset: int) -> None:
    result = lawful(normalised(4, 64, opset), grouped=how)
    (group,) = [g for g in result.report.groups if g.units > 3]
    assert group.units == (4 if how == "whole" else 16)
    assert group.kept == group.units // 2
    assert bool(group.normalised_by) == (how == "balanced" or opset < 18)


def test_groups_of_other_sizes_on_the_same_channels_are_decided_together() -> None:
    """Convolution in groups of 8 channels, normalised in 8 groups: neither alone decides."""
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 128)
    x = net.conv(x, 128, 128, kernel=3, group=16)
    y = net.op("Reshape", x, net.ints(0, 4, -1))
    y = net.op("InstanceNormalization", y, net.floats(4), net.floats(4))
    net.output(net.conv(net.op("Reshape", y, net.ints(2, 128, 6, 6)), 128, 3))
    result = lawful(net.bytes())
    assert result.report.after.params < 0.4 * result.report.before.params


def test_a_trial_passes_what_choices_read_and_of_that_what_may_go() -> None:
    """All labels, for every trial, cost minutes in networks whose windows have position tables."""
    net = Net()
    source = net.input("x", [2, 4, 6, 6])
    x = net.conv(source, 4, 64)
    for y in (x, net.conv(x, 64, 64, group=4)):  # nothing of the two may go
        net.output(y)
    x = net.conv(net.conv(source, 4, 512), 512, 32)
    net.output(net.conv(net.conv(x, 32, 32, kernel=3, group=4), 32, 3))
    opened = open_model(net.bytes())
    asked: list[_Base] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_Base", lambda *given: asked.append(_Base(*given)) or asked[-1])
        couple(opened.model, infer_shapes(opened.model))
    (base,) = asked
    assert len(base.choices) == 2
    assert base.free == [1]
    assert base.frozen.size < 512  # the dense convolution between is not passed


def test_depthwise_channels_go_whatever_is_asked() -> None:
    result = lawful(grouped(32, 32), grouped="whole")
    assert result.report.groups[0].kept == 16


# -- heads, or their dimensions ----------------------------------------------------------------


def transformer() -> bytes:
    net = Net()
    x = net.dense(net.input("x", [2, 5, 8]), 8, 32)
    x = net.op("Add", x, attention(net, x, 32, 4, 8, 5))
    net.output(net.dense(x, 32, 3))
    return net.bytes()


def test_head_dimensions_go_from_every_head_alike() -> None:
    result = lawful(transformer(), granularity=("head_dim",))
    dims = [group for group in result.report.groups if group.kind == "head_dim"]
    assert [(group.units, group.kept, group.channels_per_unit) for group in dims] == [
        (8, 4, 4),  # queries and keys
        (8, 4, 4),  # values
    ]
    assert result.report.after.params < result.report.before.params


def test_a_plan_of_head_dimensions_is_replayed() -> None:
    source = transformer()
    result = prune(source, granularity=("channel", "head_dim"))
    again = secateur.prune(source, plan=result.plan, measure_latency=False)
    assert again.model == result.model


def test_heads_and_their_dimensions_exclude_each_other() -> None:
    with pytest.raises(Refused) as caught:
        Recipe(granularity=("head", "head_dim"))
    assert caught.value.refusal.code is Code.INVALID_RECIPE


def packed(bits: int, zeros: bool) -> bytes:
    """Dense, then 64 numbers in blocks of 16 that share a scale, to 12 columns; dense."""
    net = Net()
    net.domains["com.microsoft"] = 1
    x = net.dense(net.input("x", [2, 5, 4]), 4, 64)
    numbers = net.const(net.draw.integers(0, 256, (12, 4, 2 * bits)).astype(np.uint8))
    operands = [x, numbers, net.floats(12, 4, low=0.01)]
    if zeros:
        count = 4 * bits // 8
        operands.append(net.const(net.draw.integers(0, 256, (12, count)).astype(np.uint8)))
    options = {"N": 12, "K": 64, "bits": bits, "block_size": 16}
    net.output(
        net.dense(net.op("MatMulNBits", *operands, domain="com.microsoft", **options), 12, 3)
    )
    return net.bytes()


@pytest.mark.parametrize(
    ("bits", "zeros", "units", "width"), [(4, False, 4, 16), (8, True, 4, 16), (4, True, 2, 32)]
)
def test_packed_numbers_go_in_whole_blocks(bits: int, zeros: bool, units: int, width: int) -> None:
    """Zero points of 4 bits share a byte: their blocks go in pairs."""
    result = lawful(packed(bits, zeros), target={"channels": 0.5})
    assert sorted((g.units, g.channels_per_unit, g.kept) for g in result.report.groups) == [
        (units, width, units // 2),
        (12, 1, 6),
    ]


def test_blocks_that_do_not_fill_their_axis_stay() -> None:
    net = Net()
    net.domains["com.microsoft"] = 1
    x = net.dense(net.input("x", [2, 5, 4]), 4, 56)  # the last of four blocks is half empty
    numbers = net.const(net.draw.integers(0, 256, (12, 4, 8)).astype(np.uint8))
    options = {"N": 12, "K": 56, "bits": 4, "block_size": 16, "domain": "com.microsoft"}
    y = net.op("MatMulNBits", x, numbers, net.floats(12, 4, low=0.01), **options)
    net.output(net.dense(y, 12, 3))
    found = secateur.inspect(net.bytes())
    assert [group.units for group in found.groups] == [12]
    assert any(frozen.code == "BLOCK" for frozen in found.frozen)


@pytest.mark.parametrize(
    ("cut", "shape"),
    [("whole", (2, 6, 8)), ("balanced", (4, 3, 4)), ("auto", (4, 3, 4))],
)
def test_a_block_diagonal_product_is_cut_like_a_grouped_convolution(
    cut: str, shape: tuple[int, int, int]
) -> None:
    net = Net()
    x = net.dense(net.input("x", [2, 5, 4]), 4, 24)
    net.output(net.dense(net.op("Tanh", diagonal(net, x, 4, 6, 8)), 32, 3))
    result = lawful(net.bytes(), target={"channels": 0.5}, grouped=cut)
    (blocks,) = (
        tensor
        for tensor in onnx.load_from_string(result.model).graph.initializer
        if tensor.name.startswith("blocks")
    )
    assert tuple(blocks.dims) == shape


@pytest.mark.parametrize("equation", ["blhi,hij->blhj", "hij,blhi->blhj"])
@pytest.mark.parametrize(("cut", "shape"), [("whole", (2, 3, 3)), ("balanced", (4, 1, 1))])
def test_blocks_of_an_einsum_that_gates_what_enters_go(
    cut: str, shape: tuple[int, int, int], equation: str
) -> None:
    """A recurrence's gates: the result of the blocks meets what entered them, position by
    position."""
    net = Net()
    net.output(gated(net, equation))
    result = lawful(net.bytes(), target={"channels": 0.5}, grouped=cut)
    assert shape in {tuple(t.dims) for t in onnx.load_from_string(result.model).graph.initializer}


@pytest.mark.parametrize(
    ("cut", "widths"), [("whole", (2, 3)), ("balanced", (4, 1)), ("auto", (2, 3))]
)
def test_of_two_axes_that_a_reshape_merges_one_is_cut(cut: str, widths: tuple[int, int]) -> None:
    net = Net()
    net.output(net.dense(merged(net), 12, 3))
    result = lawful(net.bytes(), target={"channels": 0.5}, grouped=cut)
    (entry,) = (e for e in result.plan.kept if len(e.axes[min(e.axes)]) == widths[0] * widths[1])
    rows = np.array(entry.axes[min(entry.axes)])
    assert (np.unique(rows // 3).size, np.unique(rows % 3).size) == widths


def test_heads_of_a_recurrent_step_go_from_every_gate() -> None:
    """Block-diagonal recurrent weights (gates, heads, width, width) beside a dense layer's gates
    (gates · heads · width); the first state is zeros."""
    net = Net()
    x, weight = net.input("x", [2, 3, 5]), net.floats(2, 4, 3, 3, name="blocks")
    kernel, bias = net.floats(5, 24), net.floats(24)
    state = net.op("ConstantOfShape", net.ints(2, 12))
    for step in range(3):
        now = net.op("Reshape", net.op("Gather", x, net.ints(step), axis=1), net.ints(2, 5))
        parts = net.op("Reshape", state, net.ints(2, 4, 3))
        gates = net.op("Einsum", parts, weight, equation="bkd,gkde->bgke")
        gates = net.op("Reshape", gates, net.ints(2, 24))
        gates = net.op("Add", net.op("Add", net.op("MatMul", now, kernel), bias), gates)
        new, gate = net.ops("Split", gates, net.ints(12, 12), outputs=2, axis=-1)
        state = net.op("Mul", net.op("Tanh", new), net.op("Sigmoid", gate))
    net.output(net.dense(state, 12, 3))
    result = lawful(net.bytes(), target={"channels": 0.5})
    sizes = {t.name: tuple(t.dims) for t in onnx.load_from_string(result.model).graph.initializer}
    assert sizes["blocks"] == (2, 2, 3, 3)


def test_a_joint_block_that_is_fixed_in_part_is_resolved() -> None:
    """One position that stays keeps its row; the other row goes whole."""
    net = Net()
    net.output(net.dense(net.input("x", [2, 4]), 4, 3))
    model = open_model(net.bytes()).model
    flow = Flow(infer_shapes(model), {"": 17}, {}, model.graph)
    labels = flow.fresh(4).reshape(2, 2)
    labels[0, 0] = FIXED
    flow.rectangles.append(labels)
    count, component = resolve_rectangles(flow)
    frozen = frozen_components(flow, count, component)[component]
    assert frozen[labels].tolist() == [[True, True], [False, False]]
    assert component[labels[1, 0]] == component[labels[1, 1]]


def test_the_inner_width_of_block_diagonal_products_goes_where_the_outer_stays() -> None:
    net = Net()
    x = net.input("x", [2, 5, 8])
    y = net.op("Tanh", diagonal(net, x, 2, 4, 8))
    net.output(diagonal(net, y, 2, 8, 4))
    result = lawful(net.bytes(), target={"channels": 0.5})
    first, second = (
        tuple(tensor.dims)
        for tensor in onnx.load_from_string(result.model).graph.initializer
        if tensor.name.startswith("blocks")
    )
    assert (first, second) == ((2, 4, 4), (2, 4, 4))


def test_weights_that_are_standardised_in_the_graph() -> None:
    """(out, in, 3, 3) as one row per output channel: neither of the two choices within a row may
    be made by counting what would go as one."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8, 3))
    rows = net.op("Reshape", net.floats(10, 8, 3, 3), net.ints(10, -1))
    centred = net.op("Sub", rows, net.op("ReduceMean", rows, axes=[1]))
    spread = net.op("Sqrt", net.op("ReduceMean", net.op("Mul", centred, centred), axes=[1]))
    weight = net.op("Reshape", net.op("Div", centred, spread), net.ints(10, 8, 3, 3))
    x = net.op("Relu", net.op("Conv", x, weight, pads=[1] * 4))
    net.output(net.conv(x, 10, 4))
    result = lawful(net.bytes(), target={"channels": 0.5})
    assert sorted((group.units, group.kept) for group in result.report.groups) == [(8, 4), (10, 5)]
