"""The law over whole models: the two trained ones, the traps of the field, and a zoo.

Each trap is something that exporters really write and that tools have got wrong; its test is
named for it. `lawful` prunes, which verifies in ONNX Runtime, and checks the law.
"""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import numpy as np
import onnx
import pytest
from laws import lawful, prune
from nets import BOOL, INT64, Net, attention
from onnx import TensorProto, helper, numpy_helper

import secateur
from secateur.graphops.model.runtime import open_session
from secateur.graphops.verify.law import check_law
from secateur.graphops.verify.verify import run_original, verify

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
ZOO = pathlib.Path(__file__).parents[3] / "shared" / "zoo"
BENCH = ZOO.with_name("bench")


def kept(result: secateur.Result, tensor: str, axis: int) -> int | None:
    """How many positions of a tensor's axis were kept; None where all were."""
    for entry in result.plan.kept:
        if entry.tensor == tensor and axis in entry.axes:
            return len(entry.axes[axis])
    return None


def tensors(result: secateur.Result) -> dict[str, Any]:
    """Initializers of the result by name."""
    proto = onnx.load_from_string(result.model)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


# -- trained models ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"target": {"channels": 0.5}, "criterion": "random"},
        {"target": {"macs": 0.4}, "scope": "global"},
        {"target": {"params": 0.6, "macs": 0.7}, "round_to": 4},
    ],
    ids=["random", "global macs", "two targets, rounded"],
)
def test_digits(name: str, recipe: dict[str, Any]) -> None:
    lawful(DIGITS / f"{name}.onnx", **recipe)


# -- traps: where weights hide -----------------------------------------------------------------


def test_weights_behind_identity() -> None:
    net = Net()
    weight, bias = net.floats(8, 4, 3, 3), net.floats(8)
    x = net.op(
        "Conv", net.input("x", [2, 4, 6, 6]), net.op("Identity", weight), net.op("Identity", bias)
    )
    y = net.op("Conv", net.op("Relu", x), net.op("Identity", net.floats(6, 8, 1, 1)))
    net.output(net.conv(net.op("Relu", y), 6, 3))
    result = lawful(net.bytes())
    assert kept(result, weight, 0) == 4


def test_one_bias_shared_by_several_layers_of_other_fates() -> None:
    net = Net()
    shared, zeros = net.floats(8), net.const(np.zeros(8, np.float32))
    x = net.op("Conv", net.input("x", [2, 4, 6, 6]), net.floats(8, 4, 1, 1), shared)
    y = net.op("Conv", net.op("Relu", x), net.floats(8, 8, 1, 1), shared)
    z = net.op("Conv", net.op("Relu", y), net.floats(8, 8, 1, 1), zeros)
    net.output(net.op("Add", net.conv(z, 8, 8, bias=False), zeros_row(net, zeros)))
    result = lawful(net.bytes(), criterion="random")
    biases = [entry for entry in result.plan.kept if entry.source == shared]
    assert len(biases) == 2
    assert biases[0].axes != biases[1].axes


def zeros_row(net: Net, zeros: str) -> str:
    return net.op("Reshape", zeros, net.ints(1, 8, 1, 1))


def test_a_bias_shared_by_layers_of_one_fate_stays_one_tensor() -> None:
    net = Net()
    x, shared = net.input("x", [2, 4, 6, 6]), net.floats(8)
    a = net.op("Conv", x, net.floats(8, 4, 1, 1), shared)
    b = net.op("Conv", x, net.floats(8, 4, 1, 1), shared)
    net.output(net.conv(net.op("Relu", net.op("Add", a, b)), 8, 3))
    result = lawful(net.bytes())
    assert tensors(result)[shared].shape == (4,)
    assert sum(entry.source == shared for entry in result.plan.kept) == 1


def test_initializers_listed_as_inputs_in_the_old_ir() -> None:
    net = Net(opset=8, ir=3)
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    net.output(net.conv(net.op("Relu", x), 8, 3))
    result = lawful(net.bytes())
    proto = onnx.load_from_string(result.model)
    assert proto.graph.input[0].name == "x"
    listed = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in proto.graph.input
    }
    for tensor in proto.graph.initializer:
        assert listed[tensor.name] == list(tensor.dims)


def test_weights_as_constant_nodes() -> None:
    net = Net()
    draw = net.draw.standard_normal
    weight = net.constant(draw((8, 4, 1, 1)).astype(np.float32))
    x = net.op(
        "Conv", net.input("x", [2, 4, 6, 6]), weight, net.constant(draw(8).astype(np.float32))
    )
    y = net.op("Conv", net.op("Relu", x), net.constant(draw((3, 8, 1, 1)).astype(np.float32)))
    net.output(y)
    result = lawful(net.bytes())
    assert kept(result, weight, 0) == 4


def test_weights_divided_by_their_own_norm() -> None:
    """As exporters write normalised weights: the norm spread to the shape of the weight."""
    net = Net()
    x, weight = net.input("x", ["N", 6]), net.floats(16, 6)
    norm = net.op("ReduceL2", weight, axes=[1], keepdims=1)
    weight = net.op("Div", weight, net.op("Expand", norm, net.op("Shape", weight)))
    y = net.op("Relu", net.op("MatMul", x, net.op("Transpose", weight, perm=[1, 0])))
    net.output(net.dense(y, 16, 3))
    lawful(net.bytes(), target={"channels": 0.5})


