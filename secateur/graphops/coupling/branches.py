"""Branches: parts of the graph that end where one position of an axis goes.

A sum over positions may be written out, one branch for each:

    y = Σ over e:  g[…, e] · f_e(x)            a mixture of experts, each a set of nodes of its own

Cutting position e is then deleting its branch. It is the law's cut: with a zero in the place of
g[…, e], all that follows from it is zero (or empty: what NonZero finds among zeros), up to the
node that adds it to the others, writes it over them or puts it beside them, and which then passes
on the others as if the branch were not there. Where anything else is made of a zero, the position
stays.

What an operator makes of nothing is said by its rule (`Rule.void`); this module follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from secateur.graphops import rules
from secateur.graphops.coupling.facts import BranchEnd, Taken
from secateur.graphops.coupling.flow import Flow
from secateur.graphops.coupling.void import Void
from secateur.graphops.model.graph import captured_by, node_label

Gone = frozenset[int]  # labels


def follow(flow: Flow) -> None:
    """Finds where branches end and what they hold; freezes the positions of those that do not.

    Cost is linear in nodes, and nothing where no position is taken out by itself.

    Args:
        flow: all nodes visited. Gets `parts` and `routed`, and the branch ends and contractions
            that come of it.
    """
    if flow.taken:
        _Walk(flow).run()
    if flow.branch_ends:
        flow.parts = _parts(flow.branch_ends, flow.graph)


@dataclass(frozen=True, slots=True)
class _Hangs:
    """A tensor that is not what it was once all of some labels went.

    Attributes:
        void: what it holds then.
        gone: the labels.
        since: the node that made it OTHER, if one did.
    """

    void: Void
    gone: Gone
    since: ir.Node | None = None


class _Walk:
    """One walk through the graph, for all positions that are taken out by themselves."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._taken = {str(one.output.name): one for one in flow.taken}
        self._hangs: dict[str, _Hangs] = {}
        self._ends: list[BranchEnd] = []
        self._stuck: dict[int, ir.Node] = {}
        self._same: dict[int, int] = {}  # labels that go together → one of them
        self._static = set(flow.constants)  # and what is computed from nothing else

    def run(self) -> None:
        """Walks; then states what was found."""
        flow = self._flow
        for node in flow.graph:
            self._visit(node)
        for value in flow.graph.outputs:
            producer = value.producer()
            if str(value.name) in self._hangs and producer is not None:
                self._stop(self._hangs[str(value.name)], producer)
        # A row of a table goes only with a position that was computed: it is no branch by itself.
        computed = {self._one(one.label) for one in flow.taken if not self._is_row(one)}
        stuck = {self._one(label): node for label, node in reversed(self._stuck.items())}
        for one in flow.taken:
            if self._one(one.label) not in computed:
                stuck.setdefault(self._one(one.label), one.node)
        for one in flow.taken:
            node = stuck.get(self._one(one.label), one.node)
            if self._one(one.label) in stuck:
                needs = f", and {node.op_type} {node_label(node)!r} needs it"
                detail = f"is taken by its position{needs if node is not one.node else ''}"
                flow.freeze(np.array([one.label], np.int32), one.node, "INDEXED", detail)
            elif one.axis is not None:
                flow.contract(one.node, 0, one.axis)
        for end in self._ends:
            labels = self._all(end.labels)
            if not labels & stuck.keys():
                flow.branch_ends.append(replace(end, labels=labels))

    def _visit(self, node: ir.Node) -> None:
        for value in captured_by(node) or ():
            if str(value.name) in self._hangs:
                self._stop(self._hangs[str(value.name)], node)
        names = ["" if value is None else str(value.name) for value in node.inputs]
        if self._static.issuperset(name for name in names if name):
            self._static.update(str(output.name) for output in node.outputs)
        found = {
            index: replace(one, gone=self._all(one.gone))
            for index, name in enumerate(names)
            if (one := self._hangs.get(name)) is not None
        }
        if found:
            self._pass(node, found)
        for output in node.outputs:
            taken = self._taken.get(str(output.name))
            if taken is not None:
                self._hangs[str(output.name)] = _Hangs(Void.ZERO, frozenset([taken.label]))

    def _pass(self, node: ir.Node, found: Mapping[int, _Hangs]) -> None:
        """From what its inputs hold once some labels went to what the outputs do."""
        outcomes = {
            one.gone: self._outcome(node, {i: o for i, o in found.items() if o.gone == one.gone})
            for one in found.values()
        }
        ends = [
            BranchEnd(node, gone, left=node.inputs.index(left))
            for gone, left in outcomes.items()
            if not isinstance(left, Void)
        ]
        self._ends += ends
        if len(ends) == len(outcomes) == 1:
            return
        gone: Gone = frozenset(label for one in outcomes for label in one)
        if len(outcomes) > 1 and len(ends) < len(outcomes):
            nothing = (Void.EMPTY, Void.ZERO)
            if any(len(alone) > 1 or left not in nothing for alone, left in outcomes.items()):
                for one in found.values():
                    self._stop(one, node)
                return
            gone = self._unite(node, gone)  # a product of two: nothing without either
        outcome = self._outcome(node, found)
        if outcome is Void.EMPTY:
            self._flow.routed.add(node_label(node))
        if isinstance(outcome, Void):
            since = next((one.since for one in found.values() if one.since is not None), None)
            hangs = _Hangs(outcome, gone, since or (node if outcome is Void.OTHER else None))
            self._hangs.update({str(output.name): hangs for output in node.outputs})

    def _outcome(self, node: ir.Node, found: Mapping[int, _Hangs]) -> Void | ir.Value:
        rule = rules.find(node.domain, node.op_type, self._flow.opset(node))
        if rule is None or rule.void is None:
            return Void.OTHER
        states = [
            found[index].void if index in found else Void.WHOLE for index in range(len(node.inputs))
        ]
        return rule.void(self._flow, node, states)

    def _unite(self, node: ir.Node, labels: Gone) -> Gone:
        """Makes these go together."""
        first, *others = sorted(labels)
        for other in others:
            self._same[other] = first
            self._flow.join(node, np.array([first], np.int32), np.array([other], np.int32))
        return frozenset([first])

    def _one(self, label: int) -> int:
        while label in self._same:
            label = self._same[label]
        return label

    def _all(self, gone: Gone) -> Gone:
        return frozenset(map(self._one, gone))

    def _is_row(self, one: Taken) -> bool:
        value = one.node.inputs[0]
        return one.axis is not None and value is not None and str(value.name) in self._static

    def _stop(self, one: _Hangs, node: ir.Node) -> None:
        """A node needs what hangs on some labels: one of them stays."""
        if len(one.gone) > 1:
            self._flow.keep(np.array(sorted(one.gone), np.int32))
        else:
            (label,) = one.gone
            self._stuck.setdefault(label, one.since or node)


def _parts(branch_ends: Sequence[BranchEnd], graph: ir.Graph) -> dict[str, Gone]:
    """Names of constants, and labels of nodes → the labels with all of which they go."""
    ends = {(end.node, index): end.labels for end in branch_ends for index in end.ends}
    hangs: dict[ir.Node, Gone] = {}

    def gone(values: Sequence[ir.Value]) -> Gone:
        """Without which nothing reads any of these; empty where something does."""
        found: Gone = frozenset()
        for value in values:
            if value.is_graph_output():
                return frozenset()
            for use in value.uses():
                labels = ends.get((use.node, use.idx)) or hangs.get(use.node)
                if labels is None:
                    return frozenset()
                found |= labels
        return found

    parts: dict[str, Gone] = {}
    for node in reversed(list(graph)):
        if labels := gone(node.outputs):
            hangs[node] = labels
            name = str(node.outputs[0].name) if node.op_type == "Constant" else node_label(node)
            parts[name] = labels
    for name, value in graph.initializers.items():
        if labels := gone([value]):
            parts[str(name)] = labels
    return parts
