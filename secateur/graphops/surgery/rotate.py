"""Turns streams into another basis: T to what writes them, T⁻¹ to what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.calibration.moments import tensor_of, weight_of
from secateur.graphops.model.constants import set_constant
from secateur.graphops.model.graph import constant_of
from secateur.graphops.rotation.bases import Rotation, by_channel
from secateur.graphops.rules.linear import LinearMap

Matrix = npt.NDArray[np.float64]


def rotate(model: ir.Model, rotations: Sequence[Rotation]) -> ir.Model:
    """A new model that computes the same with streams in another basis; the one given stays.

    Args:
        model: that the streams were found in.
        rotations: of them.
    """
    result = model.clone()
    values = {str(value.name): value for value in _values(result.graph)}
    sides: dict[LinearMap, list[Matrix | None]] = {}  # T of what it writes, T⁻¹ of what it reads
    for turn in rotations:
        for view in turn.stream.producers:
            sides.setdefault(view, [None, None])[0] = turn.there
        for view in turn.stream.readers:
            sides.setdefault(view, [None, None])[1] = turn.back
    for view, (there, back) in sides.items():
        weight, old = weight_of(view)[0], tensor_of(view)
        assert old is not None
        if there is not None:
            weight = there @ weight
        if back is not None:
            weight = (by_channel(view, weight) @ back).reshape(weight.shape)
        name = str(view.node.inputs[view.weight].name)  # type: ignore[union-attr]
        _write(values[name], old, view.tensor(weight[None], old.shape.numpy()))
    for turn in rotations:
        for name, axis in turn.stream.added.items():
            old = constant_of(values[name])
            assert old is not None
            array = np.moveaxis(old.numpy().astype(np.float64), axis, -1) @ turn.there.T
            _write(values[name], old, np.moveaxis(array, -1, axis))
    return result


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        if node.op_type == "Constant":
            yield from node.outputs


def _write(value: ir.Value, old: ir.TensorProtocol, array: npt.NDArray[np.floating]) -> None:
    numbers = np.ascontiguousarray(array.astype(old.dtype.numpy()))
    set_constant(value, ir.Tensor(numbers, dtype=old.dtype, name=old.name))
