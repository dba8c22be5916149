"""Repair without data: the mean of what went moves into the biases of those that read it.

    b ← b + W_gone · E[x_gone]        E[x] = E[f(β + |γ|·z)], z standard normal

In training, what a BatchNormalization put out had mean β and standard deviation |γ| in every
channel. Where x comes from there by operators f that work position by position, its mean is
known: for Relu |γ|·φ(β/|γ|) + β·Φ(β/|γ|) (Nagel et al.: Data-Free Quantization, ICCV 2019; for
γ = 0 Ye et al.: Rethinking the Smaller-Norm-Less-Informative Assumption, ICLR 2018). For any f it
is the mean of f over evenly likely values of z, run in ONNX Runtime. Several BatchNormalizations
that meet (in residual sums) are drawn as if they were independent. Zeros that pad an image have
another mean: at its border the biases give a little too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.special

from secateur.errors import Refused
from secateur.graphops import rules
from secateur.graphops.calibration.moments import linear_maps, weight_of
from secateur.graphops.calibration.network import Network
from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model.graph import constant_of, node_label
from secateur.graphops.repair.target import Target
from secateur.graphops.rules.linear import LinearMap
from secateur.graphops.rules.registry import Rule
from secateur.report import Folded

Mask = npt.NDArray[np.bool_]
Vector = npt.NDArray[np.float64]

_DRAWS = 2048  # values of z
# What leaves the mean of a channel what it is, whatever it does to positions.
_MEAN_STAYS = (
    *("GlobalAveragePool", "AveragePool", "ReduceMean"),
    *("Flatten", "Reshape", "Squeeze", "Identity", "Dropout"),
)
_SCALE, _SHIFT = 1, 2  # inputs of a BatchNormalization
_PER_POSITION = ("unary", "broadcast")  # families


def fold(
    original: ir.Model, coupling: Coupling, pruned: ir.Model, keep: Mask, seed: int
) -> tuple[Folded, ...]:
    """Folds the means of what went, where they are known, into the biases of matrix products.

    Args:
        original: with its statistics.
        coupling: of the original.
        pruned: cut from it; its biases are changed.
        keep: per unit whether it stays.
        seed: of the draws.

    Returns:
        one entry per product that lost channels, also where no mean is known.
    """
    means = Means(original, coupling, seed)
    wholes = {str(v.node.outputs[0].name): v for v in linear_maps(original, coupling.shapes)}
    places = {node: place for place, node in enumerate(pruned.graph)}
    found = []
    for view in list(linear_maps(pruned, coupling.shapes)):
        whole = wholes.get(str(view.node.outputs[0].name))
        line = None if whole is None else _line(whole, coupling)
        if whole is None or line is None or keep[line].all() or view.groups != whole.groups:
            continue
        target, gone, known = Target.of(view, places), int((~keep[line]).sum()), 0
        biased = target is not None and target.end.biased
        mean = means.along(whole, line) if biased else None
        if mean is not None and target is not None:
            shift = _shift(whole, coupling, keep, line, mean)
            start = target.end.numbers()
            bias = shift if start is None else start + shift
            tensor = constant_of(view.node.inputs[view.weight])
            assert tensor is not None
            target.end.write_bias(pruned.graph, view.node, view.bias, bias, tensor.dtype)
            known = gone
        found.append(Folded(node=node_label(view.node), channels=gone, folded=known))
    return tuple(found)


def _line(view: LinearMap, coupling: Coupling) -> npt.NDArray[np.int32] | None:
    x = view.node.inputs[0]
    return coupling.axes(str(x.name if x is not None else "")).get(view.x_axis)


def _shift(
    whole: LinearMap,
    coupling: Coupling,
    keep: Mask,
    line: npt.NDArray[np.int32],
    mean: Vector,
) -> Vector:
    """W_gone · E[x_gone] of the outputs that stay, flat."""
    entries = whole.channels(line.size)  # (groups, k)
    lost = np.where(keep[line[entries]], 0.0, mean[entries])
    shift = np.einsum("gok,gk->go", weight_of(whole), lost).reshape(-1)
    outputs = coupling.axes(str(whole.node.outputs[0].name)).get(whole.y_axis)
    stay: Vector = shift if outputs is None else shift[keep[outputs]]
    return stay


@dataclass(slots=True)
class Means:
    """Means of channels, as far as statistics of BatchNormalizations tell them.

    Attributes:
        model, coupling: the original.
        seed: of the draws.
    """

    model: ir.Model
    coupling: Coupling
    seed: int
    _known: dict[str, Vector | None] = field(default_factory=dict)

    def along(self, view: LinearMap, line: npt.NDArray[np.int32]) -> Vector | None:
        """Of each position of the axis that a product sums over; None where they are not known.

        Args:
            view: the product.
            line: unit of each of those positions.
        """
        value = view.node.inputs[0]
        while (producer := value.producer() if value is not None else None) is not None:
            if producer.op_type not in _MEAN_STAYS or producer.domain != "":
                break
            value = producer.inputs[0]
        if value is None:
            return None
        name = str(value.name)
        units = self.coupling.axes(name).get(1)
        if units is None or line.size % units.size:
            return None
        each = line.size // units.size  # positions that a channel was spread over
        if not np.array_equal(np.repeat(units, each), line):
            return None
        if name not in self._known:
            self._known[name] = self._of(value)
        known = self._known[name]
        return None if known is None or known.size != units.size else np.repeat(known, each)

    def _of(self, value: ir.Value) -> Vector | None:
        """Of the channels along axis 1."""
        sources = self._sources(value)
        if not sources:
            return None
        draw = np.random.default_rng(self.seed)
        feeds = {name: _normal(node, rank, draw) for name, (node, rank) in sources.items()}
        try:
            piece = Network(self.model, [feeds]).piece([str(value.name)])
            found = piece.run(0)[str(value.name)].astype(np.float64)
        except Refused:  # a constant of the size of the image is in the way
            return None
        mean: Vector = np.moveaxis(found, 1, -1).reshape(-1, found.shape[1]).mean(axis=0)
        return mean if np.isfinite(mean).all() else None

    def _sources(self, value: ir.Value) -> Mapping[str, tuple[ir.Node, int]]:
        """The BatchNormalizations that decide a value, with their ranks; none if others do too."""
        found: dict[str, tuple[ir.Node, int]] = {}
        stack, seen = [value], set[str]()
        while stack:
            name = str((value := stack.pop()).name)
            if name in seen or constant_of(value) is not None:
                continue
            seen.add(name)
            node = value.producer()
            rule = None if node is None else self._rule(node)
            shape = self.coupling.shapes.of(name)
            if node is None or rule is None or shape is None:
                return {}
            if "variance" in rule.roles.values() and len(node.outputs) == 1:
                if any(constant_of(node.inputs[at]) is None for at in (_SCALE, _SHIFT)):
                    return {}
                found[name] = (node, len(shape))
            elif rule.family in _PER_POSITION:
                stack += [one for one in node.inputs if one is not None]
            else:
                return {}
        return found

    def _rule(self, node: ir.Node) -> Rule | None:
        return rules.of(node, self.model.opset_imports)


def _normal(node: ir.Node, rank: int, draw: np.random.Generator) -> npt.NDArray[np.floating]:
    """What a BatchNormalization puts out: (draws, channels, 1 …), each in an order of its own.

    Its channels share that order: nothing on the way to the mean brings two of them together.
    """
    scale, shift = (constant_of(node.inputs[at]) for at in (_SCALE, _SHIFT))
    assert scale is not None and shift is not None
    spread, centre = (t.numpy().astype(np.float64) for t in (scale, shift))
    z = draw.permutation(scipy.special.ndtri((np.arange(_DRAWS) + 0.5) / _DRAWS))
    values = centre + np.abs(spread) * z[:, None]
    shaped: npt.NDArray[np.floating] = values.reshape(*values.shape, *[1] * (rank - 2))
    return shaped.astype(scale.dtype.numpy())