def test_a_choice_that_weights_make() -> None:
    """As exporters write a lerp by a vector of weights."""
    net = Net()
    x = net.input("x", ["N", 6])
    first, second, weight = net.dense(x, 6, 16), net.dense(x, 6, 16), net.floats(16)
    low = net.op("Less", weight, net.const(np.float32(0.5)))
    step = net.op("Mul", net.op("Sub", second, first), weight)
    y = net.op("Where", low, net.op("Add", first, step), net.op("Sub", second, step))
    net.output(net.dense(net.op("Relu", y), 16, 3))
    lawful(net.bytes(), target={"channels": 0.5})


def test_zeros_like_a_tensor_of_open_length() -> None:
    """As a WaveNet starts its sum over layers: zeros of the shape of what enters."""
    net = Net()
    x = net.input("x", [2, 6])
    ones = (np.arange(1600).reshape(40, 40) < 57).astype(np.float32)  # too many to follow
    mask = net.op("Greater", net.const(ones), net.const(np.float32(0.5)))
    rows = net.op("Slice", net.op("NonZero", mask), net.ints(0), net.ints(1), net.ints(0))
    net.output(net.op("Add", net.op("Cast", rows, to=TensorProto.FLOAT), net.floats(1, 57)))
    tokens = net.op("Gather", x, net.op("Mod", net.op("Squeeze", rows, net.ints(0)), net.ints(2)))
    wide = net.op("Relu", net.dense(tokens, 6, 16))
    zeros = net.op("ConstantOfShape", net.op("Shape", wide))
    y = net.op("Add", zeros, net.op("Tanh", net.dense(wide, 16, 16)))
    net.output(net.dense(net.op("Add", y, net.dense(wide, 16, 16)), 16, 3))
    lawful(net.bytes(), target={"channels": 0.5})


def test_a_mask_that_is_chosen_from_before_it_becomes_a_size() -> None:
    """As relative positions are put into buckets: truths known beforehand choose among numbers."""
    net = Net()
    near = net.op("And", net.const(np.eye(6) > 0), net.const(np.ones((6, 6)) > 0))
    places = net.op("Where", near, net.ints(1), net.const(np.arange(36).reshape(6, 6) % 4))
    bias = net.op("Squeeze", net.op("Gather", net.floats(4, 1), places), net.ints(-1))  # (6, 6)
    y = net.op("MatMul", net.input("x", [2, 6]), bias)
    net.output(net.dense(net.op("Relu", net.dense(y, 6, 16)), 16, 3))
    lawful(net.bytes(), target={"channels": 0.5})


def test_a_range_of_positions_that_data_decide_beside_channels() -> None:
    net = Net()
    x = net.op("Relu", net.dense(net.input("x", [2, 6, 4]), 4, 16))
    first = net.op("Cast", net.op("Mul", net.input("t", [1]), net.const(np.float32(0))), to=INT64)
    y = net.op("Slice", x, first, net.op("Add", first, net.ints(3)), net.ints(1))
    net.output(net.dense(net.op("Add", y, net.floats(16)), 16, 3))
    lawful(net.bytes(), target={"channels": 0.5})


def test_sparse_initializers() -> None:
    net = Net(opset=13)
    x = net.op("MatMul", net.input("x", [2, 4]), "sparse")
    net.output(net.dense(net.op("Relu", x), 8, 3))
    model = net.model()
    values = numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([1, 9, 20, 31]), "sparse_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 8]))
    lawful(model.SerializeToString())


# -- traps: products ---------------------------------------------------------------------------


def test_gemm_with_every_attribute() -> None:
    net = Net()
    x = net.op("Gemm", net.input("x", [4, 2]), net.floats(8, 4), net.floats(8), transA=1, transB=1)
    y = net.op("Gemm", net.op("Relu", x), net.floats(8, 6), net.floats(1, 6), alpha=0.5, beta=2.0)
    net.output(net.op("Gemm", y, net.floats(3, 6), transB=1, alpha=-1.0))
    lawful(net.bytes())


def test_matmul_and_add_instead_of_gemm() -> None:
    net = Net()
    x = net.op("Add", net.floats(8), net.op("MatMul", net.input("x", [2, 5, 4]), net.floats(4, 8)))
    net.output(net.dense(net.op("Relu", x), 8, 3))
    result = lawful(net.bytes())
    assert len(result.plan.kept) == 3


def test_conv1d_as_gemm_of_gpt2() -> None:
    net = Net()
    x = net.input("x", ["N", 5, 4])
    flat = net.op("Reshape", x, net.ints(-1, 4))
    y = net.op("Gemm", flat, net.floats(4, 8), net.floats(8))
    shape = net.op(
        "Concat", net.op("Slice", net.op("Shape", x), net.ints(0), net.ints(2)), net.ints(8), axis=0
    )
    y = net.op("Gelu" if net.opset >= 20 else "Tanh", net.op("Reshape", y, shape))
    y = net.op("Gemm", net.op("Reshape", y, net.ints(-1, 8)), net.floats(8, 4), net.floats(4))
    net.output(net.op("Add", net.op("Reshape", y, net.op("Shape", x)), x))
    result = lawful(net.bytes())
    assert result.report.verification.batch_sizes == (1, 2)


