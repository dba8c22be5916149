"""Trains the two digit classifiers of this folder and writes them, with their data, beside it.

    pip install torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 scikit-learn
    python examples/digits/train.py

The data are the 1797 hand-written digits (8×8, 17 grey levels) that scikit-learn ships. The two
models are small, but have what large ones have:

- `digits_cnn.onnx`: residual blocks, one with a strided projection; a depthwise-separable
  convolution; BatchNormalization that is *not* folded into the convolutions. TorchScript exporter.
- `digits_transformer.onnx`: 2×2 patches, learned positions, two pre-norm blocks with fused
  query-key-value projections, mean pooling. Dynamo exporter.

They are trained to be cut: a group lasso presses channels and heads towards zero, and the
transformer learns to do without any one head. Networks trained without such care lose much more
when nothing is refitted after the cut.

Seeds are fixed and one thread does the work, so a second run on the same machine and versions
writes the same files. It takes about a minute.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections import Counter

import numpy as np
import onnx
import torch
from evaluate import accuracy
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

HERE = pathlib.Path(__file__).parent
SEED = 20
HELD_OUT = 450
CALIBRATION = 512
CLASSES = 10
SIZE = 8  # images are SIZE × SIZE
LEVELS = 16.0  # pixels are 0, 1, …, 16


Slices = list[tuple[Tensor, int]]
"""Weights, each with the axis along which they are cut: index i of all of them goes together."""


class ConvNorm(nn.Sequential):
    """A convolution without bias, then BatchNormalization."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs)

    def made(self) -> Slices:
        """What goes with an output channel."""
        return [(self.conv.weight, 0), (self.norm.weight, 0), (self.norm.bias, 0)]

    def read(self) -> Slices:
        """What goes with an input channel."""
        return [(self.conv.weight, 1)]


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = ConvNorm(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, inputs, H, W] to [batch, outputs, H / stride, W / stride]."""
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(y + self.shortcut(x))


class Cnn(nn.Module):
    """Stem, residual block, strided residual block, depthwise-separable convolution, head."""

    def __init__(self, narrow: int = 16, middle: int = 32, wide: int = 64):
        super().__init__()
        self.stem = ConvNorm(1, narrow, 3)
        self.same = Residual(narrow, narrow)
        self.down = Residual(narrow, middle, stride=2)
        self.depthwise = ConvNorm(middle, middle, 3, groups=middle)
        self.pointwise = ConvNorm(middle, wide, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(wide, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [batch, 1, 8, 8] to logits [batch, 10]."""
        x = functional.relu(self.stem(x))
        x = self.down(self.same(x))
        x = functional.relu(self.depthwise(x))
        x = functional.relu(self.pointwise(x))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits

    def coupled(self) -> list[Slices]:
        """Groups of slices that can only be removed together."""
        same, down = self.same, self.down
        return [
            self.stem.made()
            + same.second.made()
            + same.first.read()
            + down.first.read()
            + down.shortcut.read(),
            same.first.made() + same.second.read(),
            down.first.made() + down.second.read(),
            down.second.made()
            + down.shortcut.made()
            + self.depthwise.made()
            + self.pointwise.read(),
            [*self.pointwise.made(), (self.head.weight, 1)],
        ]


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, drop: float = 0.25):
        super().__init__()
        self.heads = heads
        self.drop = drop
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = functional.dropout2d(mixed, self.drop, self.training)  # whole heads
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return y

    def coupled(self) -> Slices:
        """What goes with a head."""
        split = (3, self.heads, -1)
        return [
            (self.qkv.weight.unflatten(0, split), 1),
            (self.qkv.bias.unflatten(0, split), 1),
            (self.out.weight.unflatten(1, split[1:]), 1),
        ]


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a GELU perceptron, each beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, tokens, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return y

    def coupled(self) -> list[Slices]:
        """What goes with a head, and with a hidden channel."""
        hidden = [(self.up.weight, 0), (self.up.bias, 0), (self.down.weight, 1)]
        return [self.attention.coupled(), hidden]


