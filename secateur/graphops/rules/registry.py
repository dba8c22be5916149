"""The one table of operators: (domain, operator, opset range) → rule.

Everything the engine knows about an operator is one `register` call in one file of this folder:
how labels pass through (`couple`), how the node is rewritten when labels go (`rewrite`, only
where slicing its constants is not enough), what it costs (`macs`), and whether it is a matrix
product that can be refitted (`linear`) or ends in a scale and a shift (`affine`), beyond what its
output stands still (`flat`), and what it makes of nothing (`void`). An operator without a rule is
not guessed at: whatever reaches it is frozen and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from secateur.graphops.coupling.flow import Flow
    from secateur.graphops.coupling.units import Axis
    from secateur.graphops.coupling.void import Passes
    from secateur.graphops.rules.linear import Linear
    from secateur.graphops.surgery.surgeon import Surgeon

Couple = Callable[["Flow", ir.Node], None]
Rewrite = Callable[["Surgeon", ir.Node], None]
Macs = Callable[["Flow", ir.Node], "list[tuple[Axis, ...]]"]
Flat = Callable[[ir.Node], "tuple[float, float] | None"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What the engine knows of an operator.

    Attributes:
        family: the rule's family, for tables and tests.
        couple: passes labels from inputs to outputs.
        rewrite: adapts attributes and integer inputs of the node after units went.
        macs: multiply-accumulates, a sum of products of the sizes of axes.
        linear: sees the node as a matrix product over positions, from which criteria take moments
            and which repair fits; None where it is not one.
        affine: the axis of the output along which the parameters with the roles `scale` and `bias`
            run, one of each per channel, applied last; None where the node does not end so.
        flat: below and above which inputs the output no longer changes, for operators that work
            position by position; None where it always does.
        void: what the outputs hold, or which input they equal, where others hold nothing (see
            `coupling.branches`); None where that is not known.
        roles: input index → what that parameter is (`scale` of a BatchNormalization).
        reads: inputs whose labels `couple` looks at; labels that reach others are frozen.
            None: all of them.
        moves: whether the outputs hold elements of input 0 and no others.
        additive: whether the output holds sums of elements of the inputs, with the same factors at
            every position of an axis that passes.
        domain, op_type: the operator, `ai.onnx` spelt as the empty string.
        since, until: opset versions for which it holds, inclusive.
    """

    family: str
    couple: Couple
    rewrite: Rewrite | None
    macs: Macs | None
    linear: Linear | None
    affine: int | None
    flat: Flat | None
    void: Passes | None
    roles: dict[int, str]
    reads: tuple[int, ...] | None
    moves: bool
    additive: bool
    domain: str
    op_type: str
    since: int
    until: int


_RULES: dict[tuple[str, str], list[Rule]] = {}
_REASONS: dict[tuple[str, str], str] = {}
_LATEST = 1 << 30


def register(
    op_types: str,
    family: str,
    couple: Couple,
    *,
    rewrite: Rewrite | None = None,
    macs: Macs | None = None,
    linear: Linear | None = None,
    affine: int | None = None,
    flat: Flat | None = None,
    void: Passes | None = None,
    roles: dict[int, str] | None = None,
    reads: tuple[int, ...] | None = None,
    moves: bool = False,
    additive: bool = False,
    domain: str = "",
    since: int = 1,
    until: int = _LATEST,
) -> None:
    """Registers one rule for each of the space-separated operators.

    Raises:
        ValueError: another rule claims one of them in an overlapping opset range.
    """
    for op_type in op_types.split():
        rules = _RULES.setdefault((domain, op_type), [])
        for other in rules:
            if since <= other.until and other.since <= until:
                raise ValueError(
                    f"{domain or 'ai.onnx'}::{op_type} has a rule for opsets "
                    f"{other.since}..{other.until} already"
                )
        rules.append(
            Rule(
                family,
                couple,
                rewrite,
                macs,
                linear,
                affine,
                flat,
                void,
                roles or {},
                reads,
                moves,
                additive,
                domain,
                op_type,
                since,
                until,
            )
        )


def find(domain: str, op_type: str, opset: int) -> Rule | None:
    """The rule for an operator at an opset version, None when there is none."""
    for rule in _RULES.get((domain, op_type), ()):
        if rule.since <= opset <= rule.until:
            return rule
    return None


def of(node: ir.Node, opsets: Mapping[str, int]) -> Rule | None:
    """The rule for a node of a model that imports these versions of domains, None for none."""
    return find(node.domain, node.op_type, opsets.get(node.domain, 1))


def explain(op_types: str, sentence: str, *, domain: str = "") -> None:
    """States why space-separated operators have no rule on purpose.

    Raises:
        ValueError: one of them has been explained before.
    """
    for op_type in op_types.split():
        if _REASONS.setdefault((domain, op_type), sentence) != sentence:
            raise ValueError(f"{domain or 'ai.onnx'}::{op_type} is explained twice")


def reason(domain: str, op_type: str) -> str | None:
    """Why an operator has no rule, None where nobody has said."""
    return _REASONS.get((domain, op_type))


def all_reasons() -> dict[tuple[str, str], str]:
    """(domain, operator) → why it has no rule."""
    return dict(_REASONS)


def all_rules() -> Iterator[Rule]:
    """Every rule, by domain and operator."""
    for key in sorted(_RULES):
        yield from _RULES[key]
