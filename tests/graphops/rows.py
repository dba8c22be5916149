"""One row per operator and form: the smallest model in which prunable channels cross it.

A row's function gets a `Net`, calls the operator under test `subject` by name, and returns what
the model computes. Channels come from a convolution or matrix product before it and go into
another after it, so that a cut has to cross. Families get generated rows; what has attributes
that decide where channels go has one row for each way of saying it.

Adding an operator is one `register` in the engine and one row here: the suite fails on a rule
without a row, and on a row without a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nets import BOOL, INT64, Net, attention
from onnx import TensorProto, helper

Build = Callable[[Net], str]
SUBJECT = "subject"


@dataclass(frozen=True)
class Row:
    """One form of one operator.

    Attributes:
        op: its type.
        form: what is special about it; empty for the plain one.
        build: makes the model and returns the name of its output.
        opset: of the ai.onnx domain.
        freezes: the reason code expected where the operator must not be cut.
        exact: false where it is a named exception of the law on the axis that is cut.
        carries: false where its result says something about sizes, not about channels.
        alone: false where it reads more than its inputs (If), and cannot be run by itself.
        domain: of the operator.
    """

    op: str
    form: str
    build: Build
    opset: int = 17
    freezes: str | None = None
    exact: bool = True
    carries: bool = True
    alone: bool = True
    domain: str = ""

    @property
    def id(self) -> str:
        return f"{self.op}-{self.form}" if self.form else self.op


ROWS: list[Row] = []


def row(op: str, form: str = "", **options: Any) -> Callable[[Build], Build]:
    """Adds the decorated function as a row."""

    def add(build: Build) -> Build:
        ROWS.append(Row(op, form, build, **options))
        return build

    return add


def rows(op: str, builds: dict[str, Build], **options: Any) -> None:
    """Adds several forms of one operator."""
    for form, build in builds.items():
        ROWS.append(Row(op, form, build, **options))


# -- where channels come from and go to --------------------------------------------------------

C = 8  # channels that reach the operator
H = 6  # height and width of images
T = 5  # length of sequences


def image(net: Net, channels: int = C, rank: int = 4) -> str:
    """(2, channels, 6, …) whose channels can be cut."""
    x = net.input(net.name("x"), [2, 4, *[H] * (rank - 2)])
    return net.conv(x, 4, channels, rank=rank)


def image_end(net: Net, y: str, channels: int = C, rank: int = 4) -> str:
    """Consumes channels along axis 1."""
    hidden = net.op("Relu", net.conv(y, channels, 6, rank=rank))
    return net.conv(hidden, 6, 3, rank=rank)


def sequence(net: Net, channels: int = C) -> str:
    """(2, 5, channels) whose last axis can be cut."""
    return net.dense(net.input(net.name("x"), [2, T, 4]), 4, channels)


def sequence_end(net: Net, y: str, channels: int = C) -> str:
    """Consumes channels along the last axis."""
    return net.dense(net.op("Relu", net.dense(y, channels, 6)), 6, 3)


def on_image(
    op: str,
    *more: Callable[[Net], str],
    channels: int = C,
    after: int | None = None,
    rank: int = 4,
    before: Build | None = None,
    **attributes: Any,
) -> Build:
    """image → [before] → op(·, *more) → image_end."""

    def build(net: Net) -> str:
        x = image(net, channels, rank)
        x = _prepared(net, x, before)
        y = net.op(op, x, *(make(net) for make in more), name=SUBJECT, **attributes)
        return image_end(net, y, after or channels, rank)

    return build


def on_sequence(
    op: str,
    *more: Callable[[Net], str],
    channels: int = C,
    after: int | None = None,
    **attributes: Any,
) -> Build:
    """sequence → op(·, *more) → sequence_end."""

    def build(net: Net) -> str:
        x = sequence(net, channels)
        y = net.op(op, x, *(make(net) for make in more), name=SUBJECT, **attributes)
        return sequence_end(net, y, after or channels)

    return build


Prepare = Callable[[Net, str], str]


def _prepared(net: Net, x: str, before: Any) -> str:
    return x if before is None else before(net, x)


def scalar(value: float, dtype: Any = np.float32) -> Callable[[Net], str]:
    return lambda net: net.const(np.asarray(value, dtype))


def vector(*shape: int, low: float | None = None) -> Callable[[Net], str]:
    return lambda net: net.floats(*shape, low=low)


def ints(*values: int) -> Callable[[Net], str]:
    return lambda net: net.ints(*values)


def absent(net: Net) -> str:
    return ""


# -- unary -------------------------------------------------------------------------------------


def _positive(net: Net, x: str) -> str:
    return net.op("Add", net.op("Abs", x), net.const(np.float32(0.2)))


def _above_one(net: Net, x: str) -> str:
    return net.op("Add", net.op("Abs", x), net.const(np.float32(1.1)))


def _inside_one(net: Net, x: str) -> str:
    return net.op("Mul", net.op("Tanh", x), net.const(np.float32(0.9)))


_PLAIN = (
    *("Abs", "Asinh", "Atan", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor"),
    *("HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu"),
    *("Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Tanh"),
    "ThresholdedRelu",
)
_NEWER = {"Mish": 18}

for _op in _PLAIN:
    _options = {"alpha": 0.2} if _op in ("LeakyRelu", "Celu", "Elu") else {}
    rows(_op, {"": on_image(_op, **_options)}, opset=_NEWER.get(_op, 17))
rows("Relu", {"opset 7": on_image("Relu")}, opset=7)
rows("Relu", {"opset 24": on_image("Relu")}, opset=24)
rows("Sigmoid", {"rank 3": on_image("Sigmoid", rank=3), "rank 5": on_image("Sigmoid", rank=5)})
rows("Gelu", {"": on_image("Gelu"), "tanh": on_image("Gelu", approximate="tanh")}, opset=20)
rows("Swish", {"": on_image("Swish", alpha=1.5)}, opset=24)
for _op in ("Acos", "Asin", "Atanh"):
    rows(_op, {"": on_image(_op, before=_inside_one)})
rows("Acosh", {"": on_image("Acosh", before=_above_one)})
for _op in ("Log", "Sqrt", "Reciprocal"):
    rows(_op, {"": on_image(_op, before=_positive)})
rows("Clip", {"inputs": on_image("Clip", scalar(-0.5), scalar(0.7))})
rows("Clip", {"no minimum": on_image("Clip", absent, scalar(0.7))})
rows("Clip", {"attributes": on_image("Clip", min=-0.5, max=0.7)}, opset=6 + 1)
rows("Dropout", {"ratio input": on_image("Dropout", scalar(0.5))}, opset=13)
rows("Dropout", {"attribute": on_image("Dropout", ratio=0.3)}, opset=7)
rows("Cast", {"to the same": on_image("Cast", to=TensorProto.FLOAT)})


@row("Dropout", "mask")
def _(net: Net) -> str:
    y, mask = net.ops("Dropout", image(net), outputs=2, name=SUBJECT)
    return image_end(net, net.op("Where", mask, y, net.const(np.float32(0))))


@row("Cast", "to half and back")
def _(net: Net) -> str:
    y = net.op("Cast", image(net), to=TensorProto.FLOAT16, name=SUBJECT)
    return image_end(net, net.op("Cast", y, to=TensorProto.FLOAT))


@row("CastLike")
def _(net: Net) -> str:
    like = net.const(np.zeros(1, np.int32))
    y = net.op("CastLike", net.op("Mul", image(net), scalar(4)(net)), like, name=SUBJECT)
    return image_end(net, net.op("Cast", y, to=TensorProto.FLOAT))


@row("CastLike", "like another feature map")
def _(net: Net) -> str:
    x = image(net)
    y = net.op("CastLike", net.op("Relu", x), net.op("Neg", x), name=SUBJECT)
    return image_end(net, y)


def _flag(op: str) -> Build:
    def build(net: Net) -> str:
        x = image(net)
        y = net.op(op, net.op("Log", x) if op == "IsNaN" else net.op("Sqrt", x), name=SUBJECT)
        y = net.op("Cast", y, to=TensorProto.FLOAT)
        return image_end(net, net.op("Add", y, x))

    return build


rows("IsNaN", {"": _flag("IsNaN")})
rows("IsInf", {"": _flag("IsInf")})


@row("Not")
def _(net: Net) -> str:
    x = image(net)
    y = net.op("Not", net.op("Greater", x, scalar(0)(net)), name=SUBJECT)
    return image_end(net, net.op("Where", y, x, scalar(0.5)(net)))


def _as_integers(net: Net, x: str, dtype: int = TensorProto.INT32) -> str:
    magnitude = net.op("Mul", net.op("Abs", x), net.const(np.float32(9)))
    return net.op("Cast", magnitude, to=dtype)


@row("BitwiseNot", opset=18)
def _(net: Net) -> str:
    y = net.op("BitwiseNot", _as_integers(net, image(net)), name=SUBJECT)
    return image_end(net, net.op("Cast", y, to=TensorProto.FLOAT))


# -- broadcasting ------------------------------------------------------------------------------

_PAIRS = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "PRelu")


def _with_vector(op: str, first: bool = False) -> Build:
    def build(net: Net) -> str:
        x, other = image(net), net.floats(C, 1, 1, low=0.5)
        operands = (other, x) if first else (x, other)
        return image_end(net, net.op(op, *operands, name=SUBJECT))

    return build


def _with_other(op: str) -> Build:
    def build(net: Net) -> str:
        x, other = image(net), _above_one(net, image(net))
        return image_end(net, net.op(op, x, other, name=SUBJECT))

    return build


def _with_mask(op: str) -> Build:
    """The other operand has one channel for all."""

    def build(net: Net) -> str:
        mask = net.input("mask", [2, 1, H, H])
        return image_end(net, net.op(op, image(net), _above_one(net, mask), name=SUBJECT))

    return build


def _on_last_axis(op: str) -> Build:
    return on_sequence(op, vector(C, low=0.5))


for _op in _PAIRS:
    rows(_op, {"vector": _with_vector(_op), "two maps": _with_other(_op)})
    rows(_op, {"one channel for all": _with_mask(_op), "last axis": _on_last_axis(_op)})
for _op in ("Add", "Mul", "Sub", "Div"):
    rows(_op, {"scalar": on_image(_op, scalar(1.5)), "vector first": _with_vector(_op, True)})
rows("Add", {"opset 7": _with_vector("Add")}, opset=7)
rows(
    "Add",
    {"unit axes": on_image("Add", vector(1, C, 1, 1)), "whole": on_image("Add", vector(C, H, H))},
)
rows("Sum", {"one operand": on_image("Sum")})
rows("Max", {"one operand": on_image("Max")})


@row("Mean", "three operands")
def _(net: Net) -> str:
    return image_end(net, net.op("Mean", image(net), image(net), net.floats(C, 1, 1), name=SUBJECT))


@row("Mul", "squeeze and excite")
def _(net: Net) -> str:
    x = image(net)
    gate = net.conv(net.op("Relu", net.conv(net.op("GlobalAveragePool", x), C, 4)), 4, C)
    return image_end(net, net.op("Mul", x, net.op("Sigmoid", gate), name=SUBJECT))


@row("Mul", "the same twice")
def _(net: Net) -> str:
    x = image(net)
    return image_end(net, net.op("Mul", x, x, name=SUBJECT))


rows("Pow", {"scalar": on_image("Pow", scalar(2.0)), "two maps": _with_other("Pow")})
rows("Pow", {"vector": on_image("Pow", vector(C, 1, 1, low=1), before=_positive)})


@row("Mod", "fmod")
def _(net: Net) -> str:
    y = net.op("Mod", image(net), net.floats(C, 1, 1, low=0.5), fmod=1, name=SUBJECT)
    return image_end(net, y)


def _on_integers(op: str, dtype: int, other: Any, opset: int = 17, **attributes: Any) -> None:
    """x → integers → op with a vector → floats."""

    def build(net: Net) -> str:
        x = _as_integers(net, image(net), dtype)
        y = net.op(op, x, net.const(other), name=SUBJECT, **attributes)
        return image_end(net, net.op("Cast", y, to=TensorProto.FLOAT))

    ROWS.append(Row(op, "integers", build, opset))


_SMALL = np.arange(1, C + 1).reshape(C, 1, 1)
_on_integers("Mod", TensorProto.INT32, _SMALL.astype(np.int32))
_on_integers("BitShift", TensorProto.UINT32, (_SMALL % 4).astype(np.uint32), direction="LEFT")
for _op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
    _on_integers(_op, TensorProto.INT32, _SMALL.astype(np.int32), opset=18)


def _comparison(op: str) -> Build:
    def build(net: Net) -> str:
        x = net.op("Round", image(net)) if op == "Equal" else image(net)
        other = net.floats(C, 1, 1) if op != "Equal" else net.const(np.zeros((C, 1, 1), np.float32))
        flags = net.op(op, x, other, name=SUBJECT)
        return image_end(net, net.op("Where", flags, x, scalar(0.25)(net)))

    return build


for _op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
    rows(_op, {"": _comparison(_op)})


def _logic(op: str) -> Build:
    def build(net: Net) -> str:
        x = image(net)
        flags = net.op("Greater", x, scalar(0)(net))
        mask = net.const((np.arange(C) % 2 == 0).reshape(C, 1, 1))
        return image_end(
            net, net.op("Where", net.op(op, flags, mask, name=SUBJECT), x, scalar(0)(net))
        )

    return build


for _op in ("And", "Or", "Xor"):
    rows(_op, {"": _logic(_op)})


@row("Where", "mask per channel")
def _(net: Net) -> str:
    mask = net.const((np.arange(C) % 2 == 0).reshape(C, 1, 1))
    return image_end(net, net.op("Where", mask, image(net), net.floats(C, 1, 1), name=SUBJECT))


@row("Where", "mask from the input")
def _(net: Net) -> str:
    mask = net.input("mask", [2, 1, H, H], BOOL)
    return image_end(net, net.op("Where", mask, image(net), image(net), name=SUBJECT))


@row("QuantizeLinear", "per tensor")
def _(net: Net) -> str:
    scale, zero = net.const(np.float32(0.02)), net.const(np.uint8(128))
    y = net.op("QuantizeLinear", image(net), scale, zero, name=SUBJECT)
    return image_end(net, net.op("DequantizeLinear", y, scale, zero))


@row("QuantizeLinear", "per channel")
def _(net: Net) -> str:
    scale = net.const((0.01 * (1 + np.arange(C))).astype(np.float32))
    zero = net.const(np.arange(C, dtype=np.uint8) + 100)
    y = net.op("QuantizeLinear", image(net), scale, zero, axis=1, name=SUBJECT)
    return image_end(net, net.op("DequantizeLinear", y, scale, zero, axis=1))


@row("DequantizeLinear", "activation per channel")
def _(net: Net) -> str:
    scale = net.const((0.01 * (1 + np.arange(C))).astype(np.float32))
    zero = net.const(np.zeros(C, np.int8))
    y = net.op("QuantizeLinear", image(net), scale, zero, axis=1)
    return image_end(net, net.op("DequantizeLinear", y, scale, zero, axis=-3, name=SUBJECT))


@row("DequantizeLinear", "weight per channel")
def _(net: Net) -> str:
    x = net.input("x", [2, 4, H, H])
    weight = net.const(net.draw.integers(-100, 100, (C, 4, 1, 1)).astype(np.int8))
    scale = net.const((0.01 * (1 + np.arange(C))).astype(np.float32))
    zero = net.const(np.zeros(C, np.int8))
    y = net.op("DequantizeLinear", weight, scale, zero, axis=0, name=SUBJECT)
    return image_end(net, net.op("Conv", x, y))


@row("DequantizeLinear", "blocked", opset=21, freezes="UNSUPPORTED_FORM")
def _(net: Net) -> str:
    weight = net.const(net.draw.integers(-100, 100, (4, C)).astype(np.int8))
    scale = net.const((0.01 * (1 + np.arange(2 * C))).astype(np.float32).reshape(2, C))
    y = net.op("DequantizeLinear", weight, scale, axis=0, block_size=2, name=SUBJECT)
    return sequence_end(net, net.op("MatMul", net.input("x", [2, T, 4]), y))


# -- convolutions ------------------------------------------------------------------------------


def _conv(inner: int, outer: int, kernel: Any = 3, rank: int = 4, **options: Any) -> Build:
    """image(inner) → Conv → end(outer): the subject is consumer and producer at once."""

    def build(net: Net) -> str:
        y = net.conv(
            image(net, inner, rank), inner, outer, kernel, rank=rank, name=SUBJECT, **options
        )
        return image_end(net, y, outer, rank)

    return build


rows(
    "Conv",
    {
        "1x1": _conv(8, 8, 1),
        "3x3": _conv(8, 12, 3),
        "no bias": _conv(8, 8, 3, bias=False),
        "uneven kernel": _conv(8, 8, (1, 3)),
        "strides and dilations": _conv(8, 8, 3, strides=[2, 1], dilations=[1, 2]),
        "automatic padding": _conv(8, 8, 3, auto_pad="SAME_UPPER", pads=None),
        "1-D": _conv(8, 8, 3, rank=3),
        "3-D": _conv(8, 8, 3, rank=5),
        "4 groups": _conv(8, 8, 3, group=4),
        "4 groups, widening": _conv(8, 16, 3, group=4),
        "2 groups": _conv(12, 12, 3, group=2),
        "2 groups, narrowing": _conv(12, 8, 3, group=2),
        "depthwise": _conv(8, 8, 3, group=8),
        "depthwise with multiplier": _conv(8, 16, 3, group=8),
        "one output": _conv(8, 1, 3),
    },
)
rows("Conv", {"opset 7": _conv(8, 8, 3)}, opset=7)
rows("Conv", {"opset 24": _conv(8, 8, 3)}, opset=24)


@row("Conv", "groups over an input that cannot be cut")
def _(net: Net) -> str:
    y = net.conv(net.input("x", [2, 4, H, H]), 4, 12, group=2, name=SUBJECT)
    return image_end(net, y, 12)


def _conv_transpose(inner: int, outer: int, group: int = 1, **options: Any) -> Build:
    def build(net: Net) -> str:
        x, kernel = image(net, inner), 2
        weight = net.floats(inner, outer // group, kernel, kernel)
        bias = net.floats(outer)
        y = net.op("ConvTranspose", x, weight, bias, group=group, name=SUBJECT, **options)
        return image_end(net, y, outer)

    return build


rows(
    "ConvTranspose",
    {
        "": _conv_transpose(8, 12),
        "upsampling": _conv_transpose(8, 8, strides=[2, 2]),
        "output padding": _conv_transpose(8, 8, strides=[2, 2], output_padding=[1, 1]),
        "4 groups": _conv_transpose(8, 8, 4),
        "2 groups": _conv_transpose(12, 12, 2),
        "2 groups, widening": _conv_transpose(8, 24, 2),
        "depthwise": _conv_transpose(8, 8, 8, strides=[2, 2]),
    },
)


# -- Gemm, MatMul, Einsum ----------------------------------------------------------------------


def _gemm(bias: Sequence[int] | None = (12,), trans_b: int = 0, **options: Any) -> Build:
    """(2, 8) → Gemm → (2, 12) → Gemm → (2, 3)."""

    def build(net: Net) -> str:
        x = net.op("Gemm", net.input("x", [2, 4]), net.floats(4, C), net.floats(C))
        weight = net.floats(*((12, C) if trans_b else (C, 12)))
        operands = [x, weight] + ([] if bias is None else [net.floats(*bias)])
        y = net.op("Gemm", *operands, transB=trans_b, name=SUBJECT, **options)
        return net.op("Gemm", net.op("Relu", y), net.floats(3, 12), net.floats(3), transB=1)

    return build


rows(
    "Gemm",
    {
        "": _gemm(),
        "transB": _gemm(trans_b=1),
        "alpha and beta": _gemm(alpha=0.5, beta=2.0, trans_b=1),
        "no C": _gemm(bias=None),
        "scalar C": _gemm(bias=(1,)),
        "C with a row axis": _gemm(bias=(1, 12)),
        "C of the result's shape": _gemm(bias=(2, 12)),
    },
)
rows("Gemm", {"opset 7": _gemm()}, opset=7)


@row("Gemm", "transA")
def _(net: Net) -> str:
    x = net.op("MatMul", net.floats(C, 4), net.input("x", [4, 2]))  # (8, 2), channels first
    y = net.op("Gemm", x, net.floats(C, 12), net.floats(12), transA=1, name=SUBJECT)
    return net.op("Gemm", net.op("Relu", y), net.floats(12, 3))


@row("Gemm", "C is another feature map")
def _(net: Net) -> str:
    x = net.op("Gemm", net.input("x", [2, 4]), net.floats(4, C))
    shortcut = net.op("Gemm", net.input("s", [2, 4]), net.floats(4, 12))
    y = net.op("Gemm", x, net.floats(C, 12), shortcut, name=SUBJECT)
    return net.op("Gemm", net.op("Relu", y), net.floats(12, 3))


def _matmul(net: Net, shape: Sequence[int], weight: Sequence[int]) -> str:
    return net.op("MatMul", net.input("x", shape), net.floats(*weight), name=SUBJECT)


@row("MatMul", "produces")
def _(net: Net) -> str:
    return sequence_end(net, _matmul(net, [2, T, 4], [4, C]))


@row("MatMul", "consumes and produces")
def _(net: Net) -> str:
    return sequence_end(net, net.op("MatMul", sequence(net), net.floats(C, 12), name=SUBJECT), 12)


@row("MatMul", "weight on the left")
def _(net: Net) -> str:
    y = net.op("MatMul", net.floats(C, 4), net.input("x", [2, 4, T]), name=SUBJECT)
    return image_end(net, y, C, rank=3)


@row("MatMul", "vector on the right")
def _(net: Net) -> str:
    y = net.op("MatMul", net.op("Tanh", sequence(net)), net.floats(C), name=SUBJECT)  # (2, 5)
    return net.dense(net.op("Relu", net.dense(y, T, 6)), 6, 3)


@row("MatMul", "vector on the left")
def _(net: Net) -> str:
    y = net.op(
        "MatMul",
        net.floats(4),
        net.op("MatMul", net.input("x", [2, 4, T]), net.floats(T, C)),
        name=SUBJECT,
    )
    return net.dense(net.op("Relu", y), C, 3)


@row("MatMul", "weight per batch entry")
def _(net: Net) -> str:
    x = net.op("Transpose", sequence(net), perm=[1, 0, 2])
    y = net.op("MatMul", x, net.floats(T, C, 12), name=SUBJECT)
    return sequence_end(net, y, 12)


@row("MatMul", "query and key of whole heads")
def _(net: Net) -> str:
    return attention(net, net.input("x", [2, T, 4]), 4, heads=4, size=3, tokens=T, mixed=SUBJECT)


@row("MatMul", "query and key of one head")
def _(net: Net) -> str:
    x = net.input("x", [2, T, 4])
    key = net.op("Transpose", net.dense(x, 4, C), perm=[0, 2, 1])
    scores = net.op("MatMul", net.dense(x, 4, C), key, name=SUBJECT)
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), net.dense(x, 4, 6))
    return net.dense(y, 6, 3)


@row("MatMul", "channels against channels")
def _(net: Net) -> str:
    x = net.input("x", [2, T, 4])
    left = net.op("Transpose", net.dense(x, 4, C), perm=[0, 2, 1])  # (2, 8, 5)
    y = net.op("MatMul", left, net.dense(x, 4, 6), name=SUBJECT)  # (2, 8, 6)
    return image_end(net, y, C, rank=3)


def _einsum(equation: str, *shapes: Sequence[int], after: int = 12) -> Build:
    """sequence → Einsum with weights → sequence_end."""

    def build(net: Net) -> str:
        weights = [net.floats(*shape) for shape in shapes]
        y = net.op("Einsum", sequence(net), *weights, equation=equation, name=SUBJECT)
        return sequence_end(net, y, after)

    return build


rows(
    "Einsum",
    {
        "matrix": _einsum("bik,kn->bin", (C, 12)),
        "ellipsis": _einsum("...k,kn->...n", (C, 12)),
        "spaces, weight transposed": _einsum("b i k, n k -> b i n", (12, C)),
        "element-wise": _einsum("bik,k->bik", (C,), after=C),
        "one operand": _einsum("bik->bik", after=C),
    },
)


@row("Einsum", "channels first")
def _(net: Net) -> str:
    y = net.op("Einsum", image(net), net.floats(12, C), equation="bchw,oc->bohw", name=SUBJECT)
    return image_end(net, y, 12)


@row("Einsum", "heads")
def _(net: Net) -> str:
    x = net.input("x", [2, T, 4])
    query, key, value = (
        net.op("Reshape", net.dense(x, 4, 12), net.ints(2, T, 4, 3)) for _ in range(3)
    )
    scores = net.op("Einsum", query, key, equation="bihd,bjhd->bhij", name=SUBJECT)
    y = net.op("Einsum", net.op("Softmax", scores, axis=-1), value, equation="bhij,bjhd->bihd")
    return net.dense(net.op("Reshape", y, net.ints(2, T, 12)), 12, 3)


def gated(net: Net, equation: str) -> str:
    """(2, 5, 12) times the sigmoid of its product with four 3 × 3 matrices, one for each part."""
    x = sequence(net, 12)
    operands = [net.op("Reshape", x, net.ints(2, T, 4, 3)), net.floats(4, 3, 3)]
    if equation.startswith("hij"):
        operands.reverse()
    gates = net.op("Einsum", *operands, equation=equation, name=SUBJECT)
    gates = net.op("Sigmoid", net.op("Reshape", gates, net.ints(2, T, 12)))
    return sequence_end(net, net.op("Mul", x, gates), 12)


@row("Einsum", "block-diagonal")
def _(net: Net) -> str:
    return gated(net, "blhi,hij->blhj")


@row("Einsum", "block-diagonal, the matrices first")
def _(net: Net) -> str:
    return gated(net, "hij,blhi->blhj")


def merged(net: Net, name: str | None = None) -> str:
    """(2, 5, 12): each product of 4 channels of one branch and 3 of another."""
    x, y = sequence(net, 4), sequence(net, 3)
    y = net.op("Einsum", x, y, equation="blh,blk->blhk")
    return net.op("Reshape", y, net.ints(2, T, 12), name=name)


@row("Reshape", "two axes merged")
def _(net: Net) -> str:
    return sequence_end(net, merged(net, SUBJECT), 12)


@row("Einsum", "diagonal, of the gates of a recurrent step")
def _(net: Net) -> str:
    h = net.op("Tanh", net.dense(net.input("x", [2, 4]), 4, 12))
    h = net.op("Reshape", h, net.ints(2, 4, 3))
    weight = net.floats(2, 4, 3, 3)
    gates = net.op("Einsum", h, weight, equation="bkd,gkde->bgke", name=SUBJECT)
    left, right = (
        net.op("Reshape", net.op("Gather", gates, net.ints(i), axis=1), net.ints(2, 12))
        for i in range(2)
    )
    return net.dense(net.op("Mul", left, net.op("Sigmoid", right)), 12, 3)


@row("Einsum", "blocks summed")
def _(net: Net) -> str:
    """As a graph convolution over several graphs: one matrix of positions for each part."""
    x = net.op("Reshape", sequence(net, 12), net.ints(2, T, 4, 3))
    y = net.op("Einsum", x, net.floats(4, T, 2), equation="blhi,hlm->bmi", name=SUBJECT)
    return sequence_end(net, y, 3)


@row("Einsum", "diagonal", freezes="UNSUPPORTED_FORM")
def _(net: Net) -> str:
    x = net.op("MatMul", net.op("Transpose", sequence(net), perm=[0, 2, 1]), net.floats(T, C))
    y = net.op("Einsum", x, equation="bii->bi", name=SUBJECT)
    return net.dense(net.op("Relu", net.dense(y, C, 6)), 6, 3)


# -- movement ----------------------------------------------------------------------------------


@row("Transpose", "NHWC island")
def _(net: Net) -> str:
    x = net.op("Transpose", image(net), perm=[0, 2, 3, 1], name=SUBJECT)
    y = net.op("Relu", net.dense(x, C, C))
    return image_end(net, net.op("Transpose", y, perm=[0, 3, 1, 2]))


@row("Transpose", "no perm reverses")
def _(net: Net) -> str:
    x = net.op("Transpose", net.dense(net.input("x", [2, 4]), 4, C), name=SUBJECT)  # (8, 2)
    y = net.op("MatMul", net.floats(6, C), x)
    return net.op("MatMul", net.floats(3, 6), net.op("Relu", y))


@row("Transpose", "of a weight")
def _(net: Net) -> str:
    weight = net.op("Transpose", net.floats(C, 4), perm=[1, 0], name=SUBJECT)
    return sequence_end(net, net.op("MatMul", net.input("x", [2, T, 4]), weight))


def _pooled(net: Net) -> str:
    return net.op("GlobalAveragePool", image(net))  # (2, 8, 1, 1)


@row("Squeeze", "axes input")
def _(net: Net) -> str:
    y = net.op("Squeeze", _pooled(net), net.ints(2, -1), name=SUBJECT)
    return net.dense(net.op("Relu", net.dense(y, C, 6)), 6, 3)


@row("Squeeze", "axes attribute", opset=11)
def _(net: Net) -> str:
    y = net.op("Squeeze", _pooled(net), axes=[2, 3], name=SUBJECT)
    return net.dense(net.op("Relu", net.dense(y, C, 6)), 6, 3)


@row("Squeeze", "every axis of size 1")
def _(net: Net) -> str:
    y = net.op("Squeeze", _pooled(net), name=SUBJECT)
    return net.dense(net.op("Relu", net.dense(y, C, 6)), 6, 3)


@row("Unsqueeze", "axes input")
def _(net: Net) -> str:
    y = net.op("Unsqueeze", net.dense(net.input("x", [2, 4]), 4, C), net.ints(-1, 2), name=SUBJECT)
    return image_end(net, y)


@row("Unsqueeze", "axes attribute", opset=11)
def _(net: Net) -> str:
    y = net.op("Unsqueeze", net.dense(net.input("x", [2, 4]), 4, C), axes=[2, 3], name=SUBJECT)
    return image_end(net, y)


@row("Unsqueeze", "of a constant")
def _(net: Net) -> str:
    scale = net.op("Unsqueeze", net.floats(C), net.ints(1, 2), name=SUBJECT)
    return image_end(net, net.op("Mul", image(net), scale))


def _flat(op: str, *more: Callable[[Net], str], **attributes: Any) -> Build:
    """image → flattening op → Gemm."""

    def build(net: Net) -> str:
        y = net.op(op, image(net), *(make(net) for make in more), name=SUBJECT, **attributes)
        return net.dense(net.op("Relu", net.dense(y, C * H * H, 6)), 6, 3)

    return build


rows(
    "Flatten",
    {
        "": _flat("Flatten"),
        "axis 1": _flat("Flatten", axis=1),
        "negative": _flat("Flatten", axis=-3),
    },
)


@row("Flatten", "batch and channels together")
def _(net: Net) -> str:
    y = net.op("Flatten", image(net), axis=2, name=SUBJECT)  # (2·8, 36)
    return image_end(net, net.op("Reshape", y, net.ints(2, C, H, H)))


rows(
    "Reshape",
    {
        "flatten, baked": _flat("Reshape", ints(2, C * H * H)),
        "flatten, -1": _flat("Reshape", ints(2, -1)),
        "flatten, 0 and -1": _flat("Reshape", ints(0, -1)),
        "flatten, batch -1": _flat("Reshape", ints(-1, C * H * H)),
    },
)
rows("Reshape", {"opset 5": _flat("Reshape", ints(2, C * H * H))}, opset=5 + 2)


@row("Reshape", "merges space")
def _(net: Net) -> str:
    y = net.op("Reshape", image(net), net.ints(2, C, H * H), name=SUBJECT)
    return image_end(net, y, rank=3)


@row("Reshape", "merges space, channels baked, batch copied")
def _(net: Net) -> str:
    y = net.op("Reshape", image(net), net.ints(0, C, -1), name=SUBJECT)
    return image_end(net, y, rank=3)


@row("Reshape", "allowzero", opset=14)
def _(net: Net) -> str:
    y = net.op("Reshape", image(net), net.ints(2, C, -1), allowzero=1, name=SUBJECT)
    return image_end(net, y, rank=3)


@row("Reshape", "shape from a Constant node")
def _(net: Net) -> str:
    y = net.op("Reshape", image(net), net.constant(np.array([2, C, H * H])), name=SUBJECT)
    return image_end(net, y, rank=3)


@row("Reshape", "splits into heads")
def _(net: Net) -> str:
    y = net.op("Reshape", sequence(net, 12), net.ints(2, T, 4, 3), name=SUBJECT)
    y = net.op("Einsum", y, net.floats(4, 3, 6), equation="bihd,hdn->bin")
    return net.dense(net.op("Relu", y), 6, 3)


@row("Reshape", "joins heads again")
def _(net: Net) -> str:
    y = net.op("Reshape", sequence(net, 12), net.ints(2, T, 4, 3))
    y = net.op("Reshape", net.op("Relu", y), net.ints(2, T, 12), name=SUBJECT)
    return sequence_end(net, y, 12)


@row("Reshape", "channel shuffle")
def _(net: Net) -> str:
    y = net.op("Reshape", image(net), net.ints(2, 2, C // 2, H, H))
    y = net.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    return image_end(net, net.op("Reshape", y, net.ints(2, C, H, H), name=SUBJECT))


def _size_of(net: Net, x: str, axis: int) -> str:
    return net.op("Gather", net.op("Shape", x), net.ints(axis), axis=0)


@row("Reshape", "computed from the tensor itself")
def _(net: Net) -> str:
    x = image(net)
    shape = net.op("Concat", _size_of(net, x, 0), _size_of(net, x, 1), net.ints(-1), axis=0)
    return image_end(net, net.op("Reshape", x, shape, name=SUBJECT), rank=3)


@row("Reshape", "computed batch, channels baked")
def _(net: Net) -> str:
    x = net.conv(net.input("x", ["N", 4, H, H]), 4, C)
    shape = net.op("Concat", _size_of(net, x, 0), net.ints(C), net.ints(-1), axis=0)
    return image_end(net, net.op("Reshape", x, shape, name=SUBJECT), rank=3)


@row("Reshape", "batch times channels")
def _(net: Net) -> str:
    x = net.conv(net.input("x", ["N", 4, H, H]), 4, C)
    first = net.op("Mul", _size_of(net, x, 0), net.ints(C))
    y = net.op("Reshape", x, net.op("Concat", first, net.ints(1, H, H), axis=0), name=SUBJECT)
    y = net.op("Relu", y)
    shape = net.op("Concat", _size_of(net, x, 0), net.ints(C, H, H), axis=0)
    return image_end(net, net.op("Reshape", y, shape))


@row("Expand", "over space")
def _(net: Net) -> str:
    y = net.op("Expand", _pooled(net), net.ints(2, C, H, H), name=SUBJECT)
    return image_end(net, y)


@row("Expand", "ones keep")
def _(net: Net) -> str:
    return image_end(net, net.op("Expand", _pooled(net), net.ints(1, H, 1), name=SUBJECT))


@row("Expand", "makes channels")
def _(net: Net) -> str:
    x = net.op("Expand", net.input("x", [2, 1, H, H]), net.ints(2, C, H, H), name=SUBJECT)
    return image_end(net, net.op("Relu", net.op("Mul", x, net.floats(C, 1, 1))))


@row("Expand", "a token to a symbolic batch")
def _(net: Net) -> str:
    x = net.dense(net.input("x", ["N", T, 4]), 4, C)
    shape = net.op("Concat", _size_of(net, x, 0), net.ints(1, C), axis=0)
    token = net.op("Expand", net.floats(1, 1, C), shape, name=SUBJECT)
    return sequence_end(net, net.op("Concat", token, x, axis=1))


@row("Expand", "shared keys of grouped queries")
def _(net: Net) -> str:
    x = net.input("x", [2, T, 4])
    heads = [net.op("Reshape", net.dense(x, 4, n * 3), net.ints(2, T, n, 3)) for n in (4, 2)]
    query, key = (net.op("Transpose", y, perm=[0, 2, 1, 3]) for y in heads)
    key = net.op("Unsqueeze", key, net.ints(2))  # (2, 2, 1, 5, 3)
    key = net.op("Expand", key, net.ints(2, 2, 2, T, 3), name=SUBJECT)
    key = net.op("Reshape", key, net.ints(2, 4, T, 3))
    y = net.op("Add", query, key)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(2, T, 12))
    return sequence_end(net, y, 12)


rows(
    "Tile",
    {
        "over space": on_image("Tile", ints(1, 1, 2, 1)),
        "channels": on_image("Tile", ints(1, 2, 1, 1), after=2 * C),
    },
)


@row("Tile", "repeats not known", freezes="UNKNOWN_SHAPE")
def _(net: Net) -> str:
    repeats = net.op("Concat", net.ints(1, 1, 1), net.input("n", [1], INT64), axis=0)
    return image_end(net, net.op("Tile", image(net), repeats, name=SUBJECT))


# -- indexing ----------------------------------------------------------------------------------


rows(
    "Slice",
    {
        "space": on_image("Slice", ints(1), ints(5), ints(2)),
        "space, backwards": on_image("Slice", ints(-1), ints(-(2**31)), ints(3), ints(-1)),
        "channels": on_image("Slice", ints(2), ints(8), ints(1), after=6),
        "channels, to the end": on_image("Slice", ints(-6), ints(2**62), ints(1), after=6),
        "every axis": on_image("Slice", ints(0, 1, 0, 0), ints(2, 7, 6, 6), after=6),
        "channels and space": on_image("Slice", ints(1, 0), ints(7, 4), ints(1, -1), after=6),
    },
)
rows("Slice", {"attributes": on_image("Slice", starts=[2], ends=[8], axes=[1], after=6)}, opset=9)
rows(
    "Slice",
    {
        "strided channels": on_image("Slice", ints(0), ints(8), ints(1), ints(2), after=4),
        "odd channels": on_image("Slice", ints(1), ints(2**62), ints(1), ints(2), after=4),
        "every third": on_image("Slice", ints(-7), ints(9), ints(1), ints(3), channels=9, after=3),
    },
)
rows(
    "Slice",
    {
        "strided channels from the middle": on_image(
            "Slice", ints(2), ints(8), ints(1), ints(2), after=3
        ),
        "strided channels, some left over": on_image(
            "Slice", ints(0), ints(7), ints(1), ints(3), after=3
        ),
    },
    freezes="UNSUPPORTED_FORM",
)


@row("Slice", "values and their gates in turn")
def _(net: Net) -> str:
    x, end, last, two = sequence(net), net.ints(2**62), net.ints(-1), net.ints(2)
    value = net.op("Slice", x, net.ints(0), end, last, two, name=SUBJECT)
    gate = net.op("Slice", x, net.ints(1), end, last, two)
    return sequence_end(net, net.op("Mul", value, net.op("Sigmoid", gate)), C // 2)


@row("Slice", "halves that meet again")
def _(net: Net) -> str:
    x = image(net)
    low = net.op("Slice", x, net.ints(0), net.ints(C // 2), net.ints(1), name=SUBJECT)
    high = net.op("Slice", x, net.ints(C // 2), net.ints(C), net.ints(1))
    return image_end(net, net.op("Mul", low, net.op("Sigmoid", high)), C // 2)


@row("Slice", "starts not known", freezes="INDEXED")
def _(net: Net) -> str:
    start = net.input("start", [1], INT64)
    y = net.op("Slice", image(net), start, net.ints(7), net.ints(1), name=SUBJECT)
    y = net.op("GlobalAveragePool", net.op("Transpose", y, perm=[0, 2, 1, 3]))
    return image_end(net, y, H)


def _split(sizes: Sequence[int], how: str, meet: bool = False) -> Build:
    def build(net: Net) -> str:
        x = image(net, 12)
        options: dict[str, Any] = {}
        operands = [x]
        if how == "input":
            operands.append(net.ints(*sizes))
        elif how == "attribute":
            options["split"] = list(sizes)
        elif how == "num_outputs":
            options["num_outputs"] = len(sizes)
        parts = net.ops("Split", *operands, outputs=len(sizes), axis=1, name=SUBJECT, **options)
        if meet:
            y = net.op("Mul", parts[0], net.op("Sigmoid", parts[1]))
            return image_end(net, y, sizes[0])
        ends = [net.conv(part, size, 3) for part, size in zip(parts, sizes, strict=True)]
        return net.op("Sum", *ends)

    return build


rows(
    "Split",
    {
        "sizes input": _split((6, 6), "input"),
        "uneven": _split((2, 7, 3), "input"),
        "gated": _split((6, 6), "input", meet=True),
    },
)
rows("Split", {"no sizes": _split((4, 4, 4), "")}, opset=13)
rows("Split", {"sizes attribute": _split((5, 7), "attribute")}, opset=11)
rows("Split", {"no sizes, opset 7": _split((6, 6), "")}, opset=7)
rows("Split", {"num_outputs": _split((6, 6), "num_outputs")}, opset=18)


@row("Split", "space")
def _(net: Net) -> str:
    top, bottom = net.ops("Split", image(net), net.ints(2, 4), outputs=2, axis=2, name=SUBJECT)
    return net.op("Concat", image_end(net, top), image_end(net, bottom), axis=2)


def _rows_of_data(net: Net, x: str) -> list[str]:
    """Two parts of an image, whose heights the data decide as far as a graph tells."""
    nothing = net.op("Mul", net.op("ReduceMax", x, keepdims=0), net.const(np.float32(0)))
    sizes = net.op("Add", net.ints(2, 4), net.op("Cast", nothing, to=INT64))
    return net.ops("Split", x, sizes, outputs=2, axis=2, name=SUBJECT)


@row("Split", "space, by sizes that the data decide")
def _(net: Net) -> str:
    top, bottom = _rows_of_data(net, image(net))
    ends = [net.op("ReduceMax", image_end(net, part), axes=[2]) for part in (top, bottom)]
    return net.op("Concat", *ends, axis=2)


@row("Split", "query, key and value in one matrix")
def _(net: Net) -> str:
    fused = sequence(net, 24)
    parts = net.ops("Split", fused, net.ints(8, 8, 8), outputs=3, axis=2, name=SUBJECT)
    query, key, value = (
        net.op("Transpose", net.op("Reshape", y, net.ints(2, T, 4, 2)), perm=[0, 2, 1, 3])
        for y in parts
    )
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 1, 3, 2]))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), value)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(2, T, 8))
    return net.dense(y, 8, 3)


@row("Concat", "two branches")
def _(net: Net) -> str:
    y = net.op("Concat", image(net), image(net, 6), axis=1, name=SUBJECT)
    return image_end(net, y, C + 6)


@row("Concat", "negative axis, one branch twice")
def _(net: Net) -> str:
    x = image(net)
    y = net.op("Concat", x, net.op("Neg", x), axis=-3, name=SUBJECT)
    return image_end(net, y, 2 * C)


@row("Concat", "space")
def _(net: Net) -> str:
    x = image(net)
    return image_end(net, net.op("Concat", x, net.op("Relu", image(net)), axis=2, name=SUBJECT))


@row("Concat", "space, of sizes that the data decide")
def _(net: Net) -> str:
    parts = _rows_of_data(net, image(net))
    net.nodes[-1].name = "split"
    return image_end(
        net, net.op("Concat", *[net.op("Relu", part) for part in parts], axis=2, name=SUBJECT)
    )


@row("Concat", "with the input")
def _(net: Net) -> str:
    y = net.op("Concat", image(net), net.input("coordinates", [2, 2, H, H]), axis=1, name=SUBJECT)
    return image_end(net, y, C + 2)


@row("Concat", "with a constant")
def _(net: Net) -> str:
    y = net.op("Concat", image(net), net.floats(2, 2, H, H), axis=1, name=SUBJECT)
    return image_end(net, y, C + 2)


@row("Concat", "a token before a sequence")
def _(net: Net) -> str:
    y = net.op("Concat", net.floats(2, 1, C), sequence(net), axis=1, name=SUBJECT)
    return sequence_end(net, y)


@row("Concat", "opset 7", opset=7)
def _(net: Net) -> str:
    y = net.op("Concat", image(net), image(net, 6), axis=1, name=SUBJECT)
    return image_end(net, y, C + 6)


rows(
    "Gather",
    {
        "channels": on_image("Gather", ints(3, 0, 5, 6, 1), axis=1, after=5),
        "channels, repeated": on_image("Gather", ints(3, 0, 3, -1, 1, 7), axis=1, after=6),
        "space": on_image("Gather", ints(0, 2, 5), axis=2),
    },
)


@row("Gather", "channels as a matrix of indices")
def _(net: Net) -> str:
    indices = net.const(np.arange(C).reshape(4, 2)[:, ::-1].copy())
    y = net.op("Gather", image(net), indices, axis=1, name=SUBJECT)  # (2, 4, 2, 6, 6)
    return image_end(net, net.op("Reshape", y, net.ints(2, C, H, H)))


@row("Gather", "one token")
def _(net: Net) -> str:
    y = net.op("Gather", sequence(net), net.const(np.array(0)), axis=1, name=SUBJECT)
    return net.dense(net.op("Relu", net.dense(y, C, 6)), 6, 3)


@row("Gather", "an embedding")
def _(net: Net) -> str:
    tokens = net.input("tokens", [2, T], INT64)
    return sequence_end(net, net.op("Gather", net.floats(11, C), tokens, name=SUBJECT))


@row("Gather", "one of a fused triple")
def _(net: Net) -> str:
    y = net.op("Reshape", sequence(net, 24), net.ints(2, T, 3, C))
    y = net.op("Transpose", y, perm=[2, 0, 1, 3])
    parts = [
        net.op("Gather", y, net.const(np.array(i)), axis=0, name=SUBJECT if i == 0 else None)
        for i in range(3)
    ]
    return sequence_end(net, net.op("Sum", *parts))


@row("Gather", "one channel by its position", carries=False)
def _(net: Net) -> str:
    y = net.op("Gather", sequence(net), net.const(np.array(3)), axis=2, name=SUBJECT)  # (2, 5)
    return net.dense(net.op("Relu", net.dense(y, T, 6)), 6, 3)


@row("Gather", "channels by data", freezes="INDEXED")
def _(net: Net) -> str:
    indices = net.input("indices", [4], INT64)
    y = net.op("Gather", image(net), indices, axis=1, name=SUBJECT)
    return image_end(net, y, 4)


rows(
    "Pad",
    {
        "space": on_image("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1)),
        "space, reflected": on_image("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
        "channels": on_image("Pad", ints(0, 2, 0, 0, 0, 3, 0, 0), after=C + 5),
        "channels, other value": on_image(
            "Pad", ints(0, 2, 0, 0, 0, 3, 0, 0), scalar(0.5), after=C + 5
        ),
    },
)
rows("Pad", {"attribute": on_image("Pad", pads=[0, 2, 0, 0, 0, 2, 0, 0], after=C + 4)}, opset=10)
rows("Pad", {"axes": on_image("Pad", ints(1, 2, 1, 2), absent, ints(3, 1), after=C + 4)}, opset=18)
rows(
    "Pad",
    {
        "channels, reflected": on_image(
            "Pad", ints(0, 2, 0, 0, 0, 3, 0, 0), mode="reflect", after=C + 5
        )
    },
    freezes="UNSUPPORTED_FORM",
)


@row("Pad", "shortcut of a wider block")
def _(net: Net) -> str:
    x = image(net)
    shortcut = net.op("Pad", x, net.ints(0, 2, 0, 0, 0, 2, 0, 0), name=SUBJECT)
    return image_end(net, net.op("Add", shortcut, net.conv(net.op("Relu", x), C, C + 4)), C + 4)


# -- reductions --------------------------------------------------------------------------------

_EXACT = ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
_INEXACT = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp")


def _reduce(op: str, axes: Sequence[int], keep: int, how: str) -> Build:
    """image → [positive] → reduction over `axes` → what is left is consumed along channels."""

    def build(net: Net) -> str:
        x = _positive(net, image(net))
        x = net.op("Mul", x, net.const(np.float32(0.7)))
        y = _reduction(net, op, x, axes, keep, how)
        across = 1 in axes
        if across and not keep:
            y = (
                net.op("Unsqueeze", y, net.ints(1))
                if net.opset >= 13
                else net.op("Unsqueeze", y, axes=[1])
            )
        elif not keep:
            y = (
                net.op("Unsqueeze", y, net.ints(*axes))
                if net.opset >= 13
                else net.op("Unsqueeze", y, axes=list(axes))
            )
        if across:
            return image_end(net, net.op("Mul", net.conv(x, C, 6), y), 6)
        return image_end(net, y)

    return build


def _reduction(net: Net, op: str, x: str, axes: Sequence[int], keep: int, how: str) -> str:
    if how == "input":
        return net.op(op, x, net.ints(*axes), keepdims=keep, name=SUBJECT)
    return net.op(op, x, axes=list(axes), keepdims=keep, name=SUBJECT)


for _op in _EXACT + _INEXACT:
    _how, _opset = ("input", 13) if _op == "ReduceSum" else ("input", 18)
    rows(_op, {"space": _reduce(_op, (2, 3), 1, _how)}, opset=_opset)
    rows(_op, {"space, axes dropped": _reduce(_op, (-2, -1), 0, "attribute")}, opset=11)
    rows(
        _op,
        {
            "channels": _reduce(_op, (1,), 1, _how),
            "channels, axis dropped": _reduce(_op, (1,), 0, _how),
        },
        opset=_opset,
        exact=_op in _EXACT,
    )


@row("ReduceMean", "everything", exact=False)
def _(net: Net) -> str:
    x = image(net)
    mean = net.op("ReduceMean", x, keepdims=1, name=SUBJECT)
    return image_end(net, net.op("Mul", net.conv(x, C, 6), mean), 6)


rows("ReduceMean", {"over space, of any sign": on_image("ReduceMean", axes=[2, 3], keepdims=1)})


@row("ReduceSum", "empty axes and no operation", opset=18)
def _(net: Net) -> str:
    return image_end(net, net.op("ReduceSum", image(net), noop_with_empty_axes=1, name=SUBJECT))


def _softmax(op: str, axis: int | None, opset: int, exact: bool, form: str) -> None:
    options = {} if axis is None else {"axis": axis}
    rows(op, {form: on_image(op, **options)}, opset=opset, exact=exact)


@row("Softmax", "of every head")
def _(net: Net) -> str:
    """A kernel for each head and token, as ConvBERT's: whole heads go, and each is as it was."""
    kernels = net.op("Reshape", sequence(net, 12), net.ints(-1, 3))  # (2 · T · 4, 3)
    y = net.op("Softmax", kernels, axis=1, name=SUBJECT)
    return sequence_end(net, net.op("Reshape", y, net.ints(2, T, 12)), 12)


