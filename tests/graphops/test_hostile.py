"""Models that nobody means well with: each ends in a result or a typed refusal.

The single cases are what the fuzz run of `benchmarks/fuzz.py` found.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from nets import Net
from onnx import AttributeProto, TensorProto, helper

import secateur
from secateur import graphops
from secateur.errors import Code
from secateur.graphops.model import runtime
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.quantised import scaled_constants

FUZZ = pathlib.Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


def _model(change: Callable[[onnx.ModelProto], None]) -> bytes:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    y = net.op("Reshape", net.op("Relu", x), net.ints(2, 8, 36))
    net.output(net.conv(y, 8, 3, rank=3))
    model = net.model()
    change(model)
    return model.SerializeToString()


def _plain(change: Callable[[onnx.ModelProto], None]) -> bytes:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8), name="middle")
    net.output(net.conv(x, 8, 3))
    model = net.model()
    change(model)
    return model.SerializeToString()


def _refused(change: Callable[[onnx.ModelProto], None]) -> secateur.Refusal:
    with pytest.raises(secateur.Refused) as caught:
        graphops.inspect(_model(change))
    return caught.value.refusal


def _weight(model: onnx.ModelProto) -> TensorProto:
    model.graph.initializer[0].name = "weight"
    return model.graph.initializer[0]


def _shorter(model: onnx.ModelProto) -> None:
    _weight(model).raw_data = _weight(model).raw_data[:-3]


def _empty(model: onnx.ModelProto) -> None:
    _weight(model).ClearField("raw_data")


def _negative(model: onnx.ModelProto) -> None:
    _weight(model).dims[0] = -8


def _huge(model: onnx.ModelProto) -> None:
    _weight(model).dims[0] = 2**62


def _unknown_type(model: onnx.ModelProto) -> None:
    _weight(model).data_type = 1000


def _other_type(model: onnx.ModelProto) -> None:
    count = len(_weight(model).raw_data) // 4
    _weight(model).ClearField("raw_data")
    _weight(model).int32_data.extend([1] * count)


def _twice(model: onnx.ModelProto) -> None:
    _weight(model).float_data.append(1.0)


@pytest.mark.parametrize(
    "change", [_shorter, _empty, _negative, _huge, _unknown_type, _other_type, _twice]
)
def test_a_tensor_that_contradicts_itself_is_refused(
    change: Callable[[onnx.ModelProto], None],
) -> None:
    refusal = _refused(change)
    assert refusal.code is Code.INVALID_MODEL
    assert refusal.nodes == ("weight",)
    assert refusal.expected and refusal.found


@pytest.mark.parametrize("value", ["text", [1, 2], 0.5, TensorProto(), onnx.GraphProto()])
def test_an_attribute_of_the_wrong_kind_is_refused(value: object) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("group", value))

    refusal = _refused(change)
    assert refusal.code is Code.INVALID_MODEL
    assert "'group'" in refusal.message
    assert refusal.expected == "INT"


def test_an_attribute_of_an_unknown_kind_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        kind = model.graph.node[0].attribute[0]
        kind.type = AttributeProto.TYPE_PROTO

    assert _refused(change).found == "TYPE_PROTO"


@pytest.mark.parametrize("sizes", [(-1, 4), (2**31, 2**20)])
def test_a_sparse_initializer_of_wild_size_is_refused(sizes: tuple[int, int]) -> None:
    def change(model: onnx.ModelProto) -> None:
        sparse = model.graph.sparse_initializer.add()
        sparse.dims.extend(sizes)
        sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
        sparse.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [1], [0]))

    assert _refused(change).code is Code.INVALID_MODEL


def test_a_group_of_nonsensical_size_freezes() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[2].attribute[0].i = 2**40

    assert not graphops.inspect(_plain(change)).groups


def test_groups_that_read_more_channels_than_enter_freeze() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 5, 5]), 4, 6))
    net.output(net.op("Conv", x, net.floats(3, 6, 1, 1), group=3))
    assert not graphops.inspect(net.bytes()).groups


def test_a_tensor_without_elements_has_nothing_to_cut() -> None:
    def change(model: onnx.ModelProto) -> None:
        empty = helper.make_tensor("none", TensorProto.FLOAT, [0, 2**62], [])
        model.graph.initializer.append(empty)
        model.graph.node.add(op_type="Neg", input=["none"], output=["nothing"])

    assert graphops.inspect(_model(change)).groups


def test_a_node_made_of_too_many_positions_is_left_alone() -> None:
    def change(model: onnx.ModelProto) -> None:
        sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [2**40, 3])
        model.graph.initializer.append(sizes)
        model.graph.node.add(op_type="ConstantOfShape", input=["sizes"], output=["wide"])
        model.graph.node.add(op_type="Neg", input=["wide"], output=["wide_too"])

    assert graphops.inspect(_model(change)).groups


def _no_input(model: onnx.ModelProto) -> None:
    del model.graph.node[-1].input[1:]


def _no_output(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Identity", input=[model.graph.input[0].name], name="blind")


def _gap(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Min", input=["weight", ""], output=["least"], name="gap")


@pytest.mark.parametrize("change", [_no_input, _no_output, _gap])
def test_a_node_that_lacks_what_it_cannot_do_without_is_refused(
    change: Callable[[onnx.ModelProto], None],
) -> None:
    refusal = _refused(change)
    assert refusal.code is Code.INVALID_MODEL
    assert refusal.nodes
    assert "inputs" in refusal.expected
    assert "inputs" in refusal.found


@pytest.mark.parametrize("where", [b"w_1", b"conv_3", b"com.microsoft"])
def test_a_name_that_is_no_text_is_refused(where: bytes) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import.add(domain="com.microsoft", version=1)

    content = _model(change)
    assert where in content
    with pytest.raises(secateur.Refused) as caught:
        graphops.inspect(content.replace(where, b"\xf5" + where[1:]))
    assert caught.value.refusal.code is Code.INVALID_MODEL
    assert "UTF-8" in caught.value.refusal.message


def test_six_bit_numbers_are_counted_too() -> None:
    def change(model: onnx.ModelProto) -> None:
        _weight(model).data_type = TensorProto.FLOAT6E3M2

    assert _refused(change).nodes == ("weight",)


@pytest.mark.parametrize("op_type", ["ConstantOfShape", "Tile"])
def test_a_tensor_that_no_machine_holds_is_refused(op_type: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        sizes = helper.make_tensor("sizes", TensorProto.INT64, [4], [2**62, 1, 1, 1])
        model.graph.initializer.append(sizes)
        inputs = ["sizes"] if op_type == "ConstantOfShape" else ["w_1", "sizes"]
        model.graph.node.add(op_type=op_type, input=inputs, output=["wide"], name="wide")

    refusal = _refused(change)
    assert refusal.code is Code.LIMIT_EXCEEDED
    assert refusal.nodes == ("wide",)


def test_names_that_surgery_makes_are_free() -> None:
    """A constant for a Slice's ends was given the name of another tensor."""
    net = Net()
    x = net.conv(net.input("x", ["N", 4, 6, 6]), 4, 8)
    start, end, axis = net.ints(0), net.ints(6), net.ints(1)  # the ends are shared by both
    parts = [net.op("Slice", x, start, end, axis) for _ in range(2)]
    net.nodes.append(helper.make_node("Relu", [parts[0]], [f"{parts[0]}__2"]))
    y = net.op("Add", f"{parts[0]}__2", net.op("Neg", parts[1]))
    net.output(net.conv(y, 6, 3))
    graphops.prune(net.bytes(), measure_latency=False)


