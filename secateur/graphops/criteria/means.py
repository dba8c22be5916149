"""Means of what units feed to their consumers, taken inside ONNX Runtime: no feature map leaves
it, and a pass over the data takes the memory of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from secateur.graphops.calibration import sample_count
from secateur.graphops.criteria.context import Context, Part
from secateur.graphops.model.graph import opset_of
from secateur.graphops.model.opening import self_contained
from secateur.graphops.model.runtime import open_session

# Nodes that compute, from the name of a float32 tensor, another of the same shape.
Statistic = Callable[[str, str], Sequence[onnx.NodeProto]]


def channel_means(context: Context, criterion: str, statistic: Statistic) -> list[Part]:
    """Means of a statistic of the consumers' inputs, over samples and all axes but one.

    Args:
        context: with calibration data.
        criterion: that asks.
        statistic: what the means are of.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    observed = context.seen(criterion)
    places = _places(context)
    session = open_session(_with_means(context, places, statistic))
    names = [f"secateur_mean_{index}" for index in range(len(places))]
    sums = [0.0 for _ in places]
    samples = 0
    for feeds in observed.batches:
        count = sample_count(feeds)  # the last batch may be a smaller one
        samples += count
        for index, mean in enumerate(session.run(names, feeds)):
            sums[index] = sums[index] + count * mean.astype(np.float64)
    return [
        (name, axis, np.asarray(mean) / samples)
        for (name, axis), mean in zip(places, sums, strict=True)
    ]


def _places(context: Context) -> list[tuple[str, int]]:
    """Tensors and axes that nodes of the main graph sum over and that can be cut."""
    places = {
        (str(value.name), contraction.axis): None
        for contraction in context.coupling.contractions
        if (value := contraction.node.inputs[contraction.index]) is not None
        and value.name not in context.coupling.constants
        and contraction.node.graph is context.model.graph  # bodies have no outputs to add to
        and contraction.axis in context.coupling.axes(str(value.name))
    }
    return list(places)


def _with_means(context: Context, places: list[tuple[str, int]], statistic: Statistic) -> bytes:
    """The model with the mean along each place as its outputs (the axis alone is kept)."""
    proto = ir.to_proto(self_contained(context.model.clone()))
    opset = opset_of(proto)
    del proto.graph.output[:]
    for index, (name, axis) in enumerate(places):
        rank = len(context.coupling.shapes.of(name) or ())
        others = [other for other in range(rank) if other != axis]
        output = f"secateur_mean_{index}"
        to_float = helper.make_node("Cast", [name], [f"{output}_x"], to=onnx.TensorProto.FLOAT)
        proto.graph.node.extend([to_float, *statistic(f"{output}_x", f"{output}_y")])
        mean = helper.make_node("ReduceMean", [f"{output}_y"], [output], keepdims=0)
        if opset >= 18:
            axes = onnx.numpy_helper.from_array(np.array(others, np.int64), f"{output}_axes")
            proto.graph.initializer.append(axes)
            mean.input.append(axes.name)
        else:
            mean.attribute.append(helper.make_attribute("axes", others))
        proto.graph.node.append(mean)
        proto.graph.output.append(onnx.ValueInfoProto(name=output))
    return proto.SerializeToString()
