"""Classifiers as scikit-learn's exporter writes them: scalers of ai.onnx.ml, answers as maps."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from secateur import prune
from secateur.graphops.verify.law import check_law
from secateur.recipe import Recipe

FEATURES, HIDDEN, CLASSES = 6, 8, 3
KEYS = {"classlabels_int64s": [4, 5, 9], "classlabels_strings": ["b", "a", "c"]}


def classifier(keys: str) -> onnx.ModelProto:
    """Scaler, one hidden layer, Softmax; class numbers, and a map from class to probability."""
    random = np.random.default_rng(0)
    weights = {
        "first": random.normal(size=(FEATURES, HIDDEN)),
        "bias": random.normal(size=HIDDEN),
        "second": random.normal(size=(HIDDEN, CLASSES)),
    }
    ml = {"domain": "ai.onnx.ml"}
    nodes = [
        helper.make_node("Scaler", ["x"], ["s"], offset=[0.5] * 6, scale=[2.0] * 6, **ml),
        helper.make_node("MatMul", ["s", "first"], ["m"]),
        helper.make_node("Add", ["m", "bias"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "second"], ["l"]),
        helper.make_node("Softmax", ["l"], ["p"]),
        helper.make_node("ArgMax", ["p"], ["label"], axis=1, keepdims=0),
        helper.make_node("ZipMap", ["p"], ["probability"], **ml, **{keys: KEYS[keys]}),
    ]
    key_type = TensorProto.INT64 if keys == "classlabels_int64s" else TensorProto.STRING
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    rows = helper.make_sequence_type_proto(helper.make_map_type_proto(key_type, value))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
            helper.make_value_info("probability", rows),
        ],
        [
            onnx.numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.mark.parametrize("keys", list(KEYS))
def test_a_classifier_that_answers_maps(keys: str) -> None:
    model = classifier(keys)
    result = prune(model, Recipe(target={"channels": 0.5}, repair=False))
    after = onnx.load_from_string(result.model)
    assert list(after.graph.output) == list(model.graph.output)
    assert [tuple(t.dims) for t in after.graph.initializer if t.name == "first"] == [(6, 4)]
    session = ort.InferenceSession(result.model)
    rows = session.run(["probability"], {"x": np.ones((5, FEATURES), np.float32)})[0]
    assert [set(row) for row in rows] == [set(KEYS[keys])] * 5
    assert check_law(model, result).difference < 1e-6


def test_maps_are_measured_and_repaired_by() -> None:
    data = np.random.default_rng(1).normal(size=(96, FEATURES)).astype(np.float32)
    result = prune(
        classifier("classlabels_int64s"),
        Recipe(target={"channels": 0.5}),
        calibration={"x": data},
    )
    (drift,) = result.report.verification.drift
    assert drift.output == "probability"
    assert 0 < drift.relative_error < 1
    assert drift.top1_agreement is not None
    assert any(step.error_after < step.error_before for step in result.report.repair)
