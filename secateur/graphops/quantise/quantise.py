"""int8 in QDQ form, int8 with scales found at run time, and float16.

Each is ONNX Runtime's own: `quantize_static` (per channel symmetric int8 weights, uint8 activations
from their minimum to their maximum over the calibration samples), `quantize_dynamic`, and the
float16 converter. Symmetric weights keep zeros zero: what pruning has taken out stays out. They
have 7 bits: on processors without VNNI, ONNX Runtime's kernels add two products in 16 bits, and 8
bits overflow there (a tenfold error on the digit models, on AVX2). Signed activations would take
its slow path there (twelve times the time of float32 on MiniLM).

With scales from data, only products become int8, and what passes their operands on. Sums and
normalisations do not: a residual stream has a few channels a hundred times as wide as the others,
and one scale for all of them loses those (the loss of a small GPT went from 1.96 to 2.94).

With scales found at run time, the weights of convolutions are only stored as int8, per channel, and
are float32 again once there is a session: the quantiser has one scale for a whole convolution,
which MobileNet does not survive (top-1 from .76 to .06), and that takes six times as long.
"""

from __future__ import annotations

import logging
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx.version_converter
from onnxruntime import quantization

from secateur.errors import Code, Refused, VerificationFailed, refuse
from secateur.graphops.calibration.data import Feeds
from secateur.graphops.model.graph import opset_of
from secateur.graphops.model.runtime import first_line, open_session
from secateur.graphops.model.writing import Serialised

_INT8 = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"),
    *("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Split", "Pad", "Resize"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
)
_INT8_DYNAMIC = ("MatMul", "Gemm", "Gather", "LSTM", "Attention", "EmbedLayerNormalization")
_PER_CHANNEL_OPSET = 13  # from which on DequantizeLinear has an axis
_STORED = 256  # weights of a convolution from which on storing them as int8 pays for two more nodes


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
    _prepare(proto.graph)
    proto.ir_version = max(proto.ir_version, 4)  # from which on weights need not be inputs
    quantised = _quantised(proto)
    if quantised and how != "fp16":
        raise _cannot(how, "the model is quantised already", f"node {quantised[0]!r}")
    try:
        result = _float16(proto) if how == "fp16" else _int8(proto, how, batches)
    except Exception as error:  # whatever a library raises on a graph that it did not foresee
        raise _cannot(how, f"ONNX Runtime's quantiser fails on the model: {error}", "") from error
    kind = onnx.TensorProto.FLOAT16 if how == "fp16" else onnx.TensorProto.INT8
    if not _quantised(result) and all(one.data_type != kind for one in result.graph.initializer):
        raise _cannot(how, "the model has no operator that it can quantise", "none")
    content = result.SerializeToString(deterministic=True)
    return Serialised(content, None, len(content))


def check_loads(quantised: Serialised, how: str) -> None:
    """Raises `INVALID_RECIPE` when ONNX Runtime cannot load what its quantiser made."""
    try:
        open_session(quantised.runnable, lean=True)
    except Exception as error:  # of types that its operators do not take, or of subgraphs
        why = "ONNX Runtime cannot load what its quantiser makes of the model"
        raise _cannot(how, why, first_line(error)) from None


def does_not_hold(how: str, failed: VerificationFailed) -> Refused:
    """The refusal of a result that is right until it is quantised, as numbers that leave the range
    of float16 are.

    Args:
        how: it was quantised.
        failed: what is wrong with it then.
    """
    return _cannot(how, failed.refusal.message, failed.refusal.found)


def _prepare(graph: onnx.GraphProto) -> None:
    """Makes every weight an initializer and no input, in place, as quantisers look nowhere else;
    and names every node, as that is how they are told what to leave alone."""
    nodes = []
    for node in graph.node:
        node.name = node.name or f"{node.op_type}_of_{node.output[0]}"
        values = [one.t for one in node.attribute if one.name == "value"]
        if node.op_type == "Constant" and values and values[0].data_type == onnx.TensorProto.FLOAT:
            tensor = graph.initializer.add()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [one for one in graph.input if one.name not in weights]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)


