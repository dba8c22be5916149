"""What is taken out of a model before it is read: sequences of tensors, and vectors that the model
writes into. What a cut must reach then is reached, and the law says that nothing else changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from laws import lawful
from nets import Net
from onnx import TensorProto, helper

from secateur.graphops.model.normalise import normalise
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session

Build = Callable[[Net, str], str]

CHANNELS = 8


def net_of(build: Build, opset: int = 17) -> onnx.ModelProto:
    """Two convolutions, and between them what is tested."""
    net = Net(opset)
    x = net.conv(net.input("x", [2, 3, 4, 4]), 3, CHANNELS)
    net.output(net.conv(net.op("Relu", build(net, x)), CHANNELS, 2))
    return net.model()


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def is_sequence(op_type: str) -> bool:
    return "Sequence" in op_type or op_type == "Loop"


def normalised(source: onnx.ModelProto) -> onnx.ModelProto:
    opened = open_model(source)
    normalise(opened.model)
    return ir.to_proto(opened.model)


def run(model: onnx.ModelProto) -> np.ndarray:
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)}
    found: np.ndarray = open_session(model.SerializeToString(), lean=True).run(None, feeds)[0]
    return found


def sequence_info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)


def turning(net: Net, x: str, start: str, *, turns: str, rank: int = 1, stops: bool = False) -> str:
    """A loop whose turns put rows of `x` into a sequence, as TorchScript spells tensor_split."""
    bounds, step = net.ints(0, 2, 4), net.ints(1)
    nodes = [
        helper.make_node("Gather", [bounds, "turn"], ["from"]),
        helper.make_node("Add", ["turn", step], ["following"]),
        helper.make_node("Gather", [bounds, "following"], ["to"]),
        helper.make_node("Slice", [x, "from", "to", "axis"], ["part"]),
        helper.make_node("SequenceInsert", ["held", "part"], ["more"]),
        helper.make_node("Not" if stops else "Identity", ["going"], ["still"]),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, [1] * rank),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            sequence_info("held"),
        ],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []), sequence_info("more")],
        [onnx.numpy_helper.from_array(np.array([2]), "axis")],
    )
    return net.op("Loop", turns, net.const(np.array(True)), start, body=body)


def split_by_a_loop(net: Net, x: str) -> str:
    turns = turning(net, x, net.op("SequenceEmpty"), turns=net.const(np.array(2)))
    parts = [net.op("SequenceAt", turns, net.const(np.array(place))) for place in (1, -2)]
    return net.op("Concat", *parts, axis=2)


def listed(net: Net, x: str) -> str:
    """Built one by one, with a position and without, and shortened again."""
    negative, last = net.op("Neg", x), net.const(np.array(-1))
    one = net.op("SequenceConstruct", x, net.op("Sigmoid", x))
    two = net.op("SequenceInsert", one, negative, net.const(np.array(0)))
    again = net.op("Identity", two) if net.opset >= 14 else two
    three = net.op("SequenceInsert", again, net.op("Tanh", x))
    rest = net.op("SequenceErase", net.op("SequenceErase", three), last)
    first, second = (net.op("SequenceAt", rest, net.const(np.array(n))) for n in (0, 1))
    count = net.op("Cast", net.op("SequenceLength", rest), to=TensorProto.FLOAT)
    return net.op("Mul", net.op("Sub", first, second), count)


def cut_up(net: Net, x: str) -> str:
    parts = net.op("SplitToSequence", x, net.ints(3, 1), axis=2)
    ends = net.op("SequenceAt", parts, net.const(np.array(1)))
    return net.op("Add", net.op("ConcatFromSequence", parts, axis=-2), ends)


def stacked(net: Net, x: str) -> str:
    both = net.op("SequenceConstruct", x, net.op("Neg", x))
    return net.op(
        "ReduceMax", net.op("ConcatFromSequence", both, axis=-1, new_axis=1), axes=[4], keepdims=0
    )


SEQUENCES = (
    (split_by_a_loop, 13),  # earlier loops carry no sequences
    (split_by_a_loop, 17),
    *((build, opset) for build in (listed, cut_up, stacked) for opset in (12, 17)),
)


@pytest.mark.parametrize(("build", "opset"), SEQUENCES)
def test_channels_pass_where_sequences_were(build: Build, opset: int) -> None:
    source = net_of(build, opset)
    assert any(map(is_sequence, operators(source)))
    pruned = lawful(source, target={"channels": 0.5})
    assert not any(map(is_sequence, operators(onnx.load_from_string(pruned.model))))
    assert [axis for kept in pruned.plan.kept for axis in kept.axes], pruned.plan.kept
    # Nothing is left that served the sequences alone.
    plain = normalised(source)
    read = {name for node in plain.graph.node for name in node.input}
    assert {one.name for one in plain.graph.initializer} <= read
    assert (run(plain) == run(source)).all()


def at_computed_places(net: Net, x: str) -> str:
    both = net.op("SequenceConstruct", x, net.op("Neg", x))
    size = net.op("Cast", net.op("ReduceMax", x, keepdims=0), to=TensorProto.BOOL)
    return net.op("SequenceAt", both, net.op("Cast", size, to=TensorProto.INT64))


def stopping(net: Net, x: str) -> str:
    turns = net.const(np.array(2))
    held = turning(net, x, net.op("SequenceEmpty"), turns=turns, stops=True)
    return net.op("Concat", *[net.op("SequenceAt", held, net.const(np.array(0)))] * 2, axis=2)


def as_often_as_the_data_say(net: Net, x: str) -> str:
    size = net.op("Cast", net.op("ReduceMax", x, keepdims=0), to=TensorProto.BOOL)
    turns = net.op("Cast", size, to=TensorProto.INT64)
    start = net.op("SequenceConstruct", x)
    return net.op("SequenceAt", turning(net, x, start, turns=turns), net.const(np.array(0)))


@pytest.mark.parametrize("build", [at_computed_places, stopping, as_often_as_the_data_say])
def test_what_only_the_data_decide_stays(build: Build) -> None:
    source = net_of(build)
    plain = normalised(source)
    kept = {op_type for op_type in operators(source) if is_sequence(op_type)}
    assert kept <= operators(plain)
    assert (run(plain) == run(source)).all()


def test_the_turn_has_the_rank_that_the_body_says() -> None:
    def build(net: Net, x: str) -> str:
        start = net.op("SequenceConstruct", x)
        held = turning(net, x, start, turns=net.const(np.array([1])))
        return net.op("Concat", *[net.op("SequenceAt", held, net.const(np.array(1)))] * 2, axis=2)

    source = net_of(build)
    assert (run(normalised(source)) == run(source)).all()


def test_what_a_loop_gives_to_the_caller_keeps_its_name() -> None:
    def build(net: Net, x: str) -> str:
        start = net.op("SequenceConstruct", x)
        held = turning(net, x, start, turns=net.const(np.array(1)))
        net.outputs.append(sequence_info(held))
        return net.op("SequenceAt", held, net.const(np.array(0)))

    source = net_of(build)
    assert [o.name for o in normalised(source).graph.output] == [
        o.name for o in source.graph.output
    ]


def test_a_loop_that_is_fed_less_than_it_carries_stays() -> None:
    source = net_of(split_by_a_loop)
    (loop,) = (node for node in source.graph.node if node.op_type == "Loop")
    body = loop.attribute[0].g
    loop.input.append("")
    loop.output.append("other")
    body.input.append(helper.make_tensor_value_info("fed", TensorProto.FLOAT, None))
    body.output.append(helper.make_tensor_value_info("fed", TensorProto.FLOAT, None))
    assert "Loop" in operators(normalised(source))


def test_a_loop_too_long_to_write_out_stays() -> None:
    def build(net: Net, x: str) -> str:
        start = net.op("SequenceConstruct", x)
        held = turning(net, x, start, turns=net.const(np.array(1 << 40)))
        return net.op("SequenceAt", held, net.const(np.array(0)))

    assert "Loop" in operators(normalised(net_of(build)))


@pytest.mark.parametrize("reduction", [{}, {"reduction": "none"}])
def test_a_bias_that_is_written_into_is_a_constant(reduction: dict[str, str]) -> None:
    """As `bias[2:4] = 0` is exported."""

    def build(net: Net, x: str) -> str:
        zeros = net.op("Expand", net.floats(1), net.ints(2))
        places = net.const(np.array([[2], [3]]))
        bias = net.op("ScatterND", net.floats(CHANNELS), places, zeros, **reduction)
        return net.op(
            "Transpose",
            net.op("Add", net.op("Transpose", x, perm=[0, 2, 3, 1]), bias),
            perm=[0, 3, 1, 2],
        )

    source = net_of(build)
    pruned = lawful(source, target={"channels": 0.5})
    assert not operators(onnx.load_from_string(pruned.model)) & {"ScatterND", "Expand"}
    assert any(one.tensor.startswith("scatternd") for one in pruned.plan.kept)
    assert (run(normalised(source)) == run(source)).all()


def test_what_is_added_to_a_bias_is_left_to_the_runtime() -> None:
    def build(net: Net, x: str) -> str:
        places = net.const(np.array([[2], [2]]))
        bias = net.op("ScatterND", net.floats(CHANNELS), places, net.floats(2), reduction="add")
        return net.op(
            "Transpose",
            net.op("Add", net.op("Transpose", x, perm=[0, 2, 3, 1]), bias),
            perm=[0, 3, 1, 2],
        )

    source = net_of(build)
    assert "ScatterND" in operators(normalised(source))
