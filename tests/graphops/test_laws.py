"""The law over every registered rule: op(slice(x)) = slice(op(x)), and the whole model's.

The rows are in `rows.py`; a rule without a row fails here, and so does a row without a rule.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from laws import FLOAT32, Analysis, check_operator, prune
from nets import Net
from rows import ROWS, SUBJECT, Row

import secateur
from secateur.errors import Code, Refused
from secateur.graphops import rules
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.rounding import leave_rounding_out
from secateur.graphops.model.runtime import open_session
from secateur.graphops.model.shapes import Shapes, infer_shapes
from secateur.graphops.model.spelling import SPELT
from secateur.graphops.verify.law import check_law, spelt_out

RUNNABLE = [pytest.param(row, id=row.id) for row in ROWS if row.freezes is None]
FREEZING = [row for row in ROWS if row.freezes is not None]


def model_of(row: Row) -> onnx.ModelProto:
    net = Net(row.opset)
    if row.domain:
        net.domains[row.domain] = 1
    y = row.build(net)
    net.output(y)
    return net.model()


def by_id(row: Row) -> str:
    return row.id


def test_every_rule_has_a_row_in_its_opset_range() -> None:
    missing = [
        f"{rule.domain or 'ai.onnx'}::{rule.op_type} (opsets {rule.since}..{rule.until})"
        for rule in rules.all_rules()
        if not any(
            row.op == rule.op_type
            and row.domain == rule.domain
            and rule.since <= _version(row) <= rule.until
            for row in ROWS
        )
    ]
    assert not missing, "rules without a row in tests/graphops/rows.py"


def test_every_row_has_a_rule() -> None:
    unknown = [
        row.id
        for row in ROWS
        if rules.find(row.domain, row.op, _version(row)) is None
        and (row.domain, row.op) not in SPELT
    ]
    assert not unknown


def test_rows_have_names_of_their_own() -> None:
    assert [name for name, count in Counter(row.id for row in ROWS).items() if count > 1] == []


def _version(row: Row) -> int:
    return 1 if row.domain else row.opset


@pytest.mark.parametrize("row", RUNNABLE)
def test_law(row: Row) -> None:
    model = model_of(row)
    source = model.SerializeToString()
    result = prune(source, criterion="random", seed=1, target={"channels": 0.5})
    _check(row, model, source, result)
    for seed in range(2):  # what no criterion would choose: other units, other numbers of them
        plan = Analysis.of(source).random_plan(seed)
        _check(row, model, source, prune(source, plan=plan), must_cut=False)


def _check(
    row: Row,
    model: onnx.ModelProto,
    source: bytes,
    result: secateur.Result,
    must_cut: bool = True,
) -> None:
    law = check_law(source, result)
    assert law.difference < FLOAT32
    if not row.alone:
        assert result.plan.kept
        return
    operator = check_operator(model, result, SUBJECT)
    if operator is None:
        assert not row.carries, "the operator is gone"
        return
    assert operator.difference < FLOAT32
    if must_cut:
        assert operator.cut or (not row.carries and result.plan.kept), "nothing at it was cut"
        assert operator.carried or not row.carries, "nothing crossed it"
        assert operator.exact == row.exact
        assert (SUBJECT in law.exceptions) == (not row.exact)


@pytest.mark.parametrize("row", FREEZING, ids=by_id)
def test_what_cannot_be_carried_stays_and_says_why(row: Row) -> None:
    source = model_of(row).SerializeToString()
    result = prune(source, target={"channels": 0.5})
    analysis = Analysis.of(source)
    keep = analysis.keep(result.plan)
    reading = analysis.node(SUBJECT).inputs[0]
    assert reading is not None
    assert not analysis.kept(keep, reading.name)
    codes = {frozen.code for frozen in result.report.frozen if frozen.node == SUBJECT}
    assert row.freezes in codes
    assert check_law(source, result).difference < FLOAT32


@pytest.mark.parametrize("row", ROWS, ids=by_id)
def test_what_is_not_known_of_a_shape_is_not_guessed(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One size of a tensor, or its whole shape, is forgotten: less may be cut, but what is cut
    fits. Verification would refuse what does not."""
    source = model_of(row).SerializeToString()
    graph = open_model(source).model.graph
    computed = [output.name for node in graph for output in node.outputs if output.name]
    draw = random.Random(row.id)
    for name in draw.sample(computed, min(3, len(computed))):
        axis = draw.choice([None, 0, 1, 2, 3])

        def forgetful(
            model: ir.Model, given: Any = None, name: str = name, at: Any = axis
        ) -> Shapes:
            shapes = infer_shapes(model, given)
            both = dict(shapes.first), dict(shapes.second)
            for sizes in both:
                known = sizes.pop(name, None)
                if at is not None and known is not None:
                    sizes[name] = tuple(None if i == at else n for i, n in enumerate(known))
            return dataclasses.replace(shapes, first=both[0], second=both[1])

        monkeypatch.setattr("secateur.graphops.pipeline.analysed.infer_shapes", forgetful)
        try:
            prune(source, criterion="random", seed=1, target={"channels": 0.5})
        except Refused as refused:
            assert refused.refusal.code is Code.NOTHING_TO_PRUNE, refused


