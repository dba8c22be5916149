"""Refuses files whose parts contradict one another, before anything reads their numbers.

Everything after this may rely on it: a tensor has a known element type, no negative size, and
exactly the data that its sizes call for; an attribute has the kind that its operator defines, and
a node the inputs and outputs that it cannot do without; every name is text.
Libraries in native code are then not handed what they do not check themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import onnx
import onnx_ir as ir

from secateur.errors import Code, Refused, refuse

_MAX_CALLS = 100  # functions inside one another
_HEADS = ("num_heads", "q_num_heads", "kv_num_heads")
_MOST_HEADS = (1 << 31) - 1  # native code keeps no more bits of their number
_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_PAIRS = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)  # two numbers for each element

AGAIN = "Export the model again; onnx.checker.check_model may say more."


def check_parts(proto: onnx.ModelProto) -> None:
    """Checks every tensor, attribute and name of a model, subgraphs and functions included.

    Raises:
        Refused: `INVALID_MODEL`.
    """
    _check_text(opset.domain for opset in proto.opset_import)
    _check_text((proto.producer_name, proto.producer_version, proto.domain, proto.doc_string))
    opsets = {_domain(opset.domain): opset.version for opset in proto.opset_import}
    _check_graph(proto.graph, opsets, _names(proto.graph))
    for function in proto.functions:
        _check_text((function.domain, function.name, *function.input, *function.output))
        own = {*function.input, *(name for node in function.node for name in node.output)}
        _check_nodes(function.node, opsets, own)


def count_nodes(proto: onnx.ModelProto) -> int:
    """Nodes of a model, subgraphs included, when every call of a local function is inlined.

    A file of a kilobyte may state any number: functions call others, many times each.

    Raises:
        Refused: `INVALID_MODEL` when a function calls itself, or they nest too deep.
    """
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    counted: dict[tuple[str, str, str], int] = {}

    def count(nodes: Iterable[onnx.NodeProto], inside: frozenset[tuple[str, str, str]]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in inside or len(inside) > _MAX_CALLS:
                raise refuse(
                    Code.INVALID_MODEL,
                    f"function {node.op_type!r} calls itself, or calls nest too deep",
                    nodes=(node.name or node.op_type,),
                    expected=f"at most {_MAX_CALLS} calls inside one another",
                    hint="Export the model without local functions.",
                )
            if key in functions and key not in counted:
                counted[key] = count(functions[key].node, inside | {key})
            total += counted.get(key, 1)
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    total += count(graph.node, inside)
        return total

    return count(proto.graph.node, frozenset())


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a graph, its subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from node_tensors(graph.node)


def node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Every tensor in the attributes of nodes and in their subgraphs."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            for graph in attribute.graphs:
                yield from tensors(graph)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _names(graph: onnx.GraphProto) -> set[str]:
    """What a graph is given or makes, without what its bodies do."""
    found = {value.name for value in graph.input}
    found |= {tensor.name for tensor in graph.initializer}
    found |= {sparse.values.name for sparse in graph.sparse_initializer}
    return found | {name for node in graph.node for name in node.output}


def _check_graph(graph: onnx.GraphProto, opsets: Mapping[str, int], names: set[str]) -> None:
    """Checks a graph that sees the values in `names`: its own, and those around it."""
    _check_text((graph.name, graph.doc_string))
    _check_text(value.name for value in (*graph.input, *graph.output, *graph.value_info))
    for tensor in graph.initializer:
        _check_tensor(tensor)
    for sparse in graph.sparse_initializer:
        _check_tensor(sparse.values)
        _check_tensor(sparse.indices)
    _check_nodes(graph.node, opsets, names)


def _check_nodes(
    nodes: Iterable[onnx.NodeProto], opsets: Mapping[str, int], names: set[str]
) -> None:
    for node in nodes:
        _check_text((node.domain, node.op_type, node.name, node.doc_string))
        _check_text((*node.input, *node.output))
        domain = _domain(node.domain)
        version = opsets.get(domain, 1)
        _check_arity(node, version, domain)
        kinds = _attribute_kinds(node.op_type, version, domain)
        for attribute in node.attribute:
            expected = kinds.get(attribute.name)
            if expected is not None and attribute.type != expected and not attribute.ref_attr_name:
                raise _wrong_kind(node, attribute, expected)
            if attribute.HasField("t"):
                _check_tensor(attribute.t)
            for tensor in attribute.tensors:
                _check_tensor(tensor)
            _check_value(node, attribute)
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                own = _names(graph)
                _check_body(node, graph, own, names)
                _check_graph(graph, opsets, names | own)


def _check_value(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    """Values that native code neither refuses nor survives."""
    expected, found = "", ""
    if node.op_type == "Einsum" and b"\0" in attribute.s:  # it reads on for ever
        expected, found = "letters, dots, commas and an arrow", repr(attribute.s)
    elif attribute.name in _HEADS and attribute.i > _MOST_HEADS:  # it divides by 0
        expected, found = f"at most {_MOST_HEADS}", str(attribute.i)
    if expected:
        label = node.name or next(iter(node.output), node.op_type)
        raise refuse(
            Code.INVALID_MODEL,
            f"attribute {attribute.name!r} of node {label!r} ({node.op_type}) is out of range",
            nodes=(label,),
            expected=expected,
            found=found,
            hint=AGAIN,
        )


def _check_body(
    node: onnx.NodeProto, graph: onnx.GraphProto, own: set[str], around: set[str]
) -> None:
    """A body reads what there is, and hands out what is its own: ONNX Runtime runs no other."""
    label = node.name or next(iter(node.output), node.op_type)
    for value in graph.output:
        if value.name not in own:
            raise refuse(
                Code.INVALID_MODEL,
                f"node {label!r} ({node.op_type}): its body hands out {value.name!r} of outside",
                nodes=(label,),
                expected="an output that a node of the body makes",
                found=value.name,
                hint="Put an Identity between the two.",
            )
    for name in (name for inner in graph.node for name in inner.input):
        if name and name not in own and name not in around:
            raise refuse(
                Code.INVALID_MODEL,
                f"node {label!r} ({node.op_type}): its body reads {name!r}, which nothing makes",
                nodes=(label,),
                expected="a value of the body or of the graphs around it",
                found=name,
                hint=AGAIN,
            )


def _check_text(names: Iterable[str | bytes]) -> None:
    """Protobuf hands out bytes where text is not UTF-8."""
    for name in names:
        if isinstance(name, bytes):
            raise refuse(
                Code.INVALID_MODEL,
                f"a name or a text is not UTF-8: {name!r}",
                expected="text",
                found=name.hex(),
                hint="Save the model again with its names in UTF-8.",
            )


def _check_arity(node: onnx.NodeProto, version: int, domain: str) -> None:
    """Native code reads a node's required inputs and outputs without asking whether they are."""
    needed, outputs = _required(node.op_type, version, domain)
    given = [name for name in node.input[:needed] if name]
    variadic = _is_variadic(node.op_type, version, domain) and "" in node.input
    if len(given) < needed or len(node.output) < outputs or variadic:
        label = node.name or next(iter(node.output), node.op_type)
        raise refuse(
            Code.INVALID_MODEL,
            f"node {label!r} ({node.op_type}) lacks what its operator cannot do without",
            nodes=(label,),
            expected=f"{needed} inputs and {outputs} outputs, none left out",
            found=f"inputs {list(node.input)}, outputs {list(node.output)}",
            hint="Give the node what its operator asks for at the opset that the model imports.",
        )


