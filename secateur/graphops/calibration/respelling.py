"""What onnx-ad has no derivative of, in what it has: nodes of a graph whose shapes are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from secateur.graphops.calibration.data import Array
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.model.graph import opset_of, shape_of

_Spelling = Callable[["Respelling", onnx.NodeProto], bool]
_SPELLINGS: dict[tuple[str, str], _Spelling] = {}


def respell(proto: onnx.ModelProto) -> bool:
    """Replaces the nodes that have another spelling, in place; whether there were any."""
    respelling = Respelling(proto)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    respelt = [respelling.add(node) for node in nodes]
    proto.graph.node.extend(respelling.nodes)
    return any(respelt)


class Respelling:
    """The nodes of a graph, written anew.

    Attributes:
        nodes: those that are written.
        constants: tensors by name; those that nodes hold when they have been written.
        shapes: by name, where they are known.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = (*graph.value_info, *graph.input, *graph.output)
        shapes = {value.name: shape_of(value) for value in values}
        self.shapes = {name: shape for name, shape in shapes.items() if shape is not None}
        self.shapes.update({name: list(tensor.dims) for name, tensor in self.constants.items()})
        self._kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        self._opset = opset_of(proto)
        self._graph = graph
        self._node, self._made = onnx.NodeProto(), 0

    def add(self, node: onnx.NodeProto) -> bool:
        """Writes a node, in another spelling if there is one that says the same of it."""
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            self.constants[node.output[0]] = node.attribute[0].t
        spelling = _SPELLINGS.get((node.domain, node.op_type))
        self._node, self._made = node, 0
        written = len(self.nodes)
        known = bool(node.input) and node.input[0] in self.shapes
        if spelling is not None and known and spelling(self, node):
            return True
        del self.nodes[written:]
        self.nodes.append(node)
        return False

    def op(self, op_type: str, *inputs: str, gives: str = "", **attributes: Any) -> str:
        """Writes a node; the name of what it gives.

        Args:
            gives: that name, where it is not to be a new one.
        """
        name = gives or self._name()
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        """A new constant's name."""
        return self._constant(np.array(values, np.int64))

    def floats(self, values: npt.ArrayLike) -> str:
        """The same, of what the node in question reads."""
        kind = self._kinds.get(self._node.input[0], onnx.TensorProto.FLOAT)
        return self._constant(np.asarray(values, onnx.helper.tensor_dtype_to_np_dtype(kind)))

    def mean(self, x: str) -> str:
        """Over the last axis, which stays."""
        if self._opset >= 18:
            return self.op("ReduceMean", x, self.ints(-1), keepdims=1)
        return self.op("ReduceMean", x, axes=[-1], keepdims=1)

    def _constant(self, array: Array) -> str:
        name = self._name()
        self._graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def _name(self) -> str:
        self._made += 1
        return f"{self._node.output[0]}_respelt_{self._made}"


def _spells(*op_types: str, domain: str = "") -> Callable[[_Spelling], _Spelling]:
    def register(function: _Spelling) -> _Spelling:
        _SPELLINGS.update({(domain, op_type): function for op_type in op_types})
        return function

    return register


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def _operand(node: onnx.NodeProto, place: int) -> str:
    """The name of an input; empty where there is none."""
    return node.input[place] if place < len(node.input) else ""


# -- of ai.onnx --------------------------------------------------------------------------------


@_spells("Slice")
def _strided_slice(write: Respelling, node: onnx.NodeProto) -> bool:
    """One Gather for each axis."""
    known = [write.constants[name] for name in node.input[1:] if name in write.constants]
    bounds = list(map(onnx.numpy_helper.to_array, known))
    if len(bounds) != 4 or (bounds[3] == 1).all():
        return False
    shape, x = write.shapes[node.input[0]], node.input[0]
    rows = list(zip(*(bound.tolist() for bound in bounds), strict=True))
    for place, (start, end, axis, step) in enumerate(rows):
        taken = write.ints(*range(shape[axis])[start:end:step])
        gives = node.output[0] if place == len(rows) - 1 else ""
        x = write.op("Gather", x, taken, axis=axis, gives=gives)
    return True


