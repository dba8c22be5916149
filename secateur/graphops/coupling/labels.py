"""The abstract value of a tensor: which labels lie along its axes.

A label is an integer that stands for one prunable position. A `Block` is an array of labels
over one or more axes of a tensor; axes in no block are *bare*: nothing along them can be cut.
Label 0 inside a block marks single positions that cannot be cut.

Movement is the same NumPy operation on the labels: nothing here computes an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int32]

_T = TypeVar("_T", bound=np.generic)

FIXED = 0  # the label of positions that cannot be cut


@dataclass(frozen=True, slots=True)
class Block:
    """Labels over some axes of a tensor.

    Attributes:
        axes: ascending.
        labels: shaped like those axes, in that order. More than one axis: a *joint* block,
            whose labels are not a product of labels along each axis (heads × head size).
    """

    axes: tuple[int, ...]
    labels: Labels


Blocks = tuple[Block, ...]
BARE: Blocks = ()


def single(axis: int, labels: Labels) -> Blocks:
    """One block over one axis; bare if nothing in it can be cut."""
    return (Block((axis,), labels),) if labels.any() else BARE


def rows_along(array: npt.NDArray[_T], place: int) -> npt.NDArray[_T]:
    """What lies at each position of an axis, flat: (size of the axis, sizes of the others)."""
    return np.moveaxis(array, place, 0).reshape(array.shape[place], -1)


def transpose(blocks: Blocks, perm: Sequence[int]) -> Blocks:
    """Blocks after `numpy.transpose(x, perm)`."""
    target = {source: axis for axis, source in enumerate(perm)}
    return tuple(_ordered([target[axis] for axis in block.axes], block.labels) for block in blocks)


def _ordered(axes: Sequence[int], labels: Labels) -> Block:
    order = np.argsort(axes)
    return Block(tuple(sorted(axes)), np.transpose(labels, order))


def insert_axes(blocks: Blocks, axes: Sequence[int], rank: int) -> Blocks:
    """Blocks after `numpy.expand_dims(x, axes)`; `rank` is that of the result."""
    new = {axis % rank for axis in axes}
    places = [axis for axis in range(rank) if axis not in new]
    return tuple(Block(tuple(places[a] for a in block.axes), block.labels) for block in blocks)


def remove_axes(blocks: Blocks, axes: Sequence[int], rank: int) -> Blocks:
    """Blocks after `numpy.squeeze(x, axes)`; `rank` is that of the operand."""
    gone = {axis % rank for axis in axes}
    place = {axis: i for i, axis in enumerate(a for a in range(rank) if a not in gone)}
    result = []
    for block in blocks:
        labels = np.squeeze(block.labels, tuple(i for i, a in enumerate(block.axes) if a in gone))
        if left := tuple(place[a] for a in block.axes if a not in gone):
            result.append(Block(left, labels))
    return tuple(result)


def factor(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest independent ones.

    Returns:
        pairs (axes before, axes after) with equal products of sizes, in order, covering all axes.

    Raises:
        ValueError: the two shapes hold different numbers of elements, or an axis is empty.
    """
    if 0 in (*before, *after):
        raise ValueError("empty axis")
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        sources: list[int] = []
        targets: list[int] = []
        left = right = 1
        while True:
            if left == right and (sources or targets):
                break
            if (left < right or (left == right and i < len(before))) and i < len(before):
                left *= before[i]
                sources.append(i)
                i += 1
            elif j < len(after):
                right *= after[j]
                targets.append(j)
                j += 1
            else:
                raise ValueError(f"{list(before)} cannot be reshaped to {list(after)}")
        groups.append((sources, targets))
    return groups


def simplify(block: Block) -> Blocks:
    """The same block without the axes along which its labels do not change."""
    labels, axes = block.labels, list(block.axes)
    if not labels.any():
        return BARE
    for place in reversed(range(labels.ndim)):
        if labels.ndim == 1:
            break
        front = labels.take([0], axis=place)
        if np.array_equal(np.broadcast_to(front, labels.shape), labels):
            labels = front.squeeze(place)
            del axes[place]
    return (Block(tuple(axes), labels),)


def thin(labels: Labels) -> Labels:
    """The same labels without slices that repeat the one before them, along every axis.

    They say the same about which labels lie in one row or column: channels × positions in space
    become channels.
    """
    for place in range(labels.ndim):
        labels = thin_along(labels, place)
    return labels


def thin_along(labels: Labels, place: int) -> Labels:
    """The same labels without slices along one axis that repeat the one before them."""
    lines = rows_along(labels, place)
    new = np.ones(lines.shape[0], np.bool_)
    new[1:] = (lines[1:] != lines[:-1]).any(axis=1)
    return labels if new.all() else np.compress(new, labels, axis=place)
