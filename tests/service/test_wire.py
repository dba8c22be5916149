"""Values and messages say the same, field by field."""

from __future__ import annotations

import math
import typing
from typing import Any

import grpc
import pydantic
import pytest
from google.longrunning import operations_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from secateur import _wire, errors, operation, report
from secateur._chunks import joined, parted
from secateur.errors import Code, Refusal
from secateur.recipe import (
    Criterion,
    Granularity,
    Grouped,
    Normaliser,
    Quantize,
    Recipe,
    Reduction,
    Scope,
    WeightCriterion,
)
from secateur.v1 import bytestream_pb2, pruning_pb2, recipe_pb2, refusal_pb2, report_pb2

COST = report.Cost(macs=2**40, params=7, bytes=9)
FULL_COST = report.Cost(
    macs=1,
    params=2,
    bytes=3,
    latency=report.Latency(p50_ms=0.5, p95_ms=1.5, runs=9),
    peak_memory_bytes=2**33,
    nonzero=0,
    compressed_bytes=2**34,
)
DRIFT = (
    report.Drift(output="y", relative_error=0.25, cosine=1.0, top1_agreement=0.0, kl=0.0),
    report.Drift(output="z", relative_error=0.0, cosine=-1.0),
)
GROUP = report.Group(
    id="g", kind="head", units=4, kept=0, channels_per_unit=64, tensors=("w[0]", "v[1]")
)
FROZEN = report.Frozen(code="NO_RULE", node="n", op_type="ai.onnx::TopK-11", detail="", channels=0)
VERIFICATION = report.Verification(
    samples=3, from_calibration=False, held_back=True, batch_sizes=(1, 3), drift=DRIFT
)

ACCURACY = report.Accuracy(
    output="y", labels=3, top1_before=1.0, top1_after=0.0, top5_before=0.5, top5_after=0.0
)
FOLDED = report.Folded(node="n", channels=3, folded=0)
SENSITIVITY = report.Sensitivity(group="g", removed=(0, 2), drift=(0.0, 0.5))
REGION = report.Region(entry="a", exit="b", layers=("n",), macs=3, params=2, refused="why")
WEIGHT = report.SparseWeight(
    node="n", tensor="w", criterion="wanda", density=0.5, error=0.0, stored_sparse=True
)
STAGE_DRIFT = report.StageDrift(stage="pruning", drift=DRIFT)
REMOVAL = report.Removal(region=REGION, influence=0.25, drift=0.0)
DIVISIONS = (
    report.Division(regions=0),
    report.Division(regions=2, factored=1, drift=0.0, chosen=True, final_drift=0.0),
)
ROTATED = report.Rotated(group="g", channels=8, needed=3)
FACTORED = report.Factored(node="n", inputs=8, outputs=4, rank=2, error=0.0)
STEP = report.RepairStep(node="n", error_before=0.5, error_after=0.0, method="shift")

VALUES: list[tuple[pydantic.BaseModel, Any]] = [
    (report.Progress(stage=report.Stage.LOAD, fraction=0.0), report_pb2.Progress),
    (FULL_COST.latency, report_pb2.Latency),  # type: ignore[list-item]
    (COST, report_pb2.Cost),
    (FULL_COST, report_pb2.Cost),
    (DRIFT[0], report_pb2.Drift),
    (DRIFT[1], report_pb2.Drift),
    (GROUP, report_pb2.Group),
    (FROZEN, report_pb2.Frozen),
    (VERIFICATION, report_pb2.Verification),
    (ACCURACY, report_pb2.Accuracy),
    (FOLDED, report_pb2.Folded),
    (SENSITIVITY, report_pb2.Sensitivity),
    (REGION, report_pb2.Region),
    (REMOVAL, report_pb2.Removal),
    (DIVISIONS[0], report_pb2.Division),
    (DIVISIONS[1], report_pb2.Division),
    (ROTATED, report_pb2.Rotated),
    (FACTORED, report_pb2.Factored),
    (STEP, report_pb2.RepairStep),
    (WEIGHT, report_pb2.SparseWeight),
    (STAGE_DRIFT, report_pb2.StageDrift),
    (
        report.Inspection(
            groups=(GROUP,),
            frozen=(FROZEN,),
            cost=COST,
            sensitivity=(SENSITIVITY,),
            regions=(REGION,),
        ),
        report_pb2.Inspection,
    ),
    (
        report.Report(
            before=FULL_COST,
            after=COST,
            groups=(GROUP, GROUP),
            frozen=(),
            removed=(REMOVAL,),
            rotated=(ROTATED,),
            factored=(FACTORED,),
            vocabulary=(7, 0),
            divisions=DIVISIONS,
            sensitivity=(SENSITIVITY,),
            repair=(STEP, STEP),
            folded=(FOLDED,),
            sparse_weights=(WEIGHT,),
            stage_drift=(STAGE_DRIFT,),
            verification=VERIFICATION,
            accuracy=(ACCURACY,),
            warnings=("slower",),
            seconds={"LOAD": 0.5, "VERIFY": 0.0},
        ),
        report_pb2.Report,
    ),
    (report.Profile(model=COST), report_pb2.Profile),
    (
        report.Profile(model=COST, against=FULL_COST, latency_ratio=0.5, drift=DRIFT),
        report_pb2.Profile,
    ),
    (
        Refusal(code=Code.UNREACHABLE_TARGET, message="m", nodes=("a",), expected="1", found="2"),
        refusal_pb2.Refusal,
    ),
]


