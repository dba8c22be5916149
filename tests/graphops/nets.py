"""A small builder of ONNX models, as the tests of the engine write them.

    net = Net(opset=17)
    x = net.input("x", [2, 4, 6, 6])
    y = net.conv(x, 4, 8)
    net.output(net.conv(net.op("Relu", y), 8, 3))
    model = net.model()

Weights are random from a seed and scaled so that activations keep their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
BOOL = TensorProto.BOOL
INT64 = TensorProto.INT64

# The first IR version that knows each opset, as ONNX Runtime wants them to agree.
_IR_OF_OPSET = ((9, 3), (10, 4), (11, 5), (12, 6), (15, 7), (19, 8), (21, 9), (23, 10), (25, 11))


def ir_version(opset: int) -> int:
    """The IR version that came with an opset."""
    return next((version for below, version in _IR_OF_OPSET if opset < below), 12)


class Net:
    """A graph under construction. Every method that adds a node returns its output's name."""

    def __init__(self, opset: int = 17, *, ir: int | None = None, seed: int = 0) -> None:
        self.opset = opset
        self.ir = ir_version(opset) if ir is None else ir
        self.draw = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {"": opset}
        self._count = 0

    # -- values --------------------------------------------------------------------------------

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(
        self, name: str, dtype: int = FLOAT, shape: Sequence[int | str] | None = None
    ) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, array: Any, name: str | None = None, dtype: Any = None) -> str:
        """An initializer holding `array`."""
        name = name or self.name("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.const(np.array(values, np.int64))

    def floats(self, *shape: int, name: str | None = None, low: float | None = None) -> str:
        """A float32 initializer: normal, fan-in scaled; uniform from `low` where that is given."""
        if low is None:
            fan = max(1, int(np.prod(shape[1:]))) if len(shape) > 1 else 1
            array = self.draw.standard_normal(shape) / np.sqrt(fan)
        else:
            array = low + self.draw.random(shape)
        return self.const(array.astype(np.float32), name or self.name("w"))

    # -- nodes ---------------------------------------------------------------------------------

    def ops(
        self,
        op_type: str,
        *inputs: str,
        outputs: int = 1,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Adds a node and returns its outputs' names."""
        made = [self.name(op_type.lower()) for _ in range(outputs)]
        label = made[0] if name is None else name
        node = helper.make_node(
            op_type, list(inputs), made, name=label, domain=domain, **attributes
        )
        self.nodes.append(node)
        return made

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns its name."""
        return self.ops(op_type, *inputs, **attributes)[0]

    def constant(self, array: Any) -> str:
        """A Constant node."""
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(array)))

    def conv(
        self,
        x: str,
        inner: int,
        outer: int,
        kernel: int | Sequence[int] = 1,
        *,
        rank: int = 4,
        bias: bool = True,
        group: int = 1,
        **attributes: Any,
    ) -> str:
        """A Conv whose kernel keeps the size where it is odd."""
        sizes = [kernel] * (rank - 2) if isinstance(kernel, int) else list(kernel)
        attributes.setdefault("pads", [size // 2 for size in sizes] * 2)
        if attributes["pads"] is None:  # where auto_pad says it
            del attributes["pads"]
        operands = [x, self.floats(outer, inner // group, *sizes)]
        if bias:
            operands.append(self.floats(outer))
        return self.op("Conv", *operands, kernel_shape=sizes, group=group, **attributes)

    def dense(self, x: str, inner: int, outer: int, bias: bool = True) -> str:
        """MatMul over the last axis, then Add."""
        weight = self.draw.standard_normal((inner, outer)) / np.sqrt(inner)
        y = self.op("MatMul", x, self.const(weight.astype(np.float32), self.name("w")))
        return self.op("Add", y, self.floats(outer)) if bias else y

    # -- the whole -----------------------------------------------------------------------------

    def model(self) -> onnx.ModelProto:
        inputs = list(self.inputs)
        if self.ir < 4:  # the specification wants every initializer among the inputs
            inputs += [
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                for tensor in self.initializers
            ]
        graph = helper.make_graph(self.nodes, "net", inputs, self.outputs, self.initializers)
        return helper.make_model(
            graph,
            ir_version=self.ir,
            opset_imports=[helper.make_opsetid(d, v) for d, v in self.domains.items()],
            functions=self.functions,
        )

    def bytes(self) -> bytes:
        return self.model().SerializeToString(deterministic=True)


def attention(
    net: Net,
    x: str,
    width: int,
    heads: int,
    size: int,
    tokens: int,
    mixed: str | None = None,
) -> str:
    """Multi-head self-attention from and to (2, tokens, width), with baked shapes."""
    inner = heads * size
    parts = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        y = net.op("Reshape", net.dense(x, width, inner), net.ints(2, tokens, heads, size))
        parts.append(net.op("Transpose", y, perm=perm))
    query, key, value = parts
    scores = net.op("MatMul", query, key, name=mixed)
    scores = net.op("Div", scores, net.const(np.float32(np.sqrt(size))))
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), value)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(2, tokens, inner))
    return net.dense(y, inner, width)
