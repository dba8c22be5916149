"""Sparse initializers: values that are not zero, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import onnx

from secateur.errors import Code, refuse
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.writing import Serialised
from secateur.report import SparseWeight

_INDEX = 8  # bytes: the specification wants int64


def store_sparse(
    serialised: Serialised, weights: tuple[SparseWeight, ...]
) -> tuple[Serialised, tuple[SparseWeight, ...]]:
    """Stores weights as sparse initializers where that takes fewer bytes and ONNX Runtime loads it.

    Returns:
        the model; and the weights, told which of them are stored so. Those that are outputs of
        Constant nodes stay dense.

    Raises:
        Refused: `INVALID_RECIPE` when the model is too large for one file.
    """
    if serialised.weights is not None:
        raise refuse(
            Code.INVALID_RECIPE,
            "sparse initializers lie in the model's own file, and it is too large for one",
            nodes=("sparse_initializers",),
            expected="a result below 2 GiB",
            found=f"{serialised.size} bytes",
        )
    content, sparse = _stored(serialised.model, {weight.tensor for weight in weights})
    told = tuple(
        weight.model_copy(update={"stored_sparse": weight.tensor in sparse}) for weight in weights
    )
    return Serialised(content, None, len(content)), told


def _stored(content: bytes, names: Set[str]) -> tuple[bytes, Set[str]]:
    """The model, and the names of those that are sparse in it."""
    proto = onnx.ModelProto.FromString(content)
    inputs = {value.name for value in proto.graph.input}  # an old IR lists initializers there
    wanted = [
        tensor.name
        for tensor in proto.graph.initializer
        if tensor.name in names - inputs and _is_smaller(tensor)
    ]
    if not wanted:
        return content, set()
    together = _with_sparse(proto, wanted)
    if _loads(together):
        return together, set(wanted)
    accepted: list[str] = []
    for name in wanted:
        if _loads(_with_sparse(proto, [*accepted, name])):
            accepted.append(name)
    return _with_sparse(proto, accepted), set(accepted)


def _is_smaller(tensor: onnx.TensorProto) -> bool:
    array = onnx.numpy_helper.to_array(tensor)
    return bool(np.count_nonzero(array) * (array.itemsize + _INDEX) < array.nbytes)


def _with_sparse(proto: onnx.ModelProto, names: Sequence[str]) -> bytes:
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    for tensor in [tensor for tensor in graph.initializer if tensor.name in set(names)]:
        array = onnx.numpy_helper.to_array(tensor)
        places = np.flatnonzero(array)
        values = onnx.numpy_helper.from_array(array.reshape(-1)[places], tensor.name)
        indices = onnx.numpy_helper.from_array(places.astype(np.int64))
        graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(values, indices, list(array.shape))
        )
        graph.initializer.remove(tensor)
    return result.SerializeToString(deterministic=True)


def _loads(content: bytes) -> bool:
    try:
        open_session(content, lean=True)
    except Exception:  # whatever ONNX Runtime says, the weight stays dense
        return False
    return True