for _op in ("Softmax", "LogSoftmax", "Hardmax"):
    _softmax(_op, -1, 13, True, "space")
    _softmax(_op, None, 13, True, "default axis")
    _softmax(_op, 1, 13, False, "channels")
    _softmax(_op, 1, 11, False, "from channels on, opset 11")
    _softmax(_op, 3, 11, True, "last axis, opset 11")


def _position(op: str, axis: int, keep: int) -> Build:
    """image → positions of the extreme along `axis` → floats → consumed."""

    def build(net: Net) -> str:
        y = net.op(op, image(net), axis=axis, keepdims=keep, name=SUBJECT)
        y = net.op("Cast", y, to=TensorProto.FLOAT)
        return image_end(net, y, 1 if axis == 1 else C, rank=3 + keep)

    return build


for _op in ("ArgMax", "ArgMin"):
    rows(_op, {"space": _position(_op, 2, 1), "space, axis dropped": _position(_op, -1, 0)})
    rows(_op, {"channels": _position(_op, 1, 1)}, freezes="INDEXED")


@row("TopK", "space")
def _(net: Net) -> str:
    values, places = net.ops("TopK", image(net), net.ints(2), outputs=2, axis=-1, name=SUBJECT)
    y = net.op("Add", values, net.op("Cast", places, to=TensorProto.FLOAT))
    return image_end(net, y)