def test_an_input_too_large_to_make_up_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**40

    with pytest.raises(secateur.Refused) as caught:
        graphops.prune(_plain(change), measure_latency=False)
    assert caught.value.refusal.code is Code.LIMIT_EXCEEDED


def test_an_axis_that_is_not_there_is_left_to_the_runtime() -> None:
    def change(model: onnx.ModelProto) -> None:
        value = helper.make_tensor("none", TensorProto.INT64, [1], [0])
        model.graph.initializer.append(value)
        model.graph.node[1].op_type = "Gather"  # of an axis that is not there
        model.graph.node[1].input.append("none")
        model.graph.node[1].attribute.append(helper.make_attribute("axis", 9))

    graphops.inspect(_model(change))


@pytest.mark.parametrize("field", ["graph.name", "producer_name", "doc_string"])
def test_texts_beside_the_nodes_are_checked_too(field: str) -> None:
    """They were read and could not be written again."""

    def change(model: onnx.ModelProto) -> None:
        *above, last = field.split(".")
        setattr(model.graph if above else model, last, "nEt of somebody")

    content = _model(change).replace(b"nEt of", b"n\xe5t of")
    with pytest.raises(secateur.Refused) as caught:
        graphops.inspect(content)
    assert caught.value.refusal.code is Code.INVALID_MODEL
    assert "UTF-8" in caught.value.refusal.message


def test_a_one_hot_of_unknown_shape_stays() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    numbers = net.op("Cast", x, to=TensorProto.INT64, domain="of.somebody")
    depth, values = net.const(np.array(6)), net.const(np.array([0, 1], np.float32))
    y = net.op("ReduceSum", net.op("OneHot", numbers, depth, values, axis=2), net.ints(2))
    net.output(net.conv(net.op("Relu", net.conv(y, 8, 6)), 6, 3))
    with pytest.raises(secateur.Refused) as caught:
        graphops.prune(net.bytes(), measure_latency=False)
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN


