"""Is coupling linear? Nets that grow 1 to 64 times, in depth and in width.

    python benchmarks/scaling.py

Prints the time of shapes, labels and components against nodes + channels, and the exponent of a
power law through the points: 1 is linear.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.normalise import unshare
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes

RUNS = 5


def residual_net(blocks: int, width: int) -> onnx.ModelProto:
    """`blocks` residual blocks of two 1x1 convolutions with BatchNormalization, `width` wide."""
    nodes, weights = [], []

    def constant(name: str, *shape: int) -> str:
        weights.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        return name

    def conv(x: str, name: str, inner: int, outer: int) -> str:
        inputs = [x, constant(f"{name}_w", outer, inner, 1, 1)]
        nodes.append(helper.make_node("Conv", inputs, [f"{name}_c"], name=name))
        vectors = [constant(f"{name}_{part}", outer) for part in "smbv"]
        nodes.append(helper.make_node("BatchNormalization", [f"{name}_c", *vectors], [f"{name}_y"]))
        return f"{name}_y"

    x = conv("x", "stem", 3, width)
    for block in range(blocks):
        y = conv(x, f"b{block}_0", width, width)
        nodes.append(helper.make_node("Relu", [y], [f"b{block}_r"]))
        y = conv(f"b{block}_r", f"b{block}_1", width, width)
        nodes.append(helper.make_node("Add", [x, y], [f"b{block}_s"]))
        x = f"b{block}_s"
    x = conv(x, "head", width, 4)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure(model: onnx.ModelProto) -> tuple[int, float]:
    """(nodes + channels, median milliseconds of coupling)."""
    size = len(model.graph.node) + sum(t.dims[0] for t in model.graph.initializer)
    times = []
    for _ in range(RUNS):
        opened = open_model(model)
        start = time.perf_counter()
        unshare(opened.model)
        couple(opened.model, infer_shapes(opened.model))
        times.append((time.perf_counter() - start) * 1e3)
    return size, statistics.median(times)


def main() -> None:
    """Prints both tables."""
    for title, nets in (
        ("deeper: 8 blocks of 64 channels, times …", [(8 * n, 64, n) for n in (1, 4, 16, 64)]),
        ("wider: 8 blocks of 32 channels, times …", [(8, 32 * n, n) for n in (1, 4, 16, 64)]),
    ):
        print(title)
        points = []
        for blocks, width, times in nets:
            size, milliseconds = measure(residual_net(blocks, width))
            points.append((size, milliseconds))
            print(f"  {times:3d} x: {size:8d} nodes + channels, {milliseconds:8.1f} ms")
        sizes, taken = np.log(np.array(points)).T
        print(f"  exponent {np.polyfit(sizes, taken, 1)[0]:.2f}\n")


if __name__ == "__main__":
    main()
