"""The state of one pass of labels through a graph, and what operators' rules may do to it.

A rule reads the blocks of its node's inputs, states equalities between labels, freezes what it
cannot carry, and sets the blocks of its outputs. It never sees numbers, and it keeps no state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling.facts import (
    BranchEnd,
    Choice,
    Contraction,
    Pointer,
    Reason,
    Segment,
    Taken,
)
from secateur.graphops.coupling.labels import (
    BARE,
    FIXED,
    Block,
    Blocks,
    Labels,
    rows_along,
    thin,
    thin_along,
)
from secateur.graphops.model.graph import node_label
from secateur.graphops.model.shapes import Array, Shape, Shapes

Letter = Hashable

# Above this many labels a reshape collapses a joint block to its first axis before it grows.
MAX_BLOCK = 1 << 20
# More positions than that along one axis are a damaged file's, and would only take memory.
MAX_FRESH = 1 << 24


@dataclass(slots=True)
class Flow:
    """Everything one pass accumulates.

    Attributes:
        shapes: of every tensor.
        opsets: domain → version.
        constants: names of tensors that hold weights (initializers and Constant outputs).
        graph: of the model, without the bodies of its nodes.
        by_dimension: whether attention loses the same dimensions of every head, not heads.
        blocks_of: the labels of each tensor, by its name; of a constant once it is asked for.
        equal: labels that go together, pair by pair.
        frozen: labels that must stay, and the number of the reason.
        reasons: why, by number.
        rectangles: labels of joint blocks: what is left of one must have rows of equal length.
        segments: positions of which some must stay.
        heads: labels of what is an attention head.
        experts: labels of experts that something chooses from.
        stacks: labels of what lies before the last two axes of constant matrices.
        choices: of one of two cuts, made when everything is known.
        contractions: axes that are summed over.
        held: constants that must stay whole, and the node that says so.
        pointers: tensors of integers that name positions, by name.
        taken: positions that are taken out alone.
        beside: stacks of computed tensors, by name: the node, and the new axis.
        branch_ends: where what goes with a label ends.
        parts: what goes with labels, by name: constants, and nodes (see `coupling.branches`).
        routed: nodes, by label, that work on what chose their branch: it goes to others instead.
        visit: passes labels through one node; rules of nodes with subgraphs call it inside.
        labels: how many there are; label 0 is FIXED.
    """

    shapes: Shapes
    opsets: dict[str, int]
    constants: dict[str, ir.TensorProtocol]
    graph: ir.Graph
    by_dimension: bool = False
    blocks_of: dict[str, Blocks] = field(default_factory=dict)
    equal: list[tuple[Labels, Labels]] = field(default_factory=list)
    frozen: list[tuple[Labels, int]] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    rectangles: list[Labels] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    heads: list[Labels] = field(default_factory=list)
    experts: list[Labels] = field(default_factory=list)
    stacks: list[Labels] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    held: dict[str, ir.Node] = field(default_factory=dict)
    pointers: dict[str, Pointer] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    beside: dict[str, tuple[ir.Node, int]] = field(default_factory=dict)
    branch_ends: list[BranchEnd] = field(default_factory=list)
    parts: dict[str, frozenset[int]] = field(default_factory=dict)
    routed: set[str] = field(default_factory=set)
    visit: Callable[[ir.Node], None] = field(default=lambda node: None)
    labels: int = 1
    _loose: set[int] = field(default_factory=set)
    _followed: set[tuple[ir.Node, int]] = field(default_factory=set)
    _reason_ids: dict[Reason, int] = field(default_factory=dict)

    # -- reading -------------------------------------------------------------------------------

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape under the first binding of symbolic sizes."""
        return None if value is None else self.shapes.of(value.name or "")

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes, None when unknown."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def value(self, value: ir.Value | None) -> Array | None:
        """A small constant or a result of shape arithmetic, if known."""
        return None if value is None else self.shapes.values.get(value.name or "")

    def opset(self, node: ir.Node) -> int:
        """The version of the node's operator set."""
        return self.opsets.get(node.domain, 1)

    def blocks(self, value: ir.Value | None) -> Blocks:
        """The labels of a tensor. A constant gets labels of its own when first asked for."""
        if value is None or not value.name:
            return BARE
        known = self.blocks_of.get(value.name)
        if known is None:
            known = BARE
            if value.name in self.constants:
                sizes = self.shapes.first[value.name]
                if 0 not in sizes:
                    known = tuple(
                        Block((axis,), self.fresh(size))
                        for axis, size in enumerate(sizes)
                        if size is not None and 1 < size <= MAX_FRESH
                    )
            self.blocks_of[value.name] = known
        return known

    def axis(self, value: ir.Value, axis: int) -> Labels | None:
        """The labels along one axis; a joint block is collapsed to it. None where bare."""
        for block in self.blocks(value):
            if axis in block.axes:
                return self.collapse(value, block, axis).labels
        return None

    def line(self, value: ir.Value, axis: int, size: int) -> Labels:
        """As `axis`, with `size` times FIXED where it is bare."""
        labels = self.axis(value, axis)
        return np.zeros(size, np.int32) if labels is None else labels

    # -- stating -------------------------------------------------------------------------------

    def fresh(self, count: int) -> Labels:
        """New labels, one per position.

        Raises:
            ValueError: there are more than any real axis has; the node is then frozen.
        """
        if count > MAX_FRESH:
            raise ValueError(f"an axis of {count} positions")
        start, self.labels = self.labels, self.labels + count
        return np.arange(start, start + count, dtype=np.int32)

    def loose(self, count: int) -> Labels:
        """New labels of positions that a node makes and can leave out: copies, padding, zeros."""
        labels = self.fresh(count)
        self._loose.update(labels.tolist())
        return labels

    def is_loose(self, labels: Labels) -> bool:
        """Whether a block holds nothing but positions that a node can leave out."""
        return int(labels.flat[0]) in self._loose

    def padding(self, labels: Labels) -> tuple[int, int]:
        """How many positions at the front and at the back a node made and can leave out."""
        own = np.isin(labels, np.fromiter(self._loose, np.int32, len(self._loose)))
        ends = np.flatnonzero(~own)
        return (int(ends[0]), labels.size - 1 - int(ends[-1])) if ends.size else (labels.size, 0)

    def set(self, value: ir.Value, blocks: Blocks) -> None:
        """Sets the blocks of an output.

        Raises:
            ValueError: a block does not fit the output's shape; the node is then frozen.
        """
        shape = self.shape(value)
        for block in blocks:
            for axis, size in zip(block.axes, block.labels.shape, strict=True):
                if shape is not None and (axis >= len(shape) or shape[axis] not in (size, None)):
                    raise ValueError(f"axis {axis} of {value.name!r} holds {size} labels: {shape}")
            if len(block.axes) > 1 and block.labels.size:
                self.rectangles.append(thin(block.labels))
        if value.name:  # along an axis of no positions nothing can be said
            self.blocks_of[value.name] = tuple(block for block in blocks if block.labels.size)

    def join(self, node: ir.Node, first: Labels, second: Labels) -> None:
        """States that labels meet, pair by pair; what meets a fixed position is frozen."""
        first, second = np.broadcast_arrays(first.reshape(-1), second.reshape(-1))
        moving = (first != FIXED) & (second != FIXED)
        if moving.all():
            self.equal.append((first, second))
            return
        self.equal.append((first[moving], second[moving]))
        for labels, other in ((first, second), (second, first)):
            self.freeze(
                labels[other == FIXED], node, "BARE_AXIS", "meets positions that cannot be cut"
            )

    def join_rows(self, node: ir.Node, rows: Labels) -> None:
        """States that the labels of each row go together; (rows, labels of one)."""
        if rows.shape[1] > 1:
            self.join(node, np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1), rows[:, 1:])

    def join_slices(self, labels: Labels, place: int) -> Labels:
        """States that whole slices along one axis of a joint block go together.

        Returns:
            one label per slice, FIXED where a part of it cannot be cut.
        """
        rows = thin_along(rows_along(labels, place), 1)  # positions in space say the same
        first = np.repeat(rows[:, :1], rows.shape[1] - 1, axis=1)
        self.equal.append((first.reshape(-1), rows[:, 1:].reshape(-1)))
        fixed = (rows == FIXED).any(axis=1)
        self.freeze(rows[fixed], None, "BARE_AXIS", "part of it cannot be cut")
        return np.where(fixed, FIXED, rows[:, 0]).astype(np.int32)

    def freeze(self, labels: Labels, node: ir.Node | None, code: str, detail: str) -> None:
        """Keeps positions, for a reason."""
        labels = labels.reshape(-1)
        labels = labels[labels != FIXED]
        if not labels.size:
            return
        name, op_type = ("", "")
        if node is not None:
            domain = node.domain or "ai.onnx"
            name = node_label(node)
            op_type = f"{domain}::{node.op_type}-{self.opset(node)}"
        reason = Reason(code, name, op_type, detail)
        number = self._reason_ids.setdefault(reason, len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append(reason)
        self.frozen.append((labels, number))

    def freeze_value(self, value: ir.Value | None, node: ir.Node, code: str, detail: str) -> None:
        """Keeps all of a tensor."""
        for block in self.blocks(value):
            self.freeze(block.labels, node, code, detail)

    def freeze_inputs(self, node: ir.Node, code: str, detail: str) -> None:
        """Keeps all of everything that a node reads."""
        for value in node.inputs:
            self.freeze_value(value, node, code, detail)

    def freeze_axis(
        self, value: ir.Value, axis: int, node: ir.Node, code: str, detail: str
    ) -> None:
        """Keeps one axis of a tensor whole; the other axes of a joint block stay free."""
        blocks = []
        for block in self.blocks(value):
            if axis not in block.axes:
                blocks.append(block)
            elif len(block.axes) == 1:
                self.freeze(block.labels, node, code, detail)
            else:
                pivot = next(other for other in block.axes if other != axis)
                blocks.append(self.collapse(value, block, pivot))
        if value.name:
            self.blocks_of[value.name] = tuple(blocks)

    def hold(self, node: ir.Node) -> None:
        """Keeps the node's constants whole, where the node itself moves nothing.

        They get no labels for it: naming each of their positions would cost time and say
        nothing. Only what another reader labels is frozen, at the end.
        """
        for value in node.inputs:
            if value is not None and value.name in self.constants:
                self.held.setdefault(value.name, node)

    def freeze_held(self) -> None:
        """Freezes the labels that other readers gave to constants that must stay whole."""
        for name, node in self.held.items():
            for block in self.blocks_of.get(name, BARE):
                self.freeze(block.labels, node, "BARE_AXIS", "meets positions that cannot be cut")

    def collapse(self, value: ir.Value, block: Block, axis: int) -> Block:
        """Makes whole slices along `axis` the units of a joint block: equal along the others."""
        if block.axes == (axis,):
            return block
        result = Block((axis,), self.join_slices(block.labels, block.axes.index(axis)))
        if value.name:
            others = (result if other is block else other for other in self.blocks(value))
            self.blocks_of[value.name] = tuple(others)
        return result

    def unite(self, node: ir.Node, first: ir.Value, second: ir.Value) -> Blocks:
        """States that two tensors are one in turn (branches, turns of a loop); its blocks."""
        left, right = self.blocks(first), self.blocks(second)
        shared: Blocks = BARE
        for block in left:
            partner = next((other for other in right if other.axes == block.axes), None)
            if partner is not None and partner.labels.shape == block.labels.shape:
                self.join(node, block.labels, partner.labels)
                shared += (block,)
        axes = {block.axes for block in shared}
        for block in (*left, *right):
            if block.axes not in axes:
                self.freeze(block.labels, node, "BARE_AXIS", "the other branch or turn has none")
        return shared

    def choose(self, choice: Choice) -> None:
        """Leaves to `grouping.decide` which of the two cuts of a grouped axis is made.

        Raises:
            ValueError: a vector that runs with the groups is not as long as there are groups.
        """
        if any(row.size != matrix.shape[0] for row in choice.rows for matrix in choice.matrices):
            raise ValueError("a vector with neither one number per channel nor one per group")
        self.choices.append(choice)

    def keep(self, labels: Labels, least: int = 1) -> None:
        """So many of these positions must stay: one, or an axis would be empty."""
        self.segments.append(Segment(labels, least))

    def contract(
        self,
        node: ir.Node,
        index: int,
        axis: int,
        exact: bool = True,
        chosen: int | None = None,
    ) -> None:
        """Records that a node sums (or normalises) over an axis of its input `index`, or chooses
        from it."""
        self.contractions.append(Contraction(node, index, axis, exact, chosen))

    # -- one position alone --------------------------------------------------------------------

    def take(self, node: ir.Node, output: ir.Value, label: int, axis: int | None) -> None:
        """A node takes out one position, by which all of an output stands or falls."""
        if node.graph is self.graph and label != FIXED:
            self.taken.append(Taken(node, output, label, axis))
        else:
            self.freeze(np.array([label], np.int32), node, "INDEXED", "is taken by its position")

    def put_beside(self, node: ir.Node, axis: int) -> None:
        """A node puts computed tensors of one position each side by side along a new axis.

        They get labels when they meet as many computed positions that can be cut (see `meet`), if
        nothing else reads them: a stack of anything else stays as it is.
        """
        output = node.outputs[0]
        if node.graph is self.graph and len(output.uses()) == 1 and output.name:
            self.beside[output.name] = node, axis

    def _label_beside(
        self, node: ir.Node, operands: Sequence[tuple[int, Sequence[Letter | None]]]
    ) -> None:
        """Gives a stack labels where it is about to meet those of another operand."""
        lines = {
            theirs[block.axes[0]]
            for place, theirs in operands
            if (other := node.inputs[place]) is not None and other.name not in self.constants
            for block in self.blocks(other)
            if len(block.axes) == 1
        }
        for index, letters in operands:
            value = node.inputs[index]
            made, axis = self.beside.get(str(value.name if value else ""), (None, 0))
            if made is None or value is None or letters[axis] not in lines:
                continue
            del self.beside[str(value.name)]
            labels = self.fresh(len(made.inputs))
            self.keep(labels)
            self.set(value, (*self.blocks(value), Block((axis,), labels)))
            for place, label in enumerate(labels.tolist()):
                self.branch_ends.append(BranchEnd(made, frozenset([label]), without=place))

    # -- integers that name positions ----------------------------------------------------------

    def point(self, value: ir.Value, labels: Labels, source: ir.Node) -> None:
        """The integers of a tensor name positions of the axis that `labels` lie along."""
        if value.name:
            self.pointers[value.name] = Pointer(value, labels, source)

    def pointed(self, value: ir.Value | None) -> Labels | None:
        """Labels of the axis whose positions a tensor names, None where it names none."""
        pointer = None if value is None else self.pointers.get(value.name or "")
        return None if pointer is None else pointer.labels

    def follow(self, node: ir.Node, index: int) -> None:
        """Says that a node reads no other numbers than new ones from its input `index`."""
        self._followed.add((node, index))

    def choose_from(self, node: ir.Node, index: int, axis: int) -> None:
        """A node takes positions of an axis of its input 0 that input `index` names."""
        data, chosen = node.inputs[0], self.pointed(node.inputs[index])
        assert data is not None and chosen is not None
        along = self.axis(data, axis)
        if along is None or along.size != chosen.size:
            self.freeze(chosen, node, "BARE_AXIS", "chooses from positions that cannot be cut")
            self.freeze_axis(data, axis, node, "INDEXED", "is indexed by data")
        else:
            self.join(node, chosen, along)
            self.contract(node, 0, axis)
            self.experts.append(chosen)
        self.follow(node, index)

    def move_pointers(self, node: ir.Node) -> None:
        """The outputs hold integers of input 0 and no others."""
        value = node.inputs[0] if node.inputs else None
        pointer = None if value is None else self.pointers.get(value.name or "")
        if pointer is not None:
            self.follow(node, 0)
            for output in node.outputs:
                self.point(output, pointer.labels, pointer.source)

    def freeze_answers(self) -> None:
        """Freezes axes whose positions, by number, reach an output or a node that only knows
        the old numbers."""
        for pointer in self.pointers.values():
            readers = ((use.node, use.idx) for use in pointer.value.uses())
            if pointer.value.is_graph_output() or not self._followed.issuperset(readers):
                self.freeze(
                    pointer.labels, pointer.source, "INDEXED", "its positions are the answer"
                )

    # -- where operands meet -------------------------------------------------------------------

    def meet(
        self,
        node: ir.Node,
        operands: Sequence[tuple[int, Sequence[Letter | None]]],
        letters: Sequence[Letter],
        heads: bool = False,
        exact: bool = True,
    ) -> Blocks:
        """States the equalities of an einsum: the one place where operands meet.

        Element-wise operators, MatMul, Gemm, Einsum and the parameters of normalisations are all
        described by giving each axis a letter: axes of one letter run together, and a letter
        missing from the result is summed over.

        Args:
            node: whose operands they are.
            operands: (input index, one letter per axis); None for an axis that must stay whole.
            letters: of the result's axes.
            heads: name what a joint block is collapsed to a head.
            exact: whether summing over zeros is the same as summing over fewer.

        Returns:
            the blocks of the result.
        """
        if self.beside:
            self._label_beside(node, operands)
        views = _Views(self, node, operands)
        views.resolve_joint_blocks(frozenset(letters), heads)
        views.record_contractions(frozenset(letters), exact)
        return views.join(letters)


class _Views:
    """The operands of one `meet`, as blocks over letters."""

    def __init__(
        self, flow: Flow, node: ir.Node, operands: Sequence[tuple[int, Sequence[Letter | None]]]
    ) -> None:
        self.flow, self.node = flow, node
        sizes: dict[Letter, int] = {}
        shapes = []
        for index, letters in operands:
            shape = flow.shape(node.inputs[index])
            shapes.append(shape)
            for letter, size in zip(letters, shape or (), strict=False):
                if letter is not None:
                    sizes[letter] = max(sizes.get(letter, 1), size if size is not None else 2)
        self.operands: list[tuple[ir.Value, int, list[Letter | None]]] = []
        for (index, letters), shape in zip(operands, shapes, strict=True):
            value = node.inputs[index]
            assert value is not None
            effective = list(letters)
            for axis, letter in enumerate(letters):
                size = shape[axis] if shape is not None and axis < len(shape) else None
                spread = letter is not None and size == 1 and sizes[letter] > 1
                if spread or letter is None:
                    flow.freeze_axis(value, axis, node, "BARE_AXIS", "is broadcast or kept whole")
                    effective[axis] = None
            self.operands.append((value, index, effective))

    def _blocks(self, operand: int) -> Iterable[tuple[Block, tuple[Letter, ...]]]:
        value, _, letters = self.operands[operand]
        for block in self.flow.blocks(value):
            yield block, tuple(letters[axis] for axis in block.axes)

    def resolve_joint_blocks(self, result: frozenset[Letter], heads: bool) -> None:
        """Collapses joint blocks that another operand, or the result, needs by one axis."""
        for operand in range(len(self.operands)):
            for block, names in list(self._blocks(operand)):
                if len(names) < 2:
                    continue
                kept = [name for name in names if name in result]
                bare, split = self._touched(operand, names)
                if not split and not bare and len(kept) in (0, len(names)):
                    continue
                if not split and not bare:
                    self._join_alike(names)
                pool = names if self.flow.by_dimension else kept or names
                candidates = [name for name in pool if name not in bare]
                if not candidates:
                    candidates = [name for name in names if name not in bare] or list(names)
                value = self.operands[operand][0]
                # Of (heads, head size) the first goes, unless dimensions are asked for.
                chosen = candidates[-1 if self.flow.by_dimension else 0]
                pivot = block.axes[names.index(chosen)]
                collapsed = self.flow.collapse(value, block, pivot)
                if heads:
                    self.flow.heads.append(collapsed.labels)

    def _touched(self, operand: int, names: tuple[Letter, ...]) -> tuple[set[Letter], bool]:
        """Which of `names` are bare in another operand, and whether one splits the block."""
        bare: set[Letter] = set()
        split = False
        for other in range(len(self.operands)):
            if other == operand:
                continue
            labelled: set[Letter] = set()
            for _, theirs in self._blocks(other):
                labelled.update(theirs)
                if set(theirs) & set(names) and set(theirs) != set(names):
                    split = True
            mentioned = {letter for letter in self.operands[other][2] if letter is not None}
            bare.update(name for name in names if name in mentioned and name not in labelled)
        return bare, split

    def _join_alike(self, names: tuple[Letter, ...]) -> None:
        """Joins the joint blocks over the same letters, label by label."""
        arrays = []
        for operand in range(len(self.operands)):
            for block, theirs in self._blocks(operand):
                if set(theirs) == set(names) and len(theirs) == len(names):
                    order = [theirs.index(name) for name in names]
                    arrays.append(np.transpose(block.labels, order))
        for other in arrays[1:]:
            self.flow.join(self.node, arrays[0], other)

    def record_contractions(self, result: frozenset[Letter], exact: bool) -> None:
        """Notes every labelled operand axis whose letter the result lacks."""
        for value, index, letters in self.operands:
            for block in self.flow.blocks(value):
                for axis in block.axes:
                    if letters[axis] is not None and letters[axis] not in result:
                        self.flow.contract(self.node, index, axis, exact)

    def join(self, result: Sequence[Letter]) -> Blocks:
        """Joins what shares letters and returns the blocks of the result."""
        gathered: dict[frozenset[Letter], list[tuple[tuple[Letter, ...], Labels]]] = {}
        for operand in range(len(self.operands)):
            for block, names in self._blocks(operand):
                gathered.setdefault(frozenset(names), []).append((names, block.labels))
        mentions: dict[Letter, int] = defaultdict(int)
        for _, _, letters in self.operands:
            for letter in letters:
                if letter is not None:
                    mentions[letter] += 1
        blocks: Blocks = BARE
        for key, met in gathered.items():
            # What meets zeros that a node can leave out is no longer what that node made.
            found = sorted(met, key=lambda one: self.flow.is_loose(one[1]))
            names, labels = found[0]
            for other_names, other in found[1:]:
                order = [other_names.index(name) for name in names]
                self.flow.join(self.node, labels, np.transpose(other, order))
            if any(mentions[name] > len(found) for name in names):
                for _, other in found:
                    self.flow.freeze(
                        other, self.node, "BARE_AXIS", "meets positions that cannot be cut"
                    )
                continue
            if all(name in result for name in key):
                axes = [result.index(name) for name in names]
                order_of_axes = np.argsort(axes)
                blocks += (Block(tuple(sorted(axes)), np.transpose(labels, order_of_axes)),)
        return blocks
