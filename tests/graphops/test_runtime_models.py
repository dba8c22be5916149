"""Models as ONNX Runtime's own tools write them: fused, quantised, packed."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from laws import lawful
from nets import Net, attention
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

Write = Callable[[pathlib.Path, pathlib.Path], None]
# Integers of another rounding may fall on the next of 255 steps.
QUANTISED = 2e-2


def images() -> Net:
    """Two branches that are joined, added and pooled."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 4, 8, 8]), 4, 16, kernel=3))
    y = net.op("Concat", net.op("Relu", net.conv(x, 16, 16)), x, axis=1)
    y = net.op("Add", net.op("Relu", net.conv(y, 32, 16)), x)
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    net.output(net.op("Gemm", y, net.floats(16, 5), net.floats(5)))
    return net


def transformer() -> Net:
    """A block of attention and a gated feed-forward part, normalised."""
    net = Net()
    x = net.dense(net.input("x", [2, 6, 32]), 32, 32)
    for _ in range(2):
        x = net.op("Add", attention(net, x, 32, 4, 8, 6), x)
        x = net.op("LayerNormalization", x, net.floats(32, low=0.5), net.floats(32), axis=-1)
        hidden = net.op("Relu", net.dense(x, 32, 64))
        x = net.op("Add", net.dense(hidden, 64, 32), x)
        x = net.op("LayerNormalization", x, net.floats(32, low=0.5), net.floats(32), axis=-1)
    net.output(net.dense(x, 32, 3))
    return net


class Samples(CalibrationDataReader):  # type: ignore[misc]  # its package has no types
    """Four random inputs of a model."""

    def __init__(self, path: pathlib.Path) -> None:
        (face,) = onnx.load(path).graph.input
        shape = [dim.dim_value or 2 for dim in face.type.tensor_type.shape.dim]
        draw = np.random.default_rng(0)
        self._samples: Iterator[Any] = iter(
            [{face.name: draw.standard_normal(shape).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> Any:
        return next(self._samples, None)


def fused(source: pathlib.Path, target: pathlib.Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def static(layout: QuantFormat, per_channel: bool) -> Write:
    def write(source: pathlib.Path, target: pathlib.Path) -> None:
        quantize_static(
            source,
            target,
            Samples(source),
            quant_format=layout,
            per_channel=per_channel,
            reduce_range=True,  # kernels of processors without VNNI saturate
        )

    return write


def dynamic(source: pathlib.Path, target: pathlib.Path) -> None:
    quantize_dynamic(source, target, reduce_range=True)


def packed(source: pathlib.Path, target: pathlib.Path) -> None:
    quantiser = MatMulNBitsQuantizer(onnx.load(source), block_size=16, is_symmetric=True)
    quantiser.process()
    quantiser.model.save_model_to_file(str(target))


WRITERS: dict[str, tuple[Write, float]] = {
    "fused": (fused, 1e-3),
    "QDQ": (static(QuantFormat.QDQ, per_channel=False), QUANTISED),
    "QDQ per channel": (static(QuantFormat.QDQ, per_channel=True), QUANTISED),
    "QOperator": (static(QuantFormat.QOperator, per_channel=False), QUANTISED),
    "QOperator per channel": (static(QuantFormat.QOperator, per_channel=True), QUANTISED),
    "dynamic": (dynamic, QUANTISED),
}


def removed(path: pathlib.Path, limit: float) -> float:
    result = lawful(path, limit, target={"channels": 0.5})
    return 1 - result.report.after.params / result.report.before.params


@pytest.mark.parametrize("net", [images, transformer])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_onnx_runtime_writes_is_cut_as_deep(
    writer: str, net: Callable[[], Net], tmp_path: pathlib.Path
) -> None:
    write, limit = WRITERS[writer]
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    source.write_bytes(net().bytes())
    write(source, target)
    assert removed(target, limit) > removed(source, 1e-3) - 0.05


def test_weights_packed_to_4_bits_are_cut_by_blocks(tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    source.write_bytes(transformer().bytes())
    packed(source, target)
    assert "MatMulNBits" in {node.op_type for node in onnx.load(target).graph.node}
    assert removed(target, 1e-3) > 0.4
