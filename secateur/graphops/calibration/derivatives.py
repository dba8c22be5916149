"""Derivatives of a graph in reverse mode, as another graph (onnx-ad); of fixed shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx.version_converter
import onnx_ad
import onnx_ir as ir

from secateur.graphops.calibration.data import Array, Feeds, alike, evenly
from secateur.graphops.calibration.respelling import respell
from secateur.graphops.model.graph import constants, opset_of, shape_of
from secateur.graphops.model.opening import self_contained
from secateur.graphops.model.rounding import leave_rounding_out
from secateur.graphops.model.runtime import first_line, open_session
from secateur.graphops.model.shapes import infer_shapes

PREFIX = "adj_"  # onnx-ad's
_OPSET = 16  # the first in which ScatterND adds: the derivative of what is taken several times
LARGE = 256 << 20  # bytes of a model's weights
_HEAVY = 1 << 20  # bytes of one
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)

# From the number of a sample, s: arrays like the outputs that are derived.
Direction = Callable[[int], list[Array]]


class NoDerivative(Exception):
    """Some operator has none, or shapes cannot be known; the message says which."""


def opened(model: ir.Model) -> tuple[onnx.ModelProto, Feeds]:
    """A model to take derivatives of, and what those of its inputs take that are its weights.

    Graphs of derivatives hold copies of all initializers: the weights of a large model are inputs
    instead, which ONNX Runtime reads where they are.

    Args:
        model: read only.

    Raises:
        NoDerivative: it is large, and its weights are no floats.
    """
    clone, weights = model.clone(), Feeds()
    if is_large(model):
        for name, value in list(clone.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or int(tensor.dtype) not in _FLOATS or tensor.nbytes < _HEAVY:
                continue
            weights[name] = tensor.numpy()
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            del clone.graph.initializers[name]
            if not value.is_graph_input():
                clone.graph.inputs.append(value)
        if (left := _bytes(clone)) > LARGE:
            raise NoDerivative(f"{left} bytes of weights that are no floats, {LARGE} at most")
    return ir.to_proto(self_contained(clone)), weights


def is_large(model: ir.Model) -> bool:
    """Whether copies of its weights count, and so does a run."""
    return _bytes(model) > LARGE


def _bytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in constants(model.graph).values())


def freeze(proto: onnx.ModelProto, feeds: Feeds) -> None:
    """Gives inputs the shapes of feeds, and every tensor the one that follows; in place.

    Raises:
        NoDerivative: shapes cannot be inferred.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    for value in inputs:
        if value.name in feeds:
            kind, shape = value.type.tensor_type.elem_type, feeds[value.name].shape
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    named = {one.domain for one in proto.opset_import}
    for domain in {node.domain for node in proto.graph.node} - named - {"", "ai.onnx"}:
        proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))  # ONNX Runtime needs none
    try:
        _infer(proto)
        for rewrite in (_convert, leave_rounding_out, respell):
            if rewrite(proto):
                _infer(proto)
    except Exception as error:
        raise NoDerivative(f"shapes cannot be inferred: {error}") from error


