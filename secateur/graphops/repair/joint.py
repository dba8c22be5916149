"""Refits the layers of a block together, so that what leaves the block is what left it before.

Layers that are fitted one by one (`repair`) each aim at their own outputs in the original. What
one of them cannot give, those beside it could make up for, if they knew. Here the weights of a
block (`blocks`) descend along

    ∇ E‖y − ŷ‖²        y: what leaves the block in the original, ŷ: what leaves it here

over the batches that learn (`descent`); those that judge choose what is kept of it, or nothing.
Blocks rather than the whole network, after Li et al.: BRECQ, ICLR 2021: a few hundred samples say
much about the many positions of a tensor inside, and little about the outputs.

ONNX Runtime runs a block and its derivatives with respect to what each layer puts out; those of
the weights are products with the rows that the layer read there (`rules.linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from secateur.graphops.calibration.data import Array, Feeds, alike, sample_count
from secateur.graphops.calibration.derivatives import (
    PREFIX,
    NoDerivative,
    add_shift,
    freeze,
    reverse,
)
from secateur.graphops.calibration.network import Network
from secateur.graphops.calibration.observed import Observed
from secateur.graphops.model.graph import node_label
from secateur.graphops.model.runtime import open_session
from secateur.graphops.planning import cost
from secateur.graphops.repair.blocks import Block, blocks
from secateur.graphops.repair.descent import Descending
from secateur.graphops.repair.repair import EXACT, Mask, kept_positions, repairable, stands
from secateur.graphops.repair.target import Repairable
from secateur.report import RepairStep

_WORK = 4e11  # multiply-accumulates of all steps: up to a minute on two cores
_LEAST_STEPS = 40  # fewer have helped no model
_MOST_PASSES = 10  # over all samples
_COST = 3  # forward passes that one of a block and its derivatives takes
_RATE = 5e-3  # η of the first step; it falls to 0 along a cosine
_STEP = 32  # samples to a step
_LOOKS = 5  # at the batches that judge
_LEAST_LEARNERS = 4  # batches
_ERROR, _WANTED = "secateur_error", "secateur_wanted"
_WEIGHT, _SHIFT = "secateur_weight_", "secateur_shift_"


def refit_together(
    pruned: ir.Model,
    observed: Observed,
    keep: Mask,
    seed: int,
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[RepairStep, ...]:
    """Refits block after block, on what the part before, already refitted, feeds each.

    A model for which `_LEAST_STEPS` are more than `_WORK` is left as it is, and so is a block with
    an operator that has no derivative.

    Args: as of `repair`.
    """
    steps = int(_WORK / (_COST * _STEP * max(cost.macs(observed.coupling).of(keep), 1)))
    if steps < _LEAST_STEPS:
        return ()
    before, after = Network(observed.model, observed.batches), Network(pruned, observed.batches)
    made = {str(value.name) for node in observed.model.graph for value in node.outputs}
    found = [
        block for block in blocks(pruned, _of_known_sizes(pruned, observed)) if block.end in made
    ]
    places = stands(observed.model, [block.end for block in found])
    taken = []
    for place, (block, beyond) in enumerate(zip(found, places, strict=True)):
        if beyond is not None:
            before.advance(beyond)
        after.advance(block.first)
        aims = _Aims(before, block.end, observed, keep)
        common = alike(map(after.values, range(after.batches)))
        judges = [batch for batch in common if observed.judges_with(batch)]
        learners = [batch for batch in common if batch not in judges]
        if not judges or len(learners) < _LEAST_LEARNERS:
            continue
        try:
            generator = np.random.default_rng(seed + place)
            fit = _JointFit(block, after, aims, (learners, judges), generator)
        except NoDerivative:
            continue
        errors = fit.run(steps)
        if errors is not None:
            for layer in fit.layers:
                layer.write(pruned.graph)
            taken.append(
                RepairStep(
                    node=node_label(block.targets[-1].node),
                    error_before=errors[0],
                    error_after=errors[1],
                    method="joint",
                )
            )
        tell((place + 1) / len(found))
    return tuple(taken)


def _of_known_sizes(pruned: ir.Model, observed: Observed) -> list[Repairable]:
    """Layers whose results are as large for one sample as for another: a gate of the same size is
    put behind each."""
    shapes = observed.coupling.shapes
    return [
        one
        for one in repairable(pruned, shapes)
        if not shapes.axes_by_data(str(one.node.outputs[0].name))
    ]


class _Aims:
    """What is to leave a block, batch by batch."""

    def __init__(self, original: Network, end: str, observed: Observed, keep: Mask) -> None:
        self._piece, self._end = original.piece([end]), end
        self._coupling, self._keep = observed.coupling, keep

    def of(self, batch: int) -> Array:
        """The original's tensor without the positions that went."""
        array = self._piece.run(batch)[self._end]
        return kept_positions(array, self._end, self._coupling, self._keep)


