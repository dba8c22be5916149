"""Operators that multiply and sum: each is an einsum, said with letters.

Sliced on the summed axis, both operands lose the same positions; the result is what it would be
with zeros there. Sliced on any other axis, the result loses the same slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from secateur.graphops.coupling.facts import Choice
from secateur.graphops.coupling.flow import Flow, Letter
from secateur.graphops.coupling.labels import Block
from secateur.graphops.coupling.units import Axis
from secateur.graphops.coupling.void import multiplied
from secateur.graphops.model.attributes import integer, operand, text
from secateur.graphops.rules.linear import linear_gemm, linear_matmul
from secateur.graphops.rules.registry import register


def couple_matmul(flow: Flow, node: ir.Node) -> None:
    """`…mk, …kn → …mn` with broadcasting; vectors lack m or n."""
    a, b = flow.rank(node.inputs[0]), flow.rank(node.inputs[1])
    if a is None or b is None or 0 in (a, b):
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    batch = max(a, b) - 2
    left = [*range(batch - (a - 2), batch), "m", "k"] if a > 1 else ["k"]
    right = [*range(batch - (b - 2), batch), "k", "n"] if b > 1 else ["k"]
    result = [*range(max(batch, 0)), *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])]
    if _couple_diagonal(flow, node, (0, left), (1, right), result):
        return None
    flow.set(node.outputs[0], flow.meet(node, [(0, left), (1, right)], result, heads=True))
    for value, axes in zip(node.inputs, (a - 2, b - 2), strict=True):
        if value is not None and value.name in flow.constants:
            flow.stacks += [b.labels for b in flow.blocks(value) if max(b.axes) < axes]
    return None


def _couple_diagonal(
    flow: Flow,
    node: ir.Node,
    data: tuple[int, Sequence[Letter]],
    stack: tuple[int, Sequence[Letter]],
    result: Sequence[Letter],
) -> bool:
    """A block-diagonal matrix, stored as its blocks: x (…, g, c), W (g, c, o) → (…, g, o).

    Channels that were split into (groups, channels of a group) meet a stack of constant matrices,
    one for each group. As of a grouped convolution, whole groups may go, or the same channels of
    each. False, and nothing stated, where a product is not like that.
    """
    (place, left), (other, right) = data, stack
    x, w = node.inputs[place], node.inputs[other]
    if x is None or w is None or w.name not in flow.constants:
        return False
    joint = [block for block in flow.blocks(x) if len(block.axes) == 2]
    lines = {right[b.axes[0]]: b.labels for b in flow.blocks(w) if len(b.axes) == 1}
    if len(joint) != 1 or len(lines) != 3:
        return False
    block = joint[0]
    shared = [letter for letter in lines if letter in left]
    column = next((letter for letter in shared if letter not in result), None)
    group = next((letter for letter in shared if letter in result), None)
    outer = next((letter for letter in lines if letter not in left), None)
    names = [left[axis] for axis in block.axes]
    if outer not in result or None in (group, column) or set(names) != {group, column}:
        return False
    assert group is not None
    assert column is not None
    if any({left[axis] for axis in b.axes} & set(right) for b in flow.blocks(x) if b is not block):
        return False
    entering = block.labels if names[0] == group else block.labels.T
    if entering.shape != (lines[group].size, lines[column].size):
        return False
    leaving = flow.fresh(lines[group].size * lines[outer].size).reshape(entering.shape[0], -1)
    flow.choose(
        Choice(
            node,
            matrices=(entering, leaving),
            rows=(lines[group],),
            columns=((0, lines[column]), (1, lines[outer])),
            contraction=(place, left.index(column), True),
        )
    )
    places = result.index(group), result.index(outer)
    own = Block(places, leaving) if places[0] < places[1] else Block(places[::-1], leaving.T)
    others = (b for b in flow.blocks(x) if b is not block)
    moved = (Block(tuple(result.index(left[a]) for a in b.axes), b.labels) for b in others)
    flow.set(node.outputs[0], (own, *moved))
    return True


def couple_gemm(flow: Flow, node: ir.Node) -> None:
    """`α·A'·B' + β·C`: `mk, kn, mn → mn`, A and B possibly transposed, C broadcast."""
    left = ["k", "m"] if integer(node, "transA", 0) else ["m", "k"]
    right = ["n", "k"] if integer(node, "transB", 0) else ["k", "n"]
    operands: list[tuple[int, list[str]]] = [(0, left), (1, right)]
    if operand(node, 2) is not None:
        bias = flow.rank(node.inputs[2])
        if bias is None:
            return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape of C is not known")
        operands.append((2, ["m", "n"][2 - bias :]))
    flow.set(node.outputs[0], flow.meet(node, operands, ["m", "n"]))
    return None


def couple_einsum(flow: Flow, node: ir.Node) -> None:
    """As the equation says; diagonals (a letter twice in one term) are frozen."""
    equation = text(node, "equation", "").replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    ranks = [flow.rank(value) for value in node.inputs]
    if (
        not arrow
        or None in ranks
        or any(len(set(t.replace("...", ""))) < len(t.replace("...", "")) for t in terms)
    ):
        return flow.freeze_inputs(node, "UNSUPPORTED_FORM", f"equation {equation!r}")
    dots = max(
        r - len(t.replace("...", "")) for r, t in zip(ranks, terms, strict=True) if r is not None
    )
    operands = [
        (index, _letters(term, (ranks[index] or 0) - len(term.replace("...", "")), dots))
        for index, term in enumerate(terms)
    ]
    letters = _letters(result, dots if "..." in result else 0, dots)
    if len(operands) == 2:
        for data, stack in (operands, operands[::-1]):
            if _couple_diagonal(flow, node, data, stack, letters):
                return None
    flow.set(node.outputs[0], flow.meet(node, operands, letters, heads=True))
    return None


def _letters(term: str, own: int, dots: int) -> list[str | int]:
    """A term's letters, an ellipsis of `own` axes becoming the last of `dots` numbers."""
    head, ellipsis, tail = term.partition("...")
    middle: list[str | int] = list(range(dots - own, dots)) if ellipsis else []
    return [*head, *middle, *tail]


