"""What can be set at a node so that its output becomes what it is to be.

`Target` is a matrix product whose weight and bias are refitted. `Correction` is what is left where
that cannot be: a scale and a shift per channel, of a normalisation; or the bias alone, of a
product whose weight several nodes share or which is too wide to be refitted. Its map is

    target ≈ a·y + c        a, c per channel        s ← a·s        t ← a·t + c

and takes the mean and the variance of y to those of the target as far as the two run together
(Nagel et al.: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
section 4.2, for c alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.data import Array
from secateur.graphops.calibration.moments import numbers_of, outputs_of, tensor_of, weight_of
from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.quantised import dequantiser
from secateur.graphops.repair import fit, integers
from secateur.graphops.repair.constants import replace_constant
from secateur.graphops.repair.fit import Fitted, Sums
from secateur.graphops.rules.linear import LinearMap, pick_rows
from secateur.graphops.rules.registry import Rule

Matrix = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class Repairable(Protocol):
    """What `Target`, `Correction` and `gates.Gates` have in common.

    Attributes:
        node: whose output is to become something else.
        x: name of what the fit reads.
        y_axis: of the output's channels.
        end: the sum that the output ends in.
        method: `refit`, `scale_shift`, `scale` or `shift`, for the report.
        grows: whether what is written takes a tensor more than there is.
    """

    @property
    def node(self) -> ir.Node: ...  # noqa: D102

    @property
    def x(self) -> str: ...  # noqa: D102

    @property
    def y_axis(self) -> int: ...  # noqa: D102

    @property
    def end(self) -> Ending: ...  # noqa: D102

    @property
    def method(self) -> str: ...  # noqa: D102

    @property
    def grows(self) -> bool: ...  # noqa: D102

    def start(self) -> tuple[Matrix, Matrix]:
        """W (groups, out, k) and b (groups, out) as they are."""

    def rows(self, x: Array, shape: tuple[int, ...], places: Places) -> Array:
        """x[p], (groups, places, k), of an output of that shape."""

    def fit(self, seen: Sums, held: Sums) -> Fitted:
        """Fits on the one and judges by the other."""

    def write(self, graph: ir.Graph, weight: Matrix, bias: Matrix) -> None:
        """Puts W and b where the node reads them, in the shapes that `start` gives."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The sum that a node's output ends in.

    A residual block ends in y + rest. What earlier cuts have changed in the rest, y can take back:
    its target is the original's sum minus the rest as it now is (He, Zhang, Sun: Channel Pruning,
    ICCV 2017, section 3.3, for residual networks).

    Attributes:
        observed: name of the sum.
        rest: names of what is added to y on the way.
        bias: the constant that plays b, None where there is none.
        adder: the node that adds it, where it is another one.
        biased: whether b can be set.
    """

    observed: str
    rest: tuple[str, ...]
    bias: ir.Value | None
    adder: ir.Node | None
    biased: bool

    @classmethod
    def of(
        cls,
        node: ir.Node,
        places: Mapping[ir.Node, int],
        bias: ir.Value | None = None,
        *,
        biased: bool,
        adds: bool = True,
    ) -> Ending:
        """Follows the output of a node as long as only sums read it.

        Args:
            node: the node.
            places: where each node stands in the graph's order.
            bias: its own, if it has one.
            biased: whether it could have one.
            adds: whether a constant that is added first is its bias, where it has none.
        """
        adder = None
        value, rest = node.outputs[0], list[str]()
        while not value.is_graph_output() and len(value.uses()) == 1:
            user, index = next(iter(value.uses()))
            if user.op_type != "Add" or user.domain != "":
                break
            other = user.inputs[1 - index]
            if other is None or other is value:
                break
            if constant_of(other) is not None:
                if biased or rest or not adds or not _is_vector(other):
                    break
                bias, adder, biased = other, user, True
            else:
                producer = other.producer()
                if producer is not None and places.get(producer, 1 << 60) > places[node]:
                    break  # what is not repaired yet may still change
                rest.append(str(other.name))
            value = user.outputs[0]
        return cls(str(value.name), tuple(rest), bias, adder, biased)

    @property
    def grows(self) -> bool:
        """Whether a bias that is written takes a tensor more than there is."""
        return self.biased and (self.bias is None or len(self.bias.uses()) > 1)

    def reader(self, node: ir.Node) -> ir.Node | None:
        """The one node that reads the sum; None where several do, or none, or it is an output.

        Args:
            node: of this ending.
        """
        value = node.outputs[0]
        while value.name != self.observed:
            value = next(iter(value.uses()))[0].outputs[0]
        users = [user for user, _ in value.uses()]
        return users[0] if len(users) == 1 and not value.is_graph_output() else None

    def numbers(self) -> Matrix | None:
        """b, flat; None where there is none yet."""
        tensor = numbers_of(self.bias)
        return None if tensor is None else tensor.numpy().astype(np.float64).reshape(-1)

    def write_bias(
        self, graph: ir.Graph, node: ir.Node, index: int | None, bias: Matrix, dtype: ir.DataType
    ) -> None:
        """Puts b where it is added; a bias that others read too stays theirs.

        Args:
            graph: that the nodes are in.
            node: of this ending.
            index: of its own bias among its inputs.
            bias: b, any shape.
            dtype: that it is to have.
        """
        name = f"{node.outputs[0].name}_bias"
        owner = node
        if self.adder is not None:
            owner, index = self.adder, list(self.adder.inputs).index(self.bias)
        assert index is not None
        if index >= len(owner.inputs):
            owner.resize_inputs(index + 1)
        quantised = dequantiser(owner.inputs[index])
        if quantised is not None:
            integers.write_bias(graph, quantised, bias.reshape(-1), name)
            return
        replace_constant(graph, owner, index, bias.reshape(-1), dtype, name)


@dataclass(frozen=True, slots=True)
class Target:
    """A matrix product whose weight, and bias where there is or can be one, are refitted.

    Attributes:
        view: the node.
        end: the sum that its output ends in.
    """

    view: LinearMap
    end: Ending

    method = "refit"

    @classmethod
    def of(cls, view: LinearMap, places: Mapping[ir.Node, int]) -> Target | None:
        """None where the node adds a bias of another form.

        Args:
            view: of a node.
            places: where each node stands in the graph's order.
        """
        bias = None
        if view.bias is not None:
            bias = view.node.inputs[view.bias] if view.bias < len(view.node.inputs) else None
            if bias is not None and not _is_vector(bias, outputs_of(view)):
                return None
        weight = dequantiser(view.node.inputs[view.weight])
        if weight is not None and not integers.fits(weight, bias):
            return None
        # one that is added to integers' products keeps ONNX Runtime from computing them as such
        biased = view.bias is not None and (weight is None or bias is not None)
        return cls(view, Ending.of(view.node, places, bias, biased=biased))

    @property
    def node(self) -> ir.Node:
        """Of the view."""
        return self.view.node

    @property
    def x(self) -> str:
        """What the node reads."""
        return str(getattr(self.node.inputs[0], "name", ""))

    @property
    def y_axis(self) -> int:
        """Of the view."""
        return self.view.y_axis

    @property
    def shared(self) -> bool:
        """Whether other nodes read the weight too."""
        weight = self.node.inputs[self.view.weight]
        return weight is None or len(weight.uses()) > 1

    @property
    def dequantiser(self) -> ir.Node | None:
        """The node that makes the weight of integers, None where it is stored as it is."""
        return dequantiser(self.node.inputs[self.view.weight])

    @property
    def grows(self) -> bool:
        """The weight is the node's own."""
        return self.end.grows

    def start(self) -> tuple[Matrix, Matrix]:
        """W and b as they are."""
        weight, bias = weight_of(self.view), self.end.numbers()
        shape = weight.shape[:2]
        return weight, np.zeros(shape) if bias is None else bias.reshape(shape)

    def rows(self, x: Array, shape: tuple[int, ...], places: Places) -> Array:
        """Rows of the node's input."""
        return self.view.rows(x, shape, places)

    def fit(self, seen: Sums, held: Sums) -> Fitted:
        """Least squares; of integers, as they will be rounded."""
        return fit.choose(seen, held, *self.start(), biased=self.end.biased, stored=self.stored)

    def stored(self, weight: Array) -> Array:
        """What is left of W where it is written."""
        node, old = self.dequantiser, tensor_of(self.view)
        if node is None or old is None:
            return weight
        rounded = integers.rounded(node, self.view.tensor(weight, old.shape.numpy()))
        return self.view.matrix(rounded.real()).astype(np.float64)

    def write(self, graph: ir.Graph, weight: Matrix, bias: Matrix) -> None:
        """Puts W and b where the node reads them; b only where it can be set."""
        old, node = tensor_of(self.view), self.dequantiser
        assert old is not None
        array = self.view.tensor(weight, old.shape.numpy())
        name = f"{self.node.outputs[0].name}_weight"
        if node is not None:
            integers.rounded(node, array).write(graph, name, dequantiser(self.end.bias))
        else:
            replace_constant(graph, self.node, self.view.weight, array, old.dtype, name)
        if self.end.biased:
            self.end.write_bias(graph, self.node, self.view.bias, bias, old.dtype)