def test_tied_embeddings() -> None:
    net = Net()
    table = net.floats(11, 8)
    x = net.op("Gather", table, net.input("tokens", [2, 5], INT64))
    x = net.op("Add", x, net.dense(net.op("Relu", net.dense(x, 8, 12)), 12, 8))
    net.output(net.op("MatMul", x, net.op("Transpose", table, perm=[1, 0])))
    result = lawful(net.bytes())
    assert tensors(result)[table].shape == (11, 4)


# -- traps: normalisation ----------------------------------------------------------------------


def test_batch_normalization_not_folded() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8, bias=False)
    x = net.op("BatchNormalization", x, *(net.floats(8, low=0.5) for _ in range(4)))
    net.output(net.conv(net.op("Sigmoid", x), 8, 3))
    result = lawful(net.bytes())
    assert len(result.plan.kept) == 6


# -- traps: movement ---------------------------------------------------------------------------


def flatten(net: Net, x: str, how: str) -> str:
    """(N, 8, 3, 3) → (N, 72), said in different ways."""
    if how == "baked channels":
        return net.op("Reshape", x, net.ints(2, 72))
    if how == "0 and -1":
        return net.op("Reshape", x, net.ints(0, -1))
    if how == "batch -1":
        return net.op("Reshape", x, net.ints(-1, 72))
    batch = net.op("Gather", net.op("Shape", x), net.const(np.array(0)))
    first = net.op("Unsqueeze", batch, net.ints(0))
    if how == "computed batch":
        return net.op("Reshape", x, net.op("Concat", first, net.ints(72), axis=0))
    if how == "computed batch and -1":
        return net.op("Reshape", x, net.op("Concat", first, net.ints(-1), axis=0))
    sizes = net.op("Slice", net.op("Shape", x), net.ints(1), net.ints(4))
    product = net.op("ReduceProd", sizes, keepdims=1)
    return net.op("Reshape", x, net.op("Concat", first, product, axis=0))


@pytest.mark.parametrize(
    "how",
    [
        "baked channels",
        "0 and -1",
        "batch -1",
        "computed batch",
        "computed batch and -1",
        "product of sizes",
    ],
)
def test_reshape_said_as(how: str) -> None:
    net = Net()
    batch: int | str = 2 if how == "baked channels" else "N"
    x = net.op("Relu", net.conv(net.input("x", [batch, 4, 3, 3]), 4, 8))
    net.output(net.op("Gemm", flatten(net, x, how), net.floats(72, 3)))
    result = lawful(net.bytes())
    if batch == "N":
        assert result.report.verification.batch_sizes == (1, 2)


@pytest.mark.parametrize("opset", [11, 13, 18], ids=["attribute", "input", "num_outputs"])
def test_split_sizes(opset: int) -> None:
    net = Net(opset)
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 12)
    if opset == 11:
        parts = net.ops("Split", x, outputs=2, axis=1, split=[5, 7])
    elif opset == 13:
        parts = net.ops("Split", x, net.ints(5, 7), outputs=2, axis=1)
    else:
        parts = net.ops("Split", x, outputs=2, axis=1, num_outputs=2)
    sizes = (5, 7) if opset < 18 else (6, 6)
    ends = [net.conv(net.op("Relu", y), n, 3) for y, n in zip(parts, sizes, strict=True)]
    net.output(net.op("Add", *ends))
    lawful(net.bytes(), criterion="random", scope="global")


def test_slice_and_gather_on_channels() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    left = net.op("Slice", x, net.ints(0), net.ints(3), net.ints(1))
    right = net.op("Gather", x, net.ints(7, 5, 6, 4), axis=1)
    y = net.op("Concat", net.op("Relu", left), net.op("Sigmoid", right), axis=1)
    net.output(net.conv(y, 7, 3))
    lawful(net.bytes(), criterion="random")


@pytest.mark.parametrize("batch", ["N", 2])
def test_a_strided_view_that_takes_everything_in_order(batch: Any) -> None:
    """`as_strided` is exported as a Gather of the flattened tensor by indices that count it."""
    net = Net()
    x = net.op("GlobalAveragePool", net.conv(net.input("x", [batch, 4, 6, 6]), 4, 8))
    size = net.op("Gather", net.op("Shape", x), net.const(np.int64(0)))
    rows = net.op("Range", net.const(np.int64(0)), size, net.const(np.int64(1)))
    rows = net.op("Mul", net.op("Reshape", rows, net.ints(-1, 1, 1, 1)), net.const(np.int64(8)))
    columns = net.const(np.arange(8).reshape(1, 8, 1, 1))
    flat = net.op("Reshape", x, net.ints(-1))
    y = net.op("Gather", flat, net.op("Add", rows, columns))
    net.output(net.conv(y, 8, 3))
    result = lawful(net.bytes())
    assert result.report.groups[0].kept == 4


def test_nhwc_island_between_transposes() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 6, 6, 4]), 6, 8)  # read as NCHW with 6 channels
    x = net.op("Transpose", x, perm=[0, 2, 3, 1])
    x = net.op("LayerNormalization", x, net.floats(8, low=0.5), net.floats(8))
    x = net.dense(net.op("Relu", net.dense(x, 8, 12)), 12, 8)
    net.output(net.conv(net.op("Transpose", x, perm=[0, 3, 1, 2]), 8, 3))
    lawful(net.bytes())


