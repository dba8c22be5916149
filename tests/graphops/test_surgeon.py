"""Shape inputs that a model computes: each way in which surgery makes them name the new sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from laws import lawful
from nets import Net
from onnx import TensorProto, numpy_helper

import secateur
from secateur.graphops.model.runtime import open_session


def operators(result: secateur.Result) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(result.model).graph.node)


def size_of(net: Net, x: str, axis: int) -> str:
    return net.op("Gather", net.op("Shape", x), net.ints(axis), axis=0)


def runs_at(result: secateur.Result, *batches: int) -> None:
    session = open_session(result.model)
    for batch in batches:
        outputs = session.run(None, {"x": np.ones((batch, 4, 6, 6), np.float32)})
        assert outputs[0].shape[0] == batch


def start(net: Net, channels: int = 8) -> str:
    return net.op("Relu", net.conv(net.input("x", ["N", 4, 6, 6]), 4, channels))


def test_one_size_that_follows_the_input_is_copied() -> None:
    net = Net()
    x = start(net)
    shape = net.op("Concat", size_of(net, x, 0), net.ints(8, 36), axis=0)
    net.output(net.conv(net.op("Reshape", x, shape), 8, 3, rank=3))
    result = lawful(net.bytes())
    assert operators(result)["Shape"] == 0  # 0 copies the batch: no arithmetic is left
    runs_at(result, 1, 5)


def test_one_size_that_moves_becomes_minus_one() -> None:
    net = Net()
    x = net.op("Transpose", start(net), perm=[1, 0, 2, 3])  # (8, N, 6, 6)
    shape = net.op("Concat", net.ints(1, 8), size_of(net, x, 1), net.ints(36), axis=0)
    y = net.op("Transpose", net.op("Reshape", x, shape), perm=[2, 1, 3, 0])  # (N, 8, 36, 1)
    net.output(net.conv(y, 8, 3))
    result = lawful(net.bytes())
    assert operators(result)["Where"] == 0
    runs_at(result, 1, 5)


def test_a_computed_expand_is_patched_by_where() -> None:
    net = Net()
    x = start(net)
    shape = net.op("Concat", size_of(net, x, 0), net.ints(8, 6, 6), axis=0)
    y = net.op("Expand", net.op("GlobalAveragePool", x), shape)
    net.output(net.conv(y, 8, 3))
    result = lawful(net.bytes())
    assert operators(result)["Where"] == 1
    runs_at(result, 1, 5)


def test_batch_times_channels_is_scaled() -> None:
    net = Net()
    x = start(net)
    first = net.op("Mul", size_of(net, x, 0), net.ints(8))
    y = net.op(
        "Reshape",
        x,
        net.op("Concat", first, net.ints(1), size_of(net, x, 2), size_of(net, x, 3), axis=0),
    )
    shape = net.op(
        "Concat", size_of(net, x, 0), net.ints(8), size_of(net, y, 2), net.ints(-1), axis=0
    )
    net.output(net.conv(net.op("Reshape", net.op("Tanh", y), shape), 8, 3))
    result = lawful(net.bytes())
    runs_at(result, 1, 5)


def test_a_batch_computed_from_channels_is_read_from_the_input() -> None:
    """BLOOM: (batch · heads, …) is divided by the number of heads to find the batch again."""
    net = Net()
    x = start(net)
    first = net.op("Mul", size_of(net, x, 0), net.ints(8))
    merged = net.op("Reshape", x, net.op("Concat", first, net.ints(6, 6), axis=0))
    batch = net.op("Div", size_of(net, merged, 0), net.ints(8))
    image = net.op("Concat", batch, net.ints(8), size_of(net, merged, 1), net.ints(6), axis=0)
    y = net.op("Reshape", net.op("Tanh", merged), image)
    z = net.op("Expand", net.op("GlobalAveragePool", y), image)
    net.output(net.conv(net.op("Add", y, z), 8, 3))
    runs_at(lawful(net.bytes()), 1, 5)


def test_sizes_read_from_the_tensor_itself_follow_by_themselves() -> None:
    net = Net()
    x = start(net)
    y = net.op(
        "Reshape", x, net.op("Concat", size_of(net, x, 0), size_of(net, x, 1), net.ints(36), axis=0)
    )
    net.output(net.conv(y, 8, 3, rank=3))
    runs_at(lawful(net.bytes()), 1, 5)


def test_a_shape_constant_with_two_readers_of_other_fates() -> None:
    net = Net()
    shape = net.ints(-1, 8, 36)
    x = net.input("x", ["N", 4, 6, 6])
    ends = []
    for _ in range(2):
        y = net.op("Reshape", net.op("Relu", net.conv(x, 4, 8)), shape)
        ends.append(net.conv(net.op("Relu", y), 8, 3, rank=3))
    net.output(net.op("Add", *ends))
    lawful(net.bytes(), criterion="random", scope="global", target={"channels": 0.6})


def test_a_number_computed_from_channels_keeps_its_value() -> None:
    net = Net()
    x = start(net)
    count = net.op("Cast", size_of(net, x, 1), to=TensorProto.FLOAT)
    net.output(net.conv(net.op("Div", x, net.op("Sqrt", count)), 8, 3))
    runs_at(lawful(net.bytes()), 1, 5)


def test_a_size_computed_from_channels_keeps_its_value() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [2, 4, 6, 6]), 4, 8))
    count = net.op("Cast", net.op("Size", x), to=TensorProto.FLOAT)
    net.output(net.conv(net.op("Div", x, net.op("Sqrt", count)), 8, 3))
    lawful(net.bytes())


@pytest.mark.parametrize("how", ["initializer", "Constant"])
def test_a_rewritten_shape_keeps_its_name(how: str) -> None:
    net = Net()
    x = start(net)
    shape = net.ints(-1, 8, 36) if how == "initializer" else net.constant(np.array([-1, 8, 36]))
    net.output(net.conv(net.op("Reshape", x, shape), 8, 3, rank=3))
    proto = onnx.load_from_string(lawful(net.bytes()).model)
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    found |= {n.output[0]: n.attribute[0].t for n in proto.graph.node if n.op_type == "Constant"}
    assert numpy_helper.to_array(found[shape]).tolist() == [-1, 4, 36]
