"""Sizes under two bindings of what a model leaves free."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import INT64, Net
from onnx import helper

from secateur.graphops.model import arithmetic
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.shapes import Shapes, infer_shapes


def shapes_of(net: Net) -> Shapes:
    return infer_shapes(open_model(net.bytes()).model)


def test_a_sequence_is_bound_no_longer_than_its_table_of_positions() -> None:
    net = Net()
    tokens = net.input("tokens", ["N", "S"], INT64)
    length = net.op("Slice", net.op("Shape", tokens), net.ints(1), net.ints(2))
    ids = net.const(np.arange(32, dtype=np.int64).reshape(1, 32))
    ids = net.op("Slice", ids, net.ints(0), length, net.ints(1))
    words = net.op("Gather", net.floats(100, 8), tokens)
    x = net.op("Add", words, net.op("Gather", net.floats(32, 8), ids))
    net.output(net.dense(net.dense(x, 8, 6), 6, 3))
    first, second = shapes_of(net).inputs["tokens"]
    assert first[1] <= 32
    assert second[1] <= 32
    assert first != second


def test_a_length_is_bound_at_which_one_frame_is_squeezed() -> None:
    net = Net()
    frames = net.op("Conv", net.input("x", ["N", 1, "S"]), net.floats(8, 1, 512), strides=[512])
    net.output(net.dense(net.op("Squeeze", net.op("Relu", frames), net.ints(2)), 8, 3))
    assert shapes_of(net).inputs["x"][0] == (2, 1, 512)


def squeezed_where_alone(net: Net, x: str) -> str:
    """As TorchScript's exporter writes `x.squeeze(2)`."""
    size = net.op("Gather", net.op("Shape", x), net.const(np.array(2, np.int64)))
    alone = net.op("Equal", size, net.const(np.array(1, np.int64)))

    def branch(op_type: str, *more: str) -> onnx.GraphProto:
        node = helper.make_node(op_type, [x, *more], [f"{op_type}_y"], name=op_type)
        output = helper.make_tensor_value_info(f"{op_type}_y", onnx.TensorProto.FLOAT, None)
        return helper.make_graph([node], op_type, [], [output])

    squeezed, same = branch("Squeeze", net.ints(2)), branch("Identity")
    return net.op("If", alone, then_branch=squeezed, else_branch=same)


def test_a_branch_that_is_never_taken_may_squeeze_anything() -> None:
    net = Net()
    net.output(squeezed_where_alone(net, net.input("x", ["N", 4, "S"])))
    plain = Net()
    plain.output(plain.op("Relu", plain.input("x", ["N", 4, "S"])))
    assert shapes_of(net).inputs == shapes_of(plain).inputs


