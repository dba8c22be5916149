"""Shapes of operators that onnx infers none for: com.microsoft, functions, some of ai.onnx.ml."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from secateur.graphops.model.attributes import integer, integers

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
LEARN = "ai.onnx.ml"  # the domain of classical machine learning

Shape = tuple[int | None, ...]
Shapes = Sequence[Shape | None]


def infer(node: ir.Node, inputs: Shapes) -> list[Shape | None] | None:
    """Shapes of the outputs that are known, None when the operator is not known here."""
    function = _TABLES.get(node.domain, {}).get(node.op_type)
    if function is None or not inputs or inputs[0] is None:
        return None
    try:
        return function(node, inputs)
    except (IndexError, ValueError, TypeError, AttributeError):
        return None


def _first(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    return [inputs[0]]


def _skip_norm(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    return [inputs[0], None, None, inputs[0]]


def _matmul(a: int, b: int) -> Callable[[ir.Node, Shapes], list[Shape | None]]:
    def run(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
        left, right = list(inputs[a] or ()), list(inputs[b] or ())
        if integer(node, "transA", 0):
            left[-2:] = left[:-3:-1]
        if integer(node, "transB", 0):
            right[-2:] = right[:-3:-1]
        batch = left[:-2] if len(left) >= len(right) else right[:-2]
        return [(*batch, left[-2], right[-1])]

    return run


def _attention(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    """MultiHeadAttention and GroupQueryAttention: queries' rows, values' hidden size × share."""
    query, value = inputs[0] or (), inputs[2]
    if value is None or len(query) != 3:
        return [None]
    if len(value) == 4:
        return [(query[0], query[1], (value[1] or 0) * (value[3] or 0))]
    heads = integer(node, "num_heads", 0) or 1
    share = heads // (integer(node, "kv_num_heads", 0) or heads)
    return [(query[0], query[1], (value[2] or 0) * share)]


def _packed_attention(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    x, weight = inputs[0] or (), inputs[1] or ()
    sizes = integers(node, "qkv_hidden_sizes")
    hidden = (weight[1] or 0) // 3 if sizes is None else sizes[2]
    return [(x[0], x[1], hidden)]


def _embed(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    ids, table = inputs[0] or (), inputs[2] or ()
    shape: Shape = (ids[0], ids[1], table[1])
    return [shape, None, shape]


def _n_bits(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    return [(*(inputs[0] or ())[:-1], integer(node, "N", 0))]


def _broadcast(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    if any(shape is None or None in shape for shape in inputs):
        return [None]
    return [np.broadcast_shapes(*inputs)]  # type: ignore[arg-type]


def _side_by_side(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    widths = [(shape or (None,))[-1] for shape in inputs]
    total = None if None in widths else sum(width or 0 for width in widths)
    return [(*(inputs[0] or ())[:-1], total)]


def _regressor(node: ir.Node, inputs: Shapes) -> list[Shape | None]:
    return [((inputs[0] or ())[0], integer(node, "targets", 1))]


# Functions of opset 12 to 15, whose bodies onnx's inference does not look into.
COMPARISONS = ("LessOrEqual", "GreaterOrEqual")

_Table = dict[str, Callable[[ir.Node, Shapes], list[Shape | None]]]

_STANDARD: _Table = {
    **dict.fromkeys(COMPARISONS, _broadcast),
    "GroupNormalization": _first,
    "SimplifiedLayerNormalization": _first,
    "MeanVarianceNormalization": _first,
}
_OTHERS: _Table = {
    "BiasGelu": _first,
    "FastGelu": _first,
    "QuickGelu": _first,
    "Gelu": _first,
    "RotaryEmbedding": _first,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "FusedMatMul": _matmul(0, 1),
    "TransposeMatMul": _matmul(0, 1),
    "MatMulIntegerToFloat": _matmul(0, 1),
    "DynamicQuantizeMatMul": _matmul(0, 1),
    "MultiHeadAttention": _attention,
    "GroupQueryAttention": _attention,
    "Attention": _packed_attention,
    "QAttention": _packed_attention,
    "MatMulNBits": _n_bits,
    "QuantizeLinear": _first,
    "DequantizeLinear": _first,
    "MoE": _first,
    "QMoE": _first,
    "EmbedLayerNormalization": _embed,
    "QEmbedLayerNormalization": _embed,
}
_CLASSICAL: _Table = {
    "Scaler": _first,
    "Normalizer": _first,
    "Imputer": _first,
    "FeatureVectorizer": _side_by_side,
    "LinearRegressor": _regressor,
}
_TABLES = {"": _STANDARD, CONTRIB: _OTHERS, LEARN: _CLASSICAL}


# Operators of com.microsoft whose outputs have the elements of another input than the first.
_ELEMENTS = {
    "EmbedLayerNormalization": 2,
    "QEmbedLayerNormalization": 8,
    "MatMulIntegerToFloat": 2,
    "QAttention": 3,
    "QuantizeLinear": 2,
    "DequantizeLinear": 1,
}


def elements_from(node: ir.Node) -> int | None:
    """Index of the input whose elements the outputs have; None where they are float32."""
    if node.domain == LEARN:
        return 0 if node.op_type == "Imputer" else None
    return _ELEMENTS.get(node.op_type, 0) if node.domain == CONTRIB else 0
