"""Accuracy by labels: counted by hand, and refused where labels do not fit."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from nets import Net

import secateur
from secateur.errors import Code, Refused
from secateur.graphops.verify.accuracy import Hits

HALF = secateur.Recipe(target={"channels": 0.5})


def classifier(batch: int | str = "N", outputs: int = 1) -> bytes:
    """Two layers; from (N, 6) to scores of 8 classes."""
    net = Net()
    y = net.op("Relu", net.dense(net.input("x", [batch, 6]), 6, 16))
    for _ in range(outputs):
        net.output(net.dense(y, 16, 8))
    return net.bytes()


def samples(count: int = 45) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)


def classes(count: int = 45) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 8, count)


def answers(model: bytes, x: np.ndarray, batch: int | None = None) -> np.ndarray:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    size = batch or len(x)
    rows = [session.run(None, {"x": x[i : i + size]})[0] for i in range(0, len(x), size)]
    return np.concatenate(rows)


def shares(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 and top-5, by sorting."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    right = order == labels[..., None]
    return float(right[..., 0].mean()), float(right[..., :5].any(axis=-1).mean())


def prune(model: bytes, **more: Any) -> secateur.Result:
    return secateur.prune(model, HALF, measure_latency=False, **more)


def test_samples_that_come_with_labels_are_scored_all(tmp_path: pathlib.Path) -> None:
    model, x, labels = classifier(), samples(), classes()
    for place in range(2):
        half = slice(place * 20, 20 + place * 25)
        np.savez(tmp_path / f"{place}.npz", x=x[half], label=labels[half])
    result = prune(model, labels=tmp_path)
    (found,) = result.report.accuracy
    assert (found.labels, found.from_calibration, found.held_back) == (45, False, False)
    assert (found.top1_before, found.top5_before) == shares(answers(model, x), labels)
    assert (found.top1_after, found.top5_after) == shares(answers(result.model, x), labels)
    assert found.top1_before != found.top1_after


def test_labels_of_calibration_samples_score_those_that_are_held_back() -> None:
    model, x, labels = classifier(), samples(64), classes(64)
    result = prune(model, calibration={"x": x}, labels={"label": labels})
    (found,) = result.report.accuracy
    # batches of 4, every eighth of them is held back
    held = np.r_[28:32, 60:64]
    assert (found.labels, found.from_calibration, found.held_back) == (8, True, True)
    assert found.top1_before == shares(answers(model, x[held]), labels[held])[0]
    assert found.top1_after == shares(answers(result.model, x[held]), labels[held])[0]


def test_labels_change_no_byte() -> None:
    model, data = classifier(), {"x": samples(64)}
    bare = prune(model, calibration=data)
    assert not bare.report.accuracy
    for labels in (classes(64), 7 - classes(64)):
        assert prune(model, calibration=data, labels={"label": labels}).model == bare.model


def test_a_short_last_batch_of_a_fixed_size_is_scored_too() -> None:
    model, x, labels = classifier(batch=4), samples(10), classes(10)
    (found,) = prune(model, labels={"x": x, "label": labels}).report.accuracy
    padded = np.concatenate([x, x[-1:], x[-1:]])
    assert found.labels == 10
    assert found.top1_before == shares(answers(model, padded, 4)[:10], labels)[0]


def test_arrays_are_named_after_outputs_where_there_are_several() -> None:
    net = Net()
    y = net.op("Relu", net.dense(net.input("x", ["N", 6]), 6, 16))
    first, second = (net.output(net.dense(y, 16, 8)) for _ in range(2))
    labels = {first: classes(), second: 7 - classes()}
    found = prune(net.bytes(), labels={"x": samples(), **labels}).report.accuracy
    assert [one.output for one in found] == [first, second]
    with pytest.raises(Refused) as caught:
        prune(net.bytes(), labels={"x": samples(), "label": classes()})
    assert caught.value.refusal.nodes == ("label",)
    assert first in caught.value.refusal.expected


def test_hits_are_counted_by_hand() -> None:
    hits = Hits()
    scores = np.array([[0, 3, 1, 2, -1, -2], [5, 4, 3, 2, 1, 0], [1, 1, 0, 0, 0, 0]], np.float32)
    hits.add("y", scores, np.array([1, 4, 1]))  # first; fifth; second of two equal ones
    assert (hits.count, hits.first, hits.near) == (3, 1, 3)
    hits.add("y", np.full((1, 6), np.nan, np.float32), np.array([0]))
    assert (hits.count, hits.first, hits.near) == (4, 1, 3)


def test_labels_below_zero_are_not_scored() -> None:
    hits = Hits()
    hits.add("y", np.eye(6, dtype=np.float32)[:3], np.array([0, -100, 0]))
    assert (hits.count, hits.first) == (2, 1)
    with pytest.raises(Refused, match="INVALID_LABELS"):
        prune(classifier(), labels={"x": samples(), "label": np.full(45, -1)})


@pytest.mark.parametrize("axis", [1, 3])
def test_classes_lie_along_the_last_axis_or_along_axis_1(axis: int) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (2, 4, 5))
    scores = np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, axis)
    hits = Hits()
    hits.add("y", scores, labels)
    assert (hits.count, hits.first, hits.near) == (40, 40, None)


def test_outputs_that_are_class_numbers_are_compared() -> None:
    hits = Hits()
    hits.add("y", np.array([1, 2, 3, 9]), np.array([1, 0, 3]))  # one sample more than labels
    assert (hits.count, hits.first, hits.near) == (3, 2, None)


X, Y = samples(), classes()
WRONG: dict[str, tuple[Any, Any, str]] = {  # labels, calibration, what the refusal has found
    "labels without samples": ({"label": Y}, None, "neither"),
    "samples without labels": ({"x": X}, None, "samples alone"),
    "fewer labels than samples": ({"x": X, "label": Y[:40]}, None, "40"),
    "fewer labels than calibration samples": ({"label": Y[:40]}, {"x": X}, "40"),
    "samples of another shape": ({"x": X[:, :5], "label": Y}, None, "[45, 5]"),
    "one-hot labels": ({"x": X, "label": np.eye(8, dtype=int)[Y]}, None, "shape [32, 8]"),
    "labels in a column": ({"x": X, "label": Y[:, None]}, None, "shape [32, 1]"),
    "labels that are no integers": ({"x": X, "label": Y / 2}, None, "float64, shape [45]"),
    "a label of no class": ({"x": X, "label": np.full(45, 8)}, None, "8"),
    "no label to score": ({"x": X, "label": Y - 8}, None, "0"),
    "a file that is not there": ("missing.npz", None, ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_that_do_not_fit_are_refused_before_any_work(name: str) -> None:
    labels, calibration, found = WRONG[name]
    seen: list[secateur.Stage] = []
    with pytest.raises(Refused) as caught:
        prune(
            classifier(),
            labels=labels,
            calibration=calibration,
            progress=lambda step: seen.append(step.stage),
        )
    assert caught.value.refusal.code is Code.INVALID_LABELS
    assert caught.value.refusal.found == found
    assert set(seen) == {secateur.Stage.LOAD}
