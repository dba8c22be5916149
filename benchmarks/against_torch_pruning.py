"""Torch-Pruning and Secateur side by side: time to halve the channels of the same architecture.

    python -m venv bench && bench/bin/pip install -e . torch==2.13.0 torch-pruning==1.6.1 onnxscript
    bench/bin/pip install torchvision timm        # for the architectures of the zoo
    bench/bin/python benchmarks/against_torch_pruning.py [NAME …] [--into FILE]

Six architectures are built here in PyTorch and exported; those of torchvision and timm that
`../shared/zoo` holds join where it and those libraries are there. Theirs: building the dependency
graph and one step of the magnitude pruner at ratio 0.5, the classifier ignored; a success is a
network that runs, gives outputs of the same shape and has lost a fiftieth of its parameters or
more. Ours: everything between the opened model and the pruned one (coupling, criteria, planning,
surgery), at channels=0.5. Best of three, each in a process of its own, one after the other.
Nothing should run beside it: PyTorch's threads lose far more by that than we do.

Every model is a cell, added to FILE (JSON lines) when it is done; a second run takes from there
what it finds. The last lines are of the models on which both succeed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import io
import json
import logging
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import onnxruntime
import torch
import torch_pruning
from cells import add, entries, in_process
from torch import nn
from zoo import SHARED_ZOO, jobs, zoo_loader

import secateur
from secateur.recipe import Recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = Recipe(target={"channels": 0.5})
OURS = ("COUPLING", "CRITERIA", "PLANNING", "SURGERY")
REPEAT = 3
CLASSES = 1000


def unit(inner: int, outer: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, batch normalisation, ReLU."""
    conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outer), nn.ReLU())


class Residual(nn.Module):
    """x + f(x), the identity projected where the width or the stride changes."""

    def __init__(self, inner: int, outer: int, stride: int, body: nn.Module) -> None:
        super().__init__()
        same = inner == outer and stride == 1
        self.body = body
        self.skip = nn.Identity() if same else unit(inner, outer, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        return self.body(x) + self.skip(x)


def head(width: int) -> list[nn.Module]:
    """Pooling and a classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


def resnet(depths: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """ResNet with basic or bottleneck blocks."""
    layers, width = [unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate(depths):
        inner = 64 << stage
        outer = inner * (4 if bottleneck else 1)
        for block in range(depth):
            stride = 2 if stage and not block else 1
            body = [unit(width, inner, 1), unit(inner, inner, 3, stride), unit(inner, outer, 1)]
            if not bottleneck:
                body = [unit(width, inner, 3, stride), unit(inner, outer)]
            layers.append(Residual(width, outer, stride, nn.Sequential(*body)))
            width = outer
    return nn.Sequential(*layers, *head(width))


def mobile(depth: int) -> nn.Module:
    """Inverted residuals."""
    layers, width = [unit(3, 32, 3, 2)], 32
    for block in range(depth):
        outer, stride = 24 + 8 * block, 2 if block % 4 == 3 else 1
        wide = width * 6
        body = nn.Sequential(
            unit(width, wide, 1), unit(wide, wide, 3, stride, wide), unit(wide, outer, 1)
        )
        layers.append(Residual(width, outer, stride, body))
        width = outer
    return nn.Sequential(*layers, unit(width, 1280, 1), *head(1280))


def vgg() -> nn.Module:
    """VGG-16 with batch normalisation and a pooled classifier."""
    layers, width = [], 3
    for outer, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers.append(unit(width, outer))
            width = outer
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *head(width))


class Dense(nn.Module):
    """A dense block: every layer reads all before it."""

    def __init__(self, inner: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(unit(inner + growth * i, growth) for i in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All features, joined."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def dense() -> nn.Module:
    """Two dense blocks of twelve layers."""
    first = nn.Sequential(unit(3, 64, 7, 2), nn.MaxPool2d(2), Dense(64, 32, 12), unit(448, 224, 1))
    return nn.Sequential(first, nn.AvgPool2d(2), Dense(224, 32, 12), *head(608))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet-18": lambda: resnet((2, 2, 2, 2), False),
    "resnet-50": lambda: resnet((3, 4, 6, 3), True),
    "resnet-101": lambda: resnet((3, 4, 23, 3), True),
    "mobilenet-like": lambda: mobile(16),
    "vgg-16": vgg,
    "densenet-like": dense,
}


def architecture(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network without trained weights, and one sample."""
    if name in MODELS:
        return MODELS[name](), torch.randn(1, 3, 224, 224)
    entry = zoo_loader(SHARED_ZOO).entry(name)
    shape = [1 if isinstance(size, str) else size for size in entry["inputs"][0]["shape"]]
    library, known = entry["arch"].split("_", 1)
    if library == "tv":
        import torchvision

        builder = torchvision.models.get_model_builder(known)
        parts = {"weights", "weights_backbone"} & set(inspect.signature(builder).parameters)
        network = builder(**dict.fromkeys(parts))
    else:
        import timm

        network = timm.create_model(known)
    return network, torch.randn(shape)


def theirs(name: str) -> float:
    """Seconds to build the graph and prune once.

    Raises:
        ValueError: nothing was pruned, or outputs have another shape.
    """
    network, example = architecture(name)
    network.eval()
    wanted, before = _shapes(network(example)), _count(network)
    classifier = [
        module
        for module in network.modules()
        if CLASSES in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))
    ]
    start = time.perf_counter()
    pruner = torch_pruning.pruner.MagnitudePruner(
        network,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=classifier,
    )
    pruner.step()
    seconds = time.perf_counter() - start
    if _count(network) > 0.98 * before:
        raise ValueError("nothing was pruned")
    if _shapes(network(example)) != wanted:
        raise ValueError("outputs have another shape")
    return seconds


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _shapes(outputs: object) -> object:
    """Of every tensor in what a network returns."""
    if isinstance(outputs, torch.Tensor):
        return outputs.shape
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [_shapes(value) for value in values]


