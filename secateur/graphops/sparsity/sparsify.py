"""Goes through a model's weight matrices and takes single weights out, as the recipe says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration.data import Feeds
from secateur.graphops.calibration.moments import (
    WIDEST,
    collect,
    linear_maps,
    tensor_of,
    weight_of,
    width,
)
from secateur.graphops.calibration.network import Network
from secateur.graphops.criteria.lamp import shares
from secateur.graphops.model.graph import node_label
from secateur.graphops.model.names import matching
from secateur.graphops.model.shapes import Shapes
from secateur.graphops.repair.constants import replace_constant
from secateur.graphops.rules.linear import LinearMap
from secateur.graphops.sparsity import second_order
from secateur.graphops.sparsity.mask import block_scores, keep_blocks, keep_runs, lowest, quota
from secateur.recipe import Recipe
from secateur.report import SparseWeight
from secateur.sparsity import Pattern

Matrix = npt.NDArray[np.floating[Any]]


def sparsify(
    model: ir.Model,
    shapes: Shapes,
    recipe: Recipe,
    batches: Sequence[Feeds],
    tell: Callable[[float], None] = lambda share: None,
) -> tuple[SparseWeight, ...]:
    """Makes single weights zero, layer by layer in graph order.

    With calibration data each layer sees what the part before it, already sparse, feeds it.

    Args:
        model: its weights are changed.
        shapes: of the model it was cut from; ranks are the same.
        recipe: settled; what it says of sparsity, scope and what to ignore.
        batches: calibration data; none for magnitude.
        tell: told the share that is done.

    Returns:
        one entry per weight matrix, those that were left alone too.

    Raises:
        Refused: `NOTHING_TO_PRUNE` when no weight matrix can lose weights.
    """
    assert recipe.sparsity is not None
    layers = [
        _Layer.of(view, Pattern.parse(recipe.sparsity), recipe)
        for view in linear_maps(model, shapes)
    ]
    open_ones = [layer for layer in layers if not layer.dense]
    if not open_ones:
        raise refuse(
            Code.NOTHING_TO_PRUNE,
            "no weight matrix can lose single weights",
            nodes=tuple(node_label(layer.view.node) for layer in layers[:5]),
            expected=f"one that {recipe.sparsity} fits",
            found=f"{len(layers)} matrices: {layers[0].dense}" if layers else "no matrix product",
        )
    quotas: Mapping[str, int] = {}
    if recipe.scope == "global" and not open_ones[0].pattern.run:
        network = Network(model, batches) if batches else None
        quotas = _shared_out([(layer, layer.scores(network, recipe.seed)) for layer in open_ones])
    network = Network(model, batches) if batches else None
    found = []
    for place, layer in enumerate(layers):
        found.append(layer.run(model.graph, network, recipe.seed, quotas.get(place_of(layer))))
        tell((place + 1) / len(layers))
    return tuple(found)


def place_of(layer: _Layer) -> str:
    """What tells a layer from the others: the name of its node's output."""
    return str(layer.view.node.outputs[0].name)


def _shared_out(scored: Sequence[tuple[_Layer, Matrix]]) -> Mapping[str, int]:
    """How many blocks of each layer go under one threshold for all of them.

    A score counts as its share of what scores as much or more in its layer, as in `criteria.lamp`:
    small layers, of which each weight is a larger part, keep more. The best block of each layer
    stays.
    """
    lines = []
    for _, scores in scored:
        line = shares(np.sort(scores.reshape(-1))[::-1])[::-1]
        line[-1] = np.inf
        lines.append(line)
    everything = np.concatenate(lines)
    owner = np.repeat(np.arange(len(lines)), [line.size for line in lines])
    share = scored[0][0].pattern.share
    wanted = min(math.ceil(share * everything.size - 1e-9), everything.size - len(lines))
    gone = np.bincount(owner[np.argsort(everything, kind="stable")[:wanted]], minlength=len(lines))
    return {place_of(layer): int(count) for (layer, _), count in zip(scored, gone, strict=True)}


