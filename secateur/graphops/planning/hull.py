"""What gives up least for what it saves: the lower convex hull of a curve of drift.

The Lagrangian solution where costs are fixed (Shoham, Gersho: Efficient Bit Allocation, 1988).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_LOST = 0.9999  # drift saturates at 1, where nothing of the output is left; beyond this all is lost


def additive(drift: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """-ln(1 - drift): what adds up where several things drift."""
    return np.asarray(-np.log1p(-np.minimum(drift, _LOST)))


def lower_hull(
    saved: npt.NDArray[np.float64], drift: npt.NDArray[np.float64]
) -> Iterator[tuple[int, float]]:
    """The corners of a curve's lower convex hull after its first point.

    Args:
        saved: of each point of the curve, ascending.
        drift: of each.

    Yields:
        (point, drift per saved on the way to it), that no less than 0.
    """
    at = 0
    while at < saved.size - 1:
        slopes = (drift[at + 1 :] - drift[at]) / np.maximum(saved[at + 1 :] - saved[at], 1e-12)
        best = int(np.argmin(slopes))
        at += 1 + best
        yield at, max(float(slopes[best]), 0.0)