def test_concat_of_two_branches() -> None:
    net = Net()
    x = net.input("x", [2, 4, 6, 6])
    y = net.op("Concat", net.op("Relu", net.conv(x, 4, 8)), net.conv(x, 4, 6, 3), axis=1)
    net.output(net.conv(net.op("Relu", net.conv(y, 14, 8, 3)), 8, 3))
    result = lawful(net.bytes(), criterion="random")
    groups = {group.id: (group.units, group.kept) for group in result.report.groups}
    assert (8, 4) in groups.values()
    assert (6, 3) in groups.values()


def test_channel_shuffle() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 12)
    y = net.op("Reshape", x, net.ints(2, 3, 4, 6, 6))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(2, 12, 6, 6))
    net.output(net.conv(net.conv(y, 12, 12, 3, group=12), 12, 3))
    lawful(net.bytes(), criterion="random")


def test_shuffle_between_grouped_convolutions() -> None:
    net = Net()
    x = net.conv(net.conv(net.input("x", [2, 4, 6, 6]), 4, 24), 24, 24, group=3)
    y = net.op("Reshape", x, net.ints(2, 3, 8, 6, 6))
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3, 4]), net.ints(2, 24, 6, 6))
    net.output(net.conv(net.conv(y, 24, 24, group=3), 24, 3))
    lawful(net.bytes(), criterion="random")


def test_option_a_shortcut_pads_channels() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 8, 8]), 4, 8))
    long = net.conv(net.op("Relu", net.conv(x, 8, 16, 3, strides=[2, 2])), 16, 16, 3)
    thin = net.op("Slice", x, net.ints(0, 0), net.ints(8, 8), net.ints(2, 3), net.ints(2, 2))
    short = net.op("Pad", thin, net.ints(0, 4, 0, 0, 0, 4, 0, 0), net.const(np.float32(0)))
    net.output(net.conv(net.op("Relu", net.op("Add", long, short)), 16, 3))
    result = lawful(net.bytes(), criterion="random")
    assert len([entry for entry in result.plan.kept if entry.axes]) >= 6


def test_depth_to_space() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 24))
    y = net.op("DepthToSpace", x, blocksize=2, mode="CRD")
    z = net.op("SpaceToDepth", net.conv(y, 6, 5), blocksize=2)
    net.output(net.conv(net.op("DepthToSpace", z, blocksize=2), 5, 3))
    lawful(net.bytes(), criterion="random")


# -- traps: attention --------------------------------------------------------------------------


def test_heads_go_whole() -> None:
    net = Net()
    x = net.dense(net.input("x", [2, 5, 4]), 4, 8)
    x = net.op("Add", x, attention(net, x, 8, heads=4, size=3, tokens=5))
    net.output(net.dense(x, 8, 3))
    result = lawful(net.bytes())
    assert [(g.units, g.kept) for g in result.report.groups if g.kind == "head"] == [(4, 2)]


@pytest.mark.parametrize("how", ["Gather", "Split"])
def test_fused_query_key_value(how: str) -> None:
    net = Net()
    x = net.dense(net.input("x", [2, 5, 4]), 4, 8)
    fused = net.dense(x, 8, 36)
    if how == "Gather":
        stacked = net.op("Reshape", fused, net.ints(2, 5, 3, 4, 3))
        stacked = net.op("Transpose", stacked, perm=[2, 0, 3, 1, 4])
        query, key, value = (net.op("Gather", stacked, net.const(np.array(i))) for i in range(3))
    else:
        parts = net.ops("Split", fused, net.ints(12, 12, 12), outputs=3, axis=-1)
        query, key, value = (
            net.op("Transpose", net.op("Reshape", y, net.ints(2, 5, 4, 3)), perm=[0, 2, 1, 3])
            for y in parts
        )
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), value)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(2, 5, 12))
    net.output(net.dense(net.op("Add", x, net.dense(y, 12, 8)), 8, 3))
    result = lawful(net.bytes())
    assert [(g.units, g.kept) for g in result.report.groups if g.kind == "head"] == [(4, 2)]


def test_grouped_query_attention_by_expand() -> None:
    net = Net()
    x = net.dense(net.input("x", [2, 5, 4]), 4, 8)
    query = net.op("Reshape", net.dense(x, 8, 24), net.ints(2, 5, 8, 3))
    query = net.op("Transpose", query, perm=[0, 2, 1, 3])
    shared = []
    for _ in range(2):  # keys and values of 4 heads, each read by 2 queries
        y = net.op("Reshape", net.dense(x, 8, 12), net.ints(2, 5, 4, 3))
        y = net.op("Unsqueeze", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(2))
        y = net.op("Expand", y, net.ints(2, 4, 2, 5, 3))
        shared.append(net.op("Reshape", y, net.ints(2, 8, 5, 3)))
    scores = net.op("MatMul", query, net.op("Transpose", shared[0], perm=[0, 1, 3, 2]))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), shared[1])
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(2, 5, 24))
    net.output(net.dense(net.op("Add", x, net.dense(y, 24, 8)), 8, 3))
    result = lawful(net.bytes())
    assert [(g.units, g.kept) for g in result.report.groups if g.kind == "head"] == [(4, 2)]


# -- traps: graphs inside graphs ---------------------------------------------------------------


def branch(name: str, op: str, value: str) -> onnx.GraphProto:
    node = helper.make_node(op, [value], [f"{name}_y"])
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
    return helper.make_graph([node], name, [], [output])