class Transformer(nn.Module):
    """A vision transformer on 2×2 patches: 16 tokens."""

    def __init__(self, width: int = 48, heads: int = 4, hidden: int = 96, depth: int = 2):
        super().__init__()
        patch = 2
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [batch, 1, 8, 8] to logits [batch, 10]."""
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        x = self.blocks(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits

    def coupled(self) -> list[Slices]:
        """Groups of slices that can only be removed together.

        The residual stream, whose width every LayerNormalization measures, is left out.
        """
        return [group for block in self.blocks for group in block.coupled()]


def prepare() -> tuple[Tensor, Tensor]:
    """Splits the data, writes `heldout.npz` and `calibration.npz`, and returns the training part.

    Returns:
        Images [n, 1, 8, 8] in [0, 1], and their labels [n].
    """
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 1, SIZE, SIZE) / LEVELS).astype(np.float32)
    train_x, held_x, train_y, held_y = train_test_split(
        images, labels.astype(np.int64), test_size=HELD_OUT, stratify=labels, random_state=SEED
    )
    np.savez_compressed(HERE / "heldout.npz", input=held_x, label=held_y)
    np.savez_compressed(HERE / "calibration.npz", input=train_x[:CALIBRATION])
    return torch.from_numpy(train_x), torch.from_numpy(train_y)


def shifted(images: Tensor) -> Tensor:
    """The images, each moved by up to one pixel in each direction."""
    padded = functional.pad(images, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(images), 2)).tolist()
    return torch.stack([padded[i, :, r : r + SIZE, c : c + SIZE] for i, (r, c) in enumerate(moves)])


def sparsity(groups: list[Slices]) -> Tensor:
    """The group lasso: the norms of all that can only be removed together, weighted by size.

    It presses whole channels and heads towards zero, so that the trained model has some to spare.
    """
    total = torch.zeros(())
    for slices in groups:
        parts = [weight.movedim(axis, 0).reshape(weight.shape[axis], -1) for weight, axis in slices]
        units = torch.cat(parts, dim=1)
        total = total + math.sqrt(units.shape[1]) * (units.square().sum(dim=1) + 1e-8).sqrt().sum()
    return total


def fit(
    model: Cnn | Transformer,
    images: Tensor,
    labels: Tensor,
    *,
    rate: float,
    penalty: float,
    shift: bool,
) -> None:
    """Trains with AdamW, a warm-up and a cosine decay, and leaves the model in eval mode."""
    batch = 64
    epochs = 60
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for chosen in order[: len(order) // batch * batch].split(batch):
            logits = model(shifted(images[chosen]) if shift else images[chosen])
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            loss = loss + penalty * sparsity(model.coupled())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def export_unfused(model: nn.Module) -> onnx.ModelProto:
    """Exports with TorchScript, so that every BatchNormalization stays a node of its own.

    `PRESERVE` leaves the modules in eval mode but switches off the exporter's own folding of
    BatchNormalization into the convolution before it.
    """
    file = io.BytesIO()
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, SIZE, SIZE),),
        file,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )
    return onnx.load_from_string(file.getvalue())


def export_dynamo(model: nn.Module) -> onnx.ModelProto:
    """Exports with the dynamo exporter."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, SIZE, SIZE),),
        dynamo=True,
        opset_version=20,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def save(model: onnx.ModelProto, name: str) -> None:
    """Writes a model without the exporter's notes (they quote source paths), and describes it."""
    for holder in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
        *model.graph.initializer,
    ):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    names = [node.name for node in model.graph.node]
    assert all(names) and len(set(names)) == len(names), "node names must be unique"
    onnx.checker.check_model(model, full_check=True)
    path = HERE / name
    onnx.save(model, path)
    operators = Counter(node.op_type for node in model.graph.node)
    print(f"{name}: {accuracy(path):.2%} of the held-out images, {path.stat().st_size} bytes")
    print("  " + ", ".join(f"{count} {kind}" for kind, count in sorted(operators.items())))


def main() -> None:
    """Writes the data and both models."""
    torch.set_num_threads(1)
    images, labels = prepare()

    torch.manual_seed(SEED)
    cnn = Cnn()
    fit(cnn, images, labels, rate=4e-3, penalty=1e-3, shift=True)
    save(export_unfused(cnn), "digits_cnn.onnx")

    torch.manual_seed(SEED)
    transformer = Transformer()
    fit(transformer, images, labels, rate=2e-3, penalty=2e-4, shift=False)
    save(export_dynamo(transformer), "digits_transformer.onnx")


if __name__ == "__main__":
    main()
