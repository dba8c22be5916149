"""The trained models of `../shared/bench` with their data: calibration samples and a score.

Calibration samples carry no labels and are never scored on: they come from the training part where
there is one, else from one half of the data, and the score from the other half.
"""

from __future__ import annotations

import functools
import io
import json
import lzma
import pathlib
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

ROOT = pathlib.Path(__file__).resolve().parents[1]
BENCH = ROOT.parent / "shared" / "bench"
CALIBRATION = 512  # samples at most

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], list[np.ndarray]]


@dataclass(frozen=True)
class Task:
    """One model and what it is for.

    Attributes:
        name: of the model.
        place: below `../shared/bench`.
        calibration: makes what `secateur.prune(calibration=…)` takes.
        score: of a model, given a function that runs it.
        unit: what the score is.
        goals: the score to reach at MACs 0.7 and 0.5; lower is better for a loss.
    """

    name: str
    place: str
    calibration: Callable[[], Any]
    score: Callable[[Run], float]
    unit: str
    goals: tuple[float, float]

    def model(self) -> bytes:
        """The serialised model."""
        content = (BENCH / self.place).read_bytes()
        return lzma.decompress(content) if self.place.endswith(".xz") else content

    def measure(self, model: bytes) -> float:
        """The score of a model."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return self.score(lambda feeds: session.run(None, feeds))


def _top1(images: np.ndarray, labels: np.ndarray, name: str, run: Run, batch: int = 50) -> float:
    right = 0
    for start in range(0, len(images), batch):
        logits = run({name: images[start : start + batch]})[0]
        right += int((logits.argmax(1) == labels[start : start + batch]).sum())
    return right / len(images)


# -- CIFAR-10 and MNIST ------------------------------------------------------------------------


def _cifar(images: np.ndarray) -> np.ndarray:
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    return np.ascontiguousarray(
        ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    )


def _cifar_calibration() -> Feeds:
    data = np.load(BENCH / "cifar10/train5000.npz")
    return {"input": _cifar(data["images"][:CALIBRATION])}


def _cifar_score(run: Run) -> float:
    data = np.load(BENCH / "cifar10/test1000.npz")
    return _top1(_cifar(data["images"]), data["labels"], "input", run, 100)


# -- ImageNet sample ---------------------------------------------------------------------------


@functools.cache
def _imagenet(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and class indices, preprocessed for one of the two models."""
    from PIL import Image

    images, labels = [], []
    with zipfile.ZipFile(BENCH / "imagenet/sample1000_256_jpeg.zip") as archive:
        for entry in sorted(archive.namelist()):
            image = Image.open(io.BytesIO(archive.read(entry))).convert("RGB")
            labels.append(int(pathlib.PurePath(entry).name.split("_")[0]))
            wide, high = image.size
            if kind == "lite0":
                left, top = (wide - 224) // 2, (high - 224) // 2
                pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
                images.append((pixels - 127) / 128)
            else:
                side = round(0.875 * min(wide, high))
                left, top = (wide - side) // 2, (high - side) // 2
                crop = image.crop((left, top, left + side, top + side))
                pixels = np.asarray(crop.resize((192, 192), Image.Resampling.BILINEAR), np.float32)
                images.append((pixels - 127.5) / 127.5)
    return np.stack(images).transpose(0, 3, 1, 2).copy(), np.array(labels)


def _imagenet_calibration(kind: str) -> Feeds:
    return {"input": _imagenet(kind)[0][0::2][:CALIBRATION]}


def _imagenet_score(kind: str, run: Run) -> float:
    images, labels = _imagenet(kind)
    offset = 1 if kind == "mobilenet" else 0
    return _top1(images[1::2], labels[1::2] + offset, "input", run)


# -- keyword spotting --------------------------------------------------------------------------


