"""Opens what a caller calls a model, and refuses what is not one."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pathlib
from dataclasses import dataclass
from typing import Any

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from secateur.errors import Code, refuse
from secateur.graphops.model import checking, maps
from secateur.graphops.model.aside import LARGE, put_aside
from secateur.graphops.model.collecting import uncollected
from secateur.graphops.model.graph import bodies, constant_tensor, node_label
from secateur.graphops.model.names import free_name
from secateur.result import WeightsFile

# Any: a gs.Graph, which is told by its module, so that onnx-graphsurgeon is never imported for it.
ModelSource = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model | Any

_MAX_DENSE = 1 << 30  # bytes of a sparse initializer made dense


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model in memory, weights memory-mapped where they lie in external files.

    Attributes:
        model: with local functions inlined and sparse initializers made dense.
        sha256: hex digest of the serialised model as it was given.
        size: bytes of it, external data included.
        aside: of a large model in one file: the file that now holds its weights.
    """

    model: ir.Model
    sha256: str
    size: int
    aside: WeightsFile | None


@uncollected()
def open_model(
    source: ModelSource,
    *,
    external_data: bool = True,
    max_nodes: int | None = None,
    sha256: str | None = None,
) -> OpenedModel:
    """Opens a path, bytes, `onnx.ModelProto`, `onnx_ir.Model` or `gs.Graph`.

    Args:
        source: the model. It is never modified.
        external_data: whether weights may lie in files beside the model; a server says no.
        max_nodes: how many nodes it may have, functions inlined; None: any number.
        sha256: hex digest of the serialised model, for whoever knows it; None: it is computed.

    Raises:
        Refused: `INVALID_MODEL`, `UNSUPPORTED_VERSION`, `UNSAFE_EXTERNAL_DATA`,
            `MISSING_EXTERNAL_DATA` or `LIMIT_EXCEEDED`.
    """
    folder: pathlib.Path | None = None
    if isinstance(source, str | os.PathLike):
        path = pathlib.Path(source)
        folder = path.resolve().parent
        try:
            serialised = path.read_bytes()
        except OSError as error:
            raise refuse(
                Code.INVALID_MODEL,
                f"{path} cannot be read: {error.strerror or error}",
                hint="Check the path, and that the file may be read.",
            ) from None
    elif isinstance(source, bytes | bytearray | memoryview):
        serialised = bytes(source)
    else:
        serialised = _as_proto(source).SerializeToString(deterministic=True)
    proto = _parse(serialised)
    digest, size = sha256 or hashlib.sha256(serialised).hexdigest(), len(serialised)
    del serialised
    _check_versions(proto)
    _check_nodes(proto, max_nodes)
    beside = _check_external_data(proto, folder, external_data)
    checking.check_parts(proto)
    aside = None
    if size > LARGE and not beside:
        proto, aside = put_aside(proto)
        folder = aside.path.parent if aside is not None else folder
    _densify(proto.graph)
    model = _deserialise(proto)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, str(folder))
    return OpenedModel(model=model, sha256=digest, size=size + beside, aside=aside)


def self_contained(model: ir.Model) -> ir.Model:
    """Makes the model hold its external weights, so that it can be serialised alone; in place.

    onnx_ir's own loader closes the files, which clones of the model still read from.
    """
    for graph in model.graphs():
        _hold(graph)
    return model


def serialise_node(node: ir.Node) -> onnx.NodeProto:
    """A node with the weights that it holds itself. Those of a Constant stay where they are in the
    model; those of subgraphs come into memory."""
    for body in bodies(node).values():
        for graph in (body, *body.subgraphs()):
            _hold(graph)
    proto = ir.serde.serialize_node(node)
    tensor = constant_tensor(node)
    if isinstance(tensor, ir.ExternalTensor):
        held = ir.AttrTensor("value", _in_memory(tensor))
        (value,) = (item for item in proto.attribute if item.name == "value")
        value.CopyFrom(ir.serde.serialize_attribute(held))
        release(tensor)
    return proto


