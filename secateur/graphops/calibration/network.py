"""Runs a model to any of its tensors, a piece at a time.

To know a tensor deep in a graph, everything before it must run. Asked for one layer after another
that would be quadratic, so a `Network` can stand still behind a node: the values that cross that
point are held, and what follows runs from there. Where they are too large to hold, it stays where
it stood and runs the longer way: memory is bounded, and only time is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from secateur.graphops.calibration.data import Array, Feeds
from secateur.graphops.model.graph import captured_by
from secateur.graphops.model.opening import release, serialise_node
from secateur.graphops.model.quantised import dequantiser
from secateur.graphops.model.runtime import does_not_run, open_session

HOLD = 512 << 20  # bytes of values held between nodes


class Network:
    """A model and the batches it runs on.

    Args:
        model: its weights may be changed while the network stands before the nodes that read
            them.
        batches: feeds; all of them are held in memory.
        hold: most bytes of values to hold, the feeds not counted; of all batches, by what the
            first one takes.
    """

    def __init__(self, model: ir.Model, batches: Sequence[Feeds], hold: int = HOLD) -> None:
        self._model = model
        self._nodes = list(model.graph)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._at = 0  # nodes before it have run
        self._feeds = batches
        self._held: list[Feeds] = [dict(batch) for batch in batches]
        self._hold = hold

    def place(self, node: ir.Node) -> int:
        """Where a node stands in the order in which the network runs them."""
        return self._place[node]

    @functools.cached_property
    def _last_use(self) -> dict[str, int]:
        return last_uses(self._nodes)

    @property
    def batches(self) -> int:
        """How many batches it runs on."""
        return len(self._held)

    def piece(self, names: Iterable[str]) -> Piece:
        """What computes tensors from where the network stands."""
        return Piece(self, list(dict.fromkeys(names)))

    def beside(self, model: ir.Model) -> Network:
        """Another model on the values held here: one that differs only in what is still to run.

        It may read the feeds again, which the model itself does no more: a size after a cut comes
        from them.
        """
        together = [{**feeds, **held} for feeds, held in zip(self._feeds, self._held, strict=True)]
        return Network(model, together, self._hold)

    def advance(self, node: ir.Node) -> None:
        """Stands just before `node`, if the values that cross there may be held."""
        stop = self._place[node]
        crossing = [
            name
            for place in range(self._at, stop)
            if not _makes_a_weight(self._nodes[place])  # weights are read where they lie
            for name in (str(output.name) for output in self._nodes[place].outputs if output.name)
            if self._last_use.get(name, -1) >= stop
        ]
        if stop <= self._at:
            return
        kept = [name for name in self._held[0] if self._last_use.get(name, -1) >= stop]
        piece, held = self.piece(crossing), self._held
        found = piece.run(0)
        if not all(map(_can_be_held, found.values())):
            return
        share = _bytes(held[0]) / max(sum(map(_bytes, held)), 1)
        if _bytes(found) > self._hold * share:
            return
        for batch, values in enumerate(held):
            found = found if batch == 0 else piece.run(batch)
            held[batch] = {**{name: values[name] for name in kept}, **found}
        self._at = stop

    def graph(self, names: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
        """A model of the nodes between here and tensors; and the inputs it takes."""
        given = self._held[0]
        wanted, nodes = set(names), []
        for place in range(len(self._nodes) - 1, -1, -1):
            node = self._nodes[place]
            if any(output.name in wanted and output.name not in given for output in node.outputs):
                nodes.append(node)
                wanted.update(str(value.name) for value in read_by(node))
        graph = self._model.graph
        proto = onnx.ModelProto(ir_version=max(self._model.ir_version, 4))
        for domain, version in self._model.opset_imports.items():
            proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
        proto.graph.name = "piece"
        proto.graph.node.extend(map(serialise_node, reversed(nodes)))
        inputs = [name for name in given if name in wanted]
        for name in inputs:
            dtype = onnx.helper.np_dtype_to_tensor_dtype(given[name].dtype)
            sizes = _common(held[name].shape for held in self._held)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, sizes))
        for name, value in graph.initializers.items():
            if name in wanted and value.const_value is not None:
                constant = value.const_value
                tensor = ir.Tensor(constant.numpy(), name=name, dtype=constant.dtype)
                proto.graph.initializer.append(ir.serde.serialize_tensor(tensor))
                release(constant)
        outputs = [name for name in names if name not in given]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return proto, inputs

    def values(self, batch: int) -> Feeds:
        """What is held of a batch."""
        return self._held[batch]


class Piece:
    """A session from where a network stood to some tensors.

    Raises:
        Refused: `MODEL_DOES_NOT_RUN` with ONNX Runtime's message; so does `run`.
    """

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network = network
        self._given = [name for name in names if name in network.values(0)]
        self._computed = [name for name in names if name not in network.values(0)]
        self._session: ort.InferenceSession | None = None
        if self._computed:
            model, self._inputs = network.graph(self._computed)
            try:
                self._session = open_session(model.SerializeToString(), spin=False)
            except Exception as error:
                raise does_not_run(error, network.values(0)) from None

    def run(self, batch: int) -> dict[str, Array]:
        """The tensors, by name, of one batch."""
        values = self._network.values(batch)
        found: dict[str, Any] = {name: values[name] for name in self._given}
        if self._session is not None:
            feeds = {name: values[name] for name in self._inputs}
            results = self._session.run(self._computed, feeds)
            found.update(zip(self._computed, results, strict=True))
        return found


class OutputShapes:
    """Shapes of what a node puts out by those of what it reads; the node runs once for each.

    Args:
        network: standing before the node.
        y: what the node puts out.
    """

    def __init__(self, network: Network, y: str) -> None:
        self._network, self._y = network, y
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    @functools.cached_property
    def _through(self) -> Piece:
        return self._network.piece([self._y])

    def of(self, batch: int, x: Array) -> tuple[int, ...]:
        """The shape of y.

        Args:
            batch: that x is of.
            x: what the node reads.
        """
        if x.shape not in self._known:
            self._known[x.shape] = self._through.run(batch)[self._y].shape
        return self._known[x.shape]


def read_by(node: ir.Node) -> list[ir.Value]:
    """What a node reads: its inputs, and what its subgraphs take from outside."""
    found = [value for value in node.inputs if value is not None and value.name]
    return found + [value for value in captured_by(node) or () if value.name]


def last_uses(nodes: Sequence[ir.Node]) -> dict[str, int]:
    """By value, the place of the last node that reads it."""
    return {str(value.name): place for place, node in enumerate(nodes) for value in read_by(node)}


def _common(shapes: Iterable[tuple[int, ...]]) -> list[int | None]:
    """The sizes that all shapes have, None where they differ; and for 0, which says nothing."""
    return [
        sizes[0] or None if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)
    ]


def _makes_a_weight(node: ir.Node) -> bool:
    return node.op_type == "Constant" or any(map(dequantiser, node.outputs))


def _bytes(values: Feeds) -> int:
    return sum(array.nbytes for array in values.values() if isinstance(array, np.ndarray))


def _can_be_held(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