def test_vectors_that_suit_neither_groups_nor_channels_freeze_them() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 6)
    wrong = [net.const(np.ones(shape, np.float32)) for shape in ((3, 6, 1, 1), (3,))]
    x = net.op("GroupNormalization", x, *wrong, num_groups=1)
    net.output(net.conv(x, 6, 3))
    found = graphops.inspect(net.bytes())
    assert "one per group" in " ".join(f"{entry}" for entry in found.frozen)


@pytest.mark.parametrize("scales", [8, 3, 0])
def test_scales_that_do_not_suit_their_integers_say_nothing(scales: int) -> None:
    net = Net()
    integers = net.const(np.ones((8, 4, 1, 1), np.int8))
    scale = net.const(np.ones(scales, np.float32))
    w = net.op("DequantizeLinear", integers, scale, axis=0)
    net.output(net.op("Conv", net.input("x", [2, 4, 6, 6]), w))
    found = scaled_constants(open_model(net.bytes()).model.graph)
    assert bool(found) == (scales == 8)


def test_a_bias_of_another_length_is_left_to_the_runtime() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    x = net.op("BatchNormalization", x, *(net.const(np.ones(8, np.float32)) for _ in range(4)))
    weight = net.const(net.draw.standard_normal((6, 8, 1, 1)).astype(np.float32))
    y = net.op("Conv", x, weight, net.const(np.zeros(0, np.float32)))
    net.output(net.conv(net.op("Relu", y), 6, 3))
    with pytest.raises(secateur.Refused) as caught:
        graphops.prune(net.bytes(), measure_latency=False)
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN


def test_fewer_than_one_group_is_left_to_the_runtime() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 12)
    weight = net.const(np.ones((12, 6, 2, 2), np.float32))
    x = net.op("ConvTranspose", x, weight, net.const(np.ones(12, np.float32)), group=-(2**31))
    net.output(net.conv(x, 12, 3))
    graphops.inspect(net.bytes())


@pytest.mark.timeout(60)
def test_an_equation_that_is_no_text_is_refused() -> None:
    """Native code never came to its end."""
    net = Net()
    weight = net.const(np.ones((12, 8), np.float32))
    net.output(net.op("Einsum", net.input("x", [2, 5, 8]), weight, equation=b"b\0ik,nk->bin"))
    with pytest.raises(secateur.Refused) as caught:
        graphops.inspect(net.bytes())
    assert caught.value.refusal.code is Code.INVALID_MODEL


def test_more_heads_than_native_code_can_count_are_refused() -> None:
    """Of 2³² heads it keeps the lower half of the number, and divides by that."""
    net = Net()
    net.domains["com.microsoft"] = 1
    parts = [net.dense(net.input(name, [2, 5, 4]), 4, 32) for name in "qkv"]
    heads = {"num_heads": 4, "kv_num_heads": 1 << 40, "domain": "com.microsoft"}
    lengths, total = net.const(np.full(2, 4, np.int32)), net.const(np.array(5, np.int32))
    y, *_ = net.ops("GroupQueryAttention", *parts, "", "", lengths, total, outputs=3, **heads)
    net.output(net.dense(y, 32, 3))
    with pytest.raises(secateur.Refused) as caught:
        graphops.inspect(net.bytes())
    assert caught.value.refusal.code is Code.INVALID_MODEL
    assert str(1 << 40) in caught.value.refusal.found


def test_a_reshape_to_a_scalar_of_sizes_is_left_to_the_runtime() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    net.output(net.conv(net.op("Reshape", x, net.const(np.array(8))), 8, 3))
    with pytest.raises(secateur.Refused) as caught:
        secateur.prune(net.bytes())
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN


def test_a_body_that_hands_out_what_lies_outside_is_refused() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    outside = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)]
    body = helper.make_graph([], "body", [], outside)
    y = net.op("If", net.const(np.array(True)), then_branch=body, else_branch=body)
    net.output(net.conv(y, 8, 3))
    with pytest.raises(secateur.Refused) as caught:
        graphops.inspect(net.bytes())
    assert caught.value.refusal.code is Code.INVALID_MODEL
    assert "Identity" in caught.value.refusal.hint


