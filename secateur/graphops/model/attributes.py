"""Reading attributes and optional inputs of a node, as everything does that knows operators."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt
import onnx_ir as ir

# What reading a node may raise that breaks its operator's specification. The node is then treated
# like one without a rule; ONNX Runtime has the last word on whether the model is valid.
MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,  # sizes that no machine has
    TypeError,
    ValueError,
)


class KnowsValues(Protocol):
    """Knows small constants and shape arithmetic: a Flow, and a Surgeon after it."""

    def value(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The array, None when not known."""


def integer(node: ir.Node, name: str, default: int) -> int:
    """An int attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def integers(node: ir.Node, name: str) -> list[int] | None:
    """An ints attribute, None when absent."""
    attribute = node.attributes.get(name)
    return None if attribute is None else [int(item) for item in attribute.as_ints()]


def real(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.as_float())


def text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index`, None when absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def integers_at(known_by: KnowsValues, node: ir.Node, index: int, name: str) -> list[int] | None:
    """Integers that newer opsets take as input `index` and older ones as attribute `name`.

    None when given by neither, or not known before the model runs.
    """
    known = known_by.value(operand(node, index))
    if known is not None:
        return [int(item) for item in known.reshape(-1)]
    return integers(node, name)