@functools.cache
def _required(op_type: str, version: int, domain: str) -> tuple[int, int]:
    """Inputs at the front that must be there, and outputs; (0, 0) where there is no schema."""
    schema = _schema(op_type, version, domain)
    if schema is None:
        return 0, 0
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    front = 0
    for parameter in schema.inputs[: schema.min_input]:
        if parameter.option == optional:
            break
        front += 1
    return front, schema.min_output


@functools.cache
def _is_variadic(op_type: str, version: int, domain: str) -> bool:
    schema = _schema(op_type, version, domain)
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    if schema is None or not schema.inputs:
        return False
    return schema.inputs[0].option == variadic


def _schema(op_type: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except (onnx.defs.SchemaError, TypeError, ValueError, OverflowError):
        return None


@functools.cache
def _attribute_kinds(op_type: str, version: int, domain: str) -> Mapping[str, int]:
    """Attribute → kind, as the operator's schema has it; empty where there is no schema."""
    schema = _schema(op_type, version, domain)
    if schema is None:
        return {}
    kinds = schema.attributes.items()
    return {name: int(kind.type) for name, kind in kinds}  # type: ignore[call-overload]


def _wrong_kind(node: onnx.NodeProto, attribute: onnx.AttributeProto, expected: int) -> Refused:
    label = node.name or next(iter(node.output), node.op_type)
    names = onnx.AttributeProto.AttributeType
    kind = attribute.type
    return refuse(
        Code.INVALID_MODEL,
        f"attribute {attribute.name!r} of node {label!r} ({node.op_type}) is of the wrong kind",
        nodes=(label,),
        expected=names.Name(expected),
        found=names.Name(kind) if kind in names.values() else kind,
        hint=AGAIN,
    )


def _check_tensor(tensor: onnx.TensorProto) -> None:
    _check_text([tensor.name])
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise _damaged(tensor, "has no known element type", "one that onnx knows", tensor.data_type)
    if any(size < 0 for size in tensor.dims):
        raise _damaged(tensor, "has a negative size", "sizes from 0 on", list(tensor.dims))
    count = math.prod(tensor.dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external_length(tensor, dtype, count)
        return
    own = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    filled = {field: size for field in _FIELDS if (size := len(getattr(tensor, field)))}
    if tensor.HasField("raw_data"):
        if dtype == ir.DataType.STRING or filled:
            raise _damaged(tensor, "says its data twice", "one field", ["raw_data", *filled])
        if len(tensor.raw_data) != _bytes(dtype, count):
            needed = f"{_bytes(dtype, count)} bytes"
            raise _damaged(tensor, _MISFIT, needed, f"{len(tensor.raw_data)} bytes")
        return
    if set(filled) - {own}:
        raise _damaged(tensor, "has data of another type", own, sorted(filled))
    if filled.get(own, 0) != _entries(dtype, count):
        raise _damaged(tensor, _MISFIT, f"{_entries(dtype, count)} numbers", filled.get(own, 0))


_MISFIT = "does not hold the data that its sizes call for"


def _check_external_length(tensor: onnx.TensorProto, dtype: ir.DataType, count: int) -> None:
    """A stated length is that of the tensor; whether the file has it is checked elsewhere."""
    stated = {entry.key: entry.value for entry in tensor.external_data}.get("length")
    if dtype == ir.DataType.STRING:
        raise _damaged(tensor, "is text in an external file", "numbers", "strings")
    if stated is not None and stated.isdecimal() and int(stated) not in (0, _bytes(dtype, count)):
        raise _damaged(tensor, _MISFIT, f"{_bytes(dtype, count)} bytes", f"{stated} bytes")


def _bytes(dtype: ir.DataType, count: int) -> int:
    return -(-count * dtype.bitwidth // 8)


def _entries(dtype: ir.DataType, count: int) -> int:
    """Numbers in the typed field: small elements share one, complex ones take two."""
    if dtype in _PAIRS:
        return 2 * count
    if dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):
        return -(-count * dtype.bitwidth // 8)
    return count


def _damaged(tensor: onnx.TensorProto, what: str, expected: object, found: object) -> Refused:
    return refuse(
        Code.INVALID_MODEL,
        f"tensor {tensor.name!r} {what}",
        nodes=(tensor.name,),
        expected=expected,
        found=found,
        hint=AGAIN,
    )
