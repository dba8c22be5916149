"""The one place where repair gives a node other numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def replace_constant(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    array: npt.NDArray[Any],
    dtype: ir.DataType,
    name: str,
) -> None:
    """Gives input `index` of a node new numbers, in a tensor of its own."""
    value = node.inputs[index]
    alone = value is not None and len(value.uses()) == 1
    if value is not None and alone:
        name = str(value.name)
    numbers = np.ascontiguousarray(array.astype(dtype.numpy()))
    tensor = ir.Tensor(numbers, dtype=dtype, name=name)
    if value is not None and alone:
        producer = value.producer()
        if producer is not None:
            producer.attributes.clear()  # it may have been value_floats
            producer.attributes["value"] = ir.AttrTensor("value", tensor)
        else:
            value.const_value = tensor
        return
    fresh = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(fresh)
    node.replace_input_with(index, fresh)
