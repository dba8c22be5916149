"""What is where in a graph: nodes and their bodies, what bodies read, constants, inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from secateur.graphops.model.attributes import integer

_CONTROL = ("If", "Loop", "Scan")


def node_label(node: ir.Node) -> str:
    """What people call a node: its name, or its first output's when it has none."""
    if node.name:
        return node.name
    return next((value.name for value in node.outputs if value.name), None) or node.op_type


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of ai.onnx that a model is written in, 1 where it does not say."""
    versions = (one.version for one in proto.opset_import if one.domain in ("", "ai.onnx"))
    return next(versions, 1)


def shape_of(value: onnx.ValueInfoProto) -> list[int] | None:
    """The shape, None where it is not wholly known."""
    kind = value.type.tensor_type
    known = kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim)
    return [dim.dim_value for dim in kind.shape.dim] if known else None


def real_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Graph inputs that a caller feeds: not those that merely list an initializer (old IR)."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def bodies(node: ir.Node) -> dict[str, ir.Graph]:
    """The subgraphs of If, Loop and Scan by attribute; empty for any other node."""
    if node.op_type not in _CONTROL or node.domain != "":
        return {}
    found = {}
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            found[name] = attribute.as_graph()
    return found


def walk(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Every node, of a graph for one, and those of bodies after the node they belong to (onnx_ir's
    own traversal looks into every attribute of every node, which costs more than the labels of a
    graph)."""
    for node in nodes:
        yield node
        if node.op_type in _CONTROL:
            for body in bodies(node).values():
                yield from walk(body)


def captured_by(node: ir.Node) -> list[ir.Value] | None:
    """Values of the outer graph that the node's subgraphs read; None without subgraphs."""
    graphs = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    if not graphs:
        return None
    found = []
    for graph in graphs:
        inside = set(graph.inputs) | set(graph.initializers.values())
        for inner in graph.all_nodes():
            inside.update(inner.outputs)
        for inner in graph.all_nodes():
            found += [v for v in inner.inputs if v is not None and v not in inside]
        found += [v for v in graph.outputs if v not in inside]
    return found


def live_branch(node: ir.Node, condition: npt.NDArray[Any] | None) -> ir.Graph | None:
    """The branch of an If that is taken whatever the inputs are; None where that is not known."""
    if node.op_type != "If" or condition is None or condition.size != 1:
        return None
    return bodies(node).get("then_branch" if condition.reshape(-1)[0] else "else_branch")


def body_inputs(node: ir.Node, body: ir.Graph) -> list[tuple[ir.Value, ir.Value | None, bool]]:
    """(body input, what feeds it from outside, whether slice by slice) of a subgraph.

    Loop: iteration and condition (fed by none of the node's inputs), then what is carried.
    Scan: carried states, then scanned inputs, each a slice along axis 0. If has no inputs.
    """
    if node.op_type == "Loop":
        outer = [None, None, *node.inputs[2:]]
        return [(inner, o, False) for inner, o in zip(body.inputs, outer, strict=False)]
    if node.op_type == "Scan":
        scanned = integer(node, "num_scan_inputs", 0)
        states = len(body.inputs) - scanned
        return [
            (inner, o, index >= states)
            for index, (inner, o) in enumerate(zip(body.inputs, node.inputs, strict=False))
        ]
    return []


def body_outputs(node: ir.Node, body: ir.Graph) -> list[tuple[ir.Value, ir.Value, bool]]:
    """(node output, body output, whether gathered turn by turn along a new axis 0)."""
    if node.op_type == "If":
        return [(o, inner, False) for o, inner in zip(node.outputs, body.outputs, strict=False)]
    if node.op_type == "Loop":
        carried = len(node.inputs) - 2
        inners = list(body.outputs)[1:]
    else:
        carried = len(body.inputs) - integer(node, "num_scan_inputs", 0)
        inners = list(body.outputs)
    return [
        (output, inner, index >= carried)
        for index, (output, inner) in enumerate(zip(node.outputs, inners, strict=False))
    ]


def constants(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Every tensor that holds weights: initializers and outputs of Constant nodes, by name,
    those of subgraphs included."""
    found = {}
    owners = [graph]
    for node in walk(graph):
        owners.extend(bodies(node).values())
        if node.op_type == "Constant" and node.domain == "":
            tensor = constant_tensor(node)
            if tensor is not None:
                found[str(node.outputs[0].name)] = tensor
    for owner in owners:
        for name, value in owner.initializers.items():
            if value.const_value is not None:
                found[str(name)] = value.const_value
    return found


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output, None for anything else."""
    if value is None or value.const_value is not None:
        return None if value is None else value.const_value
    node = value.producer()
    return constant_tensor(node) if node is not None and node.op_type == "Constant" else None


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor that a Constant node holds, whichever attribute holds it; None for others."""
    for name, attribute in node.attributes.items():
        if name == "value":
            tensor: ir.TensorProtocol = attribute.value  # as_tensor() checks a slow protocol
            return tensor
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.array(attribute.value, np.float32))
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.array(attribute.value, np.int64))
    return None
