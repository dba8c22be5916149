"""Reading attributes and optional inputs of a node, as every rule does."""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.model.shapes import Array


class KnowsValues(Protocol):
    """Knows small constants and shape arithmetic: a Flow, and a Surgeon after it."""

    def value(self, value: ir.Value | None) -> Array | None:
        """The array, None when not known."""


def integer(node: ir.Node, name: str, default: int) -> int:
    """An int attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def integers(node: ir.Node, name: str) -> list[int] | None:
    """An ints attribute, None when absent."""
    attribute = node.attributes.get(name)
    return None if attribute is None else [int(item) for item in attribute.as_ints()]


def text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def integers_at(known_by: KnowsValues, node: ir.Node, index: int, name: str) -> list[int] | None:
    """Integers that newer opsets take as input `index` and older ones as attribute `name`.

    None when given by neither, or not known before the model runs.
    """
    known = known_by.value(operand(node, index))
    if known is not None:
        return [int(item) for item in known.reshape(-1)]
    return integers(node, name)


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index`, None when absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def rank(flow: Flow, value: ir.Value | None) -> int | None:
    """Number of axes, None when unknown."""
    shape = flow.shape(value)
    return None if shape is None else len(shape)
