"""Models too large for one file: weights beside the model, complete or not at all."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import Net

import secateur
from secateur.graphops.model import writing


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A model, in a world where one file holds 1 kB of weights."""
    monkeypatch.setattr(writing, "INLINE_LIMIT", 1024)
    net = Net()
    x = net.conv(net.input("x", ["N", 8, 4, 4]), 8, 64)
    net.output(net.conv(net.op("Relu", net.conv(x, 64, 64)), 64, 3))
    return net.bytes()


def test_weights_go_beside_the_model_under_its_name(source: bytes, tmp_path: pathlib.Path) -> None:
    result = secateur.prune(source, measure_latency=False)
    assert result.weights is not None
    path = tmp_path / "slim.onnx"
    result.save(path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["slim.onnx", "slim.onnx.data"]
    size = sum(item.stat().st_size for item in tmp_path.iterdir())
    assert result.report.after.bytes == pytest.approx(size, abs=64)  # the name is another
    x = np.ones((2, 8, 4, 4), np.float32)
    inline = onnx.load(path)  # reads the weights through their references
    wanted = onnxruntime.InferenceSession(inline.SerializeToString()).run(None, {"x": x})
    found = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)


def test_the_numbers_are_those_of_one_file(
    source: bytes, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = secateur.prune(source, measure_latency=False)
    apart.save(tmp_path / "apart.onnx")
    monkeypatch.setattr(writing, "INLINE_LIMIT", 2**30)
    whole = secateur.prune(source, measure_latency=False)
    assert whole.weights is None
    assert whole.plan == apart.plan
    ours = {t.name: t for t in onnx.load(tmp_path / "apart.onnx").graph.initializer}
    for tensor in onnx.load_from_string(whole.model).graph.initializer:
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(tensor), onnx.numpy_helper.to_array(ours[tensor.name])
        )


def test_the_temporary_weights_go_with_the_result(source: bytes) -> None:
    result = secateur.prune(source, measure_latency=False)
    assert result.weights is not None
    folder = result.weights.path.parent
    assert folder.exists()
    del result
    assert not folder.exists()
