"""The law of `linear`: W · x[p] + b is what ONNX Runtime computes at every sampled position."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from nets import Net

from secateur.graphops import rules
from secateur.graphops.calibration.moments import Moments, linear_maps, sample_places, weight_of
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.rules.linear import pick_rows
from secateur.graphops.rules.registry import all_rules

# operator, shape of x, shape of the weight, length of b or None, attributes
ROWS: list[tuple[str, list[int], list[int], int | None, dict[str, Any]]] = [
    ("MatMul", [2, 5, 4], [4, 3], None, {}),
    ("MatMul", [5, 4], [4, 3], None, {}),
    ("Gemm", [5, 4], [4, 3], 3, {}),
    ("Gemm", [4, 5], [3, 4], 3, {"transA": 1, "transB": 1, "alpha": 0.5}),
    ("Conv", [2, 4, 7, 6], [5, 4, 3, 3], 5, {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("Conv", [2, 4, 9, 9], [6, 2, 3, 2], 6, {"group": 2, "dilations": [2, 3]}),
    ("Conv", [2, 4, 7, 7], [4, 1, 3, 3], 4, {"group": 4, "pads": [1, 1, 1, 1]}),
    ("Conv", [3, 3, 6, 5], [6, 1, 3, 2], 6, {"group": 3, "pads": [1, 0, 1, 1], "strides": [2, 1]}),
    ("Conv", [2, 4, 7, 8], [5, 4, 4, 3], None, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", [2, 4, 7, 8], [5, 4, 4, 3], None, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("Conv", [2, 4, 7, 8], [5, 4, 4, 3], None, {"auto_pad": "VALID"}),
    ("Conv", [2, 4, 9], [5, 4, 3], 5, {"pads": [2, 0]}),
    ("Conv", [2, 3, 4, 5, 6], [2, 3, 2, 2, 2], 2, {"strides": [1, 2, 1]}),
    ("ConvTranspose", [2, 4, 5, 6], [4, 3, 3, 3], 3, {"strides": [2, 1], "pads": [1, 1, 0, 1]}),
    ("ConvTranspose", [2, 3, 4, 5], [3, 2, 3, 3], 6, {"group": 3, "strides": [2, 2]}),
    ("ConvTranspose", [2, 4, 5], [4, 3, 3], 6, {"group": 2, "dilations": [2]}),
    (
        "ConvTranspose",
        [2, 4, 5, 5],
        [4, 3, 3, 3],
        None,
        {"strides": [2, 2], "output_padding": [1, 1]},
    ),
    (
        "ConvTranspose",
        [2, 4, 5, 5],
        [4, 3, 3, 3],
        3,
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ),
    (
        "ConvTranspose",
        [2, 4, 5, 5],
        [4, 3, 2, 2],
        3,
        {"auto_pad": "SAME_LOWER", "strides": [3, 3]},
    ),
]


def test_every_rule_that_is_linear_has_a_row() -> None:
    assert {rule.op_type for rule in all_rules() if rule.linear is not None} == {
        row[0] for row in ROWS
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[4]}")
def test_a_product_over_positions_is_what_the_node_computes(row: Any) -> None:
    op_type, x_shape, w_shape, bias, attributes = row
    draw = np.random.default_rng(0)
    net = Net()
    x = net.input("x", x_shape)
    weight = draw.standard_normal(w_shape).astype(np.float32)
    inputs = [x, net.const(weight, "weight")]
    numbers = draw.standard_normal(bias or 0).astype(np.float32)
    if bias is not None:
        inputs.append(net.const(numbers, "bias"))
    net.output(net.op(op_type, *inputs, **attributes))
    model = open_model(net.bytes()).model
    (view,) = linear_maps(model, infer_shapes(model))
    data = draw.standard_normal(x_shape).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(net.bytes()).run(None, {"x": data})

    places = np.arange(y.size // y.shape[view.y_axis])[1::2]
    rows, matrix = view.rows(data, y.shape, places), weight_of(view)
    found = np.einsum("gpk,gok->pgo", rows, matrix).reshape(len(places), -1)
    if bias is not None:
        found += numbers
    assert np.allclose(found, pick_rows(y, view.y_axis, places), atol=1e-4)

    assert np.array_equal(view.tensor(matrix, w_shape).astype(np.float32), weight)
    channels = view.channels(x_shape[view.x_axis])
    assert channels.shape == (rows.shape[0], rows.shape[2])
    assert sorted(set(channels.reshape(-1).tolist())) == list(range(x_shape[view.x_axis]))


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_channels_tell_which_entries_go_with_a_channel(op_type: str) -> None:
    net = Net()
    x = net.input("x", [1, 4, 5, 5])
    shape = [6, 2, 3, 3] if op_type == "Conv" else [4, 3, 3, 3]
    net.output(net.op(op_type, x, net.const(np.ones(shape, np.float32), "weight"), group=2))
    model = open_model(net.bytes()).model
    (view,) = linear_maps(model, infer_shapes(model))
    data = np.zeros((1, 4, 5, 5), np.float32)
    data[:, 3] = 1  # the second channel of the second group
    size = 3 if op_type == "Conv" else 7
    rows = view.rows(data, (1, 6, size, size), np.arange(size * size))
    seen = rows.any(axis=1)
    assert np.array_equal(seen, view.channels(4) == 3)


def test_weights_that_are_not_constant_or_not_numbers_have_no_view() -> None:
    net = Net()
    x, w = net.input("x", [2, 4]), net.input("w", [4, 3])
    net.output(net.op("MatMul", x, w))
    model = open_model(net.bytes()).model
    assert not list(linear_maps(model, infer_shapes(model)))
    rule = rules.find("", "Gemm", 17)
    assert rule is not None
    assert rule.linear is not None
    scaled = ir.Node("", "Gemm", [None, None], [ir.AttrFloat32("beta", 2.0)])
    assert rule.linear(scaled, [2, 4], [4, 3]) is None  # the constant is not what is added


def test_moments_are_those_of_the_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 50, 3)).astype(np.float32)
    moments = Moments.zeros(2, 3)
    moments.add(rows[:, :20])
    moments.add(rows[:, 20:])
    assert moments.count == 50
    assert np.allclose(moments.mean(), rows.mean(axis=1), atol=1e-6)
    for group in range(2):
        assert np.allclose(moments.covariance()[group], np.cov(rows[group].T, bias=True), atol=1e-5)


def test_places_are_distinct_and_hang_on_the_seed_alone() -> None:
    first, again = (sample_places(10**6, 10, 1, 576, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    assert (np.diff(first) > 0).all()
    assert np.array_equal(sample_places(9, 10, 1, 576, np.random.default_rng(0)), np.arange(9))
