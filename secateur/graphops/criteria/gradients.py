"""Derivatives by gates: a factor of 1 on each unit where its consumers read it.

Reverse mode on the ONNX graph itself (`calibration.derivatives`), run in ONNX Runtime one
sample at a time:  ∂(sᵀy)/∂g(u)  for the outputs y of one sample and a direction s of the caller's.
A gate of 0 is the cut, by the law: at nodes that sum over the units, and only there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration import Array, Feeds
from secateur.graphops.calibration.derivatives import PREFIX, NoDerivative, freeze, reverse
from secateur.graphops.criteria.context import Context
from secateur.graphops.model.opening import self_contained
from secateur.graphops.model.runtime import open_session

SAMPLES = 64  # at most; each costs several forward passes
_GATE = "secateur_gate_"

Gradient = npt.NDArray[np.float64]
# From the number of a sample, s: arrays like its outputs.
Direction = Callable[[int], list[Array]]


class Gates:
    """A model with a gate on each unit, and the samples it runs on.

    Samples are of one shape, the one that most of them have: a graph of derivatives is of one
    shape too. A sample is a batch where the model fixes its batch.

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
        self._feeds = _samples(context, criterion)
        proto = ir.to_proto(self_contained(context.model.clone()))
        self._places = _insert_gates(context, proto)
        try:
            freeze(proto, self._feeds[0])
        except NoDerivative as error:
            raise _impossible(criterion, str(error)) from error
        kinds = {value.name: value.type.tensor_type.elem_type for value in proto.graph.output}
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
        self._names = [name for name, kind in kinds.items() if kind in floats]
        if not self._names:
            raise _impossible(criterion, "no output is of floats")
        self._session = _derive(proto, self._names, len(self._places), criterion)
        self._gates = {
            gate.name: np.ones(
                [dim.dim_value for dim in gate.type.tensor_type.shape.dim],
                onnx.helper.tensor_dtype_to_np_dtype(gate.type.tensor_type.elem_type),
            )
            for gate in proto.graph.input
            if gate.name.startswith(_GATE)
        }
        forward = open_session(proto.SerializeToString())
        self.outputs: list[list[Array]] = [
            forward.run(self._names, {**feeds, **self._gates}) for feeds in self._feeds
        ]

    def gradients(self, direction: Direction) -> Iterator[Gradient]:
        """∂(sᵀy)/∂g per unit, sample by sample.

        Args:
            direction: s of a sample.
        """
        wanted = [f"{PREFIX}{_GATE}{index}" for index in range(len(self._places))]
        for sample, feeds in enumerate(self._feeds):
            seeds = {
                f"{PREFIX}{name}": array[..., None]
                for name, array in zip(self._names, direction(sample), strict=True)
            }
            found = self._session.run(wanted, {**feeds, **self._gates, **seeds})
            total = self._context.zeros()
            for (name, axis), gradient in zip(self._places, found, strict=True):
                units = self._context.coupling.axes(name)[axis]
                values = gradient.reshape(-1).astype(np.float64)
                total += np.bincount(units, weights=values, minlength=total.size)
            yield total


def _samples(context: Context, criterion: str) -> list[Feeds]:
    """Single samples of the commonest shape, `SAMPLES` of them at most."""
    pairs = context.coupling.shapes.inputs
    free = {name for name, (a, b) in pairs.items() if a and b and a[0] != b[0]}
    samples: list[Feeds] = []
    for batch in context.seen(criterion).batches:
        count = min((len(batch[name]) for name in free if name in batch), default=1)
        samples += [
            {
                name: array[place : place + 1] if name in free else array
                for name, array in batch.items()
            }
            for place in range(count)
        ]
    shapes = [tuple(array.shape for array in sample.values()) for sample in samples]
    commonest = Counter(shapes).most_common(1)[0][0]
    alike = [sample for sample, shape in zip(samples, shapes, strict=True) if shape == commonest]
    chosen = np.linspace(0, len(alike) - 1, min(len(alike), SAMPLES)).round().astype(int)
    return [alike[place] for place in chosen.tolist()]


def _insert_gates(context: Context, proto: onnx.ModelProto) -> list[tuple[str, int]]:
    """Multiplies, in place, what exact contractions read by a new input; the places gated."""
    index_of = {node: index for index, node in enumerate(context.model.graph)}
    gates: dict[tuple[str, int], int] = {}
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
            kind = (value.dtype or ir.DataType.FLOAT).value
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(f"{_GATE}{gate}", kind, shape)
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
    return list(gates)


def _derive(
    proto: onnx.ModelProto, outputs: list[str], gates: int, criterion: str
) -> ort.InferenceSession:
    """A session of the model with the derivative of each gate as an output."""
    try:
        derived = reverse(proto, [f"{_GATE}{index}" for index in range(gates)], outputs)
        return open_session(derived.SerializeToString())
    except Exception as error:
        raise _impossible(criterion, str(error)) from error


def _impossible(criterion: str, why: str) -> Refused:
    return refuse(
        Code.INVALID_RECIPE,
        f"criterion {criterion} needs derivatives, and onnx-ad cannot take those of this model",
        expected="a rule for every operator between units and outputs",
        found=why[:300],
        hint="Use reconstruction, which runs the model forward only.",
    )