def _infer(proto: onnx.ModelProto) -> None:
    proto.CopyFrom(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    _add_shapes(proto)


def _convert(proto: onnx.ModelProto) -> bool:
    """Brings what is older to the opset that derivatives are spelt in, in place; whether it did."""
    if opset_of(proto) >= _OPSET:
        return False
    with contextlib.suppress(Exception):  # where onnx cannot, most of it has derivatives as it is
        proto.CopyFrom(onnx.version_converter.convert_version(proto, _OPSET))
        return True
    return False


def _add_shapes(proto: onnx.ModelProto) -> None:
    """Shapes that onnx does not infer, in place: those after shape arithmetic of older opsets."""
    outputs = {value.name: value for value in proto.graph.output}
    known = {
        v.name for v in (*proto.graph.value_info, *outputs.values()) if shape_of(v) is not None
    }
    missing = {name for node in proto.graph.node for name in node.output} - known - {""}
    if not missing:
        return
    shapes = infer_shapes(ir.serde.deserialize_model(proto))
    kept = [value for value in proto.graph.value_info if value.name not in missing]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    for name in missing:
        shape, kind = shapes.of(name), shapes.elements.get(name)
        if shape is None or None in shape or kind is None:
            continue
        made = onnx.helper.make_tensor_value_info(name, kind, shape)
        if name in outputs:
            outputs[name].CopyFrom(made)
        else:
            proto.graph.value_info.append(made)


def add_shift(
    graph: onnx.GraphProto, name: str, shift: str, kind: int, shape: Sequence[int]
) -> None:
    """Adds a new input of the graph to an output of its last node, in place. With zeros for it
    nothing changes, and the derivative with respect to it is that with respect to the output.

    Args:
        graph: its nodes up to the one in question.
        name: of the output.
        shift: name of the input.
        kind, shape: of both.
    """
    outputs, alone = graph.node[-1].output, f"{shift}_x"
    outputs[list(outputs).index(name)] = alone
    graph.node.append(onnx.helper.make_node("Add", [alone, shift], [name], shift))
    graph.input.append(onnx.helper.make_tensor_value_info(shift, kind, list(shape)))


def reverse(
    proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """A model that gives `PREFIX` + name of each input, and takes the same of each output.

    Raises:
        NoDerivative: onnx-ad has no rule for an operator on the way.
    """
    try:
        derived: onnx.ModelProto = onnx_ad.reverse(
            proto, inputs=list(inputs), outputs=list(outputs), layout="onnx"
        )
    except Exception as error:
        raise NoDerivative(str(error)) from error
    for node in derived.graph.node:  # a body runs again for its derivative, under the same name
        node.ClearField("name")
    _drop_unread(derived)
    _multiply_by_masks(derived, {f"{PREFIX}{name}" for name in outputs})
    return derived


@contextlib.contextmanager
def _runs() -> Iterator[None]:
    """What ONNX Runtime does not run is no derivative."""
    try:
        yield
    except Exception as error:
        raise NoDerivative(first_line(error.__cause__ or error)) from error


class Jacobian:
    """Derivatives of a graph's outputs by its gates, inputs that were put in for that.

    Args:
        proto: the graph; its shapes are fixed in place.
        gates: what each of them takes.
        samples: what all other inputs take, of one shape.

    Attributes:
        outputs: [sample][output], of the outputs that are floats, in their own dtype.

    Raises:
        NoDerivative: some operator has none, or no output is of floats.
    """

    def __init__(
        self, proto: onnx.ModelProto, gates: Mapping[str, Array], samples: Sequence[Feeds]
    ) -> None:
        self._gates, self._samples = gates, samples
        freeze(proto, {**samples[0], **gates})
        kinds = {value.name: value.type.tensor_type.elem_type for value in proto.graph.output}
        self._names = [name for name, kind in kinds.items() if kind in _FLOATS]
        if not self._names:
            raise NoDerivative("no output is of floats")
        derived = reverse(proto, list(gates), self._names)
        with _runs():
            self._session = open_session(derived.SerializeToString())
            forward = open_session(proto.SerializeToString())
            self.outputs: list[list[Array]] = [
                forward.run(self._names, {**feeds, **gates}) for feeds in samples
            ]

    def products(self, direction: Direction) -> Iterator[dict[str, Array]]:
        """∂(sᵀy)/∂g by name of the gate g, shaped like it, sample by sample.

        Args:
            direction: s of a sample.

        Raises:
            NoDerivative: ONNX Runtime does not run it.
        """
        wanted = [f"{PREFIX}{name}" for name in self._gates]
        for sample, feeds in enumerate(self._samples):
            seeds = {
                f"{PREFIX}{name}": array[..., None]
                for name, array in zip(self._names, direction(sample), strict=True)
            }
            with _runs():
                found = self._session.run(wanted, {**feeds, **self._gates, **seeds})
            yield {
                name: slope.reshape(gate.shape)
                for (name, gate), slope in zip(self._gates.items(), found, strict=True)
            }

    def draws(self, seed: int) -> Iterator[dict[str, Array]]:
        """vᵀ ∂y/∂g, v = ±1 and drawn anew for each sample: E[(vᵀJ)²] is the diagonal of JᵀJ.

        Hutchinson: A stochastic estimator of the trace of the influence matrix, 1990.
        """
        generator = np.random.default_rng(seed)
        return self.products(
            lambda sample: [
                generator.choice((-1.0, 1.0), array.shape).astype(array.dtype)
                for array in self.outputs[sample]
            ]
        )


def single_samples(batches: Sequence[Feeds], axes: Mapping[str, int], most: int) -> list[Feeds]:
    """Samples one by one, of the commonest shape: a graph of derivatives is of one shape.

    A sample is a batch where the model fixes its batch.

    Args:
        batches: what they are taken from, evenly.
        axes: along which samples lie, by input, where the batch is free.
        most: how many.
    """
    samples: list[Feeds] = []
    for batch in batches:
        count = min((batch[name].shape[axes[name]] for name in axes if name in batch), default=1)
        samples += [
            {
                name: array.take([place], axes[name]) if name in axes else array
                for name, array in batch.items()
            }
            for place in range(count)
        ]
    return evenly([samples[place] for place in alike(samples)], most)


def _drop_unread(proto: onnx.ModelProto) -> None:
    """Drops nodes that no output needs, in place: derivatives by the bounds of a Clip, that is."""
    needed = {value.name for value in proto.graph.output}
    kept = []
    for node in reversed(proto.graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(_read(node))
            kept.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(kept))


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, and all that are in its bodies."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read(inner)
        yield from (value.name for value in attribute.g.output)


def _multiply_by_masks(proto: onnx.ModelProto, seeds: set[str]) -> None:
    """Makes products of the derivatives that a mask lets through or makes zero, in place.

    Those of a Clip, that is: ONNX Runtime takes ten times as long for Where. Of what the model
    itself computes, where a mask may hide what is not finite, no Where is touched.

    Args:
        proto: of derivatives.
        seeds: names of the inputs that they start from.
    """
    zeros = {
        tensor.name: tensor.data_type
        for tensor in proto.graph.initializer
        if tensor.data_type in _FLOATS and not onnx.numpy_helper.to_array(tensor).any()
    }
    derived, nodes = set(seeds), list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        if not derived.isdisjoint(node.input):
            derived.update(node.output)
        if node.op_type != "Where" or node.input[1] not in derived or node.input[2] not in zeros:
            proto.graph.node.append(node)
            continue
        condition, value, zero = node.input
        mask = f"{node.output[0]}_mask"
        make = onnx.helper.make_node
        proto.graph.node.append(make("Cast", [condition], [mask], mask, to=zeros[zero]))
        proto.graph.node.append(make("Mul", [value, mask], node.output, node.name))