@row("TopK", "channels", exact=False)
def _(net: Net) -> str:
    values, _ = net.ops("TopK", image(net), net.ints(3), outputs=2, axis=1, name=SUBJECT)
    return image_end(net, values, 3)


@row("TopK", "channels, by number", freezes="INDEXED")
def _(net: Net) -> str:
    values, places = net.ops("TopK", image(net), net.ints(3), outputs=2, axis=1, name=SUBJECT)
    numbers = net.op("Cast", net.op("Add", places, scalar(1, np.int64)(net)), to=TensorProto.FLOAT)
    return image_end(net, net.op("Add", values, numbers), 3)


@row("TopK", "as many channels as data say", freezes="INDEXED")
def _(net: Net) -> str:
    count = net.input("k", [1], INT64)
    values, _ = net.ops("TopK", image(net), count, outputs=2, axis=1, name=SUBJECT)
    return image_end(net, net.op("ReduceMax", values, axes=[1], keepdims=1), 1)


rows("CumSum", {"space": on_image("CumSum", scalar(2, np.int64))})
rows("CumSum", {"channels": on_image("CumSum", scalar(1, np.int64))}, freezes="ORDERED")


# -- normalisations ----------------------------------------------------------------------------


def _per_channel(channels: int = C) -> list[Callable[[Net], str]]:
    return [vector(channels, low=0.5), vector(channels)]


