"""Turns streams into another basis: T to what writes them, T⁻¹ to what reads them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.moments import tensor_of, weight_of
from secateur.graphops.model.constants import set_constant
from secateur.graphops.model.graph import constant_of
from secateur.graphops.rotation.bases import Rotation, by_channel
from secateur.graphops.rules.linear import LinearMap

Matrix = npt.NDArray[np.float64]


def rotate(model: ir.Model, rotations: Iterable[Rotation]) -> ir.Model:
    """A new model that computes the same with streams in another basis; the one given stays.

    Args:
        model: that the streams were found in.
        rotations: of them.
    """
    result = model.clone()
    weights: dict[str, tuple[LinearMap, Matrix]] = {}  # of a square product, both sides change
    for turn in rotations:
        for view in turn.stream.producers:
            name, weight = _known(weights, view)
            weights[name] = view, turn.there @ weight
        for view in turn.stream.readers:
            name, weight = _known(weights, view)
            turned = by_channel(view, weight) @ turn.back
            weights[name] = view, turned.reshape(weight.shape)
    values = {str(value.name): value for value in _values(result.graph)}
    for name, (view, weight) in weights.items():
        old = tensor_of(view)
        assert old is not None
        _write(values[name], old, view.tensor(weight[None], old.shape.numpy()))
    for turn in rotations:
        for name, axis in turn.stream.added.items():
            old = constant_of(values[name])
            assert old is not None
            array = np.moveaxis(old.numpy().astype(np.float64), axis, -1) @ turn.there.T
            _write(values[name], old, np.moveaxis(array, -1, axis))
    return result


def _known(weights: dict[str, tuple[LinearMap, Matrix]], view: LinearMap) -> tuple[str, Matrix]:
    """Name of a product's weight, and the weight as it now is, (out, k)."""
    value = view.node.inputs[view.weight]
    assert value is not None
    name = str(value.name)
    return name, weights[name][1] if name in weights else weight_of(view)[0]


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        if node.op_type == "Constant":
            yield from node.outputs


def _write(value: ir.Value, old: ir.TensorProtocol, array: npt.NDArray[np.floating]) -> None:
    numbers = np.ascontiguousarray(array.astype(old.dtype.numpy()))
    set_constant(value, ir.Tensor(numbers, dtype=old.dtype, name=old.name))