def test_if_bodies_that_capture_outer_values() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    flag = net.input("flag", [], BOOL)
    y = net.op(
        "If", flag, then_branch=branch("then", "Relu", x), else_branch=branch("else", "Neg", x)
    )
    net.output(net.conv(net.op("Relu", net.conv(y, 8, 6)), 6, 3))
    lawful(net.bytes())


def test_loop_bodies_that_capture_outer_values() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    state = [helper.make_tensor_value_info("carried", TensorProto.FLOAT, None)]
    counters = [
        helper.make_tensor_value_info("trip", TensorProto.INT64, []),
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
    ]
    body = helper.make_graph(
        [
            helper.make_node("Add", ["carried", x], ["next"]),
            helper.make_node("Identity", ["going"], ["still"]),
        ],
        "body",
        counters + state,
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    times, going = net.const(np.array(3)), net.const(np.array(True))
    y = net.op("Loop", times, going, net.op("Relu", x), body=body)
    net.output(net.conv(net.op("Relu", net.conv(y, 8, 6)), 6, 3))
    lawful(net.bytes())


def test_local_functions() -> None:
    net = Net()
    net.domains["local"] = 1
    body = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    imports = [helper.make_opsetid("", net.opset)]
    net.functions.append(helper.make_function("local", "Block", ["x", "w"], ["z"], body, imports))
    x = net.op("Block", net.input("x", [2, 4, 6, 6]), net.floats(8, 4, 1, 1), domain="local")
    x = net.op("Block", x, net.floats(6, 8, 1, 1), domain="local")
    net.output(net.conv(x, 6, 3))
    result = lawful(net.bytes())
    assert len(result.plan.kept) == 3


def test_an_operator_without_a_rule_is_pruned_around() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6]), 4, 8, rank=3)
    y = net.op("Det", net.op("MatMul", x, net.floats(6, 8)))
    y = net.op(
        "Mul", net.conv(net.op("Relu", x), 8, 6, rank=3), net.op("Reshape", y, net.ints(2, 1, 1))
    )
    net.output(net.conv(net.op("Relu", net.conv(y, 6, 6, rank=3)), 6, 3, rank=3))
    result = lawful(net.bytes())
    found = {(frozen.code, frozen.op_type) for frozen in result.report.frozen}
    assert ("NO_RULE", "ai.onnx::Det-17") in found


# -- traps: numbers ----------------------------------------------------------------------------


def test_quantised_per_channel() -> None:
    net = Net()

    def weight(outer: int, inner: int) -> str:
        values = net.draw.integers(-60, 60, (outer, inner, 1, 1)).astype(np.int8)
        scales = net.const((0.008 + 0.001 * np.arange(outer)).astype(np.float32))
        zeros = net.const(np.zeros(outer, np.int8))
        return net.op("DequantizeLinear", net.const(values), scales, zeros, axis=0)

    def activation(x: str) -> str:
        scale, zero = net.const(np.float32(0.05)), net.const(np.uint8(120))
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero), scale, zero)

    x = net.op("Conv", activation(net.input("x", [2, 4, 6, 6])), weight(8, 4))
    x = net.op("Conv", activation(net.op("Relu", x)), weight(6, 8))
    net.output(net.op("Conv", activation(x), weight(3, 6)))
    # ONNX Runtime runs the result in integers and the reference, with its zeros, in floats: each
    # of two roundings to one of 256 steps may fall the other way. Weights beyond ±64 would let
    # its 8-bit kernels saturate on processors without VNNI.
    result = lawful(net.bytes(), limit=1e-2)
    scales = [entry for entry in result.plan.kept if len(entry.axes) == 1 and 0 in entry.axes]
    assert len(scales) >= 4


def test_recurrent_layers_that_are_written_as_loops() -> None:
    """As JAX and TensorFlow write them: a turn takes its own step of the sequence by number, the
    state starts at zeros as many as the batch, which the layer before tells through its results."""
    net = Net()

    def layer(sequence: str, inner: int, width: int) -> str:
        """Of (steps, batch, inner): tanh(x · w + h · u) at every step."""
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["going"], ["still"]),
                helper.make_node("Gather", [sequence, "turn"], ["xt"]),
                helper.make_node("MatMul", ["xt", net.floats(inner, width)], ["from_x"]),
                helper.make_node("MatMul", ["h", net.floats(width, width)], ["from_h"]),
                helper.make_node("Add", ["from_x", "from_h"], ["sum"]),
                helper.make_node("Tanh", ["sum"], ["next"]),
                helper.make_node("Identity", ["next"], ["step"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("turn", TensorProto.INT64, []),
                helper.make_tensor_value_info("going", TensorProto.BOOL, []),
                helper.make_tensor_value_info("h", TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info("still", TensorProto.BOOL, []),
                helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
                helper.make_tensor_value_info("step", TensorProto.FLOAT, None),
            ],
        )
        sizes = net.op("Cast", net.op("Shape", sequence), to=TensorProto.INT32)
        batch = net.op("Slice", sizes, net.ints(1), net.ints(2), net.ints(0))
        sizes = net.op("Concat", batch, net.const(np.array([width], np.int32)), axis=0)
        sizes = net.op("Cast", sizes, to=TensorProto.INT64)
        zeros = net.op("Expand", net.const(np.zeros((), np.float32)), sizes)
        start = net.const(np.array(5)), net.const(np.array(True))
        return net.ops("Loop", *start, zeros, outputs=2, body=body)[1]

    x = net.op("Transpose", net.input("x", ["N", 5, 4]), perm=[1, 0, 2])
    y = layer(layer(x, 4, 16), 16, 12)
    last = net.op("Gather", y, net.const(np.array(-1)))
    net.output(net.dense(last, 12, 3))
    result = lawful(net.bytes(), target={"channels": 0.5})
    assert sorted((group.units, group.kept) for group in result.report.groups) == [(12, 6), (16, 8)]


def converted(net: Net, dtype: int) -> onnx.ModelProto:
    """The model with float32 replaced by another type throughout."""
    model = net.model()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(dtype))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = dtype
    return model