def _statistics() -> list[Callable[[Net], str]]:
    return [*_per_channel(), vector(C), vector(C, low=0.5)]


rows("BatchNormalization", {"": on_image("BatchNormalization", *_statistics())})
rows("BatchNormalization", {"opset 7": on_image("BatchNormalization", *_statistics())}, opset=7)
rows("BatchNormalization", {"rank 3": on_image("BatchNormalization", *_statistics(), rank=3)})
rows("InstanceNormalization", {"": on_image("InstanceNormalization", *_per_channel())})


@row("BatchNormalization", "rank 2")
def _(net: Net) -> str:
    x = net.dense(net.input("x", [2, 4]), 4, C)
    y = net.op("BatchNormalization", x, *(make(net) for make in _statistics()), name=SUBJECT)
    return net.dense(net.op("Relu", y), C, 3)


rows(
    "LayerNormalization",
    {
        "": on_sequence("LayerNormalization", vector(C, low=0.5), vector(C)),
        "no bias": on_sequence("LayerNormalization", vector(C, low=0.5), axis=2),
        "over tokens too": on_sequence(
            "LayerNormalization", vector(T, C, low=0.5), vector(T, C), axis=1
        ),
    },
    exact=False,
)
rows(
    "RMSNormalization",
    {"": on_sequence("RMSNormalization", vector(C, low=0.5))},
    opset=23,
    exact=False,
)
rows(
    "SimplifiedLayerNormalization",
    {"": on_sequence("SimplifiedLayerNormalization", vector(C, low=0.5))},
    exact=False,
)


