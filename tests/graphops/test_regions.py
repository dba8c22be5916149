"""Regions: found by dominance alone, refused with reasons, and left out exactly."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import Net, attention

import secateur.graphops
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.regions.find import find
from secateur.graphops.regions.flowgraph import FlowGraph
from secateur.graphops.surgery.bypass import bypass
from secateur.graphops.verify.runtime import open_session
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