def test_a_body_that_reads_what_nothing_makes_is_refused() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    bodies = [
        helper.make_graph([helper.make_node("Neg", [name], ["y"])], "body", [], made)
        for name in (x, "nobody")
    ]
    flag = net.const(np.array(True))
    y = net.op("If", flag, then_branch=bodies[0], else_branch=bodies[1])
    net.output(net.conv(y, 8, 3))
    with pytest.raises(secateur.Refused) as caught:
        graphops.inspect(net.bytes())
    assert caught.value.refusal.code is Code.INVALID_MODEL
    assert caught.value.refusal.found == "nobody"


@pytest.mark.parametrize(
    ("cycle", "code"), [(True, Code.INVALID_MODEL), (False, Code.MODEL_DOES_NOT_RUN)]
)
def test_bodies_out_of_order_are_refused(cycle: bool, code: Code) -> None:
    """ONNX Runtime sorts the nodes of the main graph only."""
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    nodes = [helper.make_node("Neg", ["a"], ["y"])]
    nodes.append(helper.make_node("Add", ["y" if cycle else x, x], ["a"]))
    body = helper.make_graph(nodes, "body", [], made)
    y = net.op("If", net.const(np.array(True)), then_branch=body, else_branch=body)
    net.output(net.conv(net.op("Relu", net.conv(y, 8, 6)), 6, 3))
    with pytest.raises(secateur.Refused) as caught:
        graphops.prune(net.bytes(), measure_latency=False)
    assert caught.value.refusal.code is code


def test_a_kernel_wider_than_its_input_is_refused() -> None:
    """The inference of a Slice, onnx's and ONNX Runtime's, ends the process at a negative size."""
    net = Net()
    weight = net.const(np.ones((8, 4, 1, 1), np.float32))
    x = net.op("Conv", net.input("x", [2, 4, 6, 6]), weight, kernel_shape=[1, 65])
    x = net.op("Slice", x, net.ints(0, 0, 0, 0), net.ints(2, 6, 6, 6))
    net.output(net.conv(net.op("Relu", net.conv(x, 6, 6)), 6, 3))
    code = "import sys; from secateur import graphops; graphops.prune(sys.stdin.buffer.read())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=net.bytes(), capture_output=True, check=False)
    assert b"INVALID_MODEL: node 'conv_" in done.stderr


def test_a_loop_without_inputs_is_left_to_the_runtime() -> None:
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    body = helper.make_graph([helper.make_node("Relu", [x], ["y"])], "body", [], [])
    net.op("Loop", body=body)
    net.output(net.conv(net.op("Relu", x), 8, 3))
    with pytest.raises(secateur.Refused):
        graphops.prune(net.bytes(), measure_latency=False)


def test_embeddings_without_their_scales_are_left_to_the_runtime() -> None:
    net = Net()
    ids = [net.input(name, [2, 5], TensorProto.INT32) for name in ("t", "s")]
    tables = [net.const(np.ones((9, 8), np.uint8)) for _ in range(3)]
    vectors = [net.const(np.ones(8, np.uint8))]
    x = net.op("QEmbedLayerNormalization", *ids, *tables, *vectors, domain="com.microsoft")
    net.output(net.op("MatMul", x, net.const(np.ones((8, 3), np.float32))))
    graphops.inspect(net.bytes())


def test_attention_of_no_heads_is_left_to_the_runtime() -> None:
    net = Net()
    x = net.input("x", [2, 5, 8])
    names = [net.op("MatMul", x, net.const(np.ones((8, 8), np.float32))) for _ in range(3)]
    net.output(net.op("MultiHeadAttention", *names, num_heads=0, domain="com.microsoft"))
    graphops.inspect(net.bytes())


@pytest.mark.timeout(120)
def test_a_short_fuzz_run_is_clean() -> None:
    command = [sys.executable, str(FUZZ), "--seed", "0", "--inputs", "2000", "--seconds", "35"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    examined = re.search(r"(\d+) inputs", done.stdout)
    assert examined is not None and int(examined[1]) > 50


def test_a_loop_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "RUN_SECONDS", 0.3)
    scalar, flag = TensorProto.INT64, TensorProto.BOOL
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["goes_on_still"]),
            helper.make_node("Relu", ["state"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", scalar, []),
            helper.make_tensor_value_info("goes_on", flag, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 8, 4, 4]),
        ],
        [
            helper.make_tensor_value_info("goes_on_still", flag, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 8, 4, 4]),
        ],
    )
    net = Net()
    x = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    y = net.op("Loop", net.const(np.int64(2**62)), net.const(np.bool_(True)), x, body=body)
    net.output(net.conv(y, 8, 3))
    with pytest.raises(secateur.Refused) as caught:
        secateur.prune(net.bytes(), secateur.Recipe(target={"channels": 0.5}))
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN
    assert "more than 0.3 s" in caught.value.refusal.message
