"""RNN, GRU and LSTM: hidden units.

With D directions, g gates (1, 3, 4), I inputs and H hidden units:

    X (seq, batch, I), W (D, g·H, I), R (D, g·H, H), B (D, 2·g·H), initial_h and _c (D, batch, H),
    P (D, 3·H)  →  Y (seq, D, batch, H), Y_h and Y_c (D, batch, H)

and with layout 1 the batch first everywhere. A hidden unit is its row of every gate, its column of
R, and its position of every state. Directions share the tensors' axes, so unit j goes from both.
Hidden units feed one another through R alone: zero in R's column is the law's zero.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.labels import BARE, single
from secateur.graphops.coupling.units import Axis
from secateur.graphops.model.attributes import operand
from secateur.graphops.rules.registry import register
from secateur.graphops.surgery.surgeon import Surgeon

_X, _W, _R, _B, _P = 0, 1, 2, 3, 7
_STATES = (5, 6)


def couple_recurrent(flow: Flow, node: ir.Node) -> None:
    """Inputs meet W's columns; hidden units are equal in all gates and states."""
    x, w, r = node.inputs[_X], node.inputs[_W], node.inputs[_R]
    shape = flow.shape(r)
    if x is None or w is None or r is None or shape is None or flow.rank(x) != 3:
        flow.freeze_inputs(node, "UNKNOWN_SHAPE", "the shape is not known")
        return
    hidden = shape[2] or 1
    for axis in (0, 1):
        flow.freeze_axis(x, axis, node, "SEQUENCE", "the sequence or the batch")
    width = (flow.shape(x) or (1, 1, 1))[2] or 1
    flow.join(node, flow.line(x, 2, width), flow.line(w, 2, width))
    flow.contract(node, _X, 2)
    units = flow.line(r, 2, hidden)
    flow.contract(node, _R, 2)
    for index, axis in ((_W, 1), (_R, 1), (_B, 1), (_P, 1), *((state, 2) for state in _STATES)):
        value = operand(node, index)
        size = (flow.shape(value) or ())[axis] if value is not None else None
        if value is not None and size:
            # gates × hidden units, gate by gate
            gates = flow.line(value, axis, size).reshape(-1, hidden)
            flow.join(node, np.broadcast_to(units, gates.shape), gates)
    for index in (_W, _R, _B, _P, *_STATES):
        value = operand(node, index)
        if value is not None:
            for axis in (0, 1) if index in _STATES else (0,):
                flow.freeze_axis(value, axis, node, "DIRECTION", "the directions or the batch")
    for index, output in enumerate(node.outputs):
        if output.name:
            flow.set(output, single(2 if index else 3, units) if units.any() else BARE)


def rewrite_recurrent(surgeon: Surgeon, node: ir.Node) -> None:
    """The attribute hidden_size counts what stays."""
    if "hidden_size" in node.attributes and surgeon.changed(node.inputs[_R]):
        surgeon.set_integer(node, "hidden_size", surgeon.size(node.inputs[_R], 2))


def macs_recurrent(flow: Flow, node: ir.Node) -> list[tuple[Axis, ...]]:
    """sequence × batch × (W + R), both directions."""
    x, w, r = (str(node.inputs[i].name) for i in (_X, _W, _R))  # type: ignore[union-attr]
    steps = ((x, 0), (x, 1))
    return [(*steps, *((name, axis) for axis in range(3))) for name in (w, r)]


_READS = (_X, _W, _R, _B, *_STATES, _P)
_ROLES = {_W: "weight", _R: "weight", _B: "bias"}
register(
    "RNN GRU LSTM",
    "recurrent",
    couple_recurrent,
    rewrite=rewrite_recurrent,
    macs=macs_recurrent,
    roles=_ROLES,
    reads=_READS,
)