@row("LayerNormalization", "over space only")
def _(net: Net) -> str:
    x = image(net)
    y = net.op("LayerNormalization", x, net.floats(H, low=0.5), net.floats(H), name=SUBJECT)
    return image_end(net, y)


rows(
    "GroupNormalization",
    {"one scale per group": on_image("GroupNormalization", *_per_channel(4), num_groups=4)},
    opset=18,
)
rows(
    "GroupNormalization",
    {"one scale per channel": on_image("GroupNormalization", *_per_channel(), num_groups=4)},
    opset=21,
)
rows(
    "GroupNormalization",
    {"each channel alone": on_image("GroupNormalization", *_per_channel(), num_groups=C)},
    opset=21,
)
rows("MeanVarianceNormalization", {"": on_image("MeanVarianceNormalization")}, opset=13)
rows(
    "MeanVarianceNormalization",
    {"across channels": on_image("MeanVarianceNormalization", axes=[1, 2, 3])},
    opset=13,
    exact=False,
)
rows(
    "LpNormalization",
    {
        "space": on_image("LpNormalization", axis=3),
        "channels": on_image("LpNormalization", axis=1, p=1),
    },
)
rows("LpNormalization", {"last axis": on_sequence("LpNormalization")})
rows("LRN", {"": on_image("LRN", size=3)}, exact=False)


# -- space -------------------------------------------------------------------------------------

_WINDOW = {"kernel_shape": [2, 2], "strides": [2, 2]}
for _op in ("AveragePool", "MaxPool", "LpPool"):
    rows(_op, {"": on_image(_op, **_WINDOW), "1-D": on_image(_op, rank=3, kernel_shape=[2])})


def _over_channels(
    op: str, after: int, padding: tuple[int, int] = (0, 0), channels: int = C, **attributes: Any
) -> Build:
    """Windows that slide over channels, which lie along the first axis in space."""

    def build(net: Net) -> str:
        x = net.op("Unsqueeze", image(net, channels), net.ints(1))  # (2, 1, channels, 6, 6)
        if any(padding):
            front, back = padding
            x = net.op("Pad", x, net.ints(0, 0, front, 0, 0, 0, 0, back, 0, 0))
        y = net.op(op, x, name=SUBJECT, **attributes)
        return image_end(net, net.op("Squeeze", y, net.ints(1)), after)

    return build


