"""Activation: the mean absolute value that a unit feeds to its consumers, over calibration data.

    a(u) = Σ over consumers' inputs x and positions p of u:  mean |x[p]|

Hu, Peng, Tai, Tang: Network Trimming, 2016, measures zeros; the mean magnitude is its smooth
form (Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
ICLR 2017, section 2.2). The means are taken inside ONNX Runtime: no feature map leaves it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from secateur.graphops.calibration import sample_count
from secateur.graphops.criteria.context import Context
from secateur.graphops.model.opening import self_contained
from secateur.graphops.verify.runtime import open_session


def activation(context: Context) -> npt.NDArray[np.float64]:
    """Mean absolute activation per unit.

    Raises:
        Refused: `INVALID_CALIBRATION` when no calibration data was given.
    """
    observed = context.seen("activation")
    places = sorted(
        {
            (str(value.name), contraction.axis)
            for contraction in context.coupling.contractions
            if (value := contraction.node.inputs[contraction.index]) is not None
            and value.name not in context.coupling.constants
            and contraction.node.graph is context.model.graph  # bodies have no outputs to add to
            and contraction.axis in context.coupling.axes(str(value.name))
        }
    )
    session = open_session(_with_means(context, places))
    names = [f"secateur_mean_{index}" for index in range(len(places))]
    sums = [0.0 for _ in places]
    samples = 0
    for feeds in observed.batches:
        count = sample_count(feeds)  # the last batch may be a smaller one
        samples += count
        for index, mean in enumerate(session.run(names, feeds)):
            sums[index] = sums[index] + count * mean.astype(np.float64)
    total = context.zeros()
    for (name, axis), mean in zip(places, sums, strict=True):
        context.add_per_unit(total, name, axis, np.asarray(mean) / samples)
    return total


def _with_means(context: Context, places: list[tuple[str, int]]) -> bytes:
    """The model with mean |x| along each place as its outputs (the axis alone is kept)."""
    proto = ir.to_proto(self_contained(context.model.clone()))
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    del proto.graph.output[:]
    for index, (name, axis) in enumerate(places):
        rank = len(context.coupling.shapes.of(name) or ())
        others = [other for other in range(rank) if other != axis]
        output = f"secateur_mean_{index}"
        proto.graph.node.append(onnx.helper.make_node("Abs", [name], [f"{output}_abs"]))
        mean = onnx.helper.make_node("ReduceMean", [f"{output}_abs"], [output], keepdims=0)
        if opset >= 18:
            axes = onnx.numpy_helper.from_array(np.array(others, np.int64), f"{output}_axes")
            proto.graph.initializer.append(axes)
            mean.input.append(axes.name)
        else:
            mean.attribute.append(onnx.helper.make_attribute("axes", others))
        proto.graph.node.append(mean)
        proto.graph.output.append(onnx.ValueInfoProto(name=output))
    return proto.SerializeToString()