def test_half_precision() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8))
    net.output(net.conv(net.op("Relu", net.conv(x, 8, 8, 3)), 8, 3))
    model = converted(net, TensorProto.FLOAT16)
    result = lawful(model, limit=2e-3)  # half precision has 11 bits
    assert {array.dtype for array in tensors(result).values()} == {np.dtype(np.float16)}


def test_half_precision_behind_operators_that_onnx_does_not_know() -> None:
    net = Net()
    net.domains["com.microsoft"] = 1
    x = net.op("Gelu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8), domain="com.microsoft")
    net.output(net.conv(x, 8, 3))
    lawful(converted(net, TensorProto.FLOAT16), limit=2e-3)


def test_weights_in_bfloat16() -> None:
    net = Net(opset=19)

    def dense(x: str, inner: int, outer: int) -> str:
        array = net.draw.standard_normal((inner, outer)) / np.sqrt(inner)
        dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
        weight = net.const(array.astype(dtype))
        return net.op("MatMul", x, net.op("Cast", weight, to=TensorProto.FLOAT))

    x = dense(net.input("x", [2, 4]), 4, 8)
    net.output(dense(net.op("Relu", x), 8, 3))
    result = lawful(net.bytes())
    proto = onnx.load_from_string(result.model)
    assert {t.data_type for t in proto.graph.initializer} == {TensorProto.BFLOAT16}


def test_weights_in_four_bits() -> None:
    net = Net(opset=21)

    def dense(x: str, inner: int, outer: int, name: str) -> str:
        values = net.draw.integers(-7, 8, (inner, outer)).reshape(-1)
        net.initializers.append(helper.make_tensor(name, TensorProto.INT4, [inner, outer], values))
        scales = net.floats(outer, low=0.05)
        return net.op("MatMul", x, net.op("DequantizeLinear", name, scales, axis=1))

    x = dense(net.input("x", [2, 4]), 4, 10, "first")
    net.output(dense(net.op("Relu", x), 10, 3, "second"))
    # ONNX Runtime fuses a product with four-bit weights, and rounds activations there.
    result = lawful(net.bytes(), limit=5e-3)
    proto = onnx.load_from_string(result.model)
    dims = {t.name: list(t.dims) for t in proto.graph.initializer}
    assert dims["first"] == [4, 5]  # an odd number of nibbles in a row
    assert dims["second"] == [5, 3]


# -- traps: the graph's outside ----------------------------------------------------------------


def test_symbolic_batch() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 4, 6, 6]), 4, 8))
    y = net.op("Flatten", net.op("GlobalAveragePool", x))
    net.output(net.dense(y, 8, 3), shape=["N", 3])
    result = lawful(net.bytes())
    assert result.report.verification.batch_sizes == (1, 2)


def test_batch_of_a_state_has_the_name_of_the_batch() -> None:
    net = Net()
    x, state = net.input("x", ["N", 4]), net.input("state", [1, "N", 8])
    step = net.op("Unsqueeze", net.op("Relu", net.dense(x, 4, 6)), net.ints(0))
    weights = net.floats(1, 32, 6), net.floats(1, 32, 8), net.floats(1, 64)
    _, last, _ = net.ops("LSTM", step, *weights, "", state, state, outputs=3, hidden_size=8)
    net.output(net.dense(net.op("Squeeze", last, net.ints(0)), 8, 3))
    result = lawful(net.bytes())
    assert result.report.verification.batch_sizes == (1, 2)


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_opset(opset: int) -> None:
    net = Net(opset)
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8, bias=False)
    x = net.op("BatchNormalization", x, *(net.floats(8, low=0.5) for _ in range(4)))
    x = net.op("MaxPool", net.op("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Reshape", x, net.ints(2, 72))
    net.output(net.op("Gemm", y, net.floats(72, 3), net.floats(3)))
    try:
        open_session(net.bytes())
    except Exception as error:
        if "opset" in str(error).lower():
            pytest.skip(f"ONNX Runtime does not know opset {opset} yet")
        raise
    result = lawful(net.bytes())
    assert onnx.load_from_string(result.model).opset_import[0].version == opset


def test_duplicate_node_names() -> None:
    net = Net()
    x = net.op("Conv", net.input("x", [2, 4, 6, 6]), net.floats(8, 4, 1, 1), name="conv")
    net.output(net.op("Conv", net.op("Relu", x), net.floats(3, 8, 1, 1), name="conv"))
    model = net.model()
    result = prune(model)
    assert check_law(model, result).difference < 1e-5
    names = [node.name for node in onnx.load_from_string(result.model).graph.node]
    assert len(set(names)) == len(names)


def test_unnamed_nodes() -> None:
    net = Net()
    x = net.op("Conv", net.input("x", [2, 4, 6, 6]), net.floats(8, 4, 1, 1), name="")
    net.output(net.op("Conv", net.op("Relu", x, name=""), net.floats(3, 8, 1, 1), name=""))
    lawful(net.bytes())


def test_an_input_that_is_an_output() -> None:
    net = Net()
    x = net.input("x", [2, 4, 6, 6])
    net.output(net.conv(net.op("Relu", net.conv(x, 4, 8)), 8, 3))
    net.output(x, shape=[2, 4, 6, 6])
    lawful(net.bytes())


def test_a_feature_map_that_is_an_output_stays() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    net.output(x)
    net.output(net.conv(net.op("Relu", net.conv(net.op("Relu", x), 8, 6)), 6, 3))
    result = lawful(net.bytes())
    assert kept(result, "w_1", 0) is None
    assert "GRAPH_OUTPUT" in {frozen.code for frozen in result.report.frozen}


def test_a_weight_that_is_an_output_stays() -> None:
    net = Net()
    weight = net.floats(8, 4, 1, 1)
    x = net.op("Conv", net.input("x", [2, 4, 6, 6]), weight)
    net.output(net.conv(net.op("Relu", net.conv(x, 8, 6)), 6, 3))
    net.output(weight)
    result = lawful(net.bytes())
    assert kept(result, weight, 0) is None


def test_optional_inputs_left_out() -> None:
    net = Net()
    x = net.op("Clip", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8), "", net.const(np.float32(6)))
    net.output(net.conv(x, 8, 3))
    lawful(net.bytes())


