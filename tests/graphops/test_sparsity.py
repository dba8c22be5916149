"""Single weights: the patterns hold, zeros are zero, and second order beats magnitude."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import Net
from onnx import numpy_helper

import secateur
from secateur.errors import Code, Refused
from secateur.graphops.sparsity import second_order, sparsify
from secateur.graphops.sparsity.mask import block_scores, keep_blocks, quota
from secateur.sparsity import Pattern

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
CALIBRATION = DIGITS / "calibration.npz"


def prune(source: Any, calibration: Any = None, **fields: Any) -> secateur.Result:
    recipe = secateur.Recipe.parse({"granularity": ["weight"], **fields})
    return secateur.prune(source, recipe, calibration=calibration, measure_latency=False)


def tensors(model: bytes) -> dict[str, np.ndarray]:
    proto = onnx.load_from_string(model)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def correlated(rows: int, entries: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((rows, entries)) @ draw.standard_normal((entries, entries))


def magnitude(weight: np.ndarray, pattern: Pattern, gone: int) -> np.ndarray:
    return np.where(keep_blocks(weight**2, pattern, gone), weight, 0)


def loss(weight: np.ndarray, result: np.ndarray, hessian: np.ndarray) -> float:
    return float(np.einsum("oi,ij,oj->", weight - result, hessian, weight - result))


# -- patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.7", Pattern(0.7)),
        ("2:4", Pattern(0.5, 2, 4)),
        ("4:8", Pattern(0.5, 4, 8)),
        ("4x1", Pattern(0.5, rows=4)),
        ("0.75@2x3", Pattern(0.75, rows=2, columns=3)),
    ],
)
def test_patterns_are_read(text: str, pattern: Pattern) -> None:
    assert Pattern.parse(text) == pattern


@pytest.mark.parametrize(
    "text", ["", "0", "1", "1.5", "nan", "-0.1", "4:4", "0:4", "x", "2:4x", "0x1", "1@4x1", "124"]
)
def test_texts_that_are_no_pattern_are_refused(text: str) -> None:
    with pytest.raises(Refused) as caught:
        secateur.Recipe.parse({"granularity": ["weight"], "sparsity": text})
    assert caught.value.refusal.code is Code.INVALID_RECIPE
    assert text in caught.value.refusal.found


def test_blocks_go_by_their_sums_and_edges_are_blocks_too() -> None:
    scores = np.arange(15.0).reshape(5, 3)
    pattern = Pattern(0.5, rows=4)
    assert np.array_equal(block_scores(scores, pattern), [[18, 22, 26], [12, 13, 14]])
    stays = keep_blocks(scores, pattern, 2)
    assert np.array_equal(stays[:4], np.ones((4, 3), bool))
    assert np.array_equal(stays[4], [False, False, True])


@pytest.mark.parametrize(("blocks", "share", "gone"), [(10, 0.7, 7), (10, 0.71, 8), (1, 0.9, 0)])
def test_at_least_the_share_goes_and_never_all(blocks: int, share: float, gone: int) -> None:
    assert quota(blocks, share) == gone


# -- second order ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.5", "0.8", "2:4", "4x1", "0.6@2x2"])
@pytest.mark.parametrize("entries", [16, 300])  # within one stretch of columns, and over three
def test_second_order_loses_less_than_magnitude_on_correlated_data(text: str, entries: int) -> None:
    rows = correlated(2000, entries)
    hessian = rows.T @ rows / len(rows)
    weight = np.random.default_rng(1).standard_normal((8, entries))
    pattern = Pattern.parse(text)
    gone = quota(block_scores(weight, pattern).size, pattern.share)
    result = second_order.remove(weight, hessian, pattern, gone)
    if pattern.run:
        stays = np.sort(weight.reshape(8, -1, 4) ** 2, axis=2)[:, :, 2:3].repeat(4, axis=2)
        plain = np.where(weight.reshape(8, -1, 4) ** 2 >= stays, weight.reshape(8, -1, 4), 0)
        plain = plain.reshape(weight.shape)
        assert (np.count_nonzero(result.reshape(8, -1, 4), axis=2) <= 2).all()
    else:
        plain = magnitude(weight, pattern, gone)
        assert int((block_scores(result**2, pattern) == 0).sum()) == gone
    assert loss(weight, result, hessian) < loss(weight, plain, hessian)


def test_a_sweep_spreads_the_error_of_a_column_over_those_to_come() -> None:
    rows = correlated(500, 6)
    damped = second_order.damp(rows.T @ rows / len(rows))
    for first in range(6):  # one weight goes: the best that the later ones can do
        only = np.full((1, 6), 1e6)
        only[0, first] = 1e-6
        result = second_order.sweep(only, damped, Pattern(0.1), 1)
        assert result[0, first] == 0 and np.array_equal(result[0, :first], only[0, :first])
        later = np.arange(first + 1, 6)
        change = np.zeros(6)
        change[first] = -only[0, first]
        if later.size:
            change[later] = only[0, first] * np.linalg.solve(
                damped[np.ix_(later, later)], damped[later, first]
            )
        assert np.allclose(result - only, change, atol=1e-9)
    weight = np.random.default_rng(1).standard_normal((1, 6))
    assert np.array_equal(second_order.sweep(weight, damped, Pattern(0.1), 0), weight)


def test_the_weights_that_stay_are_those_of_least_squares() -> None:
    rows = correlated(500, 12)
    hessian = rows.T @ rows / len(rows)
    weight = np.random.default_rng(1).standard_normal((3, 12))
    result = second_order.remove(weight, hessian, Pattern(0.5), 18)
    damping = np.sqrt(second_order.damp(hessian) - hessian)  # as 12 more rows
    both = np.concatenate([rows / np.sqrt(len(rows)), damping])
    for row in range(3):
        stays = result[row] != 0
        best = np.linalg.lstsq(both[:, stays], both @ weight[row], rcond=None)[0]
        assert np.allclose(result[row, stays], best)
    assert (result == 0).sum() == 18


def test_saliency_is_the_loss_of_one_weight_after_all_others_are_refitted() -> None:
    rows = correlated(500, 5)
    hessian = rows.T @ rows / len(rows)
    damped = second_order.damp(hessian)
    weight = np.random.default_rng(1).standard_normal((2, 5))
    found = second_order.saliency(weight, hessian)
    for output, entry in itertools.product(range(2), range(5)):
        rest = np.setdiff1d(np.arange(5), [entry])
        change = np.zeros((1, 5))
        change[0, entry] = -weight[output, entry]
        change[0, rest] = weight[output, entry] * np.linalg.solve(
            damped[np.ix_(rest, rest)], damped[rest, entry]
        )
        assert found[output, entry] == pytest.approx(loss(change, np.zeros((1, 5)), damped))


# -- whole models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "second_order"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_share_holds_and_what_was_not_named_is_untouched(
    name: str, criterion: str, scope: str
) -> None:
    path = DIGITS / f"{name}.onnx"
    result = prune(path, CALIBRATION, sparsity="0.6", weight_criterion=criterion, scope=scope)
    before, after = tensors(path.read_bytes()), tensors(result.model)
    assert set(before) == set(after)
    sparse = {weight.tensor: weight for weight in result.report.sparse_weights}
    assert len(sparse) > 3
    zeros = sum(int((after[weight] == 0).sum()) for weight in sparse)
    entries = sum(after[weight].size for weight in sparse)
    assert 0.6 <= zeros / entries < 0.66
    for weight, entry in sparse.items():
        assert entry.density == np.count_nonzero(after[weight]) / after[weight].size
        assert entry.error is not None and 0 <= entry.error < 1
        if scope == "local":
            assert (after[weight] == 0).mean() >= 0.6
        if criterion != "second_order":  # what stays is what it was
            stays = after[weight] != 0
            assert np.array_equal(after[weight][stays], before[weight][stays])
    for rest in set(before) - set(sparse):
        assert np.array_equal(before[rest], after[rest])


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "second_order"])
@pytest.mark.parametrize(("text", "kept", "run"), [("2:4", 2, 4), ("1:8", 1, 8)])
def test_every_run_of_input_channels_keeps_at_most_n_of_m(
    criterion: str, text: str, kept: int, run: int
) -> None:
    result = prune(
        DIGITS / "digits_cnn.onnx", CALIBRATION, sparsity=text, weight_criterion=criterion
    )
    after, seen = tensors(result.model), 0
    for entry in result.report.sparse_weights:
        weight = after[entry.tensor]
        if entry.dense:
            assert weight.shape[1] % run and f"no multiple of {run}" in entry.dense
            assert entry.density == 1
            continue
        seen += 1
        by_channel = weight if weight.ndim == 2 else np.moveaxis(weight, 1, -1)
        runs = by_channel.reshape(-1, run)
        assert (np.count_nonzero(runs, axis=1) <= kept).all()
    assert seen > 3


def test_second_order_drifts_less_than_magnitude() -> None:
    def drift(criterion: str) -> float:
        path = DIGITS / "digits_transformer.onnx"
        result = prune(path, CALIBRATION, sparsity="0.5", weight_criterion=criterion)
        return result.report.verification.drift[0].relative_error

    assert drift("second_order") < 0.8 * drift("magnitude")


def test_without_calibration_data_the_smallest_weights_go() -> None:
    path = DIGITS / "digits_cnn.onnx"
    result = prune(path, sparsity="0.5")
    before, after = tensors(path.read_bytes()), tensors(result.model)
    for entry in result.report.sparse_weights:
        old, new = np.abs(before[entry.tensor]), after[entry.tensor]
        assert entry.error is None
        assert old[new == 0].max() <= old[new != 0].min()


@pytest.mark.parametrize("criterion", ["wanda", "second_order"])
def test_criteria_that_see_data_need_them(criterion: str) -> None:
    with pytest.raises(Refused) as caught:
        prune(DIGITS / "digits_cnn.onnx", sparsity="0.5", weight_criterion=criterion)
    assert caught.value.refusal.code is Code.INVALID_CALIBRATION


def test_channels_go_first_and_weights_of_what_is_left_after_them() -> None:
    path = DIGITS / "digits_cnn.onnx"
    fields = {"target": {"channels": 0.5}, "repair": False}
    channels = secateur.prune(path, secateur.Recipe.parse(fields), calibration=CALIBRATION)
    both = prune(
        path,
        CALIBRATION,
        **fields,
        granularity=["channel", "weight"],
        sparsity="0.5",
        weight_criterion="magnitude",
    )
    assert both.plan.kept == channels.plan.kept
    before, after = tensors(channels.model), tensors(both.model)
    for entry in both.report.sparse_weights:
        stays = after[entry.tensor] != 0
        assert stays.mean() <= 0.5
        assert np.array_equal(after[entry.tensor][stays], before[entry.tensor][stays])


def test_a_plan_replays_weights_too() -> None:
    path = DIGITS / "digits_cnn.onnx"
    fields = {"granularity": ["channel", "weight"], "sparsity": "2:4", "target": {"macs": 0.6}}
    first = prune(path, CALIBRATION, **fields)
    again = secateur.prune(path, plan=first.plan, calibration=CALIBRATION, measure_latency=False)
    assert again.model == first.model
    alone = prune(path, sparsity="0.5")
    assert secateur.prune(path, plan=alone.plan, measure_latency=False).model == alone.model


def test_ignored_shared_and_odd_weights_stay_and_the_report_says_why() -> None:
    net = Net()
    shared = net.floats(8, 8, 1, 1)
    x = net.op("Relu", net.conv(net.input("x", [2, 3, 6, 6]), 3, 8, 3))
    x = net.op("Relu", net.op("Conv", x, shared))
    x = net.op("Relu", net.op("Conv", x, shared))
    kept = net.floats(8, 8, 1, 1, name="keep_me")
    x = net.op("Relu", net.op("Conv", x, kept))
    net.output(net.conv(x, 8, 4))
    result = prune(net.bytes(), sparsity="2:4", ignore=["keep_*"])
    reasons = [entry.dense for entry in result.report.sparse_weights]
    assert reasons == [
        "3 input channels are no multiple of 4",
        "2 nodes read it",
        "2 nodes read it",
        "matches --ignore 'keep_*'",
        "",
    ]
    after = tensors(result.model)
    assert np.count_nonzero(after[shared]) == 64 and np.count_nonzero(after[kept]) == 64


def test_a_model_with_nothing_that_fits_is_refused() -> None:
    net = Net()
    net.output(net.conv(net.input("x", [2, 3, 6, 6]), 3, 8, 3))
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), sparsity="2:4")
    assert caught.value.refusal.code is Code.NOTHING_TO_PRUNE
    assert "no multiple of 4" in caught.value.refusal.found


# -- what the file becomes ---------------------------------------------------------------------


def test_matrices_too_wide_for_second_moments_go_by_magnitude_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparsify, "WIDEST", 20)
    net = Net()
    x = net.op("Relu", net.dense(net.input("x", ["N", 16]), 16, 32))
    net.output(net.dense(x, 32, 8))
    data = {"x": correlated(64, 16).astype(np.float32)}
    for criterion in (None, "wanda"):
        fields = {"granularity": ["weight"], "sparsity": "0.5", "weight_criterion": criterion}
        report = prune(net.bytes(), data, **fields).report
        ranked = criterion or "second_order"
        assert [one.criterion for one in report.sparse_weights] == [ranked, "magnitude"]
        (warning,) = (text for text in report.warnings if "magnitude" in text)
        assert report.sparse_weights[1].node in warning
    report = prune(net.bytes(), data, **{**fields, "weight_criterion": "magnitude"}).report
    assert not any("ranked by" in text for text in report.warnings)


def test_a_profile_counts_zeros_where_there_are_many() -> None:
    source = DIGITS / "digits_cnn.onnx"
    whole = secateur.graphops.profile(source).model
    assert whole.nonzero is None and whole.compressed_bytes is None
    result = prune(source, granularity=["weight"], sparsity="0.8")
    found = secateur.graphops.profile(result.model, against=source)
    assert found.model.nonzero == result.report.after.nonzero
    assert found.model.compressed_bytes == result.report.after.compressed_bytes
    assert found.against is not None and found.against.nonzero is None


def test_sparse_initializers_give_the_same_model_in_fewer_bytes() -> None:
    path = DIGITS / "digits_cnn.onnx"
    dense = prune(path, CALIBRATION, sparsity="0.8")
    sparse = prune(path, CALIBRATION, sparsity="0.8", sparse_initializers=True)
    proto = onnx.load_from_string(sparse.model)
    stored = {tensor.values.name for tensor in proto.graph.sparse_initializer}
    assert stored
    assert stored == {w.tensor for w in sparse.report.sparse_weights if w.stored_sparse}
    assert len(sparse.model) == sparse.report.after.bytes < len(dense.model)
    feeds = {"input": np.load(CALIBRATION)["input"][:16]}
    outputs = [
        onnxruntime.InferenceSession(one.model).run(None, feeds)[0] for one in (dense, sparse)
    ]
    assert np.array_equal(*outputs)
    again = prune(sparse.model, sparsity="0.1")  # and what we wrote we read
    assert again.report.before.nonzero == dense.report.after.nonzero


def test_weights_that_would_take_more_bytes_stay_dense() -> None:
    path, fields = DIGITS / "digits_cnn.onnx", {"sparsity": "0.5", "scope": "local"}
    result = prune(path, sparse_initializers=True, **fields)
    assert not any(weight.stored_sparse for weight in result.report.sparse_weights)
    assert result.model == prune(path, **fields).model


def test_the_report_says_what_zeros_are_good_for() -> None:
    result = prune(DIGITS / "digits_cnn.onnx", sparsity="0.9")
    before, after = result.report.before, result.report.after
    assert after.nonzero is not None and before.nonzero is not None
    assert after.compressed_bytes is not None and before.compressed_bytes is not None
    assert after.nonzero < 0.2 * before.nonzero
    assert after.compressed_bytes < 0.4 * before.compressed_bytes
    assert after.bytes == len(result.model)
    assert "make nothing faster" in result.report.warnings[0]
    assert str(after.compressed_bytes) in result.report.warnings[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"granularity": ["weight"]},
        {"granularity": ["channel"], "sparsity": "0.5"},
        {"granularity": ["channel"], "weight_criterion": "wanda"},
        {"granularity": ["channel"], "sparse_initializers": True},
        {"sparsity": "0.5", "target": {"macs": 0.5}},
        {"sparsity": "0.5", "sparse_initializers": True, "quantize": "int8"},
    ],
)
def test_recipes_that_contradict_themselves_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        secateur.Recipe.parse({"granularity": ["weight"], **fields})
    assert caught.value.refusal.code is Code.INVALID_RECIPE
