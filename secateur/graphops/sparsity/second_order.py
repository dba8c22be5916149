"""Second-order removal of weights, one column after another.

With H = E[x xᵀ] + λ, removing w_ij and updating the rest of its row costs w_ij² / [H⁻¹]_jj, where H
is that of the columns not yet passed; the update spreads the error over them:

    w_i,j: ← w_i,j: − (w_ij / U_jj) U_j,j:          UᵀU = H⁻¹, U upper triangular

Row j of U is what H⁻¹ of the columns from j on says of column j, so that one factorisation serves
all columns and rows. Which weights go is decided for a stretch of columns at a time, on the weights
as they are by then (Hassibi, Stork: Optimal Brain Surgeon, 1993; Frantar, Alistarh: Optimal Brain
Compression, NeurIPS 2022, and SparseGPT, ICML 2023, algorithm 1).

A column can spread its error only over those after it. Where the work allows, the weights S that
stay in each row are therefore fitted over all of them, w_S = (w H)_S [H_SS]⁻¹, for the sweep's
choice and for that by magnitude, and the better one is taken.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.linalg

from secateur.graphops.sparsity.mask import block_scores, keep_blocks, keep_runs
from secateur.sparsity import Pattern

Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_DAMPING = 1e-2  # of the mean of H's diagonal, as SparseGPT
_TINY = 1e-12  # where nothing is read
_COLUMNS = 128  # whose masks are chosen together
_WORK = 2e10  # multiply-accumulates of a refit: a few seconds on one core


def damp(hessian: Matrix) -> Matrix:
    """H + λ, shape (k, k)."""
    damped = hessian.copy()
    damped[np.diag_indices_from(damped)] += _DAMPING * max(float(np.diag(damped).mean()), _TINY)
    return damped


def saliency(weight: Matrix, hessian: Matrix) -> Matrix:
    """What each weight alone would cost, shape (out, k): w² / [H⁻¹]_jj."""
    cost: Matrix = weight**2 / np.diag(np.linalg.inv(damp(hessian)))
    return cost


def remove(weight: Matrix, hessian: Matrix, pattern: Pattern, gone: int) -> Matrix:
    """The matrix without the weights that cost least, the others updated.

    Args:
        weight: (out, k).
        hessian: E[x xᵀ], (k, k).
        pattern: what goes together.
        gone: how many blocks go; not looked at for N:M.
    """
    damped = damp(hessian)
    swept = sweep(weight, damped, pattern, gone)
    plain = weight**2
    masks = [
        swept != 0,
        keep_runs(plain, pattern) if pattern.run else keep_blocks(plain, pattern, gone),
    ]
    if sum(float((mask.sum(axis=1) ** 3.0).sum()) for mask in masks) / 3 > _WORK:
        return swept
    results = [refit(weight, damped, mask) for mask in masks]
    return min(results, key=lambda result: loss(weight - result, damped))


def loss(change: Matrix, hessian: Matrix) -> float:
    """E‖ΔW x‖²."""
    return float(np.einsum("oi,oi->", change @ hessian, change))


def refit(weight: Matrix, hessian: Matrix, stays: Mask) -> Matrix:
    """The best weights where only those in `stays` may differ from zero."""
    wanted = weight @ hessian
    result = np.zeros_like(weight)
    for row, kept in enumerate(stays):
        places = np.flatnonzero(kept)
        block = hessian[np.ix_(places, places)]
        result[row, places] = scipy.linalg.solve(block, wanted[row, places], assume_a="pos")
    return result


def sweep(weight: Matrix, hessian: Matrix, pattern: Pattern, gone: int) -> Matrix:
    """One pass over the columns; arguments as `remove`, H damped."""
    factor = scipy.linalg.cholesky(np.linalg.inv(hessian), lower=False)
    weight = weight.copy()
    entries = weight.shape[1]
    every = pattern.run or pattern.columns
    stretch = every * max(1, _COLUMNS // every)
    total = block_scores(weight, pattern).size
    passed = taken = 0
    for start in range(0, entries, stretch):
        stop = min(start + stretch, entries)
        if not pattern.run:
            passed += math.ceil(len(weight) / pattern.rows) * math.ceil(
                (stop - start) / pattern.columns
            )
            due = gone * passed // total - taken
            taken += due
            scores = weight[:, start:stop] ** 2 / np.diag(factor)[start:stop] ** 2
            stays = keep_blocks(scores, pattern, due)
        errors = np.zeros((len(weight), stop - start))
        for column in range(start, stop):
            place = column - start
            if pattern.run and place % pattern.run == 0:
                run = slice(column, column + pattern.run)
                stays = keep_runs(weight[:, run] ** 2 / np.diag(factor)[run] ** 2, pattern)
            chosen = stays[:, place % pattern.run if pattern.run else place]
            errors[:, place] = np.where(chosen, 0, weight[:, column]) / factor[column, column]
            weight[:, column:stop] -= np.outer(errors[:, place], factor[column, column:stop])
            weight[~chosen, column] = 0
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight
