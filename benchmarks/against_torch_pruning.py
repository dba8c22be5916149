"""Torch-Pruning and Secateur side by side: time to halve the channels of the same architecture.

    python -m venv bench && bench/bin/pip install -e . torch==2.13.0 torch-pruning==1.6.1 onnxscript
    bench/bin/python benchmarks/against_torch_pruning.py

Each architecture is built in PyTorch and exported. Theirs: building the dependency graph and one
step of the magnitude pruner at ratio 0.5, the classifier ignored. Ours: everything between the
opened model and the pruned one (coupling, criteria, planning, surgery), at channels=0.5. Both in
this process, best of `--repeat`. Three models of timm join where it is installed.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import time
from collections.abc import Callable

import torch
import torch_pruning
from torch import nn

import secateur
from secateur.recipe import Recipe

RECIPE = Recipe(target={"channels": 0.5})
OURS = ("COUPLING", "CRITERIA", "PLANNING", "SURGERY")


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
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]


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


def timm_models() -> dict[str, Callable[[], nn.Module]]:
    """More architectures where timm is installed."""
    try:
        import timm
    except ImportError:
        return {}
    names = ("resnet50", "densenet121", "efficientnet_b0")
    return {f"timm {name}": lambda name=name: timm.create_model(name) for name in names}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet-18": lambda: resnet((2, 2, 2, 2), False),
    "resnet-50": lambda: resnet((3, 4, 6, 3), True),
    "resnet-101": lambda: resnet((3, 4, 23, 3), True),
    "mobilenet-like": lambda: mobile(16),
    "vgg-16": vgg,
    "densenet-like": dense,
}


def theirs(model: nn.Module, example: torch.Tensor) -> float:
    """Seconds to build the graph and prune once."""
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    start = time.perf_counter()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=classifier,
    )
    pruner.step()
    return time.perf_counter() - start


def ours(exported: bytes) -> float:
    """Seconds of coupling, criteria, planning and surgery."""
    result = secateur.prune(exported, RECIPE, measure_latency=False)
    return sum(result.report.seconds[stage] for stage in OURS)


def main() -> None:
    """Prints one row per architecture and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    logging.disable(logging.WARNING)
    example = torch.randn(1, 3, 224, 224)
    ratios = {}
    print(f"{'model':22s} {'theirs s':>9s} {'ours s':>9s} {'ratio':>7s}")
    for name, build in {**MODELS, **timm_models()}.items():
        buffer = io.BytesIO()
        axes = {"x": {0: "N"}}
        options = {"input_names": ["x"], "dynamic_axes": axes, "opset_version": 17}
        torch.onnx.export(build().eval(), (example,), buffer, dynamo=False, **options)
        first = min(theirs(build().eval(), example) for _ in range(repeat))
        second = min(ours(buffer.getvalue()) for _ in range(repeat))
        ratios[name] = first / second
        print(f"{name:22s} {first:9.3f} {second:9.3f} {ratios[name]:7.1f}", flush=True)
    worst = min(ratios, key=lambda name: ratios[name])
    print(f"median {statistics.median(ratios.values()):.1f}×, worst {ratios[worst]:.1f}× ({worst})")


if __name__ == "__main__":
    main()
