"""Second moments of what linear nodes read, over calibration data.

    n = Σ 1      s = Σ x      S = Σ x xᵀ        over sampled positions of all samples

Accumulated in float64 from float32 products of one batch each (BLAS), so that any amount of data
takes the memory of one batch and of the moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops import rules
from secateur.graphops.calibration.network import Network, OutputShapes
from secateur.graphops.model.graph import constant_of
from secateur.graphops.model.quantised import dequantiser, real_tensor
from secateur.graphops.model.shapes import Shapes
from secateur.graphops.rules.linear import LinearMap

Matrix = npt.NDArray[np.float64]

# Entries of x beyond which a matrix of second moments is too large to hold and to factor.
WIDEST = 6144
# Rows: as many as this many multiply-accumulates allow (a fifth of a second on one core), but
# enough for the number of entries, and no more than can be told apart. To gather an entry takes as
# long as so many: of a depthwise convolution, which multiplies little, that is nearly all.
_WORK = 1.2e10
_GATHERED = 64
_ROWS_PER_ENTRY = 12
_MOST_ROWS = 65536
_LEAST_DAMPING = 1e-3
FITTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def gram(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Σ x xᵀ, shape (groups, k, k), of rows (groups, places, k)."""
    product: npt.NDArray[np.float32]
    if rows.shape[0] > 1:
        product = np.matmul(rows.transpose(0, 2, 1), rows)
    else:
        product = (rows[0].T @ rows[0])[None]  # NumPy sees that it is symmetric: half the work
    return product