def quantised_as_it_runs() -> onnx.ModelProto:
    """DynamicQuantizeLinear before a grouped convolution and products of integers."""
    net = Net()

    def steps(x: str, op: str, weight: str, zero: str, **attributes: Any) -> str:
        x, scale, middle = net.ops("DynamicQuantizeLinear", x, outputs=3)
        y = net.op(op, x, weight, middle, zero, **attributes)
        y = net.op("Cast", y, to=onnx.TensorProto.FLOAT)
        return net.op("Mul", y, net.op("Mul", scale, net.const(np.float32(0.5))))

    kernel, matrix = (
        net.const(net.draw.integers(0, 255, shape).astype(np.uint8))
        for shape in ((12, 4, 3, 3), (12, 6))
    )
    zeros = net.draw.integers(100, 150, 6).astype(np.uint8)  # one for each output
    y = net.conv(net.input("x", [2, 4, 6, 6]), 4, 8)
    y = steps(y, "ConvInteger", kernel, net.const(np.uint8(120)), group=2, pads=[1] * 4)
    y = net.op("ReduceMean", net.op("Relu", y), axes=[2, 3], keepdims=0)
    y = steps(y, "MatMulInteger", matrix, net.const(zeros))
    rows, scale, middle = net.ops("DynamicQuantizeLinear", y, outputs=3)
    columns = net.op("Transpose", rows, perm=[1, 0])  # both sides are of the data
    alike = net.op("MatMulInteger", rows, columns, middle, middle)
    alike = net.op("Cast", alike, to=onnx.TensorProto.FLOAT)
    alike = net.op("Mul", alike, net.op("Mul", scale, scale))
    y = net.op("MatMul", net.op("Softmax", alike), y)
    net.output(net.dense(net.op("Relu", y), 6, 3))
    return net.model()


def test_without_rounding_a_model_computes_nearly_what_it_did() -> None:
    model = quantised_as_it_runs()
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    wanted = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    model = spelt_out(model.SerializeToString())
    assert leave_rounding_out(model)
    found = open_session(model.SerializeToString()).run(None, {"x": x})[0]
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert 1e-6 < difference < 2e-2


def test_the_law_is_checked_without_rounding_where_that_hides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = quantised_as_it_runs().SerializeToString()
    result = prune(source, target={"channels": 0.5})
    assert result.report.after.params < result.report.before.params
    # as if another last bit had been rounded
    monkeypatch.setattr("secateur.graphops.verify.law._ROUNDS_ALIKE", -1.0)
    law = check_law(source, result)
    assert not law.rounded
    assert law.difference < FLOAT32