@dataclass(frozen=True, slots=True)
class Correction:
    """A scale and a shift of a node's output per channel, or the shift alone.

    Attributes:
        node: the node.
        y_axis: of its channels.
        channels: how many there are.
        dtype: of scale and shift.
        scale: index of s among the inputs; None where it cannot be set.
        shift: index of t; None where another node adds it.
        end: the sum that the output ends in.
    """

    node: ir.Node
    y_axis: int
    channels: int
    dtype: ir.DataType
    scale: int | None
    shift: int | None
    end: Ending

    @classmethod
    def of_product(cls, target: Target) -> Correction | None:
        """The bias of a product whose weight stays; None where it has none."""
        tensor = tensor_of(target.view)
        if tensor is None or not target.end.biased:
            return None
        channels = outputs_of(target.view)
        return cls(
            target.node,
            target.y_axis,
            channels,
            tensor.dtype,
            None,
            target.view.bias if target.end.adder is None else None,
            target.end,
        )

    @classmethod
    def of_normalisation(
        cls, node: ir.Node, rule: Rule, rank: int, places: Mapping[ir.Node, int]
    ) -> Correction | None:
        """Scale and shift of a node that ends in them; None where they are not constant vectors.

        Args:
            node: whose rule has an `affine` axis.
            rule: that rule.
            rank: of its output.
            places: where each node stands in the graph's order.
        """
        index = {role: at for at, role in rule.roles.items() if at < len(node.inputs)}
        scale, shift = index.get("scale"), index.get("bias")
        if scale is None or rule.affine is None:
            return None
        tensor = constant_of(node.inputs[scale])
        bias = None if shift is None else node.inputs[shift]
        if tensor is None or len(tensor.shape) != 1 or (bias is not None and not _is_vector(bias)):
            return None
        end = Ending.of(node, places, bias, biased=bias is not None, adds=False)
        shift = None if bias is None else shift
        axis = rule.affine % rank
        return cls(node, axis, tensor.size, tensor.dtype, scale, shift, end)

    @property
    def method(self) -> str:
        """What is set."""
        return "shift" if self.scale is None else "scale_shift" if self.end.biased else "scale"

    @property
    def x(self) -> str:
        """The output itself is what is scaled and shifted."""
        return str(self.node.outputs[0].name)

    @property
    def grows(self) -> bool:
        """Vectors that others read too are not theirs to change."""
        scale = None if self.scale is None else self.node.inputs[self.scale]
        return self.end.grows or (scale is not None and len(scale.uses()) > 1)

    def start(self) -> tuple[Matrix, Matrix]:
        """1, and 0; or the bias, where another node adds it and y is without."""
        bias = self.end.numbers() if self.end.adder is not None else None
        shift = np.zeros(self.channels) if bias is None else bias
        return np.ones((self.channels, 1, 1)), shift.reshape(-1, 1)

    def rows(self, x: Array, shape: tuple[int, ...], places: Places) -> Array:
        """Each channel alone: (channels, places, 1)."""
        return pick_rows(x, self.y_axis, places).T[..., None]

    def fit(self, seen: Sums, held: Sums) -> Fitted:
        """Least squares; towards 1, where the scale can be set."""
        if self.scale is None:
            return fit.shift(seen, held, *self.start())
        return fit.choose(seen, held, *self.start(), biased=self.end.biased)

    def write(self, graph: ir.Graph, weight: Matrix, bias: Matrix) -> None:
        """s ← a·s and t ← a·t + c, a and c as W and b."""
        slope, shift = weight.reshape(-1), bias.reshape(-1)
        name = str(self.node.outputs[0].name)
        if self.end.biased and self.end.adder is None:
            old = self.end.numbers()
            shift = shift if old is None else slope * old + shift
        if self.scale is not None:
            scale = constant_of(self.node.inputs[self.scale])
            assert scale is not None
            array = slope * scale.numpy().astype(np.float64)
            replace_constant(graph, self.node, self.scale, array, self.dtype, f"{name}_scale")
        if self.end.biased:
            self.end.write_bias(graph, self.node, self.shift, shift, self.dtype)


def _is_vector(value: ir.Value, size: int | None = None) -> bool:
    """Whether it is a constant vector, of that size where one is given."""
    tensor = numbers_of(value)
    return tensor is not None and len(tensor.shape) == 1 and size in (None, tensor.size)
