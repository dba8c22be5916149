"""The basis of a stream in which fewest channels are needed, by what its readers make of them.

    H = Σ over readers of Vᵀ·G·V        S = Cov(x), the mean over readers

V is a reader's weight and G = diag(g) how much the model's outputs depend on each of its channels
(`calibration.curvature`). What readers lose when x becomes P·x is tr (x − Px)ᵀ H (x − Px), and the
P of rank r that loses least, with bias to take over the mean, comes from the eigenvectors of

    H^½·S·H^½ = U·Λ·Uᵀ        T = D⁻¹·Uᵀ·H^½        T⁻¹ = H^-½·U·D

as does reduced-rank regression (Izenman, 1975). D gives every channel of T·x the variance 1: they
do not vary together, fall in importance, and dropping the last ones loses the sum of their λ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from secateur.graphops.calibration.moments import Moments, weight_of
from secateur.graphops.rotation.streams import Stream
from secateur.graphops.rules.linear import LinearMap

Matrix = npt.NDArray[np.float64]

_DAMPING = 1e-4  # of the mean of H's diagonal: directions that no reader reads
_FLAT = 1e-4  # of the largest deviation: below it a channel is not scaled up any more


@dataclass(frozen=True, slots=True)
class Rotation:
    """A stream, and what its channels become.

    Attributes:
        stream: of the model that was observed.
        there, back: T and T⁻¹, (channels, channels).
        shares: what readers would lose without each channel of T·x, relative to all of it.
    """

    stream: Stream
    there: Matrix
    back: Matrix
    shares: Matrix


def rotation(
    stream: Stream, moments: Mapping[str, Moments], curvature: Mapping[str, Matrix]
) -> Rotation:
    """The basis of a stream.

    Args:
        stream: one.
        moments: of what each reader reads, by the name of its output.
        curvature: g by the name of a reader's output; all alike where one has none.
    """
    names = {str(view.node.outputs[0].name): view for view in stream.readers}
    derived = all(name in curvature for name in names)
    read, spread = (
        sum(found) / len(names)
        for found in zip(
            *(
                (_reads(view, curvature[name] if derived else None), _spread(view, moments[name]))
                for name, view in names.items()
            ),
            strict=True,
        )
    )
    variance = _mean(spread)
    read, spread = read / _mean(read), spread / variance  # of whatever units, of the size of 1
    values, vectors = scipy.linalg.eigh(read + _DAMPING * np.eye(len(read)))
    root, unroot = ((vectors * scale) @ vectors.T for scale in (values**0.5, values**-0.5))
    losses, turn = scipy.linalg.eigh(root @ spread @ root)
    losses, turn = np.maximum(losses[::-1], 0.0), turn[:, ::-1]
    there, back = turn.T @ root, unroot @ turn
    deviation = np.sqrt(variance * np.maximum(losses, _FLAT**2 * (losses[0] or 1.0)))
    return Rotation(
        stream, there / deviation[:, None], back * deviation, losses / (losses.sum() or 1.0)
    )


def _mean(squares: Matrix) -> float:
    """Of the diagonal; 1 where nothing is read, or nothing varies."""
    return float(np.trace(squares)) / len(squares) or 1.0


def _reads(view: LinearMap, curvature: Matrix | None) -> Matrix:
    """Vᵀ·G·V, summed over the positions of a kernel."""
    weight = weight_of(view)[0]
    if curvature is not None:
        weight = weight * np.sqrt(curvature)[:, None]
    found: Matrix = np.einsum("oki,okj->ij", *(2 * [by_channel(view, weight)]), optimize=True)
    return found


def _spread(view: LinearMap, moments: Moments) -> Matrix:
    """Cov(x), the mean over the positions of a kernel."""
    kernel = _kernel(view)
    covariance = moments.covariance()[0]
    channels = len(covariance) // kernel
    blocks = covariance.reshape(kernel, channels, kernel, channels)
    found: Matrix = np.einsum("kikj->ij", blocks) / kernel
    return found


def by_channel(view: LinearMap, weight: Matrix) -> Matrix:
    """(out, k) as (out, kernel, channel)."""
    return weight.reshape(len(weight), _kernel(view), -1)


def _kernel(view: LinearMap) -> int:
    return math.prod(getattr(view, "kernel", ()))