def macs_matmul(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Size of the result × length of the sum."""
    a = node.inputs[0]
    last = (flow.rank(a) or 1) - 1
    return [(*all_axes(flow, node.outputs[0]), (str(a.name if a else ""), last))]


def macs_gemm(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Size of the result × length of the sum."""
    a = node.inputs[0]
    k = 0 if integer(node, "transA", 0) else 1
    return [(*all_axes(flow, node.outputs[0]), (str(a.name if a else ""), k))]


def macs_einsum(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Product of the sizes of all letters."""
    equation = text(node, "equation", "").replace(" ", "").partition("->")[0]
    axes: dict[str, Axis] = {}
    for term, value in zip(equation.split(","), node.inputs, strict=True):
        for axis, letter in enumerate(term.replace("...", "")):
            axes.setdefault(letter, (str(value.name if value else ""), axis))
    return [tuple(axes.values())]


def all_axes(flow: Flow, value: ir.Value) -> tuple[Axis, ...]:
    """Every axis of a tensor, as a factor of a cost."""
    return tuple((str(value.name), axis) for axis in range(flow.rank(value) or 0))


register(
    "MatMul",
    "contraction",
    couple_matmul,
    macs=macs_matmul,
    linear=linear_matmul,
    void=multiplied,
)
register(
    "Gemm",
    "contraction",
    couple_gemm,
    macs=macs_gemm,
    linear=linear_gemm,
    void=multiplied,
    roles={1: "weight", 2: "bias"},
)
register("Einsum", "contraction", couple_einsum, macs=macs_einsum)