def _int8(proto: onnx.ModelProto, how: str, batches: Sequence[Feeds]) -> onnx.ModelProto:
    """The quantiser reads and writes files: they lie in a folder that goes again."""
    opset = opset_of(proto)
    if how == "int8" and opset < _PER_CHANNEL_OPSET:
        proto = onnx.version_converter.convert_version(proto, _PER_CHANNEL_OPSET)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a pre-processing that we have done
    try:
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            source, result = pathlib.Path(folder, "float.onnx"), pathlib.Path(folder, "int8.onnx")
            source.write_bytes(proto.SerializeToString(deterministic=True))
            # what onnx cannot infer the type of, behind other domains' operators, is float32
            common = {
                "per_channel": True,
                "weight_type": quantization.QuantType.QInt8,
                "reduce_range": True,
                "nodes_to_exclude": _misread(proto.graph),
                "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT},
            }
            if how == "int8":
                quantization.quantize_static(
                    source,
                    result,
                    _Reader(batches),
                    quant_format=quantization.QuantFormat.QDQ,
                    op_types_to_quantize=_INT8,
                    activation_type=quantization.QuantType.QUInt8,
                    **common,
                )
            else:
                quantization.quantize_dynamic(
                    source, result, op_types_to_quantize=_INT8_DYNAMIC, **common
                )
            found = onnx.load(result)
            if how == "int8_dynamic":
                _store_convolutions(found.graph)
            return found
    finally:
        logging.root.setLevel(level)


def _misread(graph: onnx.GraphProto) -> list[str]:
    """Nodes that the quantiser takes for others: of ConvTranspose with groups it counts the outputs
    of one, and onnx's own Attention it reads as com.microsoft's."""
    return [
        node.name
        for node in graph.node
        if (node.op_type == "Attention" and node.domain in ("", "ai.onnx"))
        or (node.op_type == "ConvTranspose" and _groups(node) > 1)
    ]


def _groups(node: onnx.NodeProto) -> int:
    return next((one.i for one in node.attribute if one.name == "group"), 1)


def _store_convolutions(graph: onnx.GraphProto) -> None:
    """Has weights of convolutions be computed from int8, in place: w = scale · q, per slice of axis
    0. Cast and Mul of constants, as sessions fold them; DequantizeLinear would run each time."""
    read = {n.input[1] for n in graph.node if n.op_type in ("Conv", "ConvTranspose")}
    kept, made = [], []
    for tensor in graph.initializer:
        weight = onnx.numpy_helper.to_array(tensor) if tensor.name in read else None
        if weight is None or weight.dtype != np.float32 or weight.size < _STORED:
            kept.append(tensor)
            continue
        name = tensor.name
        widest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
        scale = widest / np.float32(127)
        scale[scale == 0] = 1
        stored = np.round(weight / scale).astype(np.int8)
        kept.append(onnx.numpy_helper.from_array(stored, f"{name}_int8"))
        kept.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
        cast = onnx.helper.make_node(
            "Cast", [f"{name}_int8"], [f"{name}_cast"], f"{name}_Cast", to=onnx.TensorProto.FLOAT
        )
        scaled = onnx.helper.make_node(
            "Mul", [f"{name}_cast", f"{name}_scale"], [name], f"{name}_Mul"
        )
        made += [cast, scaled]
    nodes = [*made, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


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


def _cannot(how: str, why: str, found: str) -> Refused:
    return refuse(
        Code.INVALID_RECIPE,
        f"the result cannot be quantised: {why}",
        nodes=("quantize",),
        expected=f"a model that ONNX Runtime quantises to {how}",
        found=found,
        hint="Leave --quantize out, or quantise the result with the tool of your choice.",
    )
