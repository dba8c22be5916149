"""Other tools' pruning without training, brought to the same share of MACs."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.planning import cost

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], list[np.ndarray]]

_HALVINGS = 7
_BATCH = 32


def count_macs(model: onnx.ModelProto | bytes) -> int:
    """Multiply-accumulates of one sample, as the project counts them."""
    opened = open_model(model)
    coupling = couple(opened.model, infer_shapes(opened.model))
    return cost.macs(coupling).of(np.ones(coupling.count + 1, np.bool_))


def least_sparsity(kept: Callable[[float], float], fraction: float) -> float:
    """The least sparsity at which no more than a fraction of the MACs is kept.

    Raises:
        ValueError: at 0.95 more is kept.
    """
    low, high = 0.0, 0.95
    if kept(high) > fraction:
        raise ValueError(f"keeps {kept(high):.2f} of the MACs at sparsity {high}")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) <= fraction else (middle, high)
    return high


def onnxsim(source: bytes, calibration: Any, fraction: float) -> tuple[bytes, float]:
    """onnxsim's channels and heads by Wanda, then its own refit; and the share of MACs kept."""
    from onnxsim import finetune, pruning

    model = onnx.load_from_string(source)
    original = count_macs(source)

    def by_norm(sparsity: float) -> float:
        """The same counts as by Wanda, without running the model."""
        pruned = pruning.apply_structured_pruning(model, sparsity)
        return count_macs(pruning.apply_attention_head_pruning(pruned, sparsity)) / original

    batches = _batches(calibration)
    with contextlib.redirect_stdout(io.StringIO()):
        sparsity = least_sparsity(by_norm, fraction)
        pruned = pruning.apply_structured_wanda_pruning(model, batches, sparsity=sparsity)
        pruned = pruning.apply_attention_head_wanda_pruning(pruned, batches, sparsity=sparsity)
        pruned = finetune.apply_pruning_finetune(model, pruned, batches)
    return pruned.SerializeToString(), count_macs(pruned) / original


def _batches(calibration: Any) -> list[Feeds]:
    """Arrays by name, or a folder of `.npz` files, in batches."""
    if not isinstance(calibration, dict):
        files = [np.load(path) for path in sorted(calibration.glob("*.npz"))]
        return [{name: file[name] for name in file.files} for file in files]
    count = len(next(iter(calibration.values())))
    return [
        {name: array[start : start + _BATCH] for name, array in calibration.items()}
        for start in range(0, count, _BATCH)
    ]


def torch_pruning(source: bytes, fraction: float) -> tuple[Run, float]:
    """Torch-Pruning's group magnitude on a CIFAR ResNet; and the share of MACs kept.

    It fails at the padded shortcuts, so stem and residual widths stay, as a user would have to
    find out. The net in torch is checked against the ONNX model first.
    """
    import onnxruntime
    import torch
    import torch_pruning as tp

    example = torch.from_numpy(
        np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    )
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {"input": example.numpy()})[0]
    net = _resnet(source)
    with torch.no_grad():
        assert np.allclose(net(example).numpy(), wanted, atol=1e-3), "another net than the ONNX one"
    original, _ = tp.utils.count_ops_and_params(net, example[:1])

    def prune(ratio: float) -> tuple[Any, float]:
        net = _resnet(source)
        ignored = [net.stem, net.linear, *(block.second for block in net.blocks)]
        tp.pruner.BasePruner(
            net,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=ignored,
        ).step()
        return net, tp.utils.count_ops_and_params(net, example[:1])[0] / original

    pruned, kept = prune(least_sparsity(lambda ratio: prune(ratio)[1], fraction))

    def run(feeds: Feeds) -> list[np.ndarray]:
        with torch.no_grad():
            return [pruned(torch.from_numpy(feeds["input"])).numpy()]

    return run, kept


def _resnet(source: bytes) -> Any:
    """A CIFAR ResNet (He et al., 2016, shortcuts of option A) in torch, with an ONNX model's
    weights, BatchNormalization folded in."""
    import torch
    from torch import nn
    from torch.nn import functional

    model = onnx.load_from_string(source)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = {kind: [n for n in model.graph.node if n.op_type == kind] for kind in ("Conv", "Gemm")}

    def load(layer: Any, node: onnx.NodeProto) -> Any:
        layer.weight.data = torch.from_numpy(arrays[node.input[1]].copy())
        layer.bias.data = torch.from_numpy(arrays[node.input[2]].copy())
        return layer

    def conv(node: onnx.NodeProto) -> Any:
        out, inner, kernel, _ = arrays[node.input[1]].shape
        stride = next(list(a.ints) for a in node.attribute if a.name == "strides")
        return load(nn.Conv2d(inner, out, kernel, stride, padding=kernel // 2), node)

    class Block(nn.Module):
        def __init__(self, first: Any, second: Any) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Any) -> Any:
            y = self.second(functional.relu(self.first(x)))
            if self.first.stride != (1, 1):
                beside = (y.shape[1] - x.shape[1]) // 2
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, beside, beside))
            return functional.relu(x + y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, *rest = (conv(node) for node in nodes["Conv"])
            self.blocks = nn.Sequential(
                *itertools.starmap(Block, zip(*[iter(rest)] * 2, strict=True))
            )
            out, inner = arrays[nodes["Gemm"][0].input[1]].shape
            self.linear = load(nn.Linear(inner, out), nodes["Gemm"][0])

        def forward(self, x: Any) -> Any:
            x = self.blocks(functional.relu(self.stem(x)))
            return self.linear(x.mean((2, 3)))

    return Net().eval()