for _op in ("AveragePool", "MaxPool", "LpPool"):
    _three = {"kernel_shape": [3, 1, 1]}
    _each = {
        "neighbours": _over_channels(_op, C, **_three, auto_pad="SAME_UPPER"),
        "neighbours, padded before": _over_channels(_op, C, (1, 1), **_three),
        "neighbours on one side": _over_channels(_op, C, (2, 0), **_three),
    }
    rows(_op, _each, exact=False)
    _ends = {"kernel_shape": [2, 1, 1], "strides": [2, 1, 1]}
    rows(_op, {"windows of channels": _over_channels(_op, C // 2, **_ends)})
    _moved = {"kernel_shape": [3, 1, 1], "strides": [3, 1, 1], "pads": [1, 0, 0, 0, 0, 0]}
    _fewer = {
        "fewer windows than channels": _over_channels(_op, C - 2, **_three),
        "windows that begin before the channels": _over_channels(_op, 3, (0, 0), 9, **_moved),
    }
    rows(_op, _fewer, freezes="SPATIAL")


def _less_pooled(op: str) -> Build:
    """A sequence's channels, seen as space: what a mean over them is to some exporters."""

    def build(net: Net) -> str:
        x = sequence(net)
        return sequence_end(net, net.op("Sub", x, net.op(op, x, name=SUBJECT)))

    return build


for _op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
    rows(_op, {"": on_image(_op)})
    rows(_op, {"last of three axes": _less_pooled(_op)}, exact=_op == "GlobalLpPool")


@row("MaxPool", "with positions", freezes="INDEXED")
def _(net: Net) -> str:
    y, places = net.ops("MaxPool", image(net), outputs=2, name=SUBJECT, **_WINDOW)
    return image_end(net, net.op("Add", y, net.op("Cast", places, to=TensorProto.FLOAT)))


rows(
    "Resize",
    {
        "scales": on_image(
            "Resize", absent, lambda net: net.const(np.float32([1, 1, 2, 2])), mode="nearest"
        ),
        "sizes": on_image("Resize", absent, absent, ints(2, C, 9, 9), mode="linear"),
    },
)
rows(
    "Resize",
    {"opset 10": on_image("Resize", lambda net: net.const(np.float32([1, 1, 2, 2])))},
    opset=10,
)
rows(
    "Resize",
    {"sizes of some axes": on_image("Resize", absent, absent, ints(9, 9), axes=[2, 3])},
    opset=18,
)
rows(
    "Resize",
    {
        "channels among the axes": on_image(
            "Resize", absent, absent, ints(9, C), axes=[2, 1], mode="nearest"
        )
    },
    opset=18,
)
rows(
    "Resize",
    {
        "channels": on_image(
            "Resize",
            absent,
            lambda net: net.const(np.float32([1, 2, 1, 1])),
            mode="nearest",
            after=2 * C,
        )
    },
    freezes="SPATIAL",
)
rows(
    "Upsample",
    {"scales input": on_image("Upsample", lambda net: net.const(np.float32([1, 1, 2, 2])))},
    opset=9,
)
rows("Upsample", {"scales attribute": on_image("Upsample", scales=[1.0, 1.0, 2.0, 2.0])}, opset=7)
rows(
    "DepthToSpace",
    {
        "DCR": on_image("DepthToSpace", blocksize=2, channels=16, after=4),
        "CRD": on_image("DepthToSpace", blocksize=2, mode="CRD", channels=16, after=4),
    },
)
rows("SpaceToDepth", {"": on_image("SpaceToDepth", blocksize=2, after=4 * C)})


@row("GridSample", opset=16)
def _(net: Net) -> str:
    grid = net.op("Tanh", net.input("grid", [2, 3, 3, 2]))
    return image_end(net, net.op("GridSample", image(net), grid, name=SUBJECT))


@row("RoiAlign", opset=16)
def _(net: Net) -> str:
    regions = net.const(np.float32([[0, 0, 4, 4], [1, 1, 5, 5], [0, 2, 3, 5]]))
    which = net.const(np.array([0, 1, 0]))
    options = {"output_height": 2, "output_width": 2, "sampling_ratio": 2}
    return image_end(net, net.op("RoiAlign", image(net), regions, which, name=SUBJECT, **options))


# -- recurrent ---------------------------------------------------------------------------------

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def _recurrent(op: str, directions: int = 1, states: bool = False, **options: Any) -> Build:
    """sequence → recurrent layer → its last state and all of its states are consumed."""

    def build(net: Net) -> str:
        rows = _GATES[op] * C
        x = net.op("Transpose", sequence(net, 6), perm=[1, 0, 2])  # (5, 2, 6)
        operands = [x, net.floats(directions, rows, 6), net.floats(directions, rows, C)]
        if states:
            operands += [net.floats(directions, 2 * rows), "", net.floats(directions, 2, C)]
        if states and op == "LSTM":
            operands += [net.floats(directions, 2, C), net.floats(directions, 3 * C)]
        options["direction"] = "bidirectional" if directions == 2 else "forward"
        every, last = net.ops(op, *operands, outputs=2, name=SUBJECT, hidden_size=C, **options)
        ends = [net.dense(net.op("Tanh", y), C, 3) for y in (every, last)]
        return net.op("Add", *ends)

    return build


for _op in _GATES:
    rows(
        _op,
        {
            "": _recurrent(_op),
            "states and biases": _recurrent(_op, states=True),
            "both directions": _recurrent(_op, 2),
        },
    )
rows("GRU", {"linear before reset": _recurrent("GRU", states=True, linear_before_reset=1)})

# -- what ONNX Runtime's optimizers emit -------------------------------------------------------

MS = "com.microsoft"

rows("Gelu", {"contrib": on_image("Gelu", domain=MS)}, domain=MS)
rows("QuickGelu", {"": on_image("QuickGelu", domain=MS)}, domain=MS)
rows("FastGelu", {"bias": on_sequence("FastGelu", vector(C), domain=MS)}, domain=MS)
rows("BiasGelu", {"": on_sequence("BiasGelu", vector(C), domain=MS)}, domain=MS)
for _op, _more in (("SkipLayerNormalization", 2), ("SkipSimplifiedLayerNormalization", 1)):
    rows(
        _op,
        {"": on_sequence(_op, sequence, *[vector(C, low=0.5)] * _more, domain=MS)},
        domain=MS,
        exact=False,
    )
rows(
    "FusedMatMul",
    {
        "transB": on_sequence(
            "FusedMatMul", vector(12, C), after=12, domain=MS, transB=1, alpha=0.5
        ),
        "plain": on_sequence("FusedMatMul", vector(C, 12), after=12, domain=MS),
    },
    domain=MS,
)
rows(
    "TransposeMatMul",
    {"": on_sequence("TransposeMatMul", vector(12, C), after=12, domain=MS, transB=1)},
    domain=MS,
)


@row("FusedGemm", domain=MS)
def _(net: Net) -> str:
    x = net.op("Gemm", net.input("x", [2, 4]), net.floats(4, C), net.floats(C))
    operands = (x, net.floats(12, C), net.floats(12))
    y = net.op("FusedGemm", *operands, transB=1, activation="Relu", domain=MS, name=SUBJECT)
    return net.op("Gemm", y, net.floats(12, 3), net.floats(3))


@row("FusedConv", domain=MS)
def _(net: Net) -> str:
    operands = (image(net), net.floats(12, C, 1, 1), net.floats(12))
    y = net.op("FusedConv", *operands, activation="Relu", domain=MS, name=SUBJECT)
    return image_end(net, y, 12)


def _projections(net: Net, *heads: int, size: int = 8) -> list[str]:
    x = net.input("x", [2, T, 4])
    return [net.dense(x, 4, count * size) for count in heads]


Added = Callable[[Net], str]  # to the scores of heads


def _each_head(net: Net) -> str:
    """A constant for each head."""
    return net.floats(1, 4, T, T)


def _by_table(net: Net) -> str:
    """For each head what a table has for a distance between positions; of rank 3."""
    places = net.const(np.abs(np.arange(T)[:, None] - np.arange(T)))
    return net.op("Transpose", net.op("Gather", net.floats(T, 4), places), perm=[2, 0, 1])


def _all_alike(net: Net) -> str:
    """One mask of all heads."""
    return net.floats(1, 1, T, T)


def _cache(net: Net) -> str:
    """Of keys, or of values."""
    return net.input(net.name("past"), [2, 4, 3, 8])


def _multi_head(added: Added | None = None, past: Added | None = None) -> Build:
    def build(net: Net) -> str:
        extra = ["", "", added(net) if added else ""]
        extra += [past(net), past(net)] if past else []
        operands = [*_projections(net, 4, 4, 4), *extra]
        options = {"outputs": 3 if past else 1, "num_heads": 4, "domain": MS, "name": SUBJECT}
        return sequence_end(net, net.ops("MultiHeadAttention", *operands, **options)[0], 32)

    return build


def _packed(added: Added | None = None, past: bool = False, present: bool = False) -> Build:
    def build(net: Net) -> str:
        operands = [sequence(net), net.floats(C, 96), net.floats(96), ""]
        operands += [net.input("past", [2, 2, 4, 3, 8]) if past else ""]
        operands += [net.op("Unsqueeze", added(net), net.ints(0))] if added else []
        options = {"num_heads": 4, "unidirectional": 1, "domain": MS}
        y, *more = net.ops("Attention", *operands, outputs=1 + present, name=SUBJECT, **options)
        for one in more:
            net.output(one)
        return net.dense(y, 32, 3)

    return build


def _grouped_queries(added: Added | None = None, sink: bool = False) -> Build:
    def build(net: Net) -> str:
        lengths, total = net.const(np.full(2, T - 1, np.int32)), net.const(np.array(T, np.int32))
        operands = [*_projections(net, 4, 2, 2), "", "", lengths, total]
        if added or sink:
            operands += ["", "", "", added(net) if added else ""]
        operands += [net.floats(4)] if sink else []
        options = {"num_heads": 4, "kv_num_heads": 2, "domain": MS}
        y, *_ = net.ops("GroupQueryAttention", *operands, outputs=3, name=SUBJECT, **options)
        return net.dense(y, 32, 3)

    return build


def _standard(added: Added | None = None, outputs: int = 1) -> Build:
    def build(net: Net) -> str:
        operands = [*_projections(net, 4, 2, 2), *([added(net)] if added else [])]
        options = {"q_num_heads": 4, "kv_num_heads": 2}
        y, *more = net.ops("Attention", *operands, outputs=outputs, name=SUBJECT, **options)
        if more:  # the scores of the heads, as an output that adds them up
            total = net.op("ReduceSum", more[-1], net.ints(1), keepdims=0)
            y = net.op("Add", y, net.dense(total, T, 32))
        return net.dense(y, 32, 3)

    return build


rows(
    "MultiHeadAttention",
    {
        "": _multi_head(),
        "a bias for each head": _multi_head(_each_head),
        "one mask": _multi_head(_all_alike),
    },
    domain=MS,
)
rows(
    "MultiHeadAttention",
    {"past states": _multi_head(past=_cache)},
    domain=MS,
    freezes="BARE_AXIS",
)
rows(
    "Attention",
    {"packed": _packed(), "packed, a bias by table": _packed(_by_table)},
    domain=MS,
)
rows(
    "Attention",
    {
        "packed, past and present states": _packed(past=True, present=True),
        "packed, present states": _packed(present=True),
    },
    domain=MS,
    carries=False,  # heads stay; what they read may go
)
rows(
    "GroupQueryAttention",
    {
        "": _grouped_queries(),
        "a bias for each head": _grouped_queries(_each_head),
        "sinks": _grouped_queries(sink=True),
    },
    domain=MS,
)
rows(
    "Attention",
    {
        "grouped queries": _standard(),
        "a bias for each head": _standard(_each_head),
        "a bias by table": _standard(_by_table),
        "one mask": _standard(_all_alike),
        "scores": _standard(outputs=4),
    },
    opset=23,
)


def _rotary(domain: str) -> Build:
    def build(net: Net) -> str:
        (x,) = _projections(net, 4)
        angles = net.draw.random((T, 4))
        places = net.const(np.tile(np.arange(T), (2, 1)))
        waves = [net.const(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
        operands = [x, places, *waves] if domain else [x, *waves, places]
        y = net.op("RotaryEmbedding", *operands, num_heads=4, domain=domain, name=SUBJECT)
        return net.dense(y, 32, 3)

    return build


rows("RotaryEmbedding", {"": _rotary("")}, opset=23)
rows("RotaryEmbedding", {"contrib": _rotary(MS)}, domain=MS)


@row("EmbedLayerNormalization", domain=MS, exact=False)
def _(net: Net) -> str:
    ids = [net.op("Cast", net.input(n, [2, T], INT64), to=TensorProto.INT32) for n in "ts"]
    tables = [net.floats(rows, C) for rows in (11, T, 2)]
    operands = [*ids, *tables, net.floats(C, low=0.5), net.floats(C)]
    y, _ = net.ops("EmbedLayerNormalization", *operands, outputs=2, domain=MS, name=SUBJECT)
    return sequence_end(net, y)


# -- quantised ---------------------------------------------------------------------------------


def _bytes(net: Net, *shape: int) -> str:
    return net.const(net.draw.integers(-60, 60, shape).astype(np.int8))


def _step(net: Net, size: float = 0.05) -> list[str]:
    """A scale and a zero point."""
    return [net.const(np.float32(size)), net.const(np.uint8(128))]


def _steps(net: Net, count: int) -> list[str]:
    """Scales and zero points of a weight's channels."""
    scales = (0.01 + 0.001 * np.arange(count)).astype(np.float32)
    return [net.const(scales), net.const(np.zeros(count, np.int8))]


def _quantised(net: Net, x: str) -> list[str]:
    step = _step(net)
    return [net.op("QuantizeLinear", x, *step), *step]


@row("QLinearConv")
def _(net: Net) -> str:
    x, out = _quantised(net, image(net)), _step(net)
    y = net.op("QLinearConv", *x, _bytes(net, 12, C, 1, 1), *_steps(net, 12), *out, name=SUBJECT)
    return image_end(net, net.op("DequantizeLinear", y, *out), 12)


@row("ConvInteger")
def _(net: Net) -> str:
    x, _, zero = _quantised(net, image(net))
    y = net.op("ConvInteger", x, _bytes(net, 12, C, 1, 1), zero, name=SUBJECT)
    y = net.op("Mul", net.op("Cast", y, to=TensorProto.FLOAT), net.const(np.float32(1e-3)))
    return image_end(net, y, 12)


@row("QLinearMatMul")
def _(net: Net) -> str:
    x, out = _quantised(net, sequence(net)), _step(net)
    step = [net.const(np.float32(0.01)), net.const(np.int8(0))]
    y = net.op("QLinearMatMul", *x, _bytes(net, C, 12), *step, *out, name=SUBJECT)
    return sequence_end(net, net.op("DequantizeLinear", y, *out), 12)


@row("MatMulInteger")
def _(net: Net) -> str:
    x, _, zero = _quantised(net, sequence(net))
    y = net.op("MatMulInteger", x, _bytes(net, C, 12), zero, name=SUBJECT)
    y = net.op("Mul", net.op("Cast", y, to=TensorProto.FLOAT), net.const(np.float32(1e-3)))
    return sequence_end(net, y, 12)


for _op in ("QLinearAdd", "QLinearMul"):

    @row(_op, domain=MS)
    def _(net: Net, op: str = _op) -> str:
        a, b, out = _quantised(net, image(net)), _quantised(net, image(net)), _step(net)
        y = net.op(op, *a, *b, *out, domain=MS, name=SUBJECT)
        return image_end(net, net.op("DequantizeLinear", y, *out))


for _op in ("QLinearLeakyRelu", "QLinearSigmoid", "QLinearAveragePool", "QLinearGlobalAveragePool"):

    @row(_op, domain=MS)
    def _(net: Net, op: str = _op) -> str:
        x, out = _quantised(net, image(net)), _step(net)
        options = {"kernel_shape": [2, 2]} if op == "QLinearAveragePool" else {}
        y = net.op(op, *x, *out, domain=MS, name=SUBJECT, **options)
        return image_end(net, net.op("DequantizeLinear", y, *out))


@row("QGemm", domain=MS)
def _(net: Net) -> str:
    x = _quantised(net, net.dense(net.input("x", [2, 4]), 4, C))
    step = [net.const(np.float32(0.01)), net.const(np.int8(0))]
    y = net.op("QGemm", *x, _bytes(net, C, 12), *step, domain=MS, name=SUBJECT)
    return net.dense(net.op("Relu", y), 12, 3)


@row("MatMulIntegerToFloat", domain=MS)
def _(net: Net) -> str:
    x, scale, zero = _quantised(net, sequence(net))
    weight = (_bytes(net, C, 12), scale, net.const(np.float32(0.01)), zero)
    return sequence_end(
        net, net.op("MatMulIntegerToFloat", x, *weight, domain=MS, name=SUBJECT), 12
    )


@row("QAttention", domain=MS)
def _(net: Net) -> str:
    x, scale, zero = _quantised(net, sequence(net))
    step = [net.const(np.float32(0.01)), net.const(np.int8(0))]
    operands = (x, _bytes(net, C, 96), net.floats(96), scale, step[0], "", zero, step[1])
    y = net.op("QAttention", *operands, num_heads=4, domain=MS, name=SUBJECT)
    return net.dense(y, 32, 3)


@row("QEmbedLayerNormalization", domain=MS, exact=False)
def _(net: Net) -> str:
    ids = [net.op("Cast", net.input(n, [2, T], INT64), to=TensorProto.INT32) for n in "ts"]
    shapes = ((11, C), (T, C), (2, C), (C,), (C,))
    tables = [net.const(net.draw.integers(90, 160, shape).astype(np.uint8)) for shape in shapes]
    steps = [_step(net, 0.02) for _ in shapes]
    operands = [*ids, *tables, "", *(s for s, _ in steps), *(z for _, z in steps)]
    y, _ = net.ops("QEmbedLayerNormalization", *operands, outputs=2, domain=MS, name=SUBJECT)
    return sequence_end(net, y)


@row("QLinearConcat", domain=MS)
def _(net: Net) -> str:
    a, b, out = _quantised(net, image(net)), _quantised(net, image(net, 12)), _step(net, 0.06)
    y = net.op("QLinearConcat", *out, *a, *b, axis=1, domain=MS, name=SUBJECT)
    return image_end(net, net.op("DequantizeLinear", y, *out), C + 12)


@row("QLinearWhere", domain=MS)
def _(net: Net) -> str:
    which = net.op("Greater", net.input("w", [2, 1, H, H]), net.const(np.float32(0)))
    a, b, out = _quantised(net, image(net)), _quantised(net, image(net)), _step(net)
    y = net.op("QLinearWhere", which, *a, *b, *out, domain=MS, name=SUBJECT)
    return image_end(net, net.op("DequantizeLinear", y, *out))


for _form, _axis, _exact in (("another axis", 1, True), ("channels", -1, False)):

    @row("QLinearSoftmax", _form, domain=MS, exact=_exact)
    def _(net: Net, axis: int = _axis) -> str:
        x, out = _quantised(net, sequence(net)), _step(net, 1 / 256)
        options = {"axis": axis, "opset": 13, "domain": MS}
        y = net.op("QLinearSoftmax", *x, *out, name=SUBJECT, **options)
        return sequence_end(net, net.op("DequantizeLinear", y, *out))


for _op in ("QuantizeLinear", "DequantizeLinear"):

    @row(_op, "contrib, 16 bits", domain=MS)
    def _(net: Net, op: str = _op) -> str:
        step = [net.const(np.full(C, 1e-3, np.float32)), net.const(np.full(C, 9, np.int16))]
        y = image(net)
        for kind in ("QuantizeLinear", "DequantizeLinear"):
            y = net.op(kind, y, *step, axis=1, domain=MS, name=SUBJECT if kind == op else None)
        return image_end(net, y)


def _n_bits(bits: int, *, flat: bool = False, zeros: bool = False, inner: int = 64) -> Build:
    """48 columns over blocks of 16 numbers that share a scale."""

    def build(net: Net) -> str:
        blocks, wide = inner // 16, 16 * bits // 8
        packed = net.const(net.draw.integers(0, 256, (48, blocks, wide)).astype(np.uint8))
        scales = (0.01 + 0.01 * net.draw.random((48, blocks))).astype(np.float32)
        operands = [sequence(net, inner), packed, net.const(scales.reshape(-1) if flat else scales)]
        if zeros:
            count = -(-blocks * bits // 8)
            operands.append(net.const(net.draw.integers(0, 256, (48, count)).astype(np.uint8)))
        options = {"N": 48, "K": inner, "bits": bits, "block_size": 16, "domain": MS}
        y = net.op("MatMulNBits", *operands, name=SUBJECT, **options)
        return sequence_end(net, y, 48)

    return build


rows(
    "MatMulNBits",
    {
        "4 bits": _n_bits(4),
        "8 bits, zero points": _n_bits(8, zeros=True),
        "4 bits, packed zero points": _n_bits(4, zeros=True),
        "4 bits, flat scales": _n_bits(4, flat=True),
        "one block": _n_bits(4, inner=16),
    },
    domain=MS,
)


@row("DynamicQuantizeLinear", exact=False)
def _(net: Net) -> str:
    parts = net.ops("DynamicQuantizeLinear", image(net), outputs=3, name=SUBJECT)
    return image_end(net, net.op("DequantizeLinear", *parts))


@row("DynamicQuantizeMatMul", domain=MS)
def _(net: Net) -> str:
    operands = (sequence(net), _bytes(net, C, 12), *_steps(net, 12))
    return sequence_end(
        net, net.op("DynamicQuantizeMatMul", *operands, domain=MS, name=SUBJECT), 12
    )


@row("GatherND")
def _(net: Net) -> str:
    places = net.const(np.array([[0, 1], [1, 4], [0, 0]]))
    y = net.op("GatherND", sequence(net), places, name=SUBJECT)  # (3, 8)
    return net.dense(net.op("Relu", y), C, 3)


@row("ScatterND")
def _(net: Net) -> str:
    places = net.const(np.array([[0, 1], [1, 4], [0, 0]]))
    updates = net.dense(net.input("u", [3, 4]), 4, C)
    return sequence_end(net, net.op("ScatterND", sequence(net), places, updates, name=SUBJECT))


# -- sources -----------------------------------------------------------------------------------


@row("Constant", "a weight")
def _(net: Net) -> str:
    weight = net.draw.standard_normal((C, 4, 1, 1)).astype(np.float32)
    value = helper.make_tensor("", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)
    made = net.op("Constant", value=value, name=SUBJECT)
    return image_end(net, net.op("Conv", net.input("x", [2, 4, H, H]), made))


@row("Constant", "a vector of floats")
def _(net: Net) -> str:
    scale = net.op("Constant", value_floats=[0.5 + i for i in range(C)], name=SUBJECT)
    return sequence_end(net, net.op("Mul", sequence(net), scale))


@row("ConstantOfShape", "channels")
def _(net: Net) -> str:
    value = helper.make_tensor("", TensorProto.FLOAT, [1], [0.5])
    more = net.op("ConstantOfShape", net.ints(2, C, H, H), value=value, name=SUBJECT)
    return image_end(net, net.op("Add", image(net), more))


@row("ConstantOfShape", "zeros beside other channels")
def _(net: Net) -> str:
    more = net.op("ConstantOfShape", net.ints(2, 4, H, H), name=SUBJECT)
    return image_end(net, net.op("Concat", image(net), more, axis=1), C + 4)


@row("Shape", carries=False)
def _(net: Net) -> str:
    x = image(net)
    y = net.op(
        "Reshape", net.op("Reshape", x, net.ints(2, C, -1)), net.op("Shape", x, name=SUBJECT)
    )
    return image_end(net, y)


@row("Size", carries=False)
def _(net: Net) -> str:
    mask = net.input("mask", [H, H])
    count = net.op("Cast", net.op("Size", mask, name=SUBJECT), to=TensorProto.FLOAT)
    return image_end(net, net.op("Div", image(net), count))


@row("Range", carries=False)
def _(net: Net) -> str:
    places = net.op(
        "Range", scalar(0.0)(net), scalar(float(H))(net), scalar(1.0)(net), name=SUBJECT
    )
    return image_end(net, net.op("Add", image(net), places))


for _op in ("RandomNormal", "RandomUniform"):

    @row(_op, carries=False)
    def _(net: Net, op: str = _op) -> str:
        noise = net.op(op, shape=[H, H], seed=3.0, name=SUBJECT)
        return image_end(net, net.op("Add", image(net), noise))


@row("EyeLike", carries=False)
def _(net: Net) -> str:
    eye = net.op("EyeLike", net.input("like", [H, H]), name=SUBJECT)
    return image_end(net, net.op("Add", image(net), eye))


# -- control flow ------------------------------------------------------------------------------


def _body(name: str, nodes: list[Any], inputs: list[Any], outputs: list[str]) -> Any:
    values = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs]
    return helper.make_graph(nodes, name, inputs, values)


@row("If", alone=False)
def _(net: Net) -> str:
    x = image(net)
    branches = {
        f"{name}_branch": _body(name, [helper.make_node(op, [x], ["y"])], [], ["y"])
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    return image_end(net, net.op("If", net.input("flag", [], BOOL), **branches, name=SUBJECT))


@row("Loop")
def _(net: Net) -> str:
    x = image(net)
    going = helper.make_tensor_value_info("going", TensorProto.BOOL, [])
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, None)
    trip = helper.make_tensor_value_info("trip", TensorProto.INT64, [])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["still"]),
            helper.make_node("Neg", ["state"], ["next"]),
        ],
        "body",
        [trip, going, state],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    times, start = net.const(np.array(3)), net.const(np.array(True))
    return image_end(net, net.op("Loop", times, start, x, body=body, name=SUBJECT))


@row("Scan")
def _(net: Net) -> str:
    x = net.op("Transpose", sequence(net), perm=[1, 0, 2])
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, None)
    step = helper.make_tensor_value_info("step", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Add", ["state", "step"], ["next"]),
        helper.make_node("Identity", ["next"], ["turn"]),
    ]
    body = _body("body", nodes, [state, step], ["next", "turn"])
    first = net.op("Squeeze", net.op("Slice", x, net.ints(0), net.ints(1)), net.ints(0))
    y = net.ops("Scan", first, x, body=body, num_scan_inputs=1, outputs=2, name=SUBJECT)
    return sequence_end(net, net.op("Transpose", y[1], perm=[1, 0, 2]))


# -- positions along some axes, channels along others ------------------------------------------


def _number(value: int) -> Callable[[Net], str]:
    return lambda net: net.const(np.int64(value))


rows("Trilu", {"space": on_image("Trilu"), "lower": on_image("Trilu", _number(1), upper=0)})
rows("Trilu", {"channels": on_sequence("Trilu")}, freezes="ORDERED")


@row("NonZero", freezes="INDEXED")
def _(net: Net) -> str:
    found = net.op("NonZero", sequence(net), name=SUBJECT)  # (3, n)
    last = net.op("ReduceMax", net.op("Cast", found, to=TensorProto.FLOAT), keepdims=0)
    return sequence_end(net, net.op("Mul", sequence(net), last))


rows("CumProd", {"space": on_image("CumProd", _number(2))}, opset=26)
rows("CumProd", {"channels": on_image("CumProd", _number(1))}, opset=26, freezes="ORDERED")
rows(
    "ReverseSequence",
    {"time": on_sequence("ReverseSequence", ints(3, 5), batch_axis=0, time_axis=1)},
)
rows(
    "ReverseSequence",
    {"channels": on_image("ReverseSequence", ints(3, 8), batch_axis=0, time_axis=1)},
    freezes="ORDERED",
)


def _masked(axis: int, length: int) -> Build:
    mask = np.arange(length) % 3 != 1
    return on_image("Compress", lambda net: net.const(mask), axis=axis)


rows("Compress", {"space": _masked(-1, H)})


@row("Compress", "channels", freezes="ORDERED")
def _(net: Net) -> str:
    mask = net.const(np.arange(C) % 2 == 0)
    return image_end(net, net.op("Compress", image(net), mask, axis=1, name=SUBJECT), C // 2)


@row("BitCast", opset=26)
def _(net: Net) -> str:
    y = net.op("BitCast", image(net), to=TensorProto.INT32, name=SUBJECT)
    return image_end(net, net.op("BitCast", y, to=TensorProto.FLOAT))


@row("OneHot")
def _(net: Net) -> str:
    classes = net.op("Clip", net.op("Round", image(net)), scalar(0)(net), scalar(3)(net))
    classes = net.op("Cast", classes, to=INT64)
    y = net.op("OneHot", classes, _number(4)(net), net.floats(2), axis=2, name=SUBJECT)
    return image_end(net, net.op("ReduceSum", y, net.ints(2), keepdims=0))


@row("GatherElements", "space")
def _(net: Net) -> str:
    places = net.const(net.draw.integers(0, H, (2, C, H, 3)))
    return image_end(net, net.op("GatherElements", image(net), places, axis=3, name=SUBJECT))


def _mixture(op: str, **attributes: Any) -> Build:
    """Tokens and a router's logits → experts; (10, 8) with 4 channels inside."""

    def build(net: Net) -> str:
        x = net.dense(net.input("x", [10, 4]), 4, C)
        operands = [x, net.dense(x, C, 6)]
        for rows_, columns in ((4, C), (C, 4)):
            if op == "MoE":
                operands.append(net.floats(6, rows_, columns))
            else:
                packed = net.draw.integers(0, 256, (6, rows_, columns // 2)).astype(np.uint8)
                operands += [net.const(packed), net.floats(6, rows_, low=0.01)]
            operands.append(net.floats(6, rows_))
        y = net.op(op, *operands, domain=MS, k=2, name=SUBJECT, **attributes)
        return sequence_end(net, y)

    return build


for _op in ("MoE", "QMoE"):
    rows(_op, {"": _mixture(_op)}, domain=MS, exact=False)


def diagonal(net: Net, x: str, groups: int, inner: int, outer: int, name: str | None = None) -> str:
    """(2, 5, groups · inner) → (2, 5, groups · outer), the matrix stored as its blocks."""
    x = net.op("Reshape", x, net.ints(-1, groups, inner))
    x = net.op("Transpose", x, perm=[1, 0, 2])
    y = net.op("MatMul", x, net.floats(groups, inner, outer, name=net.name("blocks")), name=name)
    y = net.op("Add", y, net.floats(groups, 1, outer))
    return net.op("Reshape", net.op("Transpose", y, perm=[1, 0, 2]), net.ints(2, T, groups * outer))


@row("MatMul", "block-diagonal")
def _(net: Net) -> str:
    return sequence_end(net, diagonal(net, sequence(net), 2, 4, 3, name=SUBJECT), 6)


@row("MatMul", "block-diagonal, of many groups")
def _(net: Net) -> str:
    y = diagonal(net, sequence(net), 4, 2, 2, name=SUBJECT)
    return sequence_end(net, net.op("Mul", y, net.op("Sigmoid", sequence(net))))


@row("ScatterElements", "the same place of every channel")
def _(net: Net) -> str:
    x = sequence(net)
    update = net.op("Slice", x, net.ints(0), net.ints(1), net.ints(1))  # (2, 1, 8)
    places = net.op("Expand", net.const(np.array(3)), net.op("Shape", update))
    nothing = net.op("Expand", net.const(np.float32(0)), net.op("Shape", x))
    y = net.op("ScatterElements", nothing, places, update, axis=1, name=SUBJECT)
    return sequence_end(net, y)


@row("Tile", "the same place of every channel")
def _(net: Net) -> str:
    x = sequence(net)
    _, chosen = net.ops("TopK", net.input("score", [2, T, 1]), net.ints(2), outputs=2, axis=1)
    places = net.op("Tile", chosen, net.ints(1, 1, C), name=SUBJECT)
    return sequence_end(net, net.op("GatherElements", x, places, axis=1))


# What is chosen from channels, and the channels it was chosen from, are cut alike. Such a node
# reads numbers of positions, which a cut renumbers: it is held to the law of the whole model.


def _chosen(net: Net, op: str, keep: int = 1) -> str:
    """Numbers of channels, (2, 3, 6, 6) of TopK and (2, 1, 6, 6) of ArgMax, moved about."""
    x = image(net)
    if op == "TopK":
        y = net.ops("TopK", x, net.ints(3), outputs=2, axis=1)[1]
    else:
        y = net.op(op, x, axis=1, keepdims=keep)
    y = net.op("Cast", net.op("Identity", y), to=TensorProto.INT32)
    y = net.op("Slice", net.op("Cast", y, to=INT64), net.ints(0), net.ints(4), net.ints(2))
    return net.op("Transpose", y, perm=[0, 1, 3, 2][: 3 + keep]) if keep else y


def _narrow(net: Net) -> str:
    return net.op("Slice", image(net), net.ints(0), net.ints(4), net.ints(2))


@row("OneHot", "of chosen channels", alone=False)
def _(net: Net) -> str:
    chosen = _chosen(net, "ArgMax", keep=0)
    y = net.op("OneHot", chosen, _number(C)(net), net.floats(2), axis=1, name=SUBJECT)
    return image_end(net, y)


@row("Equal", "chosen channels and their numbers", alone=False)
def _(net: Net) -> str:
    numbers = net.const(np.arange(C).reshape(C, 1, 1))
    y = net.op("Equal", _chosen(net, "ArgMin"), numbers, name=SUBJECT)
    return image_end(net, net.op("Cast", y, to=TensorProto.FLOAT))


@row("Equal", "chosen channels and a range", alone=False)
def _(net: Net) -> str:
    numbers = net.op("Range", scalar(0, np.int64)(net), _number(C)(net), _number(1)(net))
    chosen = net.op("Transpose", _chosen(net, "ArgMax"), perm=[0, 2, 3, 1])
    y = net.op("Cast", net.op("Equal", numbers, chosen, name=SUBJECT), to=TensorProto.FLOAT)
    return sequence_end(net, y)


@row("GatherElements", "chosen channels", alone=False)
def _(net: Net) -> str:
    y = net.op("Transpose", _narrow(net), perm=[0, 1, 3, 2])
    return image_end(
        net, net.op("GatherElements", y, _chosen(net, "TopK"), axis=1, name=SUBJECT), 3
    )


@row("ScatterElements", "to chosen channels", alone=False)
def _(net: Net) -> str:
    nothing = net.op("ConstantOfShape", net.ints(2, C, H, 4))
    values = net.conv(net.input("u", [2, 4, H, 4]), 4, 3)
    chosen = _chosen(net, "TopK")
    return image_end(net, net.op("ScatterElements", nothing, chosen, values, axis=1, name=SUBJECT))


@row("Gather", "rows by chosen channels", alone=False)
def _(net: Net) -> str:
    chosen = net.op("ArgMax", sequence(net), axis=-1, keepdims=0)
    return sequence_end(net, net.op("Gather", net.floats(C, 6), chosen, axis=0, name=SUBJECT), 6)


@row("GatherND", "rows by chosen channels", alone=False)
def _(net: Net) -> str:
    chosen = net.op("ArgMax", sequence(net), axis=-1, keepdims=1)  # (2, 5, 1)
    return sequence_end(net, net.op("GatherND", net.floats(C, 6), chosen, name=SUBJECT), 6)


@row("GatherND", "of each sample, by chosen channels", alone=False)
def _(net: Net) -> str:
    x = net.op("Transpose", sequence(net), perm=[0, 2, 1])  # (2, 8, 5)
    rows_ = net.op("Transpose", net.dense(sequence(net), C, C), perm=[0, 2, 1])
    rows_ = net.op("MatMul", rows_, net.floats(T, 4))  # (2, 8, 4)
    chosen = net.op("Unsqueeze", net.op("ArgMax", x, axis=1, keepdims=0), net.ints(2))
    y = net.op("GatherND", rows_, chosen, batch_dims=1, name=SUBJECT)  # (2, 5, 4)
    return sequence_end(net, y, 4)


@row("GatherElements", "channels", freezes="BARE_AXIS")
def _(net: Net) -> str:
    places = net.const(net.draw.integers(0, C, (2, 4, H, H)))
    return image_end(net, net.op("GatherElements", image(net), places, axis=1, name=SUBJECT), 4)


@row("GatherElements", "indices from the input", freezes="BARE_AXIS")
def _(net: Net) -> str:
    places = net.input("places", [2, C, H, H], INT64)
    return image_end(net, net.op("GatherElements", image(net), places, axis=3, name=SUBJECT))


def _scatter(op: str, channels: int = C) -> Build:
    def build(net: Net) -> str:
        rows_of = np.stack([net.draw.permutation(H)[:3] for _ in range(2 * channels * H)])
        places = net.const(rows_of.reshape(2, channels, H, 3))
        updates = net.conv(net.input("u", [2, 4, H, 3]), 4, channels)
        y = net.op(op, image(net), places, updates, axis=-1, name=SUBJECT)
        return image_end(net, y)

    return build


rows("ScatterElements", {"space": _scatter("ScatterElements")}, opset=18)
rows("ScatterElements", {"some channels": _scatter("ScatterElements", 5)}, freezes="BARE_AXIS")
rows("Scatter", {"": _scatter("Scatter")}, opset=9)


@row("TensorScatter", opset=24)
def _(net: Net) -> str:
    update = net.dense(net.input("u", [2, 2, 4]), 4, C)
    y = net.op("TensorScatter", sequence(net), update, net.ints(0, 3), name=SUBJECT)
    return sequence_end(net, y)


@row("DFT", opset=17)
def _(net: Net) -> str:
    y = net.op("DFT", net.op("Unsqueeze", sequence(net), net.ints(3)), axis=1, name=SUBJECT)
    real = net.op("Gather", y, _number(0)(net), axis=3)
    return sequence_end(net, real)


@row("DFT", "axis input", opset=20)
def _(net: Net) -> str:
    x = net.op("Unsqueeze", image(net), net.ints(4))
    y = net.op("DFT", x, "", _number(-2)(net), name=SUBJECT)
    return image_end(net, net.op("Gather", y, _number(1)(net), axis=4))


@row("DFT", "channels", opset=17, freezes="ORDERED")
def _(net: Net) -> str:
    y = net.op("DFT", net.op("Unsqueeze", sequence(net), net.ints(3)), axis=2, name=SUBJECT)
    return sequence_end(net, net.op("Gather", y, _number(0)(net), axis=3))


@row("Col2Im", opset=18)
def _(net: Net) -> str:
    x = net.dense(net.input("x", [2, 9, 4]), 4, 4 * C)
    blocks = net.op("Transpose", x, perm=[0, 2, 1])
    y = net.op("Col2Im", blocks, net.ints(H, H), net.ints(2, 2), strides=[2, 2], name=SUBJECT)
    return image_end(net, y)


rows(
    "CenterCropPad",
    {
        "axes": on_image("CenterCropPad", ints(4, 8), axes=[2, -1]),
        "whole shape": on_image("CenterCropPad", ints(2, C, 4, 4)),
    },
    opset=18,
)


@row("MaxRoiPool")
def _(net: Net) -> str:
    regions = net.const(np.float32([[0, 0, 0, 4, 4], [1, 1, 1, 5, 5]]))
    return image_end(
        net, net.op("MaxRoiPool", image(net), regions, pooled_shape=[2, 2], name=SUBJECT)
    )


def _deformable(group: int) -> Build:
    def build(net: Net) -> str:
        x = net.conv(net.input("x", [2, 4, H, H]), 4, C)
        weight, offset = net.floats(12, C // group, 3, 3), net.input("offset", [2, 18, 4, 4])
        operands = [x, weight, offset, net.floats(12)]
        return image_end(net, net.op("DeformConv", *operands, group=group, name=SUBJECT), 12)

    return build


rows("DeformConv", {"": _deformable(1)}, opset=19)
rows("DeformConv", {"groups": _deformable(2)}, opset=19, freezes="UNSUPPORTED_FORM")


@row("CausalConvWithState", opset=27)
def _(net: Net) -> str:
    x = net.op("Transpose", sequence(net), perm=[0, 2, 1])
    operands = [x, net.floats(C, 1, 3), net.floats(C)]
    y, state = net.ops("CausalConvWithState", *operands, outputs=2, name=SUBJECT)
    last = net.op("ReduceSum", state, net.ints(2))
    return image_end(net, net.op("Add", y, last), rank=3)
