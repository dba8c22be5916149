"""Tokens that are kept: the result answers as the original does, in new ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from nets import INT64, Net
from onnx import numpy_helper

import secateur
import secateur.graphops
from secateur.errors import Code, Refused
from secateur.graphops.model.runtime import open_session

ROWS, WIDTH = 40, 12
KEPT = (7, 0, 39, 12, 3, 25)


def language(head: str = "tied", **parts: bool) -> bytes:
    """An embedding, a hidden layer, and a head that names tokens."""
    net = Net()
    tokens = net.input("tokens", ["N", 5], INT64)
    table = net.floats(ROWS, WIDTH)
    x = net.op("Gather", table, tokens)
    x = net.op("Add", x, net.op("Gather", net.floats(5, WIDTH), net.const(np.arange(5))))
    x = net.dense(net.op("Relu", net.dense(x, WIDTH, 24)), 24, WIDTH)
    if head == "tied":
        x = net.op("MatMul", x, net.op("Transpose", table, perm=[1, 0]))
    elif head == "free":
        x = net.op("Add", net.op("MatMul", x, net.floats(WIDTH, ROWS)), net.floats(ROWS))
    elif head == "gemm":
        flat = net.op("Reshape", x, net.ints(-1, WIDTH))
        x = net.op("Gemm", flat, table, net.floats(ROWS), transB=1)
    elif head == "softmax":
        x = net.op("Softmax", net.op("MatMul", x, net.floats(WIDTH, ROWS)), axis=-1)
    if parts.get("mask"):
        mask = net.op(
            "Cast", net.op("Equal", tokens, net.const(np.int64(1))), to=onnx.TensorProto.FLOAT
        )
        x = net.op("Mul", x, net.op("Unsqueeze", mask, net.ints(2)))
    if parts.get("other"):
        net.output(net.op("ReduceMean", table, axes=[0]))
    net.output(x)
    return net.bytes()


def feeds(ids: Any = range(ROWS), count: int = 8) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {"tokens": draw.choice(np.array(ids), (count, 5)).astype(np.int64)}


def prune(source: bytes, calibration: Any = None, **fields: Any) -> secateur.Result:
    recipe = secateur.Recipe.parse({"vocabulary": KEPT, "target": {"channels": 1.0}, **fields})
    return secateur.graphops.prune(source, recipe, calibration=calibration, measure_latency=False)


def run(model: bytes, given: dict[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = open_session(model, lean=True).run(None, given)[0]
    return found


@pytest.mark.parametrize("head", ["tied", "free", "gemm", "none"])
def test_the_result_answers_as_the_original_in_new_ids(head: str) -> None:
    source = language(head)
    result = prune(source)
    new = feeds(range(len(KEPT)))
    old = {"tokens": np.array(KEPT)[new["tokens"]]}
    wanted = run(source, old)
    wanted = wanted if head == "none" else wanted[..., list(KEPT)]
    np.testing.assert_allclose(run(result.model, new), wanted, rtol=1e-5, atol=1e-6)
    assert result.report.vocabulary == KEPT
    assert result.report.verification.drift[0].relative_error < 1e-6
    tables = {"tied": 1, "free": 3, "gemm": 2, "none": 1}  # with an entry per token
    proto = onnx.load_from_string(result.model)
    shapes = [tuple(tensor.dims) for tensor in proto.graph.initializer]
    assert sum(len(KEPT) in shape for shape in shapes) == tables[head]
    assert not any(ROWS in shape for shape in shapes)
    assert result.report.before.params - result.report.after.params == sum(
        (ROWS - len(KEPT)) * size
        for size in {"tied": [12], "free": [12, 12, 1], "gemm": [12, 1], "none": [12]}[head]
    )


def test_channels_go_too_and_it_replays() -> None:
    source = language()
    result = prune(source, feeds(KEPT, 64), target={"macs": 0.3}, round_to=1)
    assert result.report.after.macs <= 0.3 * result.report.before.macs
    hidden = [entry for entry in result.plan.kept if len(entry.axes[min(entry.axes)]) < 24]
    assert hidden
    again = secateur.graphops.prune(
        source, plan=result.plan, calibration=feeds(KEPT, 64), measure_latency=False
    )
    assert again.model == result.model
    assert result.report.verification.drift[0].relative_error < 0.5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (language("softmax"), "Softmax"),
        (language(mask=True), "not only looked up"),
        (language(other=True), "others read it"),
    ],
    ids=["softmax", "mask", "other reader"],
)
def test_what_is_not_understood_is_refused(source: bytes, words: str) -> None:
    with pytest.raises(Refused) as caught:
        prune(source)
    assert caught.value.refusal.code is Code.NOTHING_TO_PRUNE
    assert words in str(caught.value)


@pytest.mark.parametrize("ids", [(), (1, 1), (-1, 2), (0, ROWS)])
def test_ids_that_are_none_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(Refused) as caught:
        prune(language(), vocabulary=ids)
    assert caught.value.refusal.code is Code.INVALID_RECIPE


def test_two_inputs_of_tokens_are_refused_until_one_is_ignored() -> None:
    net = Net()
    names = [net.input(name, ["N", 5], INT64) for name in ("tokens", "kinds")]
    tables = [net.floats(ROWS, WIDTH), net.floats(ROWS, WIDTH)]
    rows = [net.op("Gather", table, name) for table, name in zip(tables, names, strict=True)]
    x = net.op("Relu", net.dense(net.op("Add", *rows), WIDTH, 8))
    net.output(net.dense(x, 8, 4))
    with pytest.raises(Refused, match="2 inputs"):
        prune(net.bytes())
    result = prune(net.bytes(), ignore=[tables[1]])
    found = {t.name: t.dims[0] for t in onnx.load_from_string(result.model).graph.initializer}
    assert (found[tables[0]], found[tables[1]]) == (len(KEPT), ROWS)


def test_samples_with_other_tokens_and_labels_are_refused() -> None:
    with pytest.raises(Refused) as caught:
        prune(language(), {"tokens": np.array([[0, 3, 7, 8, 39]] * 4)})
    assert caught.value.refusal.code is Code.INVALID_CALIBRATION
    assert caught.value.refusal.found == "8"


def test_the_kept_rows_are_exact() -> None:
    source = language("free")
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(m).graph.initializer}
        for m in (source, prune(source).model)
    )
    table = next(name for name, array in before.items() if array.shape == (ROWS, WIDTH))
    np.testing.assert_array_equal(after[table], before[table][list(KEPT)])
