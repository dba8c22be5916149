"""Writes a model: into bytes, or with weights in a file of their own where bytes are too small."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from secateur.graphops.model import maps
from secateur.graphops.model.aside import model_beside
from secateur.graphops.model.opening import self_contained
from secateur.graphops.model.spelling import as_given
from secateur.result import WeightsFile

# protobuf holds less than 2 GiB; nodes and shapes want some of it.
INLINE_LIMIT = 2**31 - 2**24


@dataclass(frozen=True, slots=True)
class Serialised:
    """A model as it leaves the engine.

    Attributes:
        model: the ONNX protobuf.
        weights: the file with its weights, if they are not in it.
        size: bytes of both.
    """

    model: bytes
    weights: WeightsFile | None
    size: int

    @property
    def runnable(self) -> bytes | str:
        """What ONNX Runtime opens: the bytes, or the path beside which the weights lie."""
        if self.weights is None:
            return self.model
        return str(model_beside(self.weights))


def serialise(model: ir.Model) -> Serialised:
    """Serialises a model; the same model gives the same bytes.

    Weights stay where they are until they are written one by one: memory holds no second copy of
    a model too large for one file.
    """
    model = as_given(model)
    tensors = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) < INLINE_LIMIT:
        proto = ir.to_proto(self_contained(model))
        maps.put_back(model, proto)
        content = proto.SerializeToString(deterministic=True)
        return Serialised(content, None, len(content))
    weights = WeightsFile.new()
    path = model_beside(weights)
    ir.save(model, path, external_data=weights.path.name)
    proto = onnx.ModelProto.FromString(path.read_bytes())
    maps.put_back(model, proto)
    content = proto.SerializeToString(deterministic=True)
    path.write_bytes(content)
    return Serialised(content, weights, len(content) + weights.path.stat().st_size)
