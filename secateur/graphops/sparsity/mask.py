"""Which entries of a weight matrix stay under a pattern, by one score per entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.sparsity import Pattern

Matrix = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]


def block_scores(scores: Matrix, pattern: Pattern) -> Matrix:
    """Scores of the pattern's blocks: sums; blocks at the far edges may be smaller.

    Args:
        scores: (out, k).
        pattern: of blocks, 1 × 1 for single weights.
    """
    if pattern.rows == pattern.columns == 1:
        return scores
    out, entries = scores.shape
    sums: Matrix = np.add.reduceat(scores, np.arange(0, out, pattern.rows), axis=0)
    return np.add.reduceat(sums, np.arange(0, entries, pattern.columns), axis=1)


def quota(blocks: int, share: float) -> int:
    """How many of so many blocks go: at least the share, and never all."""
    return min(math.ceil(share * blocks - 1e-9), blocks - 1)


def lowest(line: Matrix, count: int) -> Mask:
    """Marks the `count` lowest of a line; of equals, those that come first."""
    if not count:
        return np.zeros(line.size, np.bool_)
    limit = np.partition(line, count - 1)[count - 1]
    marked: Mask = line < limit
    marked[np.flatnonzero(line == limit)[: count - int(marked.sum())]] = True
    return marked


def keep_blocks(scores: Matrix, pattern: Pattern, gone: int, by_row: bool = False) -> Mask:
    """Which entries stay when the blocks with the lowest scores go.

    Args:
        scores: (out, k), of entries.
        pattern: of blocks.
        gone: how many blocks go; with `by_row` of each row of blocks.
        by_row: rank within rows of blocks.
    """
    sums = block_scores(scores, pattern)
    lines = sums if by_row else sums.reshape(1, -1)
    stays = ~np.stack([lowest(line, gone) for line in lines])
    stays = stays.reshape(sums.shape)
    if stays.shape == scores.shape:
        return stays
    tall = np.repeat(stays, pattern.rows, axis=0)[: scores.shape[0]]
    return np.repeat(tall, pattern.columns, axis=1)[:, : scores.shape[1]]


def keep_runs(scores: Matrix, pattern: Pattern) -> Mask:
    """Which entries stay when each run of consecutive entries keeps its best few.

    Args:
        scores: (out, k), k a multiple of the run.
        pattern: N:M.
    """
    runs = scores.reshape(scores.shape[0], -1, pattern.run)
    order = np.argsort(-runs, axis=2, kind="stable")
    stays = np.zeros(runs.shape, np.bool_)
    np.put_along_axis(stays, order[:, :, : pattern.kept], True, axis=2)
    return stays.reshape(scores.shape)
