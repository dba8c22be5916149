"""Operators that are spelt out to be read say the same, and are written as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from laws import lawful
from nets import Net

import secateur
import secateur.graphops
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.spelling import as_given, spell_out

MS = "com.microsoft"
CHANNELS = 8
Build = Callable[[Net, str], str]


def net_of(build: Build, opset: int = 17) -> onnx.ModelProto:
    """Two convolutions, and between them what is tested."""
    net = Net(opset)
    net.domains[MS] = 1
    x = net.op("Relu", net.conv(net.input("x", ["N", 4, 6, 6]), 4, CHANNELS))
    net.output(net.conv(build(net, x), CHANNELS, 3))
    return net.model()


def fused_conv(
    activation: str, params: list[float], *, bias: bool = True, z: bool = False
) -> Build:
    def build(net: Net, x: str) -> str:
        operands = [net.floats(CHANNELS, CHANNELS, 3, 3)]
        operands.append(net.floats(CHANNELS) if bias else "")
        operands += [x] if z else []
        options: dict[str, Any] = {"activation": activation} if activation else {}
        options |= {"activation_params": params} if params else {}
        return net.op("FusedConv", x, *operands, pads=[1] * 4, domain=MS, **options)

    return build


def fused_gemm(net: Net, x: str) -> str:
    """As a product of what a pool leaves, that weighs the channels."""
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x))
    options = {"transB": 1, "activation": "LeakyRelu", "activation_alpha": 0.3, "domain": MS}
    operands = net.floats(CHANNELS, CHANNELS), net.floats(CHANNELS)
    y = net.op("FusedGemm", pooled, *operands, **options)
    return net.op("Mul", x, net.op("Unsqueeze", y, net.ints(2, 3)))


def weights_in_integers(net: Net, x: str) -> str:
    """One scale for each slice of axis 0."""
    stored = net.draw.integers(-99, 99, (CHANNELS, CHANNELS, 1, 1)).astype(np.int8)
    scale = (0.001 * np.arange(1, CHANNELS + 1)).astype(np.float32).reshape(-1, 1, 1, 1)
    cast = net.op("Cast", net.const(stored), to=onnx.TensorProto.FLOAT)
    return net.op("Relu", net.op("Conv", x, net.op("Mul", cast, net.const(scale))))


FORMS: dict[str, tuple[str, Build]] = {
    "no activation": ("FusedConv", fused_conv("", [])),
    "Relu": ("FusedConv", fused_conv("Relu", [])),
    "LeakyRelu": ("FusedConv", fused_conv("LeakyRelu", [0.2])),
    "Clip": ("FusedConv", fused_conv("Clip", [-0.1, 0.5])),
    "HardSigmoid": ("FusedConv", fused_conv("HardSigmoid", [0.3, 0.6])),
    "sum": ("FusedConv", fused_conv("Relu", [], z=True)),
    "sum without a bias": ("FusedConv", fused_conv("Relu", [], bias=False, z=True)),
    "gemm": ("FusedGemm", fused_gemm),
    "weights": ("Mul", weights_in_integers),
}


def lines(model: ir.Model) -> set[tuple[object, ...]]:
    """Nodes, and the shapes of initializers."""
    proto = ir.to_proto(model)
    nodes = {
        (
            node.domain,
            node.op_type,
            *node.input,
            "->",
            *node.output,
            *sorted(map(str, node.attribute)),
        )
        for node in proto.graph.node
    }
    return nodes | {(one.name, *one.dims) for one in proto.graph.initializer}


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_spelt_out_says_the_same_and_is_spelt_back(form: str, opset: int) -> None:
    operator, build = FORMS[form]
    if opset < 13 and form == "gemm":
        pytest.skip("its Unsqueeze is of a later opset")
    source = net_of(build, opset)
    model = open_model(source).model
    before = lines(model)
    spell_out(model)
    spelt = ir.to_proto(model)
    assert operator not in {node.op_type for node in spelt.graph.node} or form == "gemm"
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    wanted, found = (
        open_session(one.SerializeToString()).run(None, feeds)[0] for one in (source, spelt)
    )
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert lines(as_given(model)) == before
    assert "com.microsoft" not in {node.domain for node in spelt.graph.node} or opset < 13


@pytest.mark.parametrize("form", FORMS)
def test_what_is_spelt_out_is_cut_and_refitted(form: str) -> None:
    operator, build = FORMS[form]
    source = net_of(build).SerializeToString()
    result = lawful(source, 1e-5, target={"channels": 0.5}, criterion="l2")
    assert result.report.after.params < 0.6 * result.report.before.params
    assert operator in {n.op_type for n in onnx.load_from_string(result.model).graph.node}
    samples = np.random.default_rng(0).standard_normal((64, 4, 6, 6)).astype(np.float32)
    recipe = secateur.Recipe(target={"channels": 0.5}, criterion="l2", scope="local")
    refitted = secateur.graphops.prune(
        source, recipe, calibration={"x": samples}, measure_latency=False
    )
    assert len([step for step in refitted.report.repair if step.method == "refit"]) >= 2
    kinds = [
        sorted(node.op_type for node in onnx.load_from_string(model).graph.node)
        for model in (source, refitted.model)
    ]
    assert kinds[0] == kinds[1]


def test_an_activation_that_is_not_known_stays_whole() -> None:
    source = net_of(fused_conv("Softplus", []))
    with pytest.raises(secateur.Refused):
        secateur.graphops.prune(source, secateur.Recipe(target={"channels": 0.5}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation", 1.0), ("activation_params", 3), ("pads", [0.5]), ("activation", b"Lea\xeb")],
)
def test_a_node_that_is_not_as_it_is_defined_is_left(name: str, value: object) -> None:
    source = net_of(FORMS["LeakyRelu"][1])
    (node,) = (node for node in source.graph.node if node.op_type == "FusedConv")
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    model = open_model(source).model
    before = lines(model)
    spell_out(model)
    assert lines(model) == before
    with pytest.raises(secateur.Refused):
        secateur.graphops.prune(source, secateur.Recipe(target={"channels": 0.5}))