@_spells("Conv", "MaxPool", "AveragePool", "LpPool")
def _explicit_pads(write: Respelling, node: onnx.NodeProto) -> bool:
    """Pads as numbers, where `auto_pad` says them, or where a last window that only `ceil_mode`
    adds reads beyond them."""
    given = _attributes(node)
    same, ceil = given.pop("auto_pad", b"").startswith(b"SAME"), given.pop("ceil_mode", 0)
    x, y = (write.shapes.get(name, [])[2:] for name in (node.input[0], node.output[0]))
    kernel = given.get("kernel_shape") or write.shapes.get(_operand(node, 1), [])[2:]
    if not (same or ceil) or not len(x) == len(y) == len(kernel):
        return False
    ones, nothing = [1] * len(x), [0] * 2 * len(x)
    strides, steps = given.get("strides", ones), given.get("dilations", ones)
    before = np.reshape(given.get("pads", nothing), (2, -1))
    read = (np.array(y) - 1) * strides + (np.array(kernel) - 1) * steps + 1
    if same:
        both = np.maximum(read - x, 0)
        pads = np.array([both // 2, both - both // 2])
        pads = pads if b"UPPER" in _attributes(node)["auto_pad"] else pads[::-1]
    else:
        pads = np.array([before[0], np.maximum(before[1], read - x - before[0])])
        # what is beyond the pads of a node counts in no mean, and the pads themselves may
        if given.get("count_include_pad") and (pads != before).any():
            return False
    if (pads >= kernel).any() and node.op_type != "Conv":  # which is no pool
        return False
    given["pads"] = pads.ravel().tolist()
    write.nodes.append(onnx.helper.make_node(node.op_type, node.input, node.output, **given))
    return True


@_spells("SimplifiedLayerNormalization")
def _root_mean_square(write: Respelling, node: onnx.NodeProto) -> bool:
    """Over the last axis."""
    given, last = _attributes(node), len(write.shapes[node.input[0]]) - 1
    if any(node.output[1:]) or given.get("axis", -1) not in (-1, last):
        return False
    epsilon = given.get("epsilon", 1e-5)
    _normalise(write, node.input[0], node.input[1], epsilon, node.output[0])
    return True


def _normalise(write: Respelling, x: str, scale: str, epsilon: float, gives: str = "") -> str:
    """x / √(mean(x²) + ε) · γ (Zhang and Sennrich, 2019)."""
    mean = write.mean(write.op("Mul", x, x))
    root = write.op("Sqrt", write.op("Add", mean, write.floats(epsilon)))
    return write.op("Mul", write.op("Div", x, root), scale, gives=gives)


# -- of com.microsoft --------------------------------------------------------------------------


def _plus(write: Respelling, x: str, bias: str) -> str:
    return write.op("Add", x, bias) if bias else x


@_spells("Gelu", "BiasGelu", domain=CONTRIB)
def _bias_gelu(write: Respelling, node: onnx.NodeProto) -> bool:
    """x · (1 + erf(x / √2)) / 2 (Hendrycks and Gimpel, 2016)."""
    x = _plus(write, node.input[0], _operand(node, 1))
    bent = write.op("Erf", write.op("Mul", x, write.floats(math.sqrt(0.5))))
    return _half(write, x, bent, node.output[0])


@_spells("FastGelu", domain=CONTRIB)
def _fast_gelu(write: Respelling, node: onnx.NodeProto) -> bool:
    """x · (1 + tanh(√(2/π) · x · (1 + 0.044715 x²))) / 2."""
    x = _plus(write, node.input[0], _operand(node, 1))
    square = write.op("Mul", write.op("Mul", x, x), write.floats(0.044715))
    inner = write.op("Mul", x, write.op("Add", square, write.floats(1.0)))
    bent = write.op("Tanh", write.op("Mul", inner, write.floats(math.sqrt(2 / math.pi))))
    return _half(write, x, bent, node.output[0])


def _half(write: Respelling, x: str, bent: str, gives: str) -> bool:
    half = write.op("Mul", x, write.floats(0.5))
    write.op("Mul", half, write.op("Add", bent, write.floats(1.0)), gives=gives)
    return True


@_spells("QuickGelu", domain=CONTRIB)
def _quick_gelu(write: Respelling, node: onnx.NodeProto) -> bool:
    """x · σ(α x)."""
    slope = write.floats(_attributes(node).get("alpha", 1.702))
    gate = write.op("Sigmoid", write.op("Mul", node.input[0], slope))
    write.op("Mul", node.input[0], gate, gives=node.output[0])
    return True


@_spells("FusedMatMul", domain=CONTRIB)
def _fused_matmul(write: Respelling, node: onnx.NodeProto) -> bool:
    """α · A B, the last two axes of each swapped on demand."""
    given, operands = _attributes(node), []
    if given.get("transBatchA") or given.get("transBatchB"):
        return False
    for name, swap in zip(node.input, ("transA", "transB"), strict=True):
        rank = len(write.shapes.get(name, []))
        if given.get(swap) and rank < 2:
            return False
        order = [*range(rank - 2), rank - 1, rank - 2]
        operands.append(write.op("Transpose", name, perm=order) if given.get(swap) else name)
    alpha = write.floats(given.get("alpha", 1.0))
    write.op("Mul", write.op("MatMul", *operands), alpha, gives=node.output[0])
    return True


@_spells("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=CONTRIB)
def _skip_norm(write: Respelling, node: onnx.NodeProto) -> bool:
    """The normalisation of input + skip + bias; that sum is the fourth output."""
    if any(node.output[1:3]):
        return False
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    beta, bias = ("", _operand(node, 3)) if simplified else (_operand(node, 3), _operand(node, 4))
    parts = [name for name in (*node.input[:2], bias) if name]
    x = parts[0]
    for place, part in enumerate(parts[1:]):
        final = node.output[3] if len(node.output) > 3 and place == len(parts) - 2 else ""
        x = write.op("Add", x, part, gives=final)
    if not simplified:
        x = write.op("Sub", x, write.mean(x))
    epsilon = _attributes(node).get("epsilon", 1e-12)
    y = _normalise(write, x, node.input[2], epsilon, "" if beta else node.output[0])
    if beta:
        write.op("Add", y, beta, gives=node.output[0])
    return True


@_spells("MultiHeadAttention", domain=CONTRIB)
def _multi_head(write: Respelling, node: onnx.NodeProto) -> bool:
    """Of separate queries, keys and values, in three dimensions; a bias for all of them."""
    named = [_operand(node, place) for place in range(3)]
    sizes = [write.shapes.get(name, []) for name in named]
    if any(node.output[1:]) or any(len(size) != 3 for size in sizes):
        return False
    if any(_operand(node, place) for place in (4, *range(6, 10))):  # padding, the past
        return False
    parts = named
    if bias := _operand(node, 3):
        biases = _split(write, bias, [size[2] for size in sizes], 0)
        parts = [write.op("Add", *pair) for pair in zip(parts, biases, strict=True)]
    return _attend(write, node, parts, sizes[0][2], _operand(node, 5))


@_spells("Attention", domain=CONTRIB)
def _packed(write: Respelling, node: onnx.NodeProto) -> bool:
    """Of one input, by one matrix; a mask of keys has 1 where they count."""
    given, mask, shift = _attributes(node), _operand(node, 3), _operand(node, 5)
    weight = write.shapes.get(node.input[1], [])
    if any(node.output[1:]) or given.get("do_rotary") or len(weight) != 2 or _operand(node, 4):
        return False
    if mask and len(write.shapes.get(mask, [])) != 2:
        return False
    sizes = given.get("qkv_hidden_sizes") or [weight[1] // 3] * 3
    packed = _plus(write, write.op("MatMul", *node.input[:2]), _operand(node, 2))
    if mask:
        away = write.op("Sub", write.floats(1.0), write.op("CastLike", mask, packed))
        away = write.op("Mul", away, write.floats(given.get("mask_filter_value", -1e4)))
        away = write.op("Unsqueeze", away, write.ints(1, 2))
        shift = write.op("Add", away, shift) if shift else away
    return _attend(write, node, _split(write, packed, sizes, 2), sizes[0], shift)


def _split(write: Respelling, x: str, sizes: Sequence[int], axis: int) -> list[str]:
    ends = np.cumsum([0, *sizes]).tolist()
    place = write.ints(axis)
    return [
        write.op("Slice", x, write.ints(start), write.ints(end), place)
        for start, end in itertools.pairwise(ends)
    ]


def _attend(
    write: Respelling, node: onnx.NodeProto, parts: Sequence[str], width: int, shift: str
) -> bool:
    """softmax(Q Kᵀ · scale + shift) V by heads (Vaswani et al., 2017).

    Args:
        parts: Q, K and V, shape (batch, length, size of all heads).
        width: that size, of Q.
        shift: what is added to scores, empty for nothing.
    """
    given = _attributes(node)
    heads = given["num_heads"]
    by_head = write.ints(0, 0, heads, -1)
    q, k, v = (
        write.op("Transpose", write.op("Reshape", part, by_head), perm=[0, 2, *last])
        for part, last in zip(parts, ([1, 3], [3, 1], [1, 3]), strict=True)
    )
    scale = given.get("scale") or 1 / math.sqrt(width // heads)
    scores = write.op("Mul", write.op("MatMul", q, k), write.floats(scale))
    scores = _plus(write, scores, shift)
    if given.get("unidirectional"):
        length = write.shapes[node.output[0]][1]
        scores = write.op("Add", scores, write.floats(np.triu(np.full((length, length), -1e4), 1)))
    y = write.op("MatMul", write.op("Softmax", scores, axis=-1), v)
    y = write.op("Transpose", y, perm=[0, 2, 1, 3])
    write.op("Reshape", y, write.ints(0, 0, -1), gives=node.output[0])
    return True