def _hold(graph: ir.Graph) -> None:
    """Brings its external weights into memory, without those of subgraphs."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _in_memory(tensor)
    for node in graph:
        tensor = constant_tensor(node)
        if isinstance(tensor, ir.ExternalTensor):
            node.attributes["value"] = ir.AttrTensor("value", _in_memory(tensor))


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def release(tensor: ir.TensorProtocol) -> None:
    """Unmaps weights that lie in a file: mapped pages count as this process's memory.

    They are mapped again when somebody asks for them. Where a copy of a vector still looks at
    them, they stay.
    """
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):
            tensor.release()


def _as_proto(source: ModelSource) -> onnx.ModelProto:
    if isinstance(source, onnx.ModelProto):
        return source
    if isinstance(source, ir.Model):
        return ir.to_proto(source)
    if type(source).__module__.partition(".")[0] == "onnx_graphsurgeon":
        import onnx_graphsurgeon as gs

        exported: onnx.ModelProto = gs.export_onnx(source)
        return exported
    raise TypeError(
        f"a model is a path, bytes, onnx.ModelProto, onnx_ir.Model or gs.Graph, "
        f"not {type(source).__name__}"
    )


def _parse(serialised: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    if not serialised:
        raise refuse(
            Code.INVALID_MODEL,
            "the model is empty",
            expected="an ONNX file",
            found="0 B",
            hint="Check that the file arrived whole.",
        )
    try:
        proto.ParseFromString(serialised)
    except (google.protobuf.message.DecodeError, RecursionError) as error:
        raise refuse(
            Code.INVALID_MODEL,
            f"not an ONNX file, cut short, or nested too deep: {error}",
            found=f"{len(serialised)} bytes",
            hint="Check that the file arrived whole.",
        ) from None
    if not proto.graph.node or not proto.graph.output:
        raise refuse(
            Code.INVALID_MODEL,
            "the file parses but holds no graph with nodes and outputs",
            expected="at least one node and one output",
            found=f"{len(proto.graph.node)} nodes, {len(proto.graph.output)} outputs",
            hint="Give the model itself, not its external data or a file of tensors.",
        )
    return proto


def _check_versions(proto: onnx.ModelProto) -> None:
    if not proto.opset_import:
        raise refuse(Code.INVALID_MODEL, "the model imports no operator set", hint=checking.AGAIN)
    if proto.ir_version > onnx.IR_VERSION:
        raise refuse(
            Code.UNSUPPORTED_VERSION,
            "the model's IR version is newer than supported",
            expected=f"IR version {onnx.IR_VERSION} or older",
            found=proto.ir_version,
            hint="Export it with an older IR version, or upgrade secateur.",
        )
    newest = onnx.defs.onnx_opset_version()
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise refuse(
                Code.UNSUPPORTED_VERSION,
                "the model's opset is newer than supported",
                expected=f"ai.onnx opset {newest} or older",
                found=opset.version,
                hint="Convert it with onnx.version_converter, or upgrade secateur.",
            )


def _check_nodes(proto: onnx.ModelProto, most: int | None) -> None:
    nodes = checking.count_nodes(proto)
    if most is not None and nodes > most:
        raise refuse(
            Code.LIMIT_EXCEEDED,
            "the model has more nodes than this server takes, functions inlined",
            expected=f"at most {most}",
            found=nodes,
        )


def _check_external_data(proto: onnx.ModelProto, folder: pathlib.Path | None, allowed: bool) -> int:
    """Checks every external reference before anything opens it; returns their bytes."""
    total = 0
    tensors = list(checking.tensors(proto.graph))
    for function in proto.functions:
        tensors.extend(checking.node_tensors(function.node))
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not allowed or folder is None:
            raise refuse(
                Code.UNSAFE_EXTERNAL_DATA,
                f"tensor {tensor.name!r} refers to the file {location!r} outside the model",
                nodes=(tensor.name,),
                hint="Send one file: onnx.save(onnx.load(path), out, save_as_external_data=False).",
            )
        total += _check_reference(tensor.name, location, entries, folder)
    return total


def _check_reference(
    name: str, location: str, entries: dict[str, str], folder: pathlib.Path
) -> int:
    path = folder / location
    inside = not pathlib.PurePath(location).is_absolute() and path.resolve().is_relative_to(folder)
    linked = path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1)
    if not location or not inside or linked:
        raise refuse(
            Code.UNSAFE_EXTERNAL_DATA,
            f"tensor {name!r} refers to {location!r}, which is not a plain file inside the "
            "model's folder",
            nodes=(name,),
            expected="a relative path without links",
            found=location,
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        size = path.stat().st_size
    except FileNotFoundError:
        size, offset, length = -1, 0, 0
    except ValueError:
        raise refuse(
            Code.INVALID_MODEL,
            f"tensor {name!r} has an offset or length that is no number",
            nodes=(name,),
            hint="Save the model again with onnx.save_model(…, save_as_external_data=True).",
        ) from None
    if offset < 0 or length < 0 or size < offset + length:
        raise refuse(
            Code.MISSING_EXTERNAL_DATA,
            f"file {location!r} of tensor {name!r} is missing or too short",
            nodes=(name,),
            expected=f"{length} bytes at offset {offset}",
            found="no such file" if size < 0 else f"a file of {size} bytes",
            hint="Put the data file beside the model.",
        )
    return length


def _densify(graph: onnx.GraphProto) -> None:
    """Makes sparse initializers dense: onnx_ir drops them silently."""
    for sparse in graph.sparse_initializer:
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        shape = tuple(sparse.dims)
        if min(shape, default=0) < 0 or math.prod(shape) * values.itemsize > _MAX_DENSE:
            raise refuse(
                Code.INVALID_MODEL,
                f"sparse initializer {sparse.values.name!r} is too large to make dense",
                nodes=(sparse.values.name,),
                expected=f"at most {_MAX_DENSE} bytes",
                found=list(shape),
                hint="Store it as a dense initializer.",
            )
        try:
            dense = np.zeros(shape, values.dtype)
            if indices.ndim == 2:
                dense[tuple(indices.T)] = values
            else:
                dense.reshape(-1)[indices] = values
        except (IndexError, ValueError) as error:
            raise refuse(
                Code.INVALID_MODEL,
                f"sparse initializer {sparse.values.name!r}: {error}",
                nodes=(sparse.values.name,),
                hint="Store it as a dense initializer.",
            ) from None
        graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _deserialise(proto: onnx.ModelProto) -> ir.Model:
    """The graph as onnx_ir holds it: inlined, in order, every name defined and unique."""
    try:
        model = maps.read(proto)
        if "ai.onnx" in model.opset_imports:  # onnx_ir spells it so of nodes only
            model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
        if model.functions:
            onnx_ir.passes.common.InlinePass()(model)
            onnx_ir.passes.common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        if not all(_is_sorted(graph) for graph in model.graphs()):
            model.graph.sort()
    except Exception as error:  # hostile files reach every corner of a deserialiser
        raise refuse(
            Code.INVALID_MODEL, f"the graph cannot be read: {error}", hint=checking.AGAIN
        ) from None
    _check_names(model.graph)
    _name_nodes_uniquely(model.graph)
    _name_values_uniquely(model.graph)
    return model


def _is_sorted(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer.graph is graph and producer not in seen:
                return False
        seen.add(node)
    return True


def _check_names(graph: ir.Graph) -> None:
    defined: set[str] = set()
    for value in (*graph.inputs, *graph.initializers.values()):
        if not value.name:
            raise refuse(
                Code.INVALID_MODEL, "a graph input or initializer has no name", hint=checking.AGAIN
            )
        defined.add(value.name)
    for initializer in graph.initializers.values():
        if initializer.const_value is None:
            raise refuse(
                Code.INVALID_MODEL,
                f"initializer {initializer.name!r} holds no data",
                nodes=(str(initializer.name),),
                hint=checking.AGAIN,
            )
    for node in graph:
        for read in node.inputs:
            if read is not None and read.name not in defined:
                raise refuse(
                    Code.INVALID_MODEL,
                    f"node {node_label(node)!r} reads {read.name!r}, which nothing defines",
                    nodes=(node_label(node),),
                    hint=checking.AGAIN,
                )
        for value in node.outputs:
            if value.name and value.name in defined:
                raise refuse(
                    Code.INVALID_MODEL,
                    f"{value.name!r} is defined twice",
                    nodes=(node_label(node),),
                    hint="Give each value a name of its own.",
                )
            defined.add(value.name or "")
    for value in graph.outputs:
        if value.name not in defined:
            raise refuse(
                Code.INVALID_MODEL,
                f"graph output {value.name!r} is produced by no node",
                nodes=(str(value.name),),
                hint=checking.AGAIN,
            )


def _name_nodes_uniquely(graph: ir.Graph) -> None:
    """ONNX Runtime rejects two nodes of one name; unnamed ones it takes."""
    taken = {node.name for node in graph if node.name}
    seen: set[str] = set()
    for node in graph:
        if not node.name:
            continue
        if node.name in seen:
            node.name = free_name(node.name, taken, "__")
            taken.add(node.name)
        seen.add(node.name)


def _name_values_uniquely(graph: ir.Graph) -> None:
    """Branches of one If may use one name for different tensors; here a name is one tensor."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph for value in node.outputs}
    for body in graph.subgraphs():
        values = [*body.inputs, *body.initializers.values()]
        values += [value for node in body for value in node.outputs]
        for value in values:
            if value.name and value.name in taken:
                value.name = free_name(value.name, taken, "__")
            taken.add(value.name)
