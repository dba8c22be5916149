"""What onnx-ad has no derivative of, in what it has: ONNX Runtime gives the same of both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from nets import Net

from secateur.graphops.calibration.derivatives import freeze
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session

MS = "com.microsoft"
BATCH, LENGTH, HEADS, WIDTH = 2, 5, 2, 8
Build = Callable[[Net], str]


def image(op: str, size: int = 7, **attributes: object) -> Build:
    def build(net: Net) -> str:
        x = net.input("x", [BATCH, 3, size, size])
        if op == "Conv":
            return net.op(op, x, net.floats(4, 3, 3, 3), **attributes)
        return net.op(op, x, kernel_shape=[3, 2], **attributes)

    return build


def strided_slice(net: Net) -> str:
    x = net.input("x", [BATCH, LENGTH, WIDTH])
    bounds = (net.ints(-1, 1), net.ints(-99, 7), net.ints(1, 2), net.ints(-2, 3))
    return net.op("Slice", net.op("Neg", x), *bounds)  # of what has a shape by inference alone


def sequence(op: str, *shapes: tuple[int, ...], domain: str = MS, **attributes: object) -> Build:
    """An operator on (batch, length, width), and on constants."""

    def build(net: Net) -> str:
        x = net.input("x", [BATCH, LENGTH, WIDTH])
        operands = [net.floats(*shape) for shape in shapes]
        return net.op(op, x, *operands, domain=domain, **attributes)

    return build


def summed(op: str, *shapes: tuple[int, ...]) -> Build:
    """The normalisation, and the sum that it is of."""

    def build(net: Net) -> str:
        operands = [net.floats(*shape) for shape in shapes]
        x = net.input("x", [BATCH, LENGTH, WIDTH])
        given = {"domain": MS, "outputs": 4, "epsilon": 1e-3}
        y, _, _, total = net.ops(op, x, *operands, **given)
        net.nodes[-1].output[1:3] = ["", ""]
        return net.op("Add", y, total)

    return build


def products(net: Net) -> str:
    x = net.input("x", [BATCH, LENGTH, WIDTH])
    options = {"transA": 1, "transB": 1, "alpha": 0.3, "domain": MS}
    return net.op("FusedMatMul", x, net.floats(BATCH, 3, LENGTH), **options)


def separate(bias: bool = False, shift: bool = False, **attributes: object) -> Build:
    def build(net: Net) -> str:
        x = net.input("x", [BATCH, LENGTH, WIDTH])
        keys, values = net.floats(BATCH, 4, WIDTH), net.floats(BATCH, 4, 6)
        rest = ["", "", ""]
        rest[0] = net.floats(2 * WIDTH + 6) if bias else ""
        rest[2] = net.floats(1, 1, LENGTH, 4) if shift else ""
        options = {"num_heads": HEADS, "domain": MS, **attributes}
        return net.op("MultiHeadAttention", x, keys, values, *rest, **options)

    return build


def packed(mask: bool = False, **attributes: object) -> Build:
    def build(net: Net) -> str:
        x = net.input("x", [BATCH, LENGTH, WIDTH])
        operands = [net.floats(WIDTH, 3 * WIDTH), net.floats(3 * WIDTH)]
        if mask:
            counts = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 > 0
            operands.append(net.const(counts.astype(np.int32)))
        options = {"num_heads": HEADS, "domain": MS, **attributes}
        return net.op("Attention", x, *operands, **options)

    return build


FORMS: dict[str, Build] = {
    "Slice": strided_slice,
    "Conv, same upper": image("Conv", strides=[2, 2], auto_pad="SAME_UPPER"),
    "Conv, same lower": image("Conv", size=6, strides=[2, 2], auto_pad="SAME_LOWER"),
    "MaxPool, same": image("MaxPool", strides=[2, 2], auto_pad="SAME_UPPER"),
    "AveragePool, same": image("AveragePool", strides=[2, 2], auto_pad="SAME_UPPER"),
    "AveragePool, ceil": image("AveragePool", size=8, strides=[2, 3], ceil_mode=1),
    "AveragePool, ceil and pads": image(
        "AveragePool", size=8, strides=[2, 2], pads=[1, 0, 1, 0], ceil_mode=1
    ),
    "AveragePool, ceil that adds nothing": image(
        "AveragePool", pads=[1, 1, 1, 0], strides=[2, 2], ceil_mode=1, count_include_pad=1
    ),
    "SimplifiedLayerNormalization": sequence(
        "SimplifiedLayerNormalization", (WIDTH,), domain="", axis=-1, epsilon=1e-3
    ),
    "Gelu": sequence("Gelu"),
    "BiasGelu": sequence("BiasGelu", (WIDTH,)),
    "FastGelu": sequence("FastGelu"),
    "FastGelu, bias": sequence("FastGelu", (WIDTH,)),
    "QuickGelu": sequence("QuickGelu", alpha=1.3),
    "FusedMatMul": products,
    "SkipLayerNormalization": summed(
        "SkipLayerNormalization", (BATCH, LENGTH, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,)
    ),
    "SkipLayerNormalization, least": sequence(
        "SkipLayerNormalization", (BATCH, LENGTH, WIDTH), (WIDTH,)
    ),
    "SkipSimplifiedLayerNormalization": summed(
        "SkipSimplifiedLayerNormalization", (BATCH, LENGTH, WIDTH), (WIDTH,), (WIDTH,)
    ),
    "MultiHeadAttention": separate(),
    "MultiHeadAttention, bias": separate(bias=True, shift=True, scale=0.4),
    "Attention": packed(),
    "Attention, mask": packed(mask=True),
    "Attention, causal": packed(unidirectional=1),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_words_for_the_same(form: str) -> None:
    net = Net()
    net.output(FORMS[form](net))
    proto = ir.to_proto(open_model(net.bytes()).model)
    subject = next(node for node in proto.graph.node if node.op_type == form.split(",")[0])
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    (expected,) = open_session(proto.SerializeToString()).run(None, feeds)
    freeze(proto, feeds)
    (found,) = open_session(proto.SerializeToString()).run(None, feeds)
    assert np.allclose(found, expected, atol=2e-6)
    assert subject not in proto.graph.node
