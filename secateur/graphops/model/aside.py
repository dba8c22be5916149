"""Puts the weights of a large model into a file, which this library and ONNX Runtime both map.

Weights inside the protobuf are copied by whoever reads it, and by ONNX Runtime twice over.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import onnx
from onnx.external_data_helper import set_external_data

from secateur.result import WeightsFile

LARGE = 32 << 20  # bytes of a model from which its memory is worth some care
_LEAST = 1 << 16  # bytes of a tensor that is put aside: smaller ones may be sizes and axes
_PAGE = 4096


def model_beside(weights: WeightsFile) -> pathlib.Path:
    """Where the model lies that refers to a file of weights."""
    return weights.path.with_name("model.onnx")


def _weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and what Constant nodes hold: some exporters write all weights so."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (item.t for item in node.attribute if item.name == "value")


def put_aside(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, WeightsFile | None]:
    """Moves a model's large weights into a file; the model goes to `model_beside` it.

    Args:
        proto: it is used up.

    Returns:
        the model that refers to the file, and the file; `proto` and None, where there is no room.
    """
    weights, moved = WeightsFile.new(), []
    try:
        with weights.path.open("wb") as file:
            for tensor in _weights(proto.graph):
                raw = tensor.raw_data  # protobuf makes a copy each time that it is asked
                if len(raw) >= _LEAST:
                    moved.append((tensor, file.seek(-(-file.tell() // _PAGE) * _PAGE), len(raw)))
                    file.write(raw)
    except OSError:
        return proto, None
    for tensor, offset, length in moved:
        set_external_data(tensor, weights.path.name, offset, length)
        tensor.ClearField("raw_data")
    content = proto.SerializeToString()
    model_beside(weights).write_bytes(content)
    return onnx.ModelProto.FromString(content), weights  # a message frees nothing but as a whole
