"""Inputs to run a model on when nobody gave any."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from secateur.errors import Code, refuse
from secateur.graphops.calibration import Feeds
from secateur.graphops.calibration.data import batch_axes
from secateur.graphops.model.attributes import integer
from secateur.graphops.model.graph import real_inputs
from secateur.graphops.model.shapes import Shapes

_MAX_INPUT = 1 << 27  # numbers; what a damaged file asks for can be any size


def example_feeds(
    graph: ir.Graph,
    shapes: Shapes,
    *,
    batch: int | None = None,
    other_sizes: bool = False,
    seed: int = 0,
) -> Feeds:
    """Random inputs that a model accepts.

    Floats are standard normal. Integers that index a table are drawn from its rows; others are
    ones, as masks and lengths want them.

    Args:
        graph: of the model.
        shapes: of its tensors.
        other_sizes: sizes are those of the second binding, not of the first.
        batch: instead of the bound batch size, where the batch is free.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    rows, axes = _table_rows(graph, shapes), batch_axes(graph, shapes)
    feeds: Feeds = {}
    for value in real_inputs(graph):
        name = str(value.name)
        pair = shapes.inputs[name]
        shape = list(pair[1 if other_sizes else 0])
        if batch is not None and name in axes:
            shape[axes[name]] = batch
        if math.prod(shape) > _MAX_INPUT:
            raise refuse(
                Code.LIMIT_EXCEEDED,
                f"input {name!r} is too large to make one up",
                nodes=(name,),
                expected=f"at most {_MAX_INPUT} numbers",
                found=shape,
                hint="Give calibration data.",
            )
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        if value.dtype == ir.DataType.STRING:
            feeds[name] = np.full(shape, "", object)
        elif value.dtype in (ir.DataType.BFLOAT16,) or dtype.kind == "f":
            feeds[name] = generator.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b":
            feeds[name] = np.ones(shape, dtype)
        elif name in rows:
            feeds[name] = generator.integers(0, max(rows[name], 1), shape).astype(dtype)
        else:
            feeds[name] = np.ones(shape, dtype)
    return feeds


# Operators through which an index stays an index.
_PASSES = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice"})


def _table_rows(graph: ir.Graph, shapes: Shapes) -> Mapping[str, int]:
    """input name → rows of the smallest table that it indexes."""
    rows: dict[str, int] = {}
    for value in real_inputs(graph):
        if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
            continue
        frontier, seen = [value], {value}
        while frontier:
            current = frontier.pop()
            for user, index in current.uses():
                if user.op_type == "Gather" and index == 1 and user.inputs[0] is not None:
                    table = shapes.of(str(user.inputs[0].name)) or ()
                    axis = integer(user, "axis", 0)
                    if table and table[axis]:
                        size = int(table[axis] or 1)
                        rows[str(value.name)] = min(size, rows.get(str(value.name), size))
                elif user.op_type in _PASSES and index == 0:
                    fresh = [output for output in user.outputs if output not in seen]
                    frontier += fresh
                    seen.update(fresh)
    return rows
