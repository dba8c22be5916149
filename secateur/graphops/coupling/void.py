"""What operators make of nothing: of zeros that stand for what went, or of no elements at all.

A rule's `void` says it for its operator (see `coupling.branches`). These are the families.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from secateur.graphops.model.attributes import integer

if TYPE_CHECKING:
    from secateur.graphops.coupling.flow import Flow


class Void(enum.IntEnum):
    """What a tensor holds once a position went."""

    EMPTY = 0  # no elements, which are all zero
    ZERO = 1  # zeros only, or false
    OTHER = 2  # it is not known what
    WHOLE = 3  # what it held before


# From the node and what its inputs hold, one of them not WHOLE: what its outputs hold, or the
# input that they equal.
Passes = Callable[["Flow", ir.Node, Sequence[Void]], Void | ir.Value]


def of_first(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """Moves the elements of input 0, or makes zeros of zeros."""
    return states[0] if states[0] <= Void.ZERO else Void.OTHER


def of_any(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """A product: zero where a factor is."""
    return min(states) if min(states) <= Void.ZERO else Void.OTHER


def of_empty(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """Works position by position: on none, it gives none."""
    return Void.EMPTY if Void.EMPTY in states else Void.OTHER


def of_all(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """Joins its inputs: zeros where all are."""
    return max(states) if max(states) <= Void.ZERO else Void.OTHER


def added(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void | ir.Value:
    """A sum of two: what is added to zeros is left as it is."""
    if Void.EMPTY in states or max(states) <= Void.ZERO:
        return min(states)
    if set(states) != {Void.ZERO, Void.WHOLE}:
        return Void.OTHER
    return left(flow, node, states.index(Void.WHOLE))


def subtracted(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void | ir.Value:
    """A difference: likewise, but the other way round."""
    return Void.OTHER if states[1] is Void.WHOLE else added(flow, node, states)


def summed(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """Sums along axes: of no elements too, the sum is zero."""
    return Void.ZERO if states[0] <= Void.ZERO else Void.OTHER


def multiplied(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """A matrix product: of no rows none, of no columns zeros; and a shift, if there is one."""
    first = node.inputs[0]
    width = len(flow.shape(first) or ())
    if states[0] is Void.EMPTY and width > 1 and first is not None and first.name:
        # what is summed over is the model's own size, so that rows are what there is none of
        along = width - 2 if integer(node, "transA", 0) else width - 1
        if flow.shapes.is_fixed(first.name, along):
            return Void.EMPTY
    return Void.ZERO if min(states[:2]) <= Void.ZERO and len(states) < 3 else Void.OTHER


def found(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """What is not zero, among zeros."""
    return Void.EMPTY if states[0] <= Void.ZERO else Void.OTHER


def taken(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void:
    """Takes what input 1 names of input 0."""
    if states[1] is Void.EMPTY:
        return Void.EMPTY
    return Void.ZERO if states[0] is Void.ZERO else Void.OTHER


def written(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void | ir.Value:
    """Writes to a copy of input 0 where input 1 says: nowhere, and it stays what it was."""
    return left(flow, node, 0) if states[:2] == [Void.WHOLE, Void.EMPTY] else Void.OTHER


def chosen(flow: Flow, node: ir.Node, states: Sequence[Void]) -> Void | ir.Value:
    """Where: input 2 wherever input 0 is false."""
    if Void.EMPTY in states:
        return Void.EMPTY
    if states[0] is not Void.ZERO:
        return Void.OTHER if states[0] is Void.OTHER else of_all(flow, node, states[1:])
    if states[2] is not Void.WHOLE:
        return states[2]
    known, kept = flow.value(node.inputs[2]), left(flow, node, 2)
    return Void.ZERO if kept is Void.OTHER and known is not None and not known.any() else kept


def left(flow: Flow, node: ir.Node, index: int) -> Void | ir.Value:
    """An input that the output equals, if it is not stretched to a larger shape."""
    value, output = node.inputs[index], node.outputs[0]
    if value is None:
        return Void.OTHER
    for shapes in (flow.shapes.first, flow.shapes.second):
        shape = shapes.get(str(value.name))
        if shape is None or None in shape or shape != shapes.get(str(output.name)):
            return Void.OTHER
    return value
