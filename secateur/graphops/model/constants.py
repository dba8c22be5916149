"""The two ways in which a graph gets other constants."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.tape


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer that has the tensor's name, which must be free."""
    return onnx_ir.tape.Tape(graph).initializer(tensor)


def set_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Gives an initializer, or the output of a Constant node, another tensor."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()  # it may have been value_floats
        node.attributes["value"] = ir.AttrTensor("value", tensor)
