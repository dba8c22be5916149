"""What rules may do to a node of the clone when units went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from secateur.graphops.coupling.units import Coupling
from secateur.graphops.model import arithmetic
from secateur.graphops.model.attributes import integer
from secateur.graphops.model.constants import add_initializer, set_constant
from secateur.graphops.model.graph import real_inputs
from secateur.graphops.model.names import free_name
from secateur.graphops.model.shapes import Array, Shape

Mask = npt.NDArray[np.bool_]


class Surgeon:
    """A clone under surgery: answers what stays of each tensor, and edits nodes.

    All questions are about the original: `shape` and `value` are those before the cut, `size`
    and `kept` tell what is left.

    Args:
        model: the clone.
        coupling: of the original.
        keep: per unit number whether it stays; entry 0 (what cannot be cut) is true.
    """

    def __init__(self, model: ir.Model, coupling: Coupling, keep: Mask) -> None:
        self._graph = model.graph
        self._opsets = dict(model.opset_imports)
        self._coupling = coupling
        self._keep = keep
        self._masks: dict[str, dict[int, Mask]] = {}  # of what has been asked for
        self._unmeasured: set[ir.Value] = set()
        self._names: set[str | None] = set()  # of all values; collected when first asked for

    # -- what stays ----------------------------------------------------------------------------

    def kept(self, value: ir.Value | None, axis: int) -> Mask | None:
        """Which positions of an axis stay; None when all do."""
        return self.masks(value).get(axis)

    def masks(self, value: ir.Value | None) -> Mapping[int, Mask]:
        """axis → which positions stay, for the axes that lose some."""
        name = "" if value is None else value.name or ""
        known = self._masks.get(name)
        if known is None:
            found = ((axis, self._keep[units]) for axis, units in self._coupling.axes(name).items())
            known = self._masks[name] = {axis: mask for axis, mask in found if not mask.all()}
        return known

    def numbered(self, value: ir.Value | None) -> Mask | None:
        """Which of the positions stay that integers name; None where they name none."""
        units = self._coupling.numbers.get("" if value is None else value.name or "")
        return None if units is None else self._keep[units]

    def changed_sizes(self, value: ir.Value | None) -> dict[int, int]:
        """axis → new size, for the axes that lose positions."""
        return {axis: int(np.count_nonzero(mask)) for axis, mask in self.masks(value).items()}

    def changed(self, value: ir.Value | None) -> bool:
        """Whether any axis of a tensor loses positions."""
        return bool(self.masks(value))

    def size(self, value: ir.Value | None, axis: int) -> int:
        """The size of an axis after the cut, under the first binding of symbolic sizes."""
        mask = self.kept(value, axis)
        return int(self.shape(value)[axis] or 0) if mask is None else int(mask.sum())

    def shape(self, value: ir.Value | None) -> Shape:
        """The shape before the cut; empty when not known."""
        return (self._coupling.shapes.of(value.name or "") if value is not None else None) or ()

    def value(self, value: ir.Value | None) -> Array | None:
        """A small constant or result of shape arithmetic, before the cut."""
        return None if value is None else self._coupling.shapes.values.get(value.name or "")

    def is_fixed(self, value: ir.Value) -> bool:
        """Whether a known value is the model's own, whatever the input sizes."""
        return self._coupling.shapes.is_fixed_value(value.name or "")

    def measures_a_cut(self, value: ir.Value | None) -> bool:
        """Whether a known value is computed from the shape of a tensor that loses positions."""
        frontier: list[ir.Value | None] = [value]
        seen: set[ir.Value] = set()
        while frontier:
            current = frontier.pop()
            if current is None or current in seen or current in self._unmeasured:
                continue
            node = current.producer()
            if node is None or self.value(current) is None:
                continue
            seen.add(current)
            if node.op_type == "Size":
                if self.changed(node.inputs[0]):
                    return True
            elif (read := self._sizes_read(node)) is not None:
                if read:
                    return True
            else:
                frontier.extend(node.inputs)
        self._unmeasured |= seen  # a long chain is walked once
        return False

    def _sizes_read(self, node: ir.Node) -> bool | None:
        """Whether a Shape, or a Gather or Slice of one, reads a size that changes; None for any
        other node."""
        source = node
        if node.op_type in ("Gather", "Slice") and node.inputs[0] is not None:
            source = node.inputs[0].producer() or node
        if source.op_type != "Shape":
            return None
        tensor = source.inputs[0]
        rank = len(self.shape(tensor))
        axes = np.arange(rank)[integer(source, "start", 0) : integer(source, "end", rank)]
        if node is not source:
            chosen = [self.value(value) for value in node.inputs[1:]]
            answer = arithmetic.evaluate(node, [axes, *chosen])
            axes = axes if answer is None else answer[0].reshape(-1)
        return bool(set(axes.tolist()) & set(self.changed_sizes(tensor)))

    def opset(self, node: ir.Node) -> int:
        """The version of the node's operator set."""
        return self._opsets.get(node.domain, 1)

    # -- edits ---------------------------------------------------------------------------------

    def set_integer(self, node: ir.Node, name: str, value: int) -> None:
        """Sets an int attribute."""
        node.attributes[name] = ir.AttrInt64(name, value)

    def set_integers(self, node: ir.Node, name: str, values: Sequence[int]) -> None:
        """Sets an ints attribute."""
        node.attributes[name] = ir.AttrInt64s(name, [int(value) for value in values])

    def drop_attribute(self, node: ir.Node, name: str) -> None:
        """Removes an attribute if it is there."""
        node.attributes.pop(name, None)

    def set_integers_at(self, node: ir.Node, index: int, name: str, values: Sequence[int]) -> None:
        """Sets integers where the node has them: as input `index` or as attribute `name`."""
        if name in node.attributes:
            self.set_integers(node, name, values)
        else:
            self.set_input(node, index, values)

    def set_input(
        self, node: ir.Node, index: int, values: Any, like: npt.DTypeLike = np.int64
    ) -> None:
        """Makes an input a constant. A constant that only this node reads keeps its name."""
        array = np.asarray(values, dtype=like)
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        if old is not None and len(old.uses()) == 1:
            producer = old.producer()
            if old.is_initializer() or (producer is not None and producer.op_type == "Constant"):
                set_constant(old, ir.Tensor(array, name=old.name if producer is None else None))
                if old.type is not None:
                    old.shape = ir.Shape(array.shape)
                return
        node.replace_input_with(index, self._constant(f"{node.outputs[0].name}__{index}", array))

    def become_reshape(self, node: ir.Node) -> None:
        """Makes a node that only reshapes its first input a Reshape to what is left."""
        output = node.outputs[0]
        shapes, name = self._coupling.shapes, str(output.name)
        axes = range(len(self.shape(output)))
        entries = [self.size(output, a) if shapes.is_fixed(name, a) else -1 for a in axes]
        node.op_type = "Reshape"
        node.attributes.clear()
        self.set_input(node, 1, entries)

    def replace_by_constant(self, value: ir.Value, array: Array) -> None:
        """Makes all readers of a value read a constant; its node is dropped when unread."""
        if not value.is_graph_output():
            value.replace_all_uses_with(self._constant(f"{value.name}__fixed", array))

    def _constant(self, name: str, array: Array) -> ir.Value:
        return add_initializer(self._graph, ir.Tensor(array, name=self._free_name(name)))

    def _free_name(self, wish: str) -> str:
        if not self._names:
            for graph in (self._graph, *self._graph.subgraphs()):
                values = [*graph.inputs, *graph.initializers.values()]
                values += [output for node in graph for output in node.outputs]
                self._names.update(value.name for value in values)
        free = free_name(wish, self._names)
        self._names.add(free)
        return free

    def resize_shape_input(
        self, node: ir.Node, index: int, *, copies: bool, axes: Sequence[int] | None = None
    ) -> None:
        """Makes the input that names the output's sizes name the new ones.

        Entries that adapt by themselves (-1, a copying 0) stay; sizes fixed by the model are
        written down; sizes that follow the inputs but contain channels (batch × heads) are scaled.
        Where sizes are computed from a tensor that shrinks, those that follow the inputs are
        computed from the inputs instead.

        Args:
            node: whose first output is meant.
            index: of the integer input.
            copies: whether 0 copies the first input's size (Reshape without allowzero).
            axes: the output axes that the entries stand for; all, aligned right, when None.
        """
        output = node.outputs[0]
        sizes = self.changed_sizes(output)
        given = self.value(node.inputs[index])
        measured = given is not None and self.measures_a_cut(node.inputs[index])
        if given is None or not (sizes or measured):
            return
        rank = len(self.shape(output))
        places = list(axes) if axes is not None else list(range(rank - given.size, rank))
        fixed = self._coupling.shapes.fixed_entries(str(node.inputs[index].name))  # type: ignore[union-attr]
        if fixed is None:  # the model takes no other sizes
            fixed = np.ones(given.shape, np.bool_)
        entries = [int(entry) for entry in given]
        written: dict[int, int] = {}
        scaled: dict[int, Fraction] = {}
        for place, axis in enumerate(places):
            entry = entries[place]
            if entry == -1 or (copies and entry == 0) or (axis not in sizes and not measured):
                continue
            if entry == 1 and not copies:
                continue  # Expand by 1 keeps the operand's size
            whole = int(self.shape(output)[axis] or 1)
            if fixed[place]:
                written[place] = sizes.get(axis, entry)
            else:
                scaled[place] = Fraction(sizes.get(axis, whole), whole)
        if not written and not scaled:
            return
        for place, size in written.items():
            entries[place] = size
        if fixed.all() or (copies and self._as_constant(node, places, entries, fixed)):
            self.set_input(node, index, entries)
            return
        traced = self._trace(node.inputs[index], scaled) if measured else None
        if traced is None:
            self._patch(node, index, written, scaled, len(entries))
        else:
            self._compose(node, index, entries, traced)

    def _as_constant(
        self, node: ir.Node, places: Sequence[int], entries: list[int], fixed: Mask
    ) -> bool:
        """Spells sizes that follow the inputs as 0 (copied) or one -1; false if that fails."""
        source = node.inputs[0]
        before, after = self.shape(source), self.shape(node.outputs[0])
        shapes = self._coupling.shapes
        wild = [place for place, entry in enumerate(entries) if entry == -1]
        for place in np.flatnonzero(~fixed).tolist():
            axis = places[place]
            same = axis < len(before) and before[axis] == after[axis]
            second = shapes.second.get(str(source.name)) if source is not None else None
            goal = shapes.second.get(str(node.outputs[0].name))
            if same and second and goal and second[axis] == goal[axis]:
                entries[place] = 0
            else:
                entries[place] = -1
                wild.append(place)
        return len(wild) <= 1

    def _trace(
        self, given: ir.Value | None, scaled: Mapping[int, Fraction]
    ) -> dict[int, tuple[ir.Value, int, Fraction]] | None:
        """Sizes that follow the inputs as multiples of an input's size; None if one is not."""
        shapes, name = self._coupling.shapes, given.name or "" if given is not None else ""
        first, second = shapes.values[name], shapes.second_values[name]
        found: dict[int, tuple[ir.Value, int, Fraction]] = {}
        for place, factor in scaled.items():
            for value in real_inputs(self._graph):
                for axis, (a, b) in enumerate(zip(*shapes.inputs[str(value.name)], strict=True)):
                    if a != b and int(first[place]) * b == int(second[place]) * a:
                        multiple = Fraction(int(first[place]), a)
                        found.setdefault(place, (value, axis, multiple * factor))
            if place not in found:
                return None
        return found

    def _compose(
        self,
        node: ir.Node,
        index: int,
        entries: Sequence[int],
        traced: Mapping[int, tuple[ir.Value, int, Fraction]],
    ) -> None:
        """Concat(constants and input sizes × multiple), before the node."""
        name = f"{node.outputs[0].name}__{index}"
        parts = []
        for place, entry in enumerate(entries):
            if place not in traced:
                parts.append(self._constant(f"{name}_{place}", np.array([entry], np.int64)))
                continue
            value, axis, multiple = traced[place]
            shape = self._insert(node, "Shape", [value], f"{name}_{place}_shape")
            at = self._constant(f"{name}_{place}_axis", np.array([axis], np.int64))
            size = self._insert(node, "Gather", [shape, at], f"{name}_{place}_size")
            for op_type, number in (("Mul", multiple.numerator), ("Div", multiple.denominator)):
                if number != 1:
                    by = self._constant(f"{name}_{place}_by", np.array([number], np.int64))
                    size = self._insert(node, op_type, [size, by], f"{name}_{place}_{op_type}")
            parts.append(size)
        attributes = [ir.AttrInt64("axis", 0)]
        node.replace_input_with(index, self._insert(node, "Concat", parts, name, attributes))

    def _patch(
        self,
        node: ir.Node,
        index: int,
        written: dict[int, int],
        scaled: dict[int, Fraction],
        count: int,
    ) -> None:
        """Where(is written, constant, computed × new / old), before the node."""
        computed = node.inputs[index]
        assert computed is not None
        name = f"{node.outputs[0].name}__{index}"
        new = np.ones(count, np.int64)
        old = np.ones(count, np.int64)
        for place, factor in scaled.items():
            new[place], old[place] = factor.numerator, factor.denominator
        value = computed
        if (new != old).any():
            value = self._insert(
                node, "Mul", [value, self._constant(f"{name}_new", new)], f"{name}_mul"
            )
            value = self._insert(
                node, "Div", [value, self._constant(f"{name}_old", old)], f"{name}_div"
            )
        if written:
            mask = np.isin(np.arange(count), list(written))
            constant = np.array([written.get(place, 0) for place in range(count)], np.int64)
            value = self._insert(
                node,
                "Where",
                [
                    self._constant(f"{name}_fixed", mask),
                    self._constant(f"{name}_sizes", constant),
                    value,
                ],
                f"{name}_where",
            )
        node.replace_input_with(index, value)

    def _insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        free = self._free_name(name)
        node = ir.Node("", op_type, inputs, attributes, name=free)
        node.outputs[0].name = free
        owner = before.graph or self._graph  # the node may stand in a subgraph
        owner.insert_before(before, node)
        return node.outputs[0]