def total(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Σ x, shape (groups, k), of rows (groups, places, k)."""
    ones = np.ones((1, rows.shape[1]), rows.dtype)
    product: npt.NDArray[np.float32] = np.matmul(ones, rows)[:, 0]
    return product


@dataclass(slots=True)
class Moments:
    """Moments of one node's x.

    Attributes:
        count: rows seen.
        total: (groups, k).
        second: (groups, k, k).
    """

    count: int
    total: Matrix
    second: Matrix

    @classmethod
    def zeros(cls, groups: int, width: int) -> Moments:
        """Of nothing yet."""
        return cls(0, np.zeros((groups, width)), np.zeros((groups, width, width)))

    def add(self, rows: npt.NDArray[np.float32]) -> None:
        """Adds x[p], shape (groups, places, k)."""
        self.count += rows.shape[1]
        self.total += total(rows)
        self.second += gram(rows)

    def mean(self) -> Matrix:
        """(groups, k)."""
        return self.total / self.count

    def covariance(self) -> Matrix:
        """(groups, k, k)."""
        mean = self.mean()
        return self.second / self.count - mean[:, :, None] * mean[:, None, :]

    def about_zero(self) -> Matrix:
        """(groups, k, k), E[x xᵀ]."""
        return self.second / self.count

    def damping(self) -> Matrix:
        """What so few rows cannot tell of each variance, (groups,).

        δ = max(10⁻³, k / 10n) of the mean variance.
        """
        mean, k = self.mean(), self.total.shape[1]
        variances = np.trace(self.second, axis1=1, axis2=2) / self.count - (mean**2).sum(axis=1)
        share = max(_LEAST_DAMPING, k / (10 * self.count))
        found: Matrix = share * np.maximum(variances / k, 1e-12)
        return found

    def damped(self) -> Matrix:
        """The covariance, plus δ (`damping`) to each variance: (groups, k, k)."""
        damped = self.covariance()
        k = damped.shape[1]
        damped[:, np.arange(k), np.arange(k)] += self.damping()[:, None]
        return damped


def linear_maps(model: ir.Model, shapes: Shapes, *, quantised: bool = False) -> Iterator[LinearMap]:
    """Every node of the main graph that is a matrix product with a constant weight.

    Args:
        model: the model.
        shapes: of it, or of the one it was cut from.
        quantised: whether weights that a DequantizeLinear makes of constants count.
    """
    opsets = dict(model.opset_imports)
    for node in model.graph:
        rule = rules.of(node, opsets)
        if rule is None or rule.linear is None or len(node.inputs) < 2:
            continue
        x, weight = node.inputs[0], node.inputs[1]
        tensor = numbers_of(weight) if quantised else constant_of(weight)
        shape = None if x is None else shapes.of(str(x.name))
        if shape is None or tensor is None or tensor.dtype not in FITTED:
            continue
        view = rule.linear(node, [size or 0 for size in shape], tensor.shape.numpy())
        if view is not None:
            yield view


def numbers_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """A constant, or what a DequantizeLinear makes of constants; None for anything else."""
    node = dequantiser(value)
    return constant_of(value) if node is None else real_tensor(node)


def tensor_of(view: LinearMap) -> ir.TensorProtocol | None:
    """The constant that a node multiplies with, None where it is not one."""
    return numbers_of(view.node.inputs[view.weight])


def weight_of(view: LinearMap) -> Matrix:
    """W in float64, shape (groups, out / groups, k)."""
    tensor = tensor_of(view)
    assert tensor is not None
    return view.matrix(tensor.numpy()).astype(np.float64)


def width(view: LinearMap) -> int:
    """Entries of x[p]."""
    return _sizes(view)[2]


def outputs_of(view: LinearMap) -> int:
    """Channels of y, of all groups together."""
    groups, out, _ = _sizes(view)
    return groups * out


def _sizes(view: LinearMap) -> tuple[int, int, int]:
    """Of W, (groups, out, k); it is not read."""
    tensor = tensor_of(view)
    assert tensor is not None
    groups, out, entries = view.matrix(np.broadcast_to(np.float32(0), tensor.shape.numpy())).shape
    return groups, out, entries


def sample_places(
    positions: int, batches: int, groups: int, entries: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Positions of one batch to look at, ascending.

    Args:
        positions: of the output, all samples of the batch together.
        batches: how many there will be.
        groups: maps side by side.
        entries: of x in each of them.
        generator: draws them where there are more than are needed.
    """
    affordable = int(_WORK / (groups * entries * (entries + _GATHERED)))
    rows = max(min(affordable, _MOST_ROWS), _ROWS_PER_ENTRY * entries)
    wanted = -(-rows // batches)
    if positions <= wanted:
        return np.arange(positions)
    return np.sort(generator.choice(positions, wanted, replace=False))


def collect(
    network: Network,
    views: Sequence[LinearMap],
    seed: int,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[str, Moments]:
    """Moments of x of each node, by the name of its output; of those that read the same, once.

    Args:
        network: standing at its beginning.
        views: of nodes no wider than `WIDEST`.
        seed: of the positions.
        tell: told the share that is done.
    """
    found: dict[str, Moments] = {}
    shared: dict[object, Moments] = {}
    for place, view in enumerate(views):
        key = _reading(view)
        if key not in shared:
            shared[key] = _of_one(network, view, seed + place)
        found[str(view.node.outputs[0].name)] = shared[key]
        tell((place + 1) / len(views))
    return found


def _reading(view: LinearMap) -> object:
    """Equal for nodes that have the same rows."""
    x = view.node.inputs[0]
    attributes = tuple(
        sorted((name, repr(attribute.value)) for name, attribute in view.node.attributes.items())
    )
    tensor = tensor_of(view)
    kernel = () if tensor is None else tensor.shape.numpy()[2:]
    return (view.node.op_type, str(x.name if x else ""), attributes, kernel)


def _of_one(network: Network, view: LinearMap, seed: int) -> Moments:
    network.advance(view.node)
    x, y = str(view.node.inputs[0].name), str(view.node.outputs[0].name)  # type: ignore[union-attr]
    before, shapes = network.piece([x]), OutputShapes(network, y)
    generator = np.random.default_rng(seed)
    entries = width(view)
    moments = Moments.zeros(view.groups, entries)
    for batch in range(network.batches):
        data = before.run(batch)[x]
        shape = shapes.of(batch, data)
        positions = math.prod(shape) // shape[view.y_axis]
        places = sample_places(positions, network.batches, view.groups, entries, generator)
        moments.add(view.rows(data, shape, places).astype(np.float32, copy=False))
    moments.count = max(moments.count, 1)  # where no sample came by (an expert): as if zeros had
    return moments
