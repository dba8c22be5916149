"""Evaluates the small integer arithmetic by which exporters compute shapes.

`Shape → Gather → Mul → Concat → Reshape` chains decide where channels go, so the analysis has
to know their values. Only operators that occur in such chains are here; anything else is simply
not known. Arrays are tiny (see `MAX_ELEMENTS`), NumPy is the semantics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.model.attributes import integer, integers, text

MAX_ELEMENTS = 4096

_MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)

Array = npt.NDArray[Any]
Inputs = Sequence[Array | None]


def evaluate(node: ir.Node, inputs: Inputs) -> list[Array] | None:
    """The node's outputs for known inputs, or None when that is not this module's business.

    Args:
        node: of the ai.onnx domain.
        inputs: one array per input, None for an absent optional one.
    """
    function = _TABLE.get(node.op_type)
    if function is None or node.domain != "":
        return None
    try:
        outputs = function(node, inputs)
    except _MALFORMED:
        return None  # malformed: shape inference or ONNX Runtime will say so with more to tell
    outputs = [np.asarray(output) for output in outputs]
    return outputs if max([output.size for output in outputs], default=0) <= MAX_ELEMENTS else None


def _ints(node: ir.Node, name: str, inputs: Inputs, index: int) -> list[int] | None:
    """Axes and the like: an input in newer opsets, an attribute in older ones."""
    if len(inputs) > index and (given := inputs[index]) is not None:
        return [int(item) for item in given.reshape(-1)]
    return integers(node, name)


def _elementwise(function: Callable[..., Array]) -> Callable[..., list[Array]]:
    return lambda node, inputs: [function(*inputs)]


def _fold(function: Callable[..., Array]) -> Callable[..., list[Array]]:
    def run(node: ir.Node, inputs: Inputs) -> list[Array]:
        result = inputs[0]
        for other in inputs[1:]:
            result = function(result, other)
        return [np.asarray(result)]

    return run


def _divide(a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.integer):  # ONNX truncates towards zero, NumPy floors
        return np.asarray(np.sign(a) * np.sign(b) * (abs(a) // abs(b)), a.dtype)
    return np.asarray(a / b)


def _modulo(node: ir.Node, inputs: Inputs) -> list[Array]:
    first, second = inputs
    assert first is not None
    assert second is not None
    return [np.fmod(first, second) if integer(node, "fmod", 0) else np.mod(first, second)]


def _clip(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, low, high = (*inputs, None, None)[:3]
    assert data is not None
    if low is None and "min" in node.attributes:
        low = np.asarray(node.attributes["min"].value, data.dtype)
    if high is None and "max" in node.attributes:
        high = np.asarray(node.attributes["max"].value, data.dtype)
    return [np.asarray(np.clip(data, low, high), data.dtype)]


def _cast(node: ir.Node, inputs: Inputs) -> list[Array]:
    return [inputs[0].astype(ir.DataType(integer(node, "to", 1)).numpy())]  # type: ignore[union-attr]


def _gather(node: ir.Node, inputs: Inputs) -> list[Array]:
    return [np.take(inputs[0], inputs[1].astype(np.int64), axis=integer(node, "axis", 0))]  # type: ignore[arg-type, union-attr]


def _concat(node: ir.Node, inputs: Inputs) -> list[Array]:
    return [np.concatenate(inputs, axis=integer(node, "axis", 0))]  # type: ignore[arg-type]


def slices(node: ir.Node, inputs: Inputs, rank: int) -> tuple[slice, ...]:
    """The index expression of a Slice node over a tensor of `rank` axes.

    Raises:
        ValueError: starts or ends are missing.
    """
    starts, ends = _ints(node, "starts", inputs, 1), _ints(node, "ends", inputs, 2)
    if starts is None or ends is None:
        raise ValueError("Slice without starts or ends")
    axes = _ints(node, "axes", inputs, 3) or list(range(len(starts)))
    steps = _ints(node, "steps", inputs, 4) or [1] * len(starts)
    index = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # An end beyond the front means "through element 0", which Python spells None.
        stop = None if step < 0 and end < -(2**30) else end
        index[axis] = slice(start, stop, step)
    return tuple(index)


def _slice(node: ir.Node, inputs: Inputs) -> list[Array]:
    data = inputs[0]
    assert data is not None
    return [data[slices(node, inputs, data.ndim)]]


def _squeeze(node: ir.Node, inputs: Inputs) -> list[Array]:
    axes = _ints(node, "axes", inputs, 1)
    return [np.squeeze(inputs[0], axis=None if axes is None else tuple(axes))]  # type: ignore[arg-type]


def _unsqueeze(node: ir.Node, inputs: Inputs) -> list[Array]:
    return [np.expand_dims(inputs[0], tuple(_ints(node, "axes", inputs, 1) or ()))]  # type: ignore[arg-type]


def _reshape(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, shape = inputs[0], _ints(node, "shape", inputs, 1)
    assert data is not None
    assert shape is not None
    if not integer(node, "allowzero", 0):
        shape = [data.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return [data.reshape(shape)]


def _flatten(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, axis = inputs[0], integer(node, "axis", 1)
    assert data is not None
    return [data.reshape(int(np.prod(data.shape[:axis], dtype=np.int64)), -1)]


def _reduce(function: Callable[..., Array]) -> Callable[..., list[Array]]:
    def run(node: ir.Node, inputs: Inputs) -> list[Array]:
        axes = _ints(node, "axes", inputs, 1)
        if axes is None and integer(node, "noop_with_empty_axes", 0):
            return [np.asarray(inputs[0])]
        axis = None if axes is None else tuple(axes)
        return [function(inputs[0], axis=axis, keepdims=bool(integer(node, "keepdims", 1)))]

    return run


def _constant_of_shape(node: ir.Node, inputs: Inputs) -> list[Array]:
    shape = [int(size) for size in inputs[0].reshape(-1)]  # type: ignore[union-attr]
    if np.prod(shape, dtype=np.float64) > MAX_ELEMENTS:
        raise ValueError("large")
    attribute = node.attributes.get("value")
    value = np.zeros(1, np.float32) if attribute is None else attribute.value.numpy()
    return [np.full(shape, value.reshape(-1)[0])]


def _range(node: ir.Node, inputs: Inputs) -> list[Array]:
    start, limit, delta = (item.reshape(-1)[0] for item in inputs)  # type: ignore[union-attr]
    if (limit - start) / delta > MAX_ELEMENTS:
        raise ValueError("large")
    return [np.arange(start, limit, delta, dtype=start.dtype)]


def _expand(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, shape = inputs[0], [int(size) for size in inputs[1]]  # type: ignore[union-attr]
    return [np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(shape)))]  # type: ignore[arg-type, union-attr]


def _tile(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, repeats = inputs[0], [int(times) for times in inputs[1]]  # type: ignore[union-attr]
    if np.prod([data.size, *repeats], dtype=np.float64) > MAX_ELEMENTS:  # type: ignore[union-attr]
        raise ValueError("large")
    return [np.tile(data, repeats)]  # type: ignore[arg-type]


def _split(node: ir.Node, inputs: Inputs) -> list[Array]:
    sizes = _ints(node, "split", inputs, 1)
    where: Any = len(node.outputs) if sizes is None else list(np.cumsum(sizes)[:-1])
    return list(np.split(inputs[0], where, axis=integer(node, "axis", 0)))  # type: ignore[arg-type]


def _transpose(node: ir.Node, inputs: Inputs) -> list[Array]:
    return [np.transpose(inputs[0], integers(node, "perm"))]  # type: ignore[arg-type]


def _one_hot(node: ir.Node, inputs: Inputs) -> list[Array]:
    indices, depth, (off, on) = inputs[0], int(inputs[1].reshape(-1)[0]), inputs[2]  # type: ignore[union-attr, misc]
    assert indices is not None
    if indices.size * depth > MAX_ELEMENTS:
        raise ValueError("large")
    places = np.where(indices < 0, indices + depth, indices)[..., None] == np.arange(depth)
    return [np.moveaxis(np.where(places, on, off), -1, integer(node, "axis", -1))]


def _cumulative_sum(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, axis = inputs[0], int(inputs[1].reshape(-1)[0])  # type: ignore[union-attr]
    assert data is not None
    if integer(node, "reverse", 0) or integer(node, "exclusive", 0):
        raise ValueError("reversed or exclusive")
    return [np.cumsum(data, axis, dtype=data.dtype)]


def _arg(function: Callable[..., Array]) -> Callable[..., list[Array]]:
    def run(node: ir.Node, inputs: Inputs) -> list[Array]:
        if integer(node, "select_last_index", 0):
            raise ValueError("the last index")
        keep = bool(integer(node, "keepdims", 1))
        return [function(inputs[0], axis=integer(node, "axis", 0), keepdims=keep)]

    return run


def _scatter_nd(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, indices, updates = inputs
    assert data is not None
    assert indices is not None
    if text(node, "reduction", "none") != "none":
        raise ValueError("a reduction")
    result = data.copy()
    result[tuple(np.moveaxis(indices, -1, 0))] = updates
    return [result]


def _gather_nd(node: ir.Node, inputs: Inputs) -> list[Array]:
    data, indices = inputs
    assert data is not None
    assert indices is not None
    if integer(node, "batch_dims", 0):
        raise ValueError("batch_dims")
    return [data[tuple(np.moveaxis(indices, -1, 0))]]


def _quantise(node: ir.Node, inputs: Inputs) -> list[Array]:
    scale, zero = _scale(inputs)
    bounds = np.iinfo(zero.dtype)
    steps = np.rint(inputs[0] / scale) + zero.astype(np.float32)
    return [np.clip(steps, bounds.min, bounds.max).astype(zero.dtype)]


def _dequantise(node: ir.Node, inputs: Inputs) -> list[Array]:
    scale, zero = _scale(inputs)
    return [(inputs[0].astype(np.float32) - zero.astype(np.float32)) * scale]  # type: ignore[union-attr]


def _scale(inputs: Inputs) -> tuple[Array, Array]:
    """The one scale and the integer that stands for zero."""
    scale, zero = (*inputs, None)[1:3]
    zero = np.zeros((), np.uint8) if zero is None else zero
    assert scale is not None
    if scale.size != 1 or zero.dtype.kind not in "iu":
        raise ValueError("a scale per channel, or no integers")
    return scale.reshape(()), zero.reshape(())


_TABLE: dict[str, Callable[[ir.Node, Inputs], list[Array]]] = {
    "Identity": _elementwise(lambda x: x),
    "Abs": _elementwise(np.abs),
    "Neg": _elementwise(np.negative),
    "Floor": _elementwise(np.floor),
    "Ceil": _elementwise(np.ceil),
    "Round": _elementwise(np.rint),
    "Sqrt": _elementwise(np.sqrt),
    "Not": _elementwise(np.logical_not),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(_divide),
    "Pow": _elementwise(lambda x, y: np.power(x, y).astype(x.dtype)),
    "Mod": _modulo,
    "Min": _fold(np.minimum),
    "Max": _fold(np.maximum),
    "Equal": _elementwise(np.equal),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "And": _elementwise(np.logical_and),
    "Or": _elementwise(np.logical_or),
    "Xor": _elementwise(np.logical_xor),
    "Where": _elementwise(np.where),
    "Cast": _cast,
    "Clip": _clip,
    "Relu": _elementwise(lambda x: np.maximum(x, 0)),
    "Exp": _elementwise(np.exp),
    "Log": _elementwise(np.log),
    "Sign": _elementwise(np.sign),
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "OneHot": _one_hot,
    "CumSum": _cumulative_sum,
    "ArgMax": _arg(np.argmax),
    "ArgMin": _arg(np.argmin),
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "NonZero": _elementwise(lambda data: np.array(np.nonzero(data), np.int64)),
    "QuantizeLinear": _quantise,  # quantisers do not spare the arithmetic of shapes
    "DequantizeLinear": _dequantise,
    "Sum": _fold(np.add),
    "Reciprocal": _elementwise(np.reciprocal),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMin": _reduce(np.min),
    "ReduceMax": _reduce(np.max),
}

OPERATORS = frozenset(_TABLE)