class _JointFit:
    """The fit of one block, on batches of one shape.

    Args:
        block: the block.
        network: the pruned one, standing before it.
        aims: what is to leave it.
        batches: those that learn and those that judge.
        generator: draws batches and positions.

    Attributes:
        layers: W and b of each of its layers.

    Raises:
        NoDerivative: of the block, or in the original its end has another shape.
    """

    def __init__(
        self,
        block: Block,
        network: Network,
        aims: _Aims,
        batches: tuple[list[int], list[int]],
        generator: np.random.Generator,
    ) -> None:
        self.layers = [Descending(target) for target in block.targets]
        self._block, self._network, self._aims = block, network, aims
        self._learners, self._judges = batches
        self._generator = generator
        one = self._judges[0]
        self._ys = [str(target.node.outputs[0].name) for target in block.targets]
        self._xs = [target.x for target in block.targets]
        found = network.piece([block.end, *self._ys]).run(one)
        self._shapes = [found[name].shape for name in self._ys]
        aim = aims.of(one)
        if aim.shape != found[block.end].shape or aim.dtype != np.float32:
            raise NoDerivative(f"{block.end} has become another tensor")
        proto, self._inputs = network.graph([block.end, *self._ys])
        self._open_weights(proto)
        _end_in_error(proto, block.end, aim)
        whole = proto.SerializeToString()  # derivatives may be of less: without rounding
        freeze(proto, {name: network.values(one)[name] for name in self._inputs})
        try:
            self._forward = open_session(whole)
            self._backward, self._slopes, self._read = self._derive(proto)
            self._derivatives(one)
        except Exception as error:  # derivatives that ONNX Runtime does not run are none
            raise NoDerivative(str(error)) from error

    def _open_weights(self, proto: onnx.ModelProto) -> None:
        """Makes inputs of the weights, and of what is added to each layer's output; in place."""
        places = {name: place for place, name in enumerate(self._ys)}
        nodes = list(proto.graph.node)
        del proto.graph.node[:]
        for node in nodes:
            proto.graph.node.append(node)
            place = places.get(node.output[0])
            if place is None:
                continue
            weight, y = f"{_WEIGHT}{place}", self._ys[place]
            proto.graph.node[-1].input[self._block.targets[place].view.weight] = weight
            proto.graph.input.append(_input(weight, self.layers[place].shape))
            float32, shape = onnx.TensorProto.FLOAT, self._shapes[place]
            add_shift(proto.graph, y, f"{_SHIFT}{place}", float32, shape)
        read = {name for node in proto.graph.node for name in node.input}
        kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)

    def _derive(self, proto: onnx.ModelProto) -> tuple[ort.InferenceSession, list[str], list[str]]:
        """A session, the outputs that are derivatives, and those that layers read."""
        shifts = [f"{_SHIFT}{place}" for place in range(len(self.layers))]
        derived = reverse(proto, shifts, [_ERROR])
        read = [name for name in dict.fromkeys(self._xs) if name not in self._inputs]
        derived.graph.output.extend(onnx.ValueInfoProto(name=name) for name in read)
        session = open_session(derived.SerializeToString())
        return session, [f"{PREFIX}{name}" for name in shifts], read

    def run(self, steps: int) -> tuple[float, float] | None:
        """Relative errors on the batches that judge, before and after; None where none fell.

        Args:
            steps: at most.
        """
        values = np.concatenate([self._aims.of(batch) for batch in self._judges])
        variance = max(float(values.var(axis=0, dtype=np.float64).sum()) * len(values), 1e-30)
        start = best = self._judge()
        if start <= EXACT * variance:
            return None
        together = max(_STEP // sample_count(self._network.values(self._learners[0])), 1)
        steps = min(steps, _MOST_PASSES * -(-len(self._learners) // together))
        found, batches = None, self._draw()
        for count in range(1, steps + 1):
            for _ in range(together):
                self._learn(next(batches))
            rate = _RATE * (1 + np.cos(np.pi * (count - 1) / steps)) / 2
            for layer in self.layers:
                layer.step(rate, count)
            if count % -(-steps // _LOOKS) == 0 or count == steps:
                error = self._judge()
                if error < best:
                    best, found = error, [(layer.weight, layer.bias) for layer in self.layers]
        if found is None:
            return None
        for layer, numbers in zip(self.layers, found, strict=True):
            layer.weight, layer.bias = numbers
        return start / variance, best / variance

    def _draw(self) -> Iterator[int]:
        """Batches to learn from, all of them before any comes again."""
        while True:
            yield from self._generator.permutation(self._learners).tolist()

    def _judge(self) -> float:
        """Σ‖y − ŷ‖²."""
        return sum(
            float(self._forward.run([_ERROR], self._feeds(batch))[0]) for batch in self._judges
        )

    def _learn(self, batch: int) -> None:
        for layer, (x, slope) in zip(self.layers, self._derivatives(batch), strict=True):
            layer.learn(x, slope, len(self._learners), self._generator)

    def _derivatives(self, batch: int) -> list[tuple[Array, Array]]:
        """What each layer reads, and ∂‖y − ŷ‖² by what it puts out."""
        feeds, names = self._feeds(batch), [*self._slopes, *self._read]
        seeds = {f"{PREFIX}{_ERROR}": np.ones(1, np.float32)}
        found = dict(zip(names, self._backward.run(names, feeds | seeds), strict=True))
        return [
            (found[x] if x in found else feeds[x], found[slope].reshape(shape))
            for x, slope, shape in zip(self._xs, self._slopes, self._shapes, strict=True)
        ]

    def _feeds(self, batch: int) -> Feeds:
        values = self._network.values(batch)
        feeds = {name: values[name] for name in self._inputs}
        feeds[_WANTED] = self._aims.of(batch)
        for place, (layer, shape) in enumerate(zip(self.layers, self._shapes, strict=True)):
            feeds[f"{_WEIGHT}{place}"] = layer.tensor()
            feeds[f"{_SHIFT}{place}"] = layer.shift(shape)
        return feeds


def _end_in_error(proto: onnx.ModelProto, end: str, aim: Array) -> None:
    """Makes the graph end in ‖y − ŷ‖², y being an input; in place."""
    off, square = f"{_ERROR}_off", f"{_ERROR}_square"
    make = onnx.helper.make_node
    proto.graph.node.append(make("Sub", [end, _WANTED], [off], off))
    proto.graph.node.append(make("Mul", [off, off], [square], square))
    proto.graph.node.append(make("ReduceSum", [square], [_ERROR], _ERROR, keepdims=0))
    proto.graph.input.append(_input(_WANTED, aim.shape))
    del proto.graph.output[:]
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info(_ERROR, onnx.TensorProto.FLOAT, [])
    )


def _input(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))
