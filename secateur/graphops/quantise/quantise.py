"""int8 in QDQ form, int8 with scales found at run time, and float16.

Each is ONNX Runtime's own: `quantize_static` (per channel, symmetric int8 weights and activations,
minimum and maximum over the calibration samples), `quantize_dynamic`, and the float16 converter.
Symmetric weights keep zeros zero: what pruning has taken out stays out. int8 weights have 7 bits:
on processors without VNNI, ONNX Runtime's kernels add two products in 16 bits, and 8 bits overflow
there (a tenfold error on the digit models, on AVX2).
"""

from __future__ import annotations

import logging
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import onnx
from onnxruntime import quantization

from secateur.errors import Code, Refused, refuse
from secateur.graphops.calibration.data import Feeds
from secateur.graphops.model.writing import Serialised


def quantise(serialised: Serialised, how: str, batches: Sequence[Feeds]) -> Serialised:
    """The model in fewer bits.

    Args:
        serialised: the pruned model.
        how: `int8`, `int8_dynamic` or `fp16`.
        batches: calibration data, for `int8`.

    Raises:
        Refused: `INVALID_RECIPE` when the model is too large for one file, holds quantised
            operators already, has nothing to quantise, or the quantiser fails on it.
    """
    if serialised.weights is not None:
        raise _cannot(how, "the model is too large for one file", f"{serialised.size} bytes")
    proto = onnx.ModelProto.FromString(serialised.model)
    quantised = _quantised(proto)
    if quantised and how != "fp16":
        raise _cannot(how, "the model is quantised already", f"node {quantised[0]!r}")
    try:
        result = _float16(proto) if how == "fp16" else _int8(proto, how, batches)
    except Exception as error:  # whatever a library raises on a graph that it did not foresee
        raise _cannot(how, f"ONNX Runtime's quantiser fails on the model: {error}", "") from error
    changed = _halves(result) if how == "fp16" else _quantised(result)
    if not changed:
        raise _cannot(how, "the model has no operator that it can quantise", "none")
    content = result.SerializeToString(deterministic=True)
    return Serialised(content, None, len(content))


def _int8(proto: onnx.ModelProto, how: str, batches: Sequence[Feeds]) -> onnx.ModelProto:
    """The quantiser reads and writes files: they lie in a folder that goes again."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a pre-processing that we have done
    try:
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            source, result = pathlib.Path(folder, "float.onnx"), pathlib.Path(folder, "int8.onnx")
            source.write_bytes(proto.SerializeToString(deterministic=True))
            if how == "int8":
                quantization.quantize_static(
                    source,
                    result,
                    _Reader(batches),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=quantization.QuantType.QInt8,
                    weight_type=quantization.QuantType.QInt8,
                    reduce_range=True,
                )
            else:
                quantization.quantize_dynamic(
                    source,
                    result,
                    per_channel=True,
                    weight_type=quantization.QuantType.QInt8,
                    reduce_range=True,
                )
            return onnx.load(result)
    finally:
        logging.root.setLevel(level)


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Hands the batches out one after another."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self._left: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


def _float16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Inputs and outputs keep their types: a Cast stands at each."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    result: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True)
    return result


def _quantised(proto: onnx.ModelProto) -> list[str]:
    """Nodes that hold or make integers from floating-point numbers."""
    kinds = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger")
    return [
        node.name or node.output[0]
        for node in proto.graph.node
        if node.op_type in kinds or node.op_type.startswith(("QLinear", "DynamicQuantize"))
    ]


def _halves(proto: onnx.ModelProto) -> list[str]:
    return [
        tensor.name
        for tensor in proto.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT16
    ]


def _cannot(how: str, why: str, found: str) -> Refused:
    return refuse(
        Code.INVALID_RECIPE,
        f"the result cannot be quantised: {why}",
        nodes=("quantize",),
        expected=f"a model that ONNX Runtime quantises to {how}",
        found=found,
        hint="Leave --quantize out, or quantise the result with the tool of your choice.",
    )