def ours(name: str) -> float:
    """Seconds of coupling, criteria, planning and surgery."""
    result = secateur.prune(exported(name), RECIPE, measure_latency=False)
    return sum(result.report.seconds[stage] for stage in OURS)


@functools.cache
def exported(name: str) -> bytes:
    """The architecture as ONNX."""
    if name not in MODELS:
        return zoo_loader(SHARED_ZOO).load(name).SerializeToString()
    network, example = architecture(name)
    buffer, axes = io.BytesIO(), {"x": {0: "N"}}
    options = {"input_names": ["x"], "dynamic_axes": axes, "opset_version": 17}
    torch.onnx.export(network.eval(), (example,), buffer, dynamo=False, **options)
    return buffer.getvalue()


def known_models() -> list[str]:
    """Names of all that can be built here."""
    found = list(MODELS)
    libraries = {"tv": "torchvision", "timm": "timm"}
    for job in jobs(SHARED_ZOO, []) if SHARED_ZOO.exists() else ():
        library = libraries.get(job.architecture.split("_", 1)[0])
        if library is not None and importlib.util.find_spec(library) is not None:
            found.append(job.name)
    return found


@dataclass(frozen=True)
class Cell:
    """Seconds that one of the two takes for one model, or why it fails."""

    seconds: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Pair:
    """Both of one model."""

    theirs: Cell
    ours: Cell

    @property
    def ratio(self) -> float | None:
        """Their time over ours, where both succeed."""
        if self.theirs.seconds is None or self.ours.seconds is None:
            return None
        return self.theirs.seconds / self.ours.seconds

    def text(self, name: str) -> str:
        """One line."""
        columns = [
            f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}"
            for value, width, digits in (
                (self.theirs.seconds, 9, 3),
                (self.ours.seconds, 9, 3),
                (self.ratio, 7, 1),
            )
        ]
        failures = {"theirs": self.theirs.failure, "ours": self.ours.failure}
        why = "; ".join(f"{who}: {failure[:80]}" for who, failure in failures.items() if failure)
        return f"{name:42s} {' '.join(columns)}  {why}"


def measure(name: str, timeout: float) -> Pair:
    """Times one model, each of the two in a process of its own."""
    cells = [in_process(Cell, __file__, (who.__name__, name), timeout) for who in (theirs, ours)]
    return Pair(*cells)


def main() -> None:
    """Prints one row per model, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names begin with one of these; all without")
    parser.add_argument("--into", type=pathlib.Path, default=ROOT / "build" / "torch_pruning.jsonl")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one cell at most")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(4)
    if arguments.cell:
        who, name = arguments.cell
        run = {"theirs": theirs, "ours": ours}[who]
        print(json.dumps(asdict(Cell(min(run(name) for _ in range(REPEAT))))))
        return
    found = {
        one["model"]: Pair(Cell(**one["theirs"]), Cell(**one["ours"]))
        for one in entries(arguments.into)
    }
    print(f"{'model':42s} {'theirs s':>9s} {'ours s':>9s} {'ratio':>7s}")
    ratios = {}
    for name in known_models():
        if arguments.models and not name.startswith(tuple(arguments.models)):
            continue
        if name not in found:
            found[name] = measure(name, arguments.timeout)
            add(arguments.into, {"model": name, **asdict(found[name])})
        print(found[name].text(name), flush=True)
        if (ratio := found[name].ratio) is not None:
            ratios[name] = ratio
    if ratios:
        worst = min(ratios, key=lambda name: ratios[name])
        print(
            f"{len(ratios)} models: median {statistics.median(ratios.values()):.1f}×, "
            f"worst {ratios[worst]:.1f}× ({worst})"
        )


if __name__ == "__main__":
    main()