@pytest.mark.parametrize(("value", "message"), VALUES, ids=lambda v: type(v).__name__)
def test_values_come_back_equal(value: pydantic.BaseModel, message: Any) -> None:
    sent = message.FromString(_wire.to_wire(value, message()).SerializeToString())
    assert _wire.from_wire(sent, type(value)) == value


@pytest.mark.parametrize(("value", "message"), VALUES, ids=lambda v: type(v).__name__)
def test_fields_have_the_same_names(value: pydantic.BaseModel, message: Any) -> None:
    assert set(message.DESCRIPTOR.fields_by_name) == set(type(value).model_fields)


def test_every_value_of_the_report_has_a_message() -> None:
    defined = {
        name
        for name, kind in vars(report).items()
        if isinstance(kind, type) and issubclass(kind, report._Value) and not name.startswith("_")
    }
    assert defined == {type(v).__name__ for v, _ in VALUES} - {"Refusal"}
    assert defined == set(report_pb2.DESCRIPTOR.message_types_by_name)


def enum_names(enum: Any, prefix: str) -> set[str]:
    names = {value.name for value in enum.DESCRIPTOR.values if value.number != 0}
    assert all(name.startswith(prefix) for name in names)
    return {name.removeprefix(prefix) for name in names}


def test_enums_have_the_same_values() -> None:
    assert enum_names(report_pb2.Stage, "STAGE_") == {stage.value for stage in report.Stage}
    assert enum_names(refusal_pb2.RefusalCode, "REFUSAL_CODE_") == {code.value for code in Code}
    for enum, prefix, literal in (
        (recipe_pb2.Criterion, "CRITERION_", Criterion),
        (recipe_pb2.Granularity, "GRANULARITY_", Granularity),
        (recipe_pb2.Grouped, "GROUPED_", Grouped),
        (recipe_pb2.Normaliser, "NORMALISER_", Normaliser),
        (recipe_pb2.Reduction, "REDUCTION_", Reduction),
        (recipe_pb2.Scope, "SCOPE_", Scope),
        (recipe_pb2.WeightCriterion, "WEIGHT_CRITERION_", WeightCriterion),
        (recipe_pb2.Quantize, "QUANTIZE_", Quantize),
    ):
        wanted = {name.upper() for name in typing.get_args(literal)}
        assert enum_names(enum, prefix) == wanted


def test_numbers_that_json_cannot_write_come_back() -> None:
    drift = report.Drift(output="y", relative_error=math.inf, cosine=math.nan)
    back = _wire.from_wire(_wire.to_wire(drift, report_pb2.Drift()), report.Drift)
    assert back.relative_error == math.inf
    assert math.isnan(back.cosine)


# ---- recipes -----------------------------------------------------------------------------------


def test_recipe_comes_back_equal() -> None:
    recipe = Recipe(
        target={"macs": 0.5, "params": 0.1},
        criterion="bn_scale",
        reduction="max",
        normaliser="isomorphic",
        granularity=("head", "weight"),
        sparsity="2:4",
        weight_criterion="second_order",
        vocabulary=(5, 0),
        quantize="int8_dynamic",
        grouped="balanced",
        scope="global",
        ignore=("a*", "b"),
        round_to=8,
        seed=2**32 - 1,
    )
    sent = _wire.recipe_to_wire(recipe)
    assert _wire.recipe_from_wire(recipe_pb2.Recipe.FromString(sent.SerializeToString())) == recipe
    assert set(sent.DESCRIPTOR.fields_by_name) == set(Recipe.model_fields)
    alone = Recipe(granularity=("weight",), sparsity="0.7", sparse_initializers=True)
    assert _wire.recipe_from_wire(_wire.recipe_to_wire(alone)) == alone