def _halves(count: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(0).permutation(count)
    return order[: count // 2], order[count // 2 :]


def _kws_calibration() -> Feeds:
    features = np.load(BENCH / "kws/kws01_1000.npz")["features"]
    return {"input": features[_halves(len(features))[0][:CALIBRATION]]}


def _kws_score(run: Run) -> float:
    data = np.load(BENCH / "kws/kws01_1000.npz")
    test = _halves(len(data["labels"]))[1]
    return _top1(data["features"][test], data["labels"][test], "input", run, 100)


# -- sentences ---------------------------------------------------------------------------------


def _tokens(sentences: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BENCH / "minilm/tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    return [encoding.ids for encoding in tokenizer.encode_batch(sentences)]


def _by_length(tokens: list[list[int]]) -> dict[int, list[int]]:
    lengths: dict[int, list[int]] = {}
    for place, ids in enumerate(tokens):
        lengths.setdefault(len(ids), []).append(place)
    return lengths


def _pairs() -> list[tuple[str, str, float]]:
    rows = json.loads((BENCH / "minilm/stsb_dev.json").read_text())
    return [(row[0], row[1], row[2]) for row in rows]


def _minilm_calibration() -> pathlib.Path:
    """A folder of .npz files, one per sentence length: nothing is padded."""
    sentences = [text for pair in _pairs()[: CALIBRATION // 2] for text in pair[:2]]
    tokens = _tokens(sentences)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="secateur-bench-"))
    for length, places in _by_length(tokens).items():
        ids = np.array([tokens[place] for place in places], np.int64)
        np.savez(folder / f"{length:03d}.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    return folder


def _minilm_score(run: Run) -> float:
    from scipy.stats import spearmanr

    pairs = _pairs()[CALIBRATION // 2 :]
    sentences = [text for pair in pairs for text in pair[:2]]
    tokens = _tokens(sentences)
    embeddings = np.zeros((len(sentences), 384), np.float32)
    for places in _by_length(tokens).values():
        ids = np.array([tokens[place] for place in places], np.int64)
        embeddings[places] = run({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    cosine = (embeddings[0::2] * embeddings[1::2]).sum(1)
    return float(spearmanr(cosine, [pair[2] for pair in pairs]).statistic)


# -- text recognition --------------------------------------------------------------------------


def _ocr(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(
        ((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
    )


def _ocr_calibration() -> Feeds:
    images = np.load(BENCH / "ocr/rendered400.npz")["images"]
    return {"x": _ocr(images[_halves(len(images))[0]])}


def _ocr_score(run: Run) -> float:
    data = np.load(BENCH / "ocr/rendered400.npz")
    characters = json.loads((BENCH / "ocr/rec_chars.json").read_text())
    test = _halves(len(data["images"]))[1]
    right = 0
    for start in range(0, len(test), 25):
        part = test[start : start + 25]
        best = run({"x": _ocr(data["images"][part])})[0].argmax(-1)
        for line, text in zip(best, data["texts"][part], strict=True):
            fresh = line[np.r_[True, line[1:] != line[:-1]]]
            right += "".join(characters[i] for i in fresh if i).strip() == text
    return right / len(test)


# -- characters --------------------------------------------------------------------------------


def _characters() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the training text and of the last tenth."""
    text = (BENCH / "chargpt/tinyshakespeare.txt").read_text()
    number = {c: i for i, c in enumerate(json.loads((BENCH / "chargpt/vocab.json").read_text()))}
    tokens = np.array([number[c] for c in text], np.int64)
    return tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]


def _chargpt_calibration() -> Feeds:
    train, _ = _characters()
    starts = np.random.default_rng(0).integers(0, len(train) - 64, CALIBRATION)
    return {"tokens": np.stack([train[start : start + 64] for start in starts])}


def _chargpt_score(run: Run) -> float:
    _, text = _characters()
    starts = np.arange(0, len(text) - 65, 64)[:1024]
    loss = []
    for part in np.array_split(starts, 16):
        windows = np.stack([text[start : start + 65] for start in part])
        logits = run({"tokens": windows[:, :-1]})[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        loss.append(-np.take_along_axis(log, windows[:, 1:, None], -1).mean())
    return float(np.mean(loss))


TASKS = (
    Task(
        "resnet56",
        "cifar10/resnet56.onnx",
        _cifar_calibration,
        _cifar_score,
        "top-1",
        (0.922, 0.912),
    ),
    Task(
        "resnet20",
        "cifar10/resnet20.onnx",
        _cifar_calibration,
        _cifar_score,
        "top-1",
        (0.905, 0.880),
    ),
    Task(
        "efficientnet_lite0",
        "imagenet/efficientnet_lite0.onnx",
        functools.partial(_imagenet_calibration, "lite0"),
        functools.partial(_imagenet_score, "lite0"),
        "top-1",
        (0.84, 0.72),
    ),
    Task(
        "mobilenet_v1_075",
        "imagenet/mobilenet_v1_075_192.onnx",
        functools.partial(_imagenet_calibration, "mobilenet"),
        functools.partial(_imagenet_score, "mobilenet"),
        "top-1",
        (0.77, 0.66),
    ),
    Task("kws_dscnn", "kws/kws_dscnn.onnx", _kws_calibration, _kws_score, "top-1", (0.895, 0.87)),
    Task(
        "minilm",
        "minilm/all_minilm_l6_v2.onnx.xz",
        _minilm_calibration,
        _minilm_score,
        "Spearman",
        (0.86, 0.84),
    ),
    Task(
        "ppocr_rec",
        "ocr/ch_PP-OCRv4_rec_infer.onnx",
        _ocr_calibration,
        _ocr_score,
        "exact",
        (0.97, 0.90),
    ),
    Task(
        "chargpt",
        "chargpt/chargpt.onnx",
        _chargpt_calibration,
        _chargpt_score,
        "loss",
        (2.00, 2.08),
    ),
)
