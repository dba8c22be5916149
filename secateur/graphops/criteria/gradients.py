"""Derivatives by gates: a factor of 1 on each unit where its consumers read it.

Reverse mode on the ONNX graph itself (`calibration.derivatives`), run in ONNX Runtime one
sample at a time:  ∂(sᵀy)/∂g(u)  for the outputs y of one sample and a direction s of the caller's.
A gate of 0 is the cut, by the law: at nodes that sum over the units, and only there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import Array
from secateur.graphops.calibration.data import batch_axes
from secateur.graphops.calibration.derivatives import (
    Direction,
    Jacobian,
    NoDerivative,
    opened,
    single_samples,
)
from secateur.graphops.criteria.context import Context

SAMPLES = 64  # at most; each costs several forward passes
_GATE = "secateur_gate_"

Gradient = npt.NDArray[np.float64]


class Gates:
    """A model with a gate on each unit, and the samples it runs on.

    Attributes:
        outputs: [sample][output], of the outputs that are floats, in their own dtype.
    """

    def __init__(self, context: Context, criterion: str) -> None:
        """Runs the model on the samples.

        Raises:
            Refused: `INVALID_CALIBRATION` without calibration data, `INVALID_RECIPE` where
                an operator has no derivative, or where no output is of floats.
        """
        self._context = context
        batches = context.seen(criterion).batches
        axes = batch_axes(context.model.graph, context.coupling.shapes)
        samples = single_samples(batches, axes, SAMPLES)
        try:
            proto, weights = opened(context.model)
            self._places, gates = _insert_gates(context, proto)
            self._jacobian = Jacobian(proto, gates, [{**weights, **one} for one in samples])
        except NoDerivative as error:
            raise _impossible(criterion, str(error)) from error
        self.outputs = self._jacobian.outputs

    def gradients(self, direction: Direction) -> Iterator[Gradient]:
        """∂(sᵀy)/∂g per unit, sample by sample.

        Args:
            direction: s of a sample.
        """
        return map(self._per_unit, self._jacobian.products(direction))

    def draws(self) -> Iterator[Gradient]:
        """vᵀ ∂y/∂g per unit, v = ±1 and drawn anew for each sample."""
        return map(self._per_unit, self._jacobian.draws(self._context.seed))

    def _per_unit(self, slopes: dict[str, Array]) -> Gradient:
        total = self._context.zeros()
        for (name, axis), slope in zip(self._places, slopes.values(), strict=True):
            units = self._context.coupling.axes(name)[axis]
            values = slope.reshape(-1).astype(np.float64)
            total += np.bincount(units, weights=values, minlength=total.size)
        return total


def _insert_gates(
    context: Context, proto: onnx.ModelProto
) -> tuple[list[tuple[str, int]], dict[str, Array]]:
    """Multiplies, in place, what exact contractions read by a new input.

    Returns:
        tensors and axes that are gated, and the ones that each gate takes.
    """
    index_of = {node: index for index, node in enumerate(context.model.graph)}
    gates: dict[tuple[str, int], int] = {}
    ones: dict[str, Array] = {}
    before: dict[int, list[onnx.NodeProto]] = {}
    for contraction in sorted(
        (c for c in context.coupling.contractions if c.exact and c.node in index_of),
        key=lambda c: index_of[c.node],
    ):
        value = contraction.node.inputs[contraction.index]
        name, axis = "" if value is None else str(value.name), contraction.axis
        line = context.coupling.axes(name).get(axis)
        if value is None or line is None or name in context.coupling.constants:
            continue
        index = index_of[contraction.node]
        if (name, axis) not in gates:
            gate = gates[name, axis] = len(gates)
            shape = [1] * len(context.coupling.shapes.of(name) or ())
            shape[axis] = line.size
            kind = value.dtype or ir.DataType.FLOAT
            ones[f"{_GATE}{gate}"] = np.ones(shape, kind.numpy())
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(f"{_GATE}{gate}", kind.value, shape)
            )
            before.setdefault(index, []).append(
                onnx.helper.make_node(
                    "Mul", [name, f"{_GATE}{gate}"], [f"{_GATE}{gate}_y"], f"{_GATE}{gate}"
                )
            )
        proto.graph.node[index].input[contraction.index] = f"{_GATE}{gates[name, axis]}_y"
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for index, node in enumerate(nodes):
        proto.graph.node.extend([*before.get(index, ()), node])
    return list(gates), ones


def _impossible(criterion: str, why: str) -> Refused:
    return refuse(
        Code.INVALID_RECIPE,
        f"criterion {criterion} needs derivatives, and onnx-ad cannot take those of this model",
        expected="a rule for every operator between units and outputs",
        found=why[:300],
        hint="Use reconstruction, which runs the model forward only.",
    )
