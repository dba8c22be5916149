"""The one place where repair gives a node other numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.model.constants import add_initializer, set_constant


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
        set_constant(value, tensor)
        return
    node.replace_input_with(index, add_initializer(graph, tensor))
