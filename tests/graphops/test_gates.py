"""Recurrent layers: the weights of their inputs are refitted, and nothing else of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from nets import Net

import secateur

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def redundant(
    kind: str, *, directions: int = 1, bias: bool = True, layout: int = 0, last: bool = False
) -> bytes:
    """Features in pairs, one 20 times the other, and a recurrent layer that reads them."""
    net, draw = Net(), np.random.default_rng(1)
    hidden, gates = 5, GATES[kind] * 5
    half = draw.standard_normal((6, 8)).astype(np.float32)
    weight = net.const(np.concatenate([half, 20 * half], axis=1))
    x = net.op("Relu", net.op("MatMul", net.input("x", ["N", 7, 6]), weight))
    if not layout:
        x = net.op("Transpose", x, perm=[1, 0, 2])
    inputs = [x, net.floats(directions, gates, 16), net.floats(directions, gates, hidden)]
    if bias:
        inputs.append(net.floats(directions, 2 * gates))
    direction = "bidirectional" if directions == 2 else "forward"
    more = {"layout": layout} if layout else {}
    outputs = net.ops(kind, *inputs, outputs=2, hidden_size=hidden, direction=direction, **more)
    if last:
        net.nodes[-1].output[0] = ""  # the states alone
        net.output(outputs[1])
    else:
        net.output(net.op("Tanh", outputs[0]))
    return net.bytes()


def data(count: int = 64) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((count, 7, 6)).astype(np.float32)}


def prune(model: bytes, repair: bool | None = None) -> secateur.Result:
    recipe = secateur.Recipe(target={"channels": 0.5}, criterion="l1", repair=repair)
    return secateur.prune(model, recipe, calibration=data(), measure_latency=False)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_others_can_replace_are_replaced(
    kind: str, directions: int, bias: bool
) -> None:
    model = redundant(kind, directions=directions, bias=bias)
    whole, bare = prune(model), prune(model, repair=False)
    (step,) = [s for s in whole.report.repair if kind.lower() in s.node]
    assert step.method == "refit" and step.error_after < 0.05 * step.error_before
    drifts = [one.report.verification.drift[0].relative_error for one in (whole, bare)]
    assert drifts[0] < 0.3 * drifts[1]


def test_what_feeds_the_state_stays() -> None:
    kept, refitted = (layer(prune(redundant("LSTM"), repair)) for repair in (False, True))
    assert np.array_equal(kept[2], refitted[2])  # R
    assert np.array_equal(kept[3][:, 20:], refitted[3][:, 20:])  # its bias
    assert not np.array_equal(kept[1], refitted[1])


def test_states_alone_may_be_read() -> None:
    result = prune(redundant("GRU", last=True))
    assert any("gru" in step.node for step in result.report.repair)


def layer(result: secateur.Result) -> list[np.ndarray]:
    """X's place, W, R and B."""
    graph = onnx.load_from_string(result.model).graph
    (node,) = [node for node in graph.node if node.op_type == "LSTM"]
    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return [found.get(name, np.empty(0)) for name in node.input]
