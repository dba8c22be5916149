"""Mixtures of experts in one node: a router's logits choose, for each token, k of E experts.

    y = Σ over the k largest r_e:  p_e · (W2_e · f(W1_e · x + b1_e) + b2_e)      p = softmax(r)

MoE:  x (…, H), r (tokens, E), W1 (E, F·I, H), b1 (E, F·I), W2 (E, H, I), b2 (E, H)
QMoE: the same with integer weights, whose rows are packed, and scales, zero points and a second
      router that only weighs; everything but x and the routers has E as its axis 0

F is 2 where a gate lies beside each of the I positions (SwiGLU), else 1. Without an expert, the
others are chosen and weighed as if its logit were −∞.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow, Letter
from secateur.graphops.coupling.units import Axis
from secateur.graphops.model.attributes import integer, operand, text
from secateur.graphops.model.contrib import CONTRIB
from secateur.graphops.rules.contraction import all_axes
from secateur.graphops.rules.registry import register

_ROUTER, _WEIGHER = 1, 14  # inputs with E as their axis 1
_GATED = ("swiglu", "geglu")


def couple_moe(flow: Flow, node: ir.Node) -> None:
    """Experts run through the router and all weights; H, as x does, into the result; and I."""
    gated = text(node, "activation_type", "relu") in _GATED
    if operand(node, 6) is not None or (gated and integer(node, "swiglu_fusion", 0) != 1):
        return flow.freeze_inputs(
            node, "UNSUPPORTED_FORM", "ONNX Runtime runs it with one interleaved gate only"
        )
    size = flow.rank(node.inputs[0])
    if size is None:
        return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
    batch: list[Letter] = list(range(size - 1))
    rows = "gated" if gated else "i"
    operands: list[tuple[int, list[Letter]]] = [
        (0, [*batch, "h"]),
        (_ROUTER, ["token", "e"]),
        (2, ["e", rows, "h"]),
        (3, ["e", rows]),
        (4, ["e", "h", "i"]),
        (5, ["e", "h"]),
    ]
    present = [one for one in operands if operand(node, one[0]) is not None]
    # Only H reaches the result; the others stand behind it, so that nothing counts as summed here.
    blocks = flow.meet(node, present, [*batch, "h", "e", rows, *(["i"] if gated else [])])
    first, second = node.inputs[2], node.inputs[4]
    assert first is not None and second is not None
    if gated:
        pairs, inner = flow.axis(first, 1), flow.axis(second, 2)
        if pairs is not None and inner is not None:
            flow.join(node, np.repeat(inner, 2), pairs)
        else:
            flow.freeze_value(first, node, "BARE_AXIS", "meets positions that cannot be cut")
            flow.freeze_value(second, node, "BARE_AXIS", "meets positions that cannot be cut")
    flow.contract(node, 0, size - 1)
    flow.contract(node, 4, 2)
    _couple_experts(flow, node)
    return flow.set(node.outputs[0], tuple(b for b in blocks if max(b.axes) < size))


def couple_quantised_moe(flow: Flow, node: ir.Node) -> None:
    """Experts run through the routers and all else; rows are packed and stay whole."""
    operands: list[tuple[int, list[Letter | None]]] = []
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        size = flow.rank(value)
        if size is None:
            return flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
        letters: list[Letter | None] = [None] * size
        if index:
            letters[1 if index in (_ROUTER, _WEIGHER) else 0] = "e"
        operands.append((index, letters))
    flow.meet(node, operands, ["e"])
    return _couple_experts(flow, node)


def _couple_experts(flow: Flow, node: ir.Node) -> None:
    router = node.inputs[_ROUTER]
    experts = flow.axis(router, 1) if router is not None else None
    if experts is not None:
        chosen = integer(node, "k", 1)
        flow.keep(experts, chosen)
        flow.contract(node, _ROUTER, 1, exact=False, chosen=chosen)
        flow.experts.append(experts)


def macs_moe(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """Both products of k experts for every token: tokens × H × (F·I + I) × k."""
    tokens = all_axes(flow, node.outputs[0])
    first, second = node.inputs[2], node.inputs[4]
    axes: list[Axis] = [(str(first.name if first else ""), 1)]
    axes.append((str(second.name if second else ""), 2))
    return [(*tokens, axis) for axis in axes] * integer(node, "k", 1)


def macs_quantised_moe(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """As MoE; the rows of W2, axis 2, hold several numbers a byte."""
    tokens = all_axes(flow, node.outputs[0])
    first, second = node.inputs[2], node.inputs[5]
    bits = integer(node, "expert_weight_bits", 4)
    bits = integer(node, "fc2_expert_weight_bits", bits)
    terms: list[tuple[Axis, ...]] = [(*tokens, (str(first.name if first else ""), 1))]
    terms += [(*tokens, (str(second.name if second else ""), 2))] * (8 // bits)
    return terms * integer(node, "k", 1)


register("MoE", "experts", couple_moe, macs=macs_moe, domain=CONTRIB)
register("QMoE", "experts", couple_quantised_moe, macs=macs_quantised_moe, domain=CONTRIB)
