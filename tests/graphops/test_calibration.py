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
    samples = open_calibration(arrays(count), open_model(model(batch)).model.graph).draw()
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
    samples = open_calibration(data, open_model(model()).model.graph).draw()
    drawn = np.sort(np.concatenate([f["image"][:, 0, 0, 0] for f in samples.seen + samples.judged]))
    assert drawn.size == 1024
    assert set(np.diff(drawn)) <= {2, 3}


def test_a_remainder_that_a_fixed_batch_cannot_take_is_left_out() -> None:
    assert sizes(5, 2) == ([2, 2], [2, 2])
    assert prune(model(2), calibration=arrays(5)).report.verification.samples == 4


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