def test_unset_recipe_fields_take_the_defaults() -> None:
    assert _wire.recipe_from_wire(recipe_pb2.Recipe()) == Recipe()
    unspecified = recipe_pb2.Recipe(
        criterion=recipe_pb2.CRITERION_UNSPECIFIED, scope=recipe_pb2.SCOPE_UNSPECIFIED
    )
    assert _wire.recipe_from_wire(unspecified) == Recipe()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"target": {"macs": 2.0}}, Code.INVALID_TARGET),
        ({"target": {"macs": float("nan")}}, Code.INVALID_TARGET),
        ({"target": {"beauty": 0.5}}, Code.INVALID_TARGET),
        ({"round_to": 0}, Code.INVALID_RECIPE),
        ({"criterion": 99}, Code.INVALID_RECIPE),
        ({"granularity": [recipe_pb2.GRANULARITY_UNSPECIFIED]}, Code.INVALID_RECIPE),
        (
            {"granularity": [recipe_pb2.GRANULARITY_HEAD, recipe_pb2.GRANULARITY_HEAD_DIM]},
            Code.INVALID_RECIPE,
        ),
    ],
)
def test_bad_recipes_are_refused(fields: dict[str, Any], code: Code) -> None:
    with pytest.raises(errors.Refused) as caught:
        _wire.recipe_from_wire(recipe_pb2.Recipe(**fields))
    assert caught.value.refusal.code is code


# ---- refusals ----------------------------------------------------------------------------------


class FailedCall(grpc.RpcError):
    """What a client sees of a status."""

    def __init__(self, status: status_pb2.Status) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return next(code for code in grpc.StatusCode if code.value[0] == self._status.code)

    def details(self) -> str:
        return str(self._status.message)

    def trailing_metadata(self) -> Any:
        return ((_wire.STATUS_KEY, self._status.SerializeToString()),)


@pytest.mark.parametrize("code", list(Code))
def test_every_refusal_crosses_whole(code: Code) -> None:
    refusal = Refusal(
        code=code, message="über", nodes=("a", "b"), expected="1", found="2", hint="do"
    )
    status = _wire.refusal_to_status(refusal, "id")
    assert grpc.StatusCode.OK.value[0] != status.code
    error = _wire.error_of(FailedCall(status), "target")
    assert isinstance(error, errors.Refused)
    assert error.refusal == refusal
    assert isinstance(error, errors.VerificationFailed) == (code is Code.VERIFICATION_FAILED)


def test_status_carries_what_any_grpc_program_understands() -> None:
    refusal = Refusal(code=Code.UNREACHABLE_TARGET, message="m", expected="1", found="2")
    status = _wire.refusal_to_status(refusal, "the-id")
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(request)
    assert (info.reason, info.domain) == ("UNREACHABLE_TARGET", "secateur.dev")
    assert dict(info.metadata) == {"expected": "1", "found": "2"}
    assert request.request_id == "the-id"


def test_large_refusals_are_cut_to_fit_in_metadata() -> None:
    nodes = tuple(f"some/rather/long/name/of/a/node/{i}" for i in range(5000))
    refusal = Refusal(code=Code.INVALID_MODEL, message="é" * 9000, nodes=nodes, found="f" * 9000)
    status = _wire.refusal_to_status(refusal, "id")
    assert len(status.SerializeToString()) * 4 / 3 < 8000
    error = _wire.error_of(FailedCall(status), "target")
    assert isinstance(error, errors.Refused)
    kept = error.refusal.nodes
    assert kept[:-1] == nodes[: len(kept) - 1]
    assert kept[-1] == f"… and {len(nodes) - len(kept) + 1} more"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerError),
        (grpc.StatusCode.INTERNAL, errors.ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.ServerError),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.ServerError),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.Cancelled),
    ],
)
def test_other_failures_become_the_two_other_exceptions(
    code: grpc.StatusCode, kind: type[Exception]
) -> None:
    status = _wire.failure_to_status(code, "text", "REASON", "id")
    assert type(_wire.error_of(FailedCall(status), "target")) is kind