@dataclass(frozen=True, slots=True)
class _Layer:
    """One weight matrix.

    Attributes:
        view: the node that reads it.
        pattern: of what goes.
        criterion: by which; magnitude where the matrix is too wide for second moments.
        by_row: whether weights are ranked among those of their output.
        dense: why it is left alone; empty where it is not.
    """

    view: LinearMap
    pattern: Pattern
    criterion: str
    by_row: bool
    dense: str

    @classmethod
    def of(cls, view: LinearMap, pattern: Pattern, recipe: Recipe) -> _Layer:
        criterion = recipe.weight_criterion or "magnitude"
        if width(view) > WIDEST:
            criterion = "magnitude"
        by_row = criterion == "wanda" and recipe.scope != "global"
        layer = cls(view, pattern, criterion, by_row, "")
        return replace(layer, dense=layer._reason(recipe.ignore))

    def _reason(self, ignore: Sequence[str]) -> str:
        """Why no weight may go, empty where some may."""
        value = self.view.node.inputs[self.view.weight]
        assert value is not None
        names = [str(value.name), self.view.node.name or ""]
        glob = matching(ignore, names)
        if glob is not None:
            return f"matches --ignore {glob!r}"
        if len(value.uses()) > 1:
            return f"{len(value.uses())} nodes read it"
        entries = width(self.view)
        if self.pattern.run:
            channels = entries // math.prod(getattr(self.view, "kernel", ()))
            if channels % self.pattern.run:
                return f"{channels} input channels are no multiple of {self.pattern.run}"
        return ""

    def run(
        self, graph: ir.Graph, network: Network | None, seed: int, gone: int | None
    ) -> SparseWeight:
        """Takes the weights out.

        Args:
            graph: that the node is in.
            network: the model on calibration data, if there are any.
            seed: of the positions that are sampled.
            gone: how many blocks go; the pattern's share of them when None.
        """
        weight = self._weight()
        error = None
        result = weight
        if not self.dense:
            hessians = self._hessians(network, seed)
            result = self._without(weight, hessians, gone)
            if hessians is not None:
                error = _relative(weight, result, hessians)
            old = tensor_of(self.view)
            assert old is not None
            array = self.view.tensor(result, old.shape.numpy()) + 0.0  # no negative zeros
            name = f"{place_of(self)}_weight"
            replace_constant(graph, self.view.node, self.view.weight, array, old.dtype, name)
        return SparseWeight(
            node=node_label(self.view.node),
            tensor=str(self.view.node.inputs[self.view.weight].name),  # type: ignore[union-attr]
            criterion="" if self.dense else self.criterion,
            density=float(np.count_nonzero(result) / result.size),
            error=error,
            dense=self.dense,
        )

    def scores(self, network: Network | None, seed: int) -> Matrix:
        """Scores of the blocks of the whole matrix, in one dimension."""
        weight = self._weight()
        scores = self._scores(weight, self._hessians(network, seed))
        return np.concatenate([block_scores(part, self.pattern).reshape(-1) for part in scores])

    def _weight(self) -> Matrix:
        """W (groups, out, k), in float64 only where weights are updated: matrices may be large."""
        tensor = tensor_of(self.view)
        if self.criterion == "second_order" or tensor is None:
            return weight_of(self.view)
        array = self.view.matrix(tensor.numpy())
        return array.astype(np.result_type(array, np.float32), copy=False)

    def _hessians(self, network: Network | None, seed: int) -> Matrix | None:
        """E[x xᵀ], (groups, k, k)."""
        if network is None or width(self.view) > WIDEST:
            return None
        return collect(network, [self.view], seed)[place_of(self)].about_zero()

    def _scores(self, weight: Matrix, hessians: Matrix | None) -> Matrix:
        """One score per entry, (groups, out, k).

        Wanda's is |w_ij| ‖x_j‖ (Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach
        for Large Language Models, ICLR 2024); here and for magnitude squared, so that those of a
        block add up.
        """
        if hessians is None or self.criterion == "magnitude":
            return weight**2
        if self.criterion == "wanda":
            return weight**2 * np.diagonal(hessians, axis1=1, axis2=2)[:, None, :]
        pairs = zip(weight, hessians, strict=True)
        return np.stack([second_order.saliency(*pair) for pair in pairs])

    def _without(self, weight: Matrix, hessians: Matrix | None, gone: int | None) -> Matrix:
        """The matrix, (groups, out, k), without what goes."""
        if self.criterion == "second_order" and hessians is not None:
            counts = self._counts(self._scores(weight, hessians), gone)
            return np.stack(
                [
                    second_order.remove(part, hessian, self.pattern, count)
                    for part, hessian, count in zip(weight, hessians, counts, strict=True)
                ]
            )
        scores = self._scores(weight, hessians)
        if self.pattern.run:
            return np.where([keep_runs(part, self.pattern) for part in scores], weight, 0)
        if self.by_row:
            share = quota(block_scores(scores[0], self.pattern).shape[1], self.pattern.share)
            kept = [keep_blocks(part, self.pattern, share, by_row=True) for part in scores]
            return np.where(kept, weight, 0)
        counts = self._counts(scores, gone)
        kept = [
            keep_blocks(part, self.pattern, count)
            for part, count in zip(scores, counts, strict=True)
        ]
        return np.where(kept, weight, 0)

    def _counts(self, scores: Matrix, gone: int | None) -> list[int]:
        """How many blocks of each group of a convolution go: those that score least in all."""
        blocks = [block_scores(part, self.pattern).reshape(-1) for part in scores]
        if self.pattern.run:
            return [0] * len(blocks)
        total = sum(block.size for block in blocks)
        gone = quota(total, self.pattern.share) if gone is None else gone
        if len(blocks) == 1:
            return [gone]
        owner = np.repeat(np.arange(len(blocks)), [block.size for block in blocks])
        going = lowest(np.concatenate(blocks), gone)
        return [int(count) for count in np.bincount(owner[going], minlength=len(blocks))]


def _relative(before: Matrix, after: Matrix, hessians: Matrix) -> float:
    """E‖(W − W′)x‖² / E‖W x‖²."""
    lost, whole = (
        float(np.einsum("goi,goi->", np.matmul(part, hessians), part))
        for part in (before - after, before)
    )
    return max(lost, 0.0) / max(whole, 1e-30)
