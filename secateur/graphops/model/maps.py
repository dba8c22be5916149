"""Outputs that are maps, as scikit-learn's classifiers give their probabilities by class.

onnx_ir holds tensors and sequences of them, but no maps. Their type is noted where a model is read,
and put back where it is written; nothing between asks for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

_TYPE = "secateur.type"  # where a value's metadata, which clones copy, hold the noted type


def read(proto: onnx.ModelProto) -> ir.Model:
    """The model, with the types that hold maps noted at its outputs.

    Args:
        proto: it is used up: those types are taken out of it.
    """
    for info in list(proto.graph.value_info):
        if _holds_map(info.type):
            proto.graph.value_info.remove(info)
    types = {}
    for info in proto.graph.output:
        if _holds_map(info.type):
            types[info.name] = onnx.TypeProto.FromString(info.type.SerializeToString())
            info.ClearField("type")
    model = ir.from_proto(proto)
    for value in model.graph.outputs:
        if value.name in types:
            value.meta[_TYPE] = types[value.name]
    return model


def put_back(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Gives a serialised model's outputs the types that were noted, in place."""
    for value, info in zip(model.graph.outputs, proto.graph.output, strict=True):
        if _TYPE in value.meta:
            info.type.CopyFrom(value.meta[_TYPE])


def as_array(output: Any) -> Any:
    """A sequence of maps over the same keys as an array, a row for each; else what it was."""
    if not isinstance(output, list) or not output or not isinstance(output[0], dict):
        return output
    if any(one.keys() != output[0].keys() for one in output):
        return output
    return np.array([[one[key] for key in output[0]] for one in output])


def _holds_map(kind: onnx.TypeProto) -> bool:
    while kind.HasField("sequence_type") or kind.HasField("optional_type"):
        kind = (
            kind.sequence_type if kind.HasField("sequence_type") else kind.optional_type
        ).elem_type
    return kind.HasField("map_type")
