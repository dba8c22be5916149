"""Where a matrix product's weight and bias lie, and what its output is to become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.moments import tensor_of
from secateur.graphops.model.shapes import constant_of
from secateur.graphops.rules.linear import LinearMap

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Target:
    """What a node's output should be, said of the sum that it ends in.

    A residual block ends in y + rest. What earlier cuts have changed in the rest, y can take back:
    its target is the original's sum minus the rest as it now is (He, Zhang, Sun: Channel Pruning,
    ICCV 2017, section 3.3, for residual networks).

    Attributes:
        view: the node.
        observed: name of the sum.
        rest: names of what is added to y on the way.
        bias: the constant that plays b, None where there is none.
        adder: the node that adds it, where it is another one.
        biased: whether b can be set.
    """

    view: LinearMap
    observed: str
    rest: tuple[str, ...]
    bias: ir.Value | None
    adder: ir.Node | None
    biased: bool

    @classmethod
    def of(cls, view: LinearMap, places: Mapping[ir.Node, int]) -> Target | None:
        """None where the node adds a bias of another form, or shares its weight with others.

        Args:
            view: of a node.
            places: where each node stands in the graph's order.
        """
        node, adder, biased = view.node, None, False
        weight = node.inputs[view.weight]
        if weight is None or len(weight.uses()) > 1:
            return None
        bias = None
        if view.bias is not None:
            bias = node.inputs[view.bias] if view.bias < len(node.inputs) else None
            biased = True
            if bias is not None and not _is_vector(bias):
                return None
        value, rest = node.outputs[0], list[str]()
        while not value.is_graph_output() and len(value.uses()) == 1:
            user, index = next(iter(value.uses()))
            if user.op_type != "Add" or user.domain not in ("", "ai.onnx"):
                break
            other = user.inputs[1 - index]
            if other is None or other is value:
                break
            if constant_of(other) is not None:
                if biased or rest or not _is_vector(other):
                    break
                bias, adder, biased = other, user, True
            else:
                producer = other.producer()
                if producer is not None and places.get(producer, 1 << 60) > places[node]:
                    break  # what is not repaired yet may still change
                rest.append(str(other.name))
            value = user.outputs[0]
        return cls(view, str(value.name), tuple(rest), bias, adder, biased)

    def numbers(self, groups: int) -> Matrix | None:
        """b, shape (groups, out / groups); None where there is none yet."""
        tensor = constant_of(self.bias)
        return None if tensor is None else tensor.numpy().astype(np.float64).reshape(groups, -1)

    def write(self, graph: ir.Graph, weight: Matrix, bias: Matrix | None) -> None:
        """Puts W and b where the node reads them; a bias that others read too stays theirs.

        Args:
            graph: that the node is in.
            weight: (groups, out / groups, k).
            bias: (groups, out / groups); None leaves it.
        """
        node = self.view.node
        old = tensor_of(self.view)
        assert old is not None
        name = str(node.outputs[0].name)
        array = self.view.tensor(weight, old.shape.numpy())
        replace_constant(graph, node, self.view.weight, array, old.dtype, f"{name}_weight")
        if bias is None or not self.biased:
            return
        owner, index = node, self.view.bias
        if self.adder is not None:
            owner, index = self.adder, list(self.adder.inputs).index(self.bias)
        assert index is not None
        if index >= len(owner.inputs):
            owner.resize_inputs(index + 1)
        replace_constant(graph, owner, index, bias.reshape(-1), old.dtype, f"{name}_bias")


def _is_vector(value: ir.Value) -> bool:
    tensor = constant_of(value)
    return tensor is not None and len(tensor.shape) == 1


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