def test_a_group_whose_every_unit_would_go_keeps_one() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8))
    net.output(net.conv(net.op("Relu", net.conv(x, 8, 2)), 2, 3))
    result = lawful(net.bytes(), target={"channels": 0.001})
    assert [group.kept for group in result.report.groups] == [1, 1]
    rounded = lawful(net.bytes(), target={"channels": 0.001}, round_to=4)
    assert [group.kept for group in rounded.report.groups] == [4, 2]


def test_every_range_of_a_split_keeps_one() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 12)
    parts = net.ops("Split", x, net.ints(2, 10), outputs=2, axis=1)
    net.output(net.op("Add", net.conv(parts[0], 2, 3), net.conv(parts[1], 10, 3)))
    lawful(net.bytes(), target={"channels": 0.17}, scope="global", criterion="random")


# -- a zoo, where there is one -----------------------------------------------------------------

# Small and quick ones, of every kind: exporters, convolutions, attention, oddities, quantised.
SAMPLE = (
    "fp16_resnettiny",
    "hand_attention_opset23",
    "hand_opset9_constants",
    "hf_bert_mlm_tied",
    "hf_gpt2_mini",
    "hf_llama_mini__ts",
    "hf_mamba_mini",
    "hf_t5_gated_full",
    "hf_vit_mini",
    "q_resnettiny_qdq_pertensor",
    "skl_mlp_classifier",
    "x_ChannelSliceGather",
    "x_CRNN",
    "x_EinsumAttn",
    "x_GroupedConvT",
    "x_LinearAttn",
    "x_MQAttn",
    "x_PadSkip",
    "x_PixelShuffleSR",
    "x_ResNetTiny__tsraw",
    "x_Siamese",
    "x_SplitUneven",
    "x_UNet",
    "x_YOLOv8Like__ts",
)


@pytest.mark.skipif(not ZOO.is_dir(), reason="no model zoo beside the checkout")
@pytest.mark.parametrize("name", SAMPLE)
def test_zoo(name: str) -> None:
    spec = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model = zoo.load(name)
    half = name.startswith(("fp16", "q_"))
    lawful(model, limit=2e-2 if half else 1e-4, criterion="random")


@pytest.mark.parametrize(
    "place",
    ["vad/silero_vad_16k_op15.onnx", "vad/silero_vad_16k_sequence.onnx", "face/slim_320.onnx"],
)
@pytest.mark.skipif(not BENCH.is_dir(), reason="no trained models beside the checkout")
def test_trained_models_that_nobody_gave_data_for(place: str) -> None:
    lawful(BENCH / place)