def test_a_busy_server_says_when_to_come_again() -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    status = _wire.failure_to_status(code, "text", "REASON", "id", retry_s=2.5)
    error = _wire.error_of(FailedCall(status), "target")
    assert isinstance(error, errors.ServerBusy)
    assert error.retry_s == 2.5


def test_operations_say_how_they_stand() -> None:
    fields = set(operation.Operation.model_fields) - {"name", "error", "refusal"}
    assert fields == set(pruning_pb2.PruneMetadata.DESCRIPTOR.fields_by_name)
    states = enum_names(pruning_pb2.OperationState, "OPERATION_STATE_")
    assert states == set(operation.State)
    metadata = pruning_pb2.PruneMetadata(state="OPERATION_STATE_RUNNING", attempts=2)
    metadata.create_time.FromSeconds(1_000_000)
    metadata.progress.stage, metadata.progress.fraction = 3, 0.5  # type: ignore[assignment]
    message = operations_pb2.Operation(name="operations/x")
    message.metadata.Pack(metadata)
    found = _wire.operation_from_wire(message)
    assert (found.name, found.state, found.attempts) == ("operations/x", "RUNNING", 2)
    assert found.progress is not None and found.progress.stage is report.Stage.CRITERIA
    assert found.create_time.timestamp() == 1_000_000
    assert found.queue_position is None and found.failure is None
    metadata.progress.stage = 99  # type: ignore[assignment]
    message.metadata.Pack(metadata)
    assert _wire.operation_from_wire(message).progress is None


def test_an_operation_fails_as_its_call_would() -> None:
    refusal = Refusal(code=Code.VERIFICATION_FAILED, message="m", expected="1", found="2")
    cases = [
        ("FAILED", _wire.refusal_to_status(refusal, "id"), errors.VerificationFailed),
        ("FAILED", status_pb2.Status(code=13, message="m"), errors.ServerError),
        ("CANCELLED", status_pb2.Status(code=1, message="m"), errors.Cancelled),
    ]
    for state, status, kind in cases:
        metadata = pruning_pb2.PruneMetadata(state=f"OPERATION_STATE_{state}")
        metadata.create_time.FromSeconds(1)
        message = operations_pb2.Operation(name="operations/x", done=True, error=status)
        message.metadata.Pack(metadata)
        assert type(_wire.operation_from_wire(message).failure) is kind


def test_refusal_of_a_newer_server_is_shown_as_text() -> None:
    refusal = refusal_pb2.Refusal(code=9999, message="m")  # type: ignore[arg-type]
    status = status_pb2.Status(code=3, message="what it says")
    status.details.add().Pack(refusal)
    error = _wire.error_of(FailedCall(status), "target")
    assert isinstance(error, errors.ServerError)
    assert "what it says" in str(error)


# ---- messages with content ---------------------------------------------------------------------

WRITES = st.builds(
    bytestream_pb2.WriteRequest,
    resource_name=st.text(max_size=9),
    write_offset=st.integers(-(2**63), 2**63 - 1),
    finish_write=st.booleans(),
    data=st.binary(max_size=300),
)


@given(WRITES)
def test_content_is_joined_and_parted_as_protobuf_does(message: Any) -> None:
    bare = bytestream_pb2.WriteRequest()
    bare.CopyFrom(message)
    bare.ClearField("data")
    content = joined(bare, message.data)
    assert bytestream_pb2.WriteRequest.FromString(content) == message
    for serialised in (content, message.SerializeToString()):
        assert parted(bytestream_pb2.WriteRequest, serialised) == (bare, message.data)


@given(WRITES, st.data())
def test_any_bytes_are_parted_as_protobuf_does(message: Any, data: st.DataObject) -> None:
    content = bytearray(message.SerializeToString() + data.draw(st.binary(max_size=20)))
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, min(len(content), 40) - 1))] = data.draw(
                st.integers(0, 255)
            )
    try:
        expected = bytestream_pb2.WriteRequest.FromString(bytes(content))
    except DecodeError:
        with pytest.raises(DecodeError):
            parted(bytestream_pb2.WriteRequest, bytes(content))
        return
    bare, found = parted(bytestream_pb2.WriteRequest, bytes(content))
    assert found == expected.data
    expected.ClearField("data")
    assert bare == expected
