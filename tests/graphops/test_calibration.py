"""Calibration data: what is taken, and each way of being wrong."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from laws import prune
from nets import INT64, Net

from secateur.errors import Code, Refusal, Refused
from secateur.graphops.calibration import open_calibration
from secateur.graphops.model.opening import open_model


def model(batch: int | str = "N") -> bytes:
    """Two inputs: an image and tokens."""
    net = Net()
    image = net.conv(net.input("image", [batch, 3, 4, 4]), 3, 8)
    tokens = net.op("Gather", net.floats(11, 6), net.input("tokens", [batch, 5], INT64))
    left = net.dense(net.op("Flatten", net.op("GlobalAveragePool", image)), 8, 3)
    right = net.dense(net.op("ReduceSum", tokens, net.ints(1), keepdims=0), 6, 3)
    net.output(net.op("Add", left, right))
    return net.bytes()


def arrays(count: int = 4) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "image": draw.standard_normal((count, 3, 4, 4)).astype(np.float32),
        "tokens": draw.integers(0, 11, (count, 5)),
    }


def recurrent() -> bytes:
    """A scalar, a state whose samples lie along axis 1, and steps of a sequence, in that order."""
    net = Net()
    factor = net.input("factor", [])
    state = net.input("state", [2, "N", 6])
    x = net.op("Mul", net.dense(net.input("x", ["N", 4]), 4, 6), factor)
    summed = net.op("ReduceSum", state, net.ints(0), keepdims=0)
    net.output(net.dense(net.op("Tanh", net.op("Add", x, net.dense(summed, 6, 6))), 6, 3))
    return net.bytes()


def states(count: int = 40) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "factor": np.array(0.5, np.float32),
        "state": draw.standard_normal((2, count, 6)).astype(np.float32),
        "x": draw.standard_normal((count, 4)).astype(np.float32),
    }


def refusal(calibration: Any, batch: int | str = "N") -> Refusal:
    with pytest.raises(Refused) as caught:
        prune(model(batch), calibration=calibration)
    assert caught.value.refusal.code is Code.INVALID_CALIBRATION
    return caught.value.refusal


# -- taken -------------------------------------------------------------------------------------


def test_arrays_a_file_and_a_folder_are_the_same_data(tmp_path: pathlib.Path) -> None:
    data = arrays(6)
    np.savez(tmp_path / "all.npz", **data)
    folder = tmp_path / "parts"
    folder.mkdir()
    np.savez(folder / "a.npz", **{name: array[:3] for name, array in data.items()})
    np.savez(folder / "b.npz", **{name: array[3:] for name, array in data.items()})
    sources: list[Any] = [data, tmp_path / "all.npz", str(folder)]
    results = [prune(model(), criterion="activation", calibration=source) for source in sources]
    assert len({result.model for result in results}) == 1
    assert [result.report.verification.samples for result in results] == [6, 6, 6]
    assert all(result.report.verification.from_calibration for result in results)


def sizes(count: int, batch: int | str = "N") -> tuple[list[int], list[int]]:
    """Sizes of the batches that statistics see, and of those that are kept back."""
    samples = open_calibration(arrays(count), open_model(model(batch)).model).draw()
    return [len(feeds["image"]) for feeds in samples.seen], [
        len(feeds["image"]) for feeds in samples.judged
    ]


def test_a_free_batch_is_small_enough_that_some_can_be_kept_back() -> None:
    assert sizes(640) == ([32] * 18, [32] * 2)
    assert sizes(70) == ([4] * 15 + [2], [4] * 2)
    assert sizes(16) == ([1] * 14, [1] * 2)


def test_too_few_samples_judge_themselves() -> None:
    assert sizes(5) == ([1] * 5, [1] * 5)
    assert not prune(model(), calibration=arrays(5)).report.verification.held_back
    assert prune(model(), calibration=arrays(16)).report.verification.held_back


def test_more_samples_than_are_run_are_thinned_out_evenly() -> None:
    data = arrays(3000)
    data["tokens"][:, 0] = np.arange(3000) % 11
    data["image"][:, 0, 0, 0] = np.arange(3000)
    samples = open_calibration(data, open_model(model()).model).draw()
    drawn = np.sort(np.concatenate([f["image"][:, 0, 0, 0] for f in samples.seen + samples.judged]))
    assert drawn.size == 1024
    assert set(np.diff(drawn)) <= {2, 3}


def test_a_remainder_that_a_fixed_batch_cannot_take_is_left_out() -> None:
    assert sizes(5, 2) == ([2, 2], [2, 2])
    assert prune(model(2), calibration=arrays(5)).report.verification.samples == 4


def test_samples_of_a_state_lie_along_the_axis_that_bears_the_name(tmp_path: pathlib.Path) -> None:
    data = states()
    np.savez(tmp_path / "all.npz", **data)
    opened = open_model(recurrent()).model
    for source in (data, tmp_path / "all.npz"):
        calibration = open_calibration(source, opened)
        assert calibration.count() == 40
        samples = calibration.draw()
        assert {feeds["state"].shape for feeds in samples.seen} == {(2, 2, 6)}
        first = calibration.feeds(data, np.array([3, 8]))
        assert np.array_equal(first["state"], data["state"][:, [3, 8]])
        assert np.array_equal(first["x"], data["x"][[3, 8]])
        assert first["factor"].shape == ()


@pytest.mark.parametrize("criterion", ["reconstruction", "fisher"])
def test_a_model_with_a_state_is_pruned_by_its_samples(criterion: str) -> None:
    result = prune(recurrent(), criterion=criterion, calibration=states())
    assert result.report.verification.held_back
    assert result.report.verification.samples == 4
    assert result.report.after.params < result.report.before.params
    assert not any("alike" in warning for warning in result.report.warnings)


def test_states_of_other_numbers_of_samples() -> None:
    data = states()
    with pytest.raises(Refused) as caught:
        prune(recurrent(), calibration={**data, "state": data["state"][:, :7]})
    assert "'state': 7" in caught.value.refusal.found
    with pytest.raises(Refused) as caught:
        prune(recurrent(), calibration={**data, "state": data["state"][0]})
    assert "2, 'N', 6" in caught.value.refusal.expected


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_table_that_is_an_input_comes_once_for_all_samples(batch: str | int, rows: int) -> None:
    """tf2onnx makes inputs of constants that a layer captured."""
    net = Net()
    x = net.dense(net.input("x", [batch, 5, 4]), 4, 16)
    x = net.op("Add", x, net.dense(net.input("table", [rows, 4]), 4, 16))
    net.output(net.dense(net.op("Relu", x), 16, 3), shape=[batch, 5, 3])
    draw = np.random.default_rng(0)
    data = {
        "table": draw.standard_normal((rows, 4)).astype(np.float32),
        "x": draw.standard_normal((40, 5, 4)).astype(np.float32),
    }
    calibration = open_calibration(data, open_model(net.bytes()).model)
    assert calibration.count() == 40
    assert calibration.is_fixed() == (batch == 1)
    assert {feeds["table"].shape for feeds in calibration.draw().seen} == {(rows, 4)}
    result = prune(net.bytes(), calibration=data, target={"channels": 0.5})
    assert result.report.verification.held_back


def test_arrays_that_no_input_wants_are_ignored() -> None:
    result = prune(model(), calibration={**arrays(), "labels": np.zeros(4)})
    assert result.report.verification.from_calibration


# -- refused -----------------------------------------------------------------------------------


def test_a_missing_input() -> None:
    data = arrays()
    del data["tokens"]
    found = refusal(data)
    assert "tokens" in found.expected
    assert "tokens" not in found.found


def test_a_misspelt_input() -> None:
    data = arrays()
    data["Image"] = data.pop("image")
    assert "Image" in refusal(data).found


@pytest.mark.parametrize(
    ("name", "array", "expected", "found"),
    [
        ("image", np.zeros((4, 3, 4, 4)), "float32", "float64"),
        ("tokens", np.zeros((4, 5), np.int32), "int64", "int32"),
        ("image", np.zeros((4, 3, 4, 5), np.float32), "4, 4]", "4, 5]"),
        ("image", np.zeros((4, 1, 4, 4), np.float32), "3, 4, 4", "1, 4, 4"),
        ("image", np.zeros((3, 4, 4), np.float32), "3, 4, 4", "[3, 4, 4]"),
        ("tokens", np.zeros((4, 5, 1), np.int64), "5]", "[4, 5, 1]"),
        ("image", np.zeros((0, 3, 4, 4), np.float32), "at least 1", "0"),
        ("image", np.full((4, 3, 4, 4), np.nan, np.float32), "finite", "192"),
        ("image", np.full((4, 3, 4, 4), np.inf, np.float32), "finite", "192"),
    ],
    ids=[
        "double",
        "other integers",
        "width",
        "channels",
        "no batch axis",
        "one axis too many",
        "empty",
        "NaN",
        "infinite",
    ],
)
def test_an_array_that_does_not_fit(
    name: str, array: np.ndarray, expected: str, found: str
) -> None:
    refused = refusal({**arrays(), name: array})
    assert refused.nodes == (name,)
    assert expected in refused.expected
    assert found in refused.found


def test_other_numbers_of_samples() -> None:
    data = arrays()
    data["tokens"] = data["tokens"][:3]
    refused = refusal(data)
    assert "4" in refused.found
    assert "3" in refused.found


def test_fewer_samples_than_a_fixed_batch() -> None:
    refused = refusal(arrays(1), batch=2)
    assert "2" in refused.expected
    assert refused.found == "1"


def test_files_that_are_none(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.npz"
    text.write_text("not a zip")
    cut = tmp_path / "cut.npz"
    np.savez(cut, **arrays())
    cut.write_bytes(cut.read_bytes()[:-40])
    objects = tmp_path / "objects.npz"
    np.savez(objects, **{**arrays(), "image": np.array([{}], object)})
    plain = tmp_path / "plain.npz"
    with plain.open("wb") as file:
        np.save(file, np.zeros(3))
    empty = tmp_path / "empty.npz"
    empty.touch()
    damaged = tmp_path / "damaged.npz"
    np.savez_compressed(damaged, **arrays())
    damaged.write_bytes(damaged.read_bytes().replace(b"image.npy", b"image.npz", 1))
    for path in (text, cut, objects, plain, empty, damaged, tmp_path / "none.npz"):
        assert path.name in refusal(path).message


def test_a_folder_without_files(tmp_path: pathlib.Path) -> None:
    assert refusal(tmp_path).found == "none"


def test_a_wrong_part_in_a_folder_is_named(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays())
    np.savez(tmp_path / "b.npz", **{**arrays(), "image": np.zeros((4, 3, 9, 9), np.float32)})
    refused = refusal(tmp_path)
    assert "b.npz" in refused.message
    assert refused.nodes == ("image",)
