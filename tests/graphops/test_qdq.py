"""Models that ONNX Runtime has quantised are pruned with their scales and zero points."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import Net
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization import QuantFormat, QuantType

import secateur
import secateur.graphops
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.quantised import scaled_constants
from secateur.graphops.model.spelling import spell_out
from secateur.graphops.repair.integers import rounded
from secateur.graphops.verify.law import LawCheck, check_law

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
CALIBRATION = np.load(DIGITS / "calibration.npz")
FORMS: dict[str, dict[str, Any]] = {
    "qdq per channel": {"per_channel": True, "weight_type": QuantType.QInt8},
    "qdq per tensor": {"per_channel": False, "weight_type": QuantType.QInt8},
    "qdq zero points": {
        "per_channel": True,
        "weight_type": QuantType.QUInt8,
        "activation_type": QuantType.QUInt8,
        "extra_options": {"WeightSymmetric": False},
    },
    "operators": {"per_channel": True, "quant_format": QuantFormat.QOperator},
    "dynamic": {},
    "dynamic, weights of convolutions too": {},
}


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        names = CALIBRATION.files
        rows = [{name: CALIBRATION[name][i : i + 32] for name in names} for i in (0, 32)]
        self._rows: Iterator[dict[str, np.ndarray]] = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rows, None)


@pytest.fixture(scope="module", params=[(n, f) for n in ("cnn", "transformer") for f in FORMS])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, bytes]:
    name, form = request.param
    path = tmp_path_factory.mktemp("qdq") / "int8.onnx"
    source = DIGITS / f"digits_{name}.onnx"
    if form.startswith("dynamic,"):
        recipe = secateur.Recipe.parse({"target": {"channels": 1.0}, "quantize": "int8-dynamic"})
        return form, secateur.graphops.prune(source, recipe, measure_latency=False).model
    if form == "dynamic":
        quantization.quantize_dynamic(source, path, per_channel=True, reduce_range=True)
    else:
        quantization.quantize_static(source, path, _Reader(), reduce_range=True, **FORMS[form])
    return form, path.read_bytes()


def constants(model: bytes) -> dict[str, np.ndarray]:
    proto = onnx.load_from_string(model)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def prune(source: bytes, **fields: Any) -> secateur.Result:
    plain = {"target": {"channels": 0.6}, "repair": False}
    recipe = secateur.Recipe.parse({**plain, **fields})
    return secateur.graphops.prune(source, recipe, measure_latency=False)


def test_scales_and_zero_points_are_cut_with_their_weights(quantised: tuple[str, bytes]) -> None:
    form, source = quantised
    result = prune(source)
    before, after = constants(source), constants(result.model)
    kept = {entry.tensor: entry for entry in result.plan.kept}
    assert kept
    for name, array in after.items():
        entry = kept.get(name)
        if array.dtype == np.int64:  # shapes
            continue
        wanted = before[name if entry is None else entry.source]
        for axis, indices in () if entry is None else entry.axes.items():
            wanted = np.take(wanted, indices, axis=axis)
        np.testing.assert_array_equal(array, wanted)
    scales = {name for name in kept if name.endswith("_scale")}
    assert scales == {n for n in scales if before[n].size > 1}
    assert scales or "channel" not in form
    assert check_law(source, result).difference < 2e-2


def test_the_law_is_exact_where_products_of_integers_saturate() -> None:
    """Sums of two products beyond 16 bits are cut off by processors without VNNI."""
    net = Net()

    def scalars(*values: np.generic) -> list[str]:
        return [net.const(value) for value in values]

    def dense(x: list[str], inner: int, outer: int, scale: float) -> list[str]:
        weight = net.const(net.draw.integers(90, 128, (inner, outer)).astype(np.int8))
        result = scalars(np.float32(scale), np.uint8(0))
        scales = scalars(np.float32(0.01), np.int8(0))
        return [net.op("QLinearMatMul", *x, weight, *scales, *result), *result]

    face = scalars(np.float32(0.01), np.uint8(0))
    x = [net.op("QuantizeLinear", net.input("x", ["N", 16]), *face), *face]
    y = dense(dense(x, 16, 32, 0.1), 32, 3, 5.0)
    net.output(net.op("DequantizeLinear", *y))
    assert check_law(net.bytes(), prune(net.bytes())) == LawCheck(0.0, ())


def test_the_law_leaves_rounding_out_where_a_last_bit_decides_a_step() -> None:
    net = Net(opset=21)
    x = net.op("Relu", net.dense(net.input("x", ["N", 16]), 16, 999))
    y = net.dense(x, 999, 2048)
    step, middle = net.const(np.float32(2e-5)), net.const(np.uint16(1 << 15))
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", y, step, middle), step, middle)
    net.output(net.op("Sin", net.op("Mul", y, net.const(np.float32(5e4)))))
    model = net.bytes()
    # one step more or less makes 0.8 of it; without rounding, 5e4 times what floats round is left
    assert check_law(model, prune(model)).difference < 0.2


def test_units_are_ranked_by_what_their_integers_stand_for() -> None:
    """Per channel, the integers of every channel fill their range."""
    net = Net()
    integers = net.draw.integers(-60, 60, (8, 4, 1, 1)).astype(np.int8)
    scales = np.array([9, 1, 8, 2, 7, 3, 6, 4], np.float32) / 500
    w = net.op("DequantizeLinear", net.const(integers), net.const(scales), axis=0)
    x = net.op("Relu", net.op("Conv", net.input("x", [2, 4, 6, 6]), w))
    net.output(
        net.op("GlobalAveragePool", net.op("Conv", x, net.const(np.ones((3, 8, 1, 1), "f"))))
    )
    result = prune(net.bytes(), target={"channels": 0.5}, criterion="l2", reduction="sum")
    entry = next(e for e in result.plan.kept if e.source == net.initializers[1].name)
    assert entry.axes == {0: (0, 2, 4, 6)}


@pytest.mark.parametrize("op_type", ["QLinearConv", "QLinearMatMul", "DequantizeLinear"])
def test_what_integers_stand_for(op_type: str) -> None:
    net = Net()
    rank = 4 if op_type == "QLinearConv" else 2
    axis = 0 if op_type == "QLinearConv" else 1
    weight = net.draw.integers(0, 255, (5, 5, 1, 1)[:rank]).astype(np.uint8)
    scale = (0.01 * np.arange(1, 6)).astype(np.float32)
    zero = np.array([100, 110, 120, 130, 140], np.uint8)
    operands = [net.const(array) for array in (weight, scale, zero)]
    if op_type == "DequantizeLinear":
        net.output(net.op(op_type, *operands))
    else:
        step, middle = net.const(np.float32(0.1)), net.const(np.uint8(128))
        x = net.op("QuantizeLinear", net.input("x", [3, 5, 2, 2][:rank]), step, middle)
        y = net.op(op_type, x, step, middle, *operands, step, middle)
        net.output(net.op("DequantizeLinear", y, step, middle))
    model = open_model(net.bytes()).model
    spell_out(model)
    shape = [1] * rank
    shape[axis] = 5
    wanted = (weight.astype(np.float32) - zero.reshape(shape)) * scale.reshape(shape)
    found = scaled_constants(model.graph)[operands[0]].real(weight)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_answers_stay(quantised: tuple[str, bytes]) -> None:
    _, source = quantised
    result = prune(source, target={"channels": 0.9})
    feeds = {name: CALIBRATION[name][:200] for name in CALIBRATION.files}
    answers = [
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for m in (source, result.model)
    ]
    same = (answers[0].argmax(-1) == answers[1].argmax(-1)).mean()
    assert same > 0.8


def test_the_report_says_that_quantised_weights_are_not_repaired(
    quantised: tuple[str, bytes],
) -> None:
    source = quantised[1]
    for repair, said in ((None, 1), (False, 0)):
        result = prune(source, repair=repair)
        found = [text for text in result.report.warnings if "are not repaired" in text]
        assert len(found) == said
    with pytest.raises(secateur.Refused):
        prune(source, repair=True)


def test_operators_stay_what_they_were(quantised: tuple[str, bytes]) -> None:
    source = quantised[1]
    found = []
    for model in (source, prune(source).model):
        kinds = Counter(node.op_type for node in onnx.load_from_string(model).graph.node)
        # those that cut heads apart are fewer, and what normalising took out is not put back
        found.append({k: n for k, n in kinds.items() if k not in ("Concat", "Slice", "Identity")})
    assert found[0] == found[1]


def test_a_plan_is_replayed(quantised: tuple[str, bytes]) -> None:
    source = quantised[1]
    result = prune(source)
    names = set(constants(source))
    assert {entry.source for entry in result.plan.kept} <= names
    replayed = secateur.graphops.prune(source, plan=result.plan, measure_latency=False)
    assert replayed.model == result.model


STEP = (np.float32(0.05), np.uint8(128))  # a scale and a zero point
MS = "com.microsoft"


class Integers(Net):
    """Two convolutions of integers, and between them what is tested."""

    def __init__(self, opset: int = 17) -> None:
        super().__init__(opset)
        self.domains[MS] = 1
        self.step = [self.const(one) for one in STEP]

    def conv_of_integers(self, x: str, inner: int, outer: int) -> str:
        weight = self.const(self.draw.integers(-60, 60, (outer, inner, 1, 1)).astype(np.int8))
        scales = [self.const(one) for one in (np.float32(0.01), np.int8(0))]
        bias = self.const(self.draw.integers(-900, 900, outer).astype(np.int32))
        operands = [x, *self.step, weight, *scales, *self.step, bias]
        return self.op("QLinearConv", *operands, kernel_shape=[1, 1])

    def whole(self, between: Callable[[str], str]) -> bytes:
        x = self.op("QuantizeLinear", self.input("x", [2, 4, 6, 6]), *self.step)
        y = self.conv_of_integers(between(self.conv_of_integers(x, 4, 16)), 16, 3)
        self.output(self.op("DequantizeLinear", y, *self.step))
        return self.bytes()


def kinds(model: bytes) -> Counter[tuple[str, str]]:
    nodes = onnx.load_from_string(model).graph.node
    return Counter((node.domain, node.op_type) for node in nodes)


@pytest.mark.parametrize("opset", [10, 12, 13, 21])
def test_operators_on_integers_are_cut_in_every_opset(opset: int) -> None:
    net = Integers(opset)
    source = net.whole(
        lambda y: net.op("QLinearAdd", y, *net.step, y, *net.step, *net.step, domain=MS)
    )
    result = prune(source, target={"channels": 0.5})
    (hidden,) = result.report.groups
    assert (hidden.units, hidden.kept) == (16, 8)
    assert kinds(result.model) == kinds(source)
    assert check_law(source, result).difference < 2e-2


def test_a_layout_that_floats_do_not_have_stays_whole() -> None:
    net = Integers()

    def between(y: str) -> str:
        pool = {"kernel_shape": [1, 1], "channels_last": 1, "domain": MS}
        y = net.op("Transpose", y, perm=[0, 2, 3, 1])
        y = net.op("QLinearAveragePool", y, *net.step, *net.step, **pool)
        return net.op("Transpose", y, perm=[0, 3, 1, 2])

    with pytest.raises(secateur.Refused, match="qlinearaveragepool"):
        prune(net.whole(between))


def test_integers_inside_a_body_are_cut() -> None:
    net = Integers()

    def between(y: str) -> str:
        branches = {}
        for branch, count in (("then_branch", 1), ("else_branch", 2)):
            before, x = len(net.nodes), y
            for _ in range(count):
                x = net.conv_of_integers(x, 16, 16)
            inner, net.nodes = net.nodes[before:], net.nodes[:before]
            ends = [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.UINT8, None)]
            branches[branch] = onnx.helper.make_graph(inner, branch, [], ends)
        return net.op("If", net.input("which", [], onnx.TensorProto.BOOL), **branches)

    source = net.whole(between)
    result = prune(source, target={"channels": 0.5})
    assert result.report.after.params < 0.4 * result.report.before.params
    assert check_law(source, result).difference < 2e-2
    proto = onnx.load_from_string(result.model)
    (choice,) = (node for node in proto.graph.node if node.op_type == "If")
    bodies = [[node.op_type for node in attribute.g.node] for attribute in choice.attribute]
    assert sorted(map(len, bodies)) == [1, 2]
    assert {op_type for body in bodies for op_type in body} == {"QLinearConv"}


def test_a_block_of_integers_goes_whole() -> None:
    net = Integers()

    def between(y: str) -> str:
        for _ in range(3):
            z = net.conv_of_integers(net.conv_of_integers(y, 16, 16), 16, 16)
            y = net.op("QLinearAdd", y, *net.step, z, *net.step, *net.step, domain=MS)
        return y

    source = net.whole(between)
    recipe = secateur.Recipe(target={"macs": 0.7}, granularity=["layer"])
    draw = np.random.default_rng(0)
    samples = {"x": draw.standard_normal((16, 4, 6, 6)).astype(np.float32)}
    result = secateur.graphops.prune(source, recipe, calibration=samples, measure_latency=False)
    assert len(result.report.removed) == 1
    before, after = kinds(source), kinds(result.model)
    assert before["", "QLinearConv"] - after["", "QLinearConv"] == 2
    assert not after["", "Conv"]


def test_quantised_weights_are_refitted(quantised: tuple[str, bytes]) -> None:
    form, source = quantised
    plain, repaired = (
        secateur.graphops.prune(
            source,
            secateur.Recipe.parse({"target": {"macs": 0.35}, "repair": repair}),
            calibration=DIGITS / "calibration.npz",
            measure_latency=False,
        )
        for repair in (False, True)
    )
    before, after = (r.report.verification.drift[0].relative_error for r in (plain, repaired))
    assert after < 0.7 * before
    assert {"refit", "joint"} <= {step.method for step in repaired.report.repair}
    assert not [text for text in repaired.report.warnings if "for want of derivatives" in text]
    assert not [text for text in repaired.report.warnings if "are not repaired" in text]
    kinds = [
        sorted(
            (name, array.dtype.str)
            for name, array in constants(model).items()
            if array.size and ("qdq" in form or array.dtype.itemsize == 1)
        )
        for model in (plain.model, repaired.model)
    ]
    assert kinds[0] == kinds[1]
    if "qdq" in form:
        _check_scales_of_biases(repaired.model)


def _check_scales_of_biases(model: bytes) -> None:
    """Sums of products of integers are in steps of the input's scale times the weight's."""
    proto, numbers = onnx.load_from_string(model), constants(model)
    made = {node.output[0]: node for node in proto.graph.node}
    count = 0
    for node in proto.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        x, w, b = (made[name] for name in node.input)
        assert {x.op_type, w.op_type, b.op_type} == {"DequantizeLinear"}
        wanted = numbers[x.input[1]] * numbers[w.input[1]]
        np.testing.assert_allclose(numbers[b.input[1]], wanted, rtol=1e-5)
        count += 1
    assert count


@pytest.mark.parametrize(
    ("new", "integers", "scale"),
    [
        ([[5.0, -2.0]], [[50, -20]], 0.1),  # fits
        ([[12.0, -3.0]], [[100, -25]], 0.12),  # the first would lie beyond 100
        ([[6.0, -10.0]], [[30, -50]], 0.2),  # the second beyond -50
    ],
)
@pytest.mark.parametrize("zero", [0, 120])
def test_scales_grow_where_they_must(
    new: list[list[float]], integers: list[list[int]], scale: float, zero: int
) -> None:
    net = Net()
    old = np.array([[100, -50]]) + zero
    kind = np.uint8 if zero else np.int8
    operands = [net.const(a) for a in (old.astype(kind), np.float32(0.1), kind(zero))]
    net.output(net.op("MatMul", net.input("x", [2, 1]), net.op("DequantizeLinear", *operands)))
    graph = open_model(net.bytes()).model.graph
    node = next(node for node in graph if node.op_type == "DequantizeLinear")
    found = rounded(node, np.array(new))
    np.testing.assert_array_equal(found.integers, np.array(integers) + zero)
    assert found.integers.dtype == kind
    assert found.scaled.scale == pytest.approx(scale)
    assert found.growth == pytest.approx(scale / 0.1)
    np.testing.assert_allclose(found.real(), new, rtol=1e-6)
