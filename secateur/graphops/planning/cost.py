"""What a model costs for any choice of units, without cutting it.

MACs and parameters are sums of products of axis sizes; the size of an axis is the number of its
positions whose unit stays. Both are linear in the number of positions, so a search over targets
evaluates them as often as it likes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.coupling.units import Axis, Coupling
from secateur.graphops.model.graph import constants

Mask = npt.NDArray[np.bool_]

_BRANCH = -1  # stands for an axis
# Integers that say where and how many, not how much.
_NO_PARAMETERS = (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING)


@dataclass(frozen=True, slots=True)
class Cost:
    """A sum of products of axis sizes, ready to evaluate."""

    _units: npt.NDArray[np.int32]  # units of all axes, one after another
    _starts: npt.NDArray[np.int64]  # where each axis begins
    _factors: npt.NDArray[np.float64]  # per term
    _branches: Mask  # per axis whether it is a branch, which is there as long as any unit is
    _axes: npt.NDArray[np.int64]  # (terms, width): axis numbers; the last one has size 1

    def of(self, keep: Mask) -> int:
        """The cost when the units in `keep` stay."""
        if not self._axes.size:
            return int(self._factors.sum())
        sizes = np.ones(self._starts.size + 1, np.float64)
        sizes[:-1] = np.add.reduceat(keep[self._units].astype(np.int64), self._starts)
        sizes[:-1][self._branches] = sizes[:-1][self._branches] > 0
        return int(np.rint((self._factors * sizes[self._axes].prod(axis=1)).sum()))


def macs(coupling: Coupling) -> Cost:
    """Multiply-accumulates of one forward pass, of one sample where the batch is free.

    Experts that work on the tokens that chose them save none when they go: others get the tokens.
    """
    share, routed = 1 / _batch(coupling), coupling.routed
    terms = [("" if t.node in routed else t.node, share, t.axes) for t in coupling.macs]
    return _cost(coupling, terms)


def params(coupling: Coupling) -> Cost:
    """Elements of the constants that hold weights."""
    return _cost(
        coupling,
        [
            (name, 1.0, tuple((name, axis) for axis in range(len(tensor.shape))))
            for name, tensor in coupling.constants.items()
            if tensor.dtype not in _NO_PARAMETERS
        ],
    )


def constant_bytes(coupling: Coupling) -> Cost:
    """Bytes of all constants, whatever they hold."""
    return _cost(
        coupling,
        [
            (name, tensor.dtype.itemsize, tuple((name, a) for a in range(len(tensor.shape))))
            for name, tensor in coupling.constants.items()
            if tensor.dtype != ir.DataType.STRING
        ],
    )


def macs_by_node(coupling: Coupling) -> dict[str, float]:
    """Multiply-accumulates of one sample, nothing cut, by label of the node."""
    divisor = _batch(coupling)
    found: dict[str, float] = {}
    for term in coupling.macs:
        sizes = [_size(coupling, name, axis) for name, axis in term.axes]
        found[term.node] = found.get(term.node, 0.0) + math.prod(sizes) / divisor
    return found


def elements_by_constant(coupling: Coupling) -> dict[str, int]:
    """Elements of each constant that holds weights, nothing cut."""
    return {
        name: tensor.size
        for name, tensor in coupling.constants.items()
        if tensor.dtype not in _NO_PARAMETERS
    }


def count_params(model: ir.Model) -> int:
    """Elements of a model's constants that hold weights."""
    tensors = constants(model.graph).values()
    return sum(tensor.size for tensor in tensors if tensor.dtype not in _NO_PARAMETERS)


def count_nonzero(model: ir.Model) -> int:
    """Those of them that are not zero."""
    tensors = constants(model.graph).values()
    return sum(
        int(np.count_nonzero(tensor.numpy()))
        for tensor in tensors
        if tensor.dtype not in _NO_PARAMETERS
    )


def _batch(coupling: Coupling) -> int:
    """The first binding of the batch where every input leaves it free, else 1."""
    pairs = [pair for pair in coupling.shapes.inputs.values() if pair[0]]
    free = [first[0] for first, second in pairs if first[0] != second[0]]
    return free[0] if free and len(free) == len(pairs) else 1


def _cost(coupling: Coupling, terms: list[tuple[str, float, tuple[Axis, ...]]]) -> Cost:
    """Of terms (what costs it, factor, axes)."""
    numbers: dict[Axis, int] = {}
    units: list[npt.NDArray[np.int32]] = []
    factors, products = [], []
    for part, constant, axes in terms:
        factor, product = constant, []
        if part in coupling.parts:
            axes = (*axes, (part, _BRANCH))
        for name, axis in axes:
            line = coupling.parts[name] if axis == _BRANCH else coupling.axes(name).get(axis)
            if line is None:
                factor *= _size(coupling, name, axis)
                continue
            if (name, axis) not in numbers:
                numbers[name, axis] = len(units)
                units.append(line)
            product.append(numbers[name, axis])
        factors.append(factor)
        products.append(product)
    width = max((len(product) for product in products), default=0)
    padded = [product + [len(units)] * (width - len(product)) for product in products]
    lengths = [line.size for line in units]
    return Cost(
        _units=np.concatenate(units) if units else np.zeros(0, np.int32),
        _starts=np.cumsum([0, *lengths[:-1]]) if units else np.zeros(0, np.int64),
        _branches=np.array([axis == _BRANCH for _, axis in numbers], np.bool_),
        _factors=np.array(factors, np.float64),
        _axes=np.array(padded, np.int64).reshape(len(products), width if units else 0),
    )


def _size(coupling: Coupling, name: str, axis: int) -> int:
    shape = coupling.shapes.of(name) or ()
    if name in coupling.constants:
        shape = tuple(coupling.constants[name].shape.numpy())
    return (shape[axis] if axis < len(shape) else None) or 1
