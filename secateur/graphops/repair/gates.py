"""What can be refitted of a recurrent layer: the weights of its inputs.

    gates = W·x_t + R·h_(t−1) + b        W' x' ≈ W·x        of the hidden units that stay

W·x is linear in x, at every step alike; the hidden state is not: R and its bias stay. The target is
not in the graph: it is the original's W applied to what the original feeds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.data import Array
from secateur.graphops.calibration.moments import FITTED, WIDEST
from secateur.graphops.model.graph import constant_of
from secateur.graphops.repair import fit
from secateur.graphops.repair.constants import replace_constant
from secateur.graphops.repair.fit import Fitted, Sums
from secateur.graphops.repair.target import Ending
from secateur.graphops.rules.linear import pick_rows

Matrix = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_W, _B = 1, 3  # inputs of RNN, GRU and LSTM


@dataclass(frozen=True, slots=True)
class Gates:
    """The input weights of RNN, GRU or LSTM: W (directions, gates, inputs).

    Attributes:
        node: the layer.
        end: what the fit is to reproduce: the original's input, through the original's weights.
        y_axis: of the input's features.
    """

    node: ir.Node
    end: Ending
    y_axis: int = 2

    method = "refit"

    @classmethod
    def of(cls, node: ir.Node) -> Gates | None:
        """None where W or B is no constant, and where W is shared, too wide or not of floats."""
        x, weight = node.inputs[0], node.inputs[_W]
        bias = node.inputs[_B] if len(node.inputs) > _B else None
        tensor = constant_of(weight)
        if x is None or weight is None or tensor is None or len(weight.uses()) > 1:
            return None
        if tensor.dtype not in FITTED or tensor.shape.numpy()[2] > WIDEST:
            return None
        if bias is not None and constant_of(bias) is None:
            return None
        return cls(node, Ending(str(x.name), (), bias, None, biased=True))

    @property
    def x(self) -> str:
        """The layer's input."""
        return self.end.observed

    @property
    def grows(self) -> bool:
        """A layer without a bias gets one."""
        return self.end.grows

    def start(self) -> tuple[Matrix, Matrix]:
        """W (directions, gates, inputs), and 0 (directions, gates): what is to be added to b."""
        weight = input_weight(self.node)
        return weight, np.zeros(weight.shape[:2])

    def rows(self, x: Array, shape: tuple[int, ...], places: Places) -> Array:
        """Steps of x, (1, places, inputs); every direction reads the same."""
        return pick_rows(x, self.y_axis, places)[None]

    def fit(self, seen: Sums, held: Sums) -> Fitted:
        """Least squares."""
        return fit.choose(seen, held, *self.start(), biased=True)

    def write(self, graph: ir.Graph, weight: Matrix, bias: Matrix) -> None:
        """W, and what the fit adds to its bias; the half that belongs to R stays."""
        old = constant_of(self.node.inputs[_W])
        name = next((str(output.name) for output in self.node.outputs if output.name), self.x)
        assert old is not None
        dtype = old.dtype
        replace_constant(graph, self.node, _W, weight, dtype, f"{name}_weight")
        before = constant_of(self.end.bias)
        gates = weight.shape[1]
        whole = np.zeros((weight.shape[0], 2 * gates))
        if before is not None:
            whole += before.numpy()
        whole[:, :gates] += bias
        if len(self.node.inputs) <= _B:
            self.node.resize_inputs(_B + 1)
        replace_constant(graph, self.node, _B, whole, dtype, f"{name}_bias")


def input_weight(node: ir.Node) -> Matrix:
    """W of a recurrent layer, (directions, gates, inputs)."""
    tensor = constant_of(node.inputs[_W])
    assert tensor is not None
    return tensor.numpy().astype(np.float64)
