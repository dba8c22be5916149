"""What rules state of labels besides that they are equal."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from secateur.graphops.coupling.labels import Labels


@dataclass(frozen=True, slots=True)
class Reason:
    """Why labels are frozen: a stable code, where, and one sentence."""

    code: str
    node: str
    op_type: str
    detail: str


@dataclass(frozen=True, slots=True)
class Contraction:
    """An operand axis that a node sums over: where a cut equals a zero (the law).

    `exact` is false where the node divides by the count, or compares across the axis. `chosen` says
    how many of the largest positions it takes (of the smallest where negative), 0 where it weighs
    all of them by a softmax, and None where it does not weigh one against the other.
    """

    node: ir.Node
    index: int
    axis: int
    exact: bool
    chosen: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A channel axis that a node reads as groups: whole ones go, or the same part of each.

    Attributes:
        node: whose groups they are.
        matrices: labels (groups, positions of one group) of the operands that are read so.
        rows: vectors (groups,) that go with whole groups, and stay whole otherwise.
        columns: (index of a matrix, vector) that go with its columns, and stay whole otherwise.
        contraction: (input index, axis, exact) that a balanced cut sums or normalises over.
    """

    node: ir.Node
    matrices: tuple[Labels, ...]
    rows: tuple[Labels, ...] = ()
    columns: tuple[tuple[int, Labels], ...] = ()
    contraction: tuple[int, int, bool] | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions of which so many must stay, or a node would have too few."""

    labels: Labels
    least: int


@dataclass(frozen=True, slots=True)
class Pointer:
    """Integers that name positions of an axis: what TopK and ArgMax choose.

    Cutting the axis renumbers them, which is right as long as whoever reads them reads an axis that
    is cut alike.

    Attributes:
        value: the integers.
        labels: along the axis.
        source: the node that chose.
    """

    value: ir.Value
    labels: Labels
    source: ir.Node


@dataclass(frozen=True, slots=True)
class Taken:
    """One position that a node takes out by itself: all of its output hangs on it.

    Attributes:
        node: that takes it.
        output: of the node, without a label for it.
        label: of the position.
        axis: of the node's input 0 that it lies along; None where the output says whether the
            position, by its number, was chosen.
    """

    node: ir.Node
    output: ir.Value
    label: int
    axis: int | None


@dataclass(frozen=True, slots=True)
class BranchEnd:
    """Where a branch ends that goes with labels, all of them together.

    Attributes:
        node: that joins the branch to others.
        labels: without which there is no branch.
        left: the input that the node's readers then read instead; None: the node stays, and does
            without one input.
        without: that input.
    """

    node: ir.Node
    labels: frozenset[int]
    left: int | None = None
    without: int | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """The inputs that nothing reads then."""
        every = range(len(self.node.inputs)) if self.without is None else (self.without,)
        return tuple(index for index in every if index != self.left)
