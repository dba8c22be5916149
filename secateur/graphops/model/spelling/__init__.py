"""Operators that say the same as plain ones, spelt out to be read, and written as they were.

    QLinearConv(q, w, b)           ↔   QuantizeLinear(Conv(DequantizeLinear(q), …(w), …(b)))
    Mul(Cast(MatMulInteger(q, w))) ↔   MatMul(DequantizeLinear(q), DequantizeLinear(w))
    Mul(Cast(w), scale)            ↔   DequantizeLinear(w, scale)
    FusedConv(x, w, b, z)          ↔   Relu(Add(Conv(x, w, b), z))

The left is what files hold and devices take; the right is what coupling, criteria and repair know
already, for which a Conv is a Conv wherever its numbers are stored and whatever is joined to it.
`as_given` spells back what `spell_out` has changed, node by node, where the neighbours that it
needs are still there; a node that has lost them stays as it was spelt.
"""

from __future__ import annotations

import contextlib

import onnx_ir as ir

from secateur.graphops.model.attributes import MALFORMED
from secateur.graphops.model.spelling import dynamic, fused, integers
from secateur.graphops.model.spelling.writing import Spell, Writer
from secateur.graphops.model.unread import drop_unread, unread

__all__ = ["ON_INTEGERS", "SPELT", "as_given", "spell_out"]

_MARK = "secateur_spell_back"  # a node's: what makes of it what it was
# What is spelt with one plain operator, and only that: domain, operator → the plain one.
SPELT = {key: form.operator for key, form in integers.FORMS.items()} | fused.OPERATORS
ON_INTEGERS = {op_type for _, op_type in integers.FORMS}
_SPELLINGS: dict[tuple[str, str], Spell] = {
    **dict.fromkeys(integers.FORMS, integers.spell),
    **dict.fromkeys(fused.OPERATORS, fused.spell),
    ("", "MatMulInteger"): dynamic.spell_product,
    ("", "ConvInteger"): dynamic.spell_product,
    ("", "Mul"): dynamic.spell_weight,
}


def spell_out(model: ir.Model) -> dict[str, str]:
    """Spells operators out, in place; those that are not as they are mostly written are left.

    Returns:
        name of each vector that is new → name of the one that it is cut with.
    """
    writer = Writer(model)
    for graph in model.graphs():
        before = None
        for node in list(graph):
            spell = _SPELLINGS.get((node.domain, node.op_type))
            if spell is None:
                continue
            before = unread(graph) if before is None else before
            back = None
            with contextlib.suppress(*MALFORMED):  # nothing is changed before all is read
                back = spell(writer, node)
            if back is not None:
                node.meta[_MARK] = back
        if before is not None:
            drop_unread(graph, before)
    return writer.tied


def as_given(model: ir.Model) -> ir.Model:
    """The model with the operators that it had; itself where none was spelt out."""
    if not any(_MARK in node.meta for graph in model.graphs() for node in graph):
        return model
    result = model.clone()
    for graph in result.graphs():
        before = unread(graph)
        for node in list(graph):
            back = node.meta.get(_MARK)
            if back is not None and back(node):
                del node.meta[_MARK]
        drop_unread(graph, before)
    return result