def test_a_length_is_bound_at_which_a_recurrent_layer_reads_what_it_can() -> None:
    net = Net()
    frames = net.op("Conv", net.input("x", ["N", 1, "S"]), net.floats(8, 1, 512), strides=[512])
    step = net.op("Unsqueeze", squeezed_where_alone(net, frames), net.ints(0))
    net.output(net.op("LSTM", step, net.floats(1, 24, 8), net.floats(1, 24, 6), hidden_size=6))
    assert shapes_of(net).inputs["x"][0] == (2, 1, 512)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_shape_arithmetic_that_was_quantised(dtype: Any) -> None:
    net = Net()
    x = net.input("x", ["N", 4, 6])
    size = net.op("Cast", net.op("Gather", net.op("Shape", x), net.ints(1)), to=1)
    step, middle = net.const(np.float32(0.0313)), net.const(dtype(-3 if dtype is np.int8 else 3))
    integers = net.op("QuantizeLinear", size, step, middle)
    size = net.op("Round", net.op("DequantizeLinear", integers, step, middle))
    sizes = net.op("Concat", net.ints(-1), net.op("Cast", size, to=INT64), axis=0)
    y = net.op("Reshape", x, sizes)
    net.output(y)
    net.output(integers, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    shapes = shapes_of(net)
    feeds = {"x": np.zeros((2, 4, 6), np.float32)}
    wanted, steps = open_session(net.bytes()).run(None, feeds)
    assert shapes.of(y) == wanted.shape
    np.testing.assert_array_equal(shapes.values[integers], steps)


def test_operators_that_came_later_than_the_model() -> None:
    """ONNX Runtime's optimizer writes LayerNormalization into models of any opset."""
    net = Net(opset=14)
    x = net.op("LayerNormalization", net.input("x", ["N", 8]), net.floats(8), net.floats(8))
    net.output(net.dense(x, 8, 3))
    assert shapes_of(net).of(x) == (2, 8)


def test_what_is_equal_in_both_bindings_is_the_model_s_own() -> None:
    net = Net()
    x = net.input("x", ["N", 4, "H", 6])
    y = net.conv(x, 4, 8)
    net.output(net.conv(y, 8, 3))
    shapes = shapes_of(net)
    assert [shapes.is_fixed(y, axis) for axis in range(4)] == [False, True, False, True]


def test_shape_arithmetic_is_evaluated_and_knows_what_follows_the_input() -> None:
    net = Net()
    x = net.input("x", ["N", 4, 6])
    twice = net.op("Mul", net.op("Shape", x), net.ints(2, 2, 2))
    y = net.op("Expand", net.op("Reshape", x, net.ints(-1)), net.ints(1))
    net.output(net.op("Reshape", y, net.op("Div", twice, net.ints(2, 2, 2))))
    shapes = shapes_of(net)
    fixed = shapes.fixed_entries(twice)
    assert shapes.values[twice].tolist() == [4, 8, 12]
    assert fixed is not None
    assert fixed.tolist() == [False, True, True]


def test_what_nonzero_finds_follows_the_data() -> None:
    net = Net()
    x = net.input("x", ["N", 6])
    rows = net.op("Slice", net.op("NonZero", x), net.ints(0), net.ints(1), net.ints(0))  # (1, n)
    tokens = net.op("Gather", x, net.op("Squeeze", rows, net.ints(0)), axis=0)  # (n, 6)
    sizes = net.op("Concat", net.op("Shape", tokens), net.ints(1), axis=0)
    y = net.op("Reshape", tokens, sizes)
    net.output(net.op("ReduceSum", y, net.ints(0), keepdims=0))
    shapes = shapes_of(net)
    assert [shapes.is_fixed(y, axis) for axis in range(3)] == [False, True, True]
    assert (shapes.of(y) or ())[1:] == (6, 1)
    found, size = zip(shapes.first[y], shapes.second[y], strict=True), shapes.inputs["x"]
    counts, batches = next(found), (size[0][0], size[1][0])
    assert (counts[0] or 0) * batches[1] != (counts[1] or 0) * batches[0], "it is no input's size"


def test_a_count_that_only_the_model_s_data_make_right_is_left_open() -> None:
    net = Net()
    x = net.input("x", ["N", 6])
    mask = net.op("Greater", net.floats(40, 40), net.const(np.float32(0)))  # too large to follow
    found = net.op("NonZero", net.op("Slice", mask, net.ints(0), net.ints(3), net.ints(0)))
    y = net.op("Reshape", found, net.ints(2, 1, -1), name="r")
    z = net.op("Add", net.op("Cast", y, to=onnx.TensorProto.FLOAT), net.floats(1, 1, 57))
    net.output(net.op("Add", x, net.op("ReduceSum", z, keepdims=0)))
    shapes = shapes_of(net)
    assert shapes.of(found) == (2, None)
    assert shapes.of(z) is not None


def test_of_a_shape_known_in_part_what_is_known_is_used() -> None:
    """As exporters halve the last axis of what a data-dependent choice left."""
    net = Net()
    x = net.input("x", ["N", 6])
    mask = net.op("Greater", net.floats(40, 40), net.const(np.float32(0)))  # too large to follow
    rows = net.op("Slice", net.op("NonZero", mask), net.ints(0), net.ints(1), net.ints(0))
    net.op("Add", net.op("Cast", rows, to=onnx.TensorProto.FLOAT), net.floats(1, 57))
    tokens = net.op("Gather", x, net.op("Squeeze", rows, net.ints(0)), axis=0)  # (n, 6)
    sizes = net.op("Shape", tokens)
    half = net.op("Div", net.op("Gather", sizes, net.ints(-1), axis=0), net.ints(2))
    y = net.op("Slice", tokens, net.ints(0), half, net.ints(-1))
    scale = net.op("Slice", y, net.ints(0), net.ints(1), net.ints(-1))
    flat = net.op("Reshape", scale, net.ints(-1))
    z = net.op("Reshape", flat, net.op("Concat", net.op("Shape", flat), net.ints(1), axis=0))
    wide = net.op("Expand", z, net.op("Shape", y))
    net.output(net.op("ReduceSum", wide, keepdims=0))
    shapes = shapes_of(net)
    assert [shapes.of(value) for value in (tokens, y, z, wide)] == [
        (None, 6),
        (None, 3),
        (None, 1),
        (None, 3),
    ]


def test_nodes_that_are_alike_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = onnx.shape_inference.infer_node_outputs

    def count(schema: Any, node: onnx.NodeProto, *rest: Any, **options: Any) -> Any:
        asked.append(node.op_type)
        return ask(schema, node, *rest, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_node_outputs", count)
    net = Net()
    x = net.input("x", ["N", 16, 6, 6])
    for _ in range(5):
        x = net.op("Relu", net.conv(x, 16, 16))
    net.output(net.conv(x, 16, 12))
    assert shapes_of(net).of(x) == (2, 16, 6, 6)
    # once per binding; the last convolution has another weight
    assert (asked.count("Conv"), asked.count("Relu")) == (4, 2)


@pytest.mark.parametrize(("domain", "wide"), [("", 32), ("com.microsoft", 8)])
def test_an_operator_s_domain_says_which_shapes_it_has(domain: str, wide: int) -> None:
    """Attention of ai.onnx takes queries, keys and values; the other x, a weight and a bias."""
    net = Net(opset=23)
    x = net.input("x", [2, 5, 32])
    if domain:
        y = net.op("Attention", x, net.floats(32, 24), net.floats(24), num_heads=4, domain=domain)
    else:
        y = net.op("Attention", x, *[net.dense(x, 32, 16)] * 2, q_num_heads=4, kv_num_heads=2)
    net.output(y)
    assert shapes_of(net).of(y) == (2, 5, wide)


INTEGERS = np.array([[3, 0, 2], [1, 2, 0]], np.int64)
NEW = [
    ("OneHot", [INTEGERS, np.int64(4), np.array([0, 7], np.int64)], {"axis": 1}),
    ("OneHot", [INTEGERS - 1, np.int64(4), np.array([0, 7], np.int64)], {}),
    ("CumSum", [INTEGERS, np.int64(1)], {}),
    ("ArgMax", [INTEGERS], {"axis": 1, "keepdims": 0}),
    ("ArgMin", [INTEGERS], {}),
    ("GatherND", [INTEGERS, np.array([[1, 2], [0, 0]], np.int64)], {}),
    ("ScatterND", [INTEGERS, np.array([[1]], np.int64), INTEGERS[:1]], {}),
    ("NonZero", [INTEGERS], {}),
]


@pytest.mark.parametrize(("op_type", "inputs", "attributes"), NEW)
def test_arithmetic_gives_what_onnx_runtime_gives(
    op_type: str, inputs: list[Any], attributes: dict[str, Any]
) -> None:
    net = Net()
    names = [net.input(f"i{n}", list(np.shape(item)), INT64) for n, item in enumerate(inputs)]
    net.output(net.op(op_type, *names, **attributes), INT64)
    feeds = {name: np.asarray(item) for name, item in zip(names, inputs, strict=True)}
    (wanted,) = open_session(net.bytes()).run(None, feeds)
    node = open_model(net.bytes()).model.graph[0]
    found = arithmetic.evaluate(node, inputs)
    assert found is not None
    np.testing.assert_array_equal(found[0], wanted)


@pytest.mark.parametrize("op_type", ["Tile", "Expand", "ConstantOfShape"])
def test_arithmetic_makes_nothing_large(op_type: str) -> None:
    """What a damaged file asks for can be any size, and is not made to see that it is too large."""
    sizes = np.array([1 << 33, 1 << 20])
    data = () if op_type == "ConstantOfShape" else (np.zeros((1, 1), np.int64),)
    assert arithmetic.evaluate(ir.node(op_type, []), [*data, sizes]) is None