@pytest.mark.skipif(not BENCH.is_dir(), reason="no trained models beside the checkout")
def test_a_trained_model_with_a_state_learns_from_samples() -> None:
    draw = np.random.default_rng(0)
    samples = {
        "input": draw.standard_normal((64, 576)).astype(np.float32) / 10,
        "state": np.zeros((2, 64, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    model = BENCH / "vad" / "silero_vad_16k_op15.onnx"
    report = prune(model, target={"macs": 0.7}, calibration=samples).report
    assert report.verification.held_back
    assert report.after.macs <= 0.7 * report.before.macs


def attending(net: Net, asks: str, told: str) -> None:
    """Attention of (N, T, 8) over (N, S, 8), four heads of four dimensions.

    Keys are turned in three dimensions, by sizes that are read from them, as PyTorch exports it.
    """
    split = net.ints(0, 0, 4, 4)
    asked, keys, values = (
        net.op(
            "Transpose",
            net.op("Reshape", net.op("MatMul", one, net.floats(8, 16)), split),
            perm=[0, 2, 1, 3],
        )
        for one in (asks, told, told)
    )
    sizes = net.op("Shape", keys)
    n, h, t, d = (net.op("Slice", sizes, net.ints(i), net.ints(i + 1)) for i in range(4))
    flat = net.op("Reshape", keys, net.op("Concat", net.ints(-1), t, d, axis=0))
    turned = net.op("Transpose", flat, perm=[0, 2, 1])
    keys = net.op("Reshape", turned, net.op("Concat", n, h, d, t, axis=0))
    weights = net.op("Softmax", net.op("MatMul", asked, keys), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", weights, values), perm=[0, 2, 1, 3])
    net.output(net.op("MatMul", net.op("Reshape", mixed, net.ints(0, 0, 16)), net.floats(16, 8)))


@pytest.mark.parametrize("length", [16, 64])
def test_a_length_that_is_a_multiple_of_the_batch(length: int) -> None:
    net = Net()
    x = net.input("x", ["N", "T", 8])
    attending(net, x, x)
    calibration = {"x": np.random.default_rng(0).standard_normal((24, length, 8), np.float32)}
    recipe = secateur.Recipe(target={"channels": 0.5}, criterion="l2", repair=False)
    result = secateur.prune(net.bytes(), recipe, calibration=calibration, measure_latency=False)
    session = open_session(result.model)
    for shape in ((1, 5, 8), (4, length, 8)):
        assert session.run(None, {"x": np.ones(shape, np.float32)})[0].shape == shape


@pytest.mark.parametrize("batches", [("N", "N"), ("N", "M")])
def test_two_lengths_that_need_not_be_equal(batches: tuple[str, str]) -> None:
    """Exporters may name every batch by itself, though they must be equal."""
    net = Net()
    asks, told = net.input("x", [batches[0], "T", 8]), net.input("y", [batches[1], "S", 8])
    attending(net, net.op("Add", asks, net.op("ReduceMean", told, axes=[1])), told)
    session = open_session(lawful(net.model()).model)
    for asked, of in ((5, 7), (7, 5), (3, 3)):
        feeds = {"x": np.ones((2, asked, 8), np.float32), "y": np.ones((2, of, 8), np.float32)}
        assert session.run(None, feeds)[0].shape == (2, asked, 8)


@pytest.mark.parametrize("split", [False, True])
def test_a_table_of_positions_stays_as_long_as_the_longest_input(split: bool) -> None:
    """Masks and positions for any length, of which as many are taken as there are tokens (GPT-Neo,
    MPT): none may go for what is taken of them for one length."""
    net = Net()
    x = net.dense(net.input("x", ["N", "T", 4]), 4, 8)
    length = net.op("Slice", net.op("Shape", x), net.ints(1), net.ints(2))
    table = net.floats(16, 8, name="table")
    if split:
        sizes = net.op("Concat", length, net.op("Sub", net.ints(16), length), axis=0)
        positions = net.ops("Split", table, sizes, outputs=2, axis=0)[0]
    else:
        positions = net.op("Slice", table, net.ints(0), length, net.ints(0))
    net.output(net.dense(net.op("Relu", net.op("Add", x, positions)), 8, 3))
    data = {"x": np.random.default_rng(0).standard_normal((32, 6, 4)).astype(np.float32)}
    for calibration in (None, data):
        result = secateur.prune(net.bytes(), calibration=calibration, measure_latency=False)
        assert tensors(result)["table"].shape == (16, 4)
        session = open_session(result.model)
        for tokens in (3, 6, 16):
            found = session.run(None, {"x": np.ones((2, tokens, 4), np.float32)})
            assert found[0].shape == (2, tokens, 3)


def test_a_result_that_only_takes_the_sizes_of_the_samples_is_refused() -> None:
    def model(rows: int) -> bytes:
        net = Net()
        x = net.input("x", ["N", "T", 4])
        length = net.op("Slice", net.op("Shape", x), net.ints(1), net.ints(2))
        table = net.op("Slice", net.floats(rows, 4), net.ints(0), length, net.ints(0))
        net.output(net.op("Add", x, table))
        return net.bytes()

    samples, longer = ({"x": np.ones((2, tokens, 4), np.float32)} for tokens in (3, 12))
    answered = run_original(model(16), [samples], from_calibration=True, perhaps=longer)
    assert verify(model(16), answered).samples == 2
    with pytest.raises(secateur.VerificationFailed, match=r"does not run with inputs .*12"):
        verify(model(8), answered)
    too_long = {"x": np.ones((2, 32, 4), np.float32)}  # for the original, too
    verify(model(8), run_original(model(16), [samples], from_calibration=True, perhaps=too_long))


def test_images_that_need_not_be_square() -> None:
    net = Net()
    x = net.op("Conv", net.input("x", ["N", 4, "H", "W"]), net.floats(16, 4, 1, 1))
    sizes = net.op("Shape", x)
    n, c, h, w = (net.op("Slice", sizes, net.ints(i), net.ints(i + 1)) for i in range(4))
    x = net.op("Reshape", x, net.op("Concat", n, c, net.op("Mul", h, w), axis=0))
    x = net.op("Reshape", net.op("Relu", x), net.op("Concat", n, c, h, w, axis=0))
    net.output(net.op("Conv", x, net.floats(4, 16, 1, 1)))
    session = open_session(lawful(net.model()).model)
    for high, wide in ((5, 7), (7, 5), (6, 6)):
        shape = (2, 4, high, wide)
        assert session.run(None, {"x": np.ones(shape, np.float32)})[0].shape == shape
