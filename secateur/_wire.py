"""Between our values and the wire's messages: what client and server must agree on.

Field names are the same on both sides (a test holds them together), so a conversion is protobuf's
own JSON mapping plus pydantic's validation. Only enums differ: `STAGE_LOAD` on the wire is `LOAD`
here, `CRITERION_L2` is `l2`.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any, TypeVar

import grpc
import pydantic
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, duration_pb2, json_format, message
from google.rpc import error_details_pb2, status_pb2

from secateur._address import is_loopback
from secateur.errors import (
    Cancelled,
    Code,
    Refusal,
    SecateurError,
    ServerBusy,
    ServerError,
    raised,
)
from secateur.operation import Operation
from secateur.recipe import Recipe
from secateur.report import Progress
from secateur.v1 import pruning_pb2, recipe_pb2, refusal_pb2

INLINE_LIMIT = 2 << 20  # bytes; payloads above travel as blobs
CHUNK = 1 << 20  # bytes of one ByteStream message: measured, larger is not faster
INLINE_TOTAL = 8 << 20  # bytes; of all payloads in one request
KEEPALIVE_MS = 60_000  # between two signs of life of a connection with calls on it
MAX_MESSAGE = 16 << 20  # bytes; room for the payloads and for a long report
DOMAIN = "secateur.dev"  # of google.rpc.ErrorInfo
STATUS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

# Metadata is limited to 8 KiB by default in every gRPC implementation. base64 takes a third, and
# the status text (percent-encoded, up to three times its bytes) and the ErrorInfo lie beside it.
REFUSAL_LIMIT = 3584  # bytes
TEXT_LIMIT = 384  # bytes of the status text and of each text in a refusal that is cut
INFO_LIMIT = 96  # bytes of each text in an ErrorInfo

MESSAGE_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
)

STATUS_OF_CODE: dict[Code, grpc.StatusCode] = {
    Code.INVALID_MODEL: grpc.StatusCode.INVALID_ARGUMENT,
    Code.UNSAFE_EXTERNAL_DATA: grpc.StatusCode.INVALID_ARGUMENT,
    Code.MISSING_EXTERNAL_DATA: grpc.StatusCode.INVALID_ARGUMENT,
    Code.UNSUPPORTED_VERSION: grpc.StatusCode.FAILED_PRECONDITION,
    Code.MODEL_DOES_NOT_RUN: grpc.StatusCode.FAILED_PRECONDITION,
    Code.INVALID_CALIBRATION: grpc.StatusCode.INVALID_ARGUMENT,
    Code.INVALID_RECIPE: grpc.StatusCode.INVALID_ARGUMENT,
    Code.INVALID_TARGET: grpc.StatusCode.INVALID_ARGUMENT,
    Code.UNREACHABLE_TARGET: grpc.StatusCode.FAILED_PRECONDITION,
    Code.UNMATCHED_IGNORE: grpc.StatusCode.INVALID_ARGUMENT,
    Code.INVALID_PLAN: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOTHING_TO_PRUNE: grpc.StatusCode.FAILED_PRECONDITION,
    Code.VERIFICATION_FAILED: grpc.StatusCode.FAILED_PRECONDITION,
    Code.LIMIT_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.INVALID_LABELS: grpc.StatusCode.INVALID_ARGUMENT,
}

_Message = TypeVar("_Message", bound=message.Message)
_Value = TypeVar("_Value", bound=pydantic.BaseModel)

# ---- values ------------------------------------------------------------------------------------


def to_wire(value: pydantic.BaseModel, target: _Message) -> _Message:
    """Fills `target`, the message of the same name, from `value`."""
    fields = _quote_non_finite(value.model_dump(mode="json", exclude_none=True))
    for field, prefix, _ in _enums(target):
        if field in fields:
            fields[field] = _each(fields[field], lambda name, p=prefix: p + name.upper())
    return json_format.ParseDict(fields, target)


def from_wire(source: message.Message, kind: type[_Value]) -> _Value:
    """The value of class `kind` that `source`, the message of the same name, states.

    Fields that this version does not know are dropped: an older client reads a newer server.

    Raises:
        pydantic.ValidationError: the message states no such value.
    """
    return kind.model_validate(_fields(source, defaults=True))


def recipe_to_wire(recipe: Recipe) -> recipe_pb2.Recipe:
    """The message of a recipe; every field is set, so that a server's defaults do not matter."""
    return to_wire(recipe, recipe_pb2.Recipe())


def recipe_from_wire(source: recipe_pb2.Recipe) -> Recipe:
    """The recipe that an untrusted message asks for; unset fields take `Recipe`'s defaults.

    Raises:
        Refused: as `Recipe.parse`.
    """
    return Recipe.parse(_fields(source, defaults=False))


def operation_from_wire(source: operations_pb2.Operation) -> Operation:
    """What an operation whose metadata is a PruneMetadata says of itself.

    Raises:
        pydantic.ValidationError: it says nothing of that kind.
    """
    metadata = pruning_pb2.PruneMetadata()
    source.metadata.Unpack(metadata)
    fields = _fields(metadata, defaults=False)
    if metadata.HasField("progress"):
        try:
            fields["progress"] = from_wire(metadata.progress, Progress)
        except pydantic.ValidationError:  # a stage that only a newer server knows
            del fields["progress"]
    if source.HasField("error"):
        fields["error"] = source.error.message
        fields["refusal"] = _refusal_of(source.error)
    return Operation.model_validate({"name": source.name, **fields})


def _fields(source: message.Message, *, defaults: bool) -> dict[str, Any]:
    fields: dict[str, Any] = json_format.MessageToDict(
        source,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=defaults,
    )
    for field, prefix, cased in _enums(source):
        if field in fields:
            names = _each(fields[field], lambda n, p=prefix, c=cased: c(str(n).removeprefix(p)))
            fields[field] = names
            if names == "unspecified":  # as if unset
                del fields[field]
    return fields


def _enums(source: message.Message) -> list[tuple[str, str, Any]]:
    """(field, prefix of its values, case of our names) of each enum field; none lie deeper."""
    found = []
    for field in source.DESCRIPTOR.fields:
        if field.enum_type is not None:
            zero = field.enum_type.values_by_number[0].name
            cased = str.lower if isinstance(source, recipe_pb2.Recipe) else str.upper
            found.append((field.name, zero.removesuffix("UNSPECIFIED"), cased))
    return found


def _each(value: Any, function: Any) -> Any:
    return [function(item) for item in value] if isinstance(value, list) else function(value)


def _quote_non_finite(value: Any) -> Any:
    """JSON has no NaN or infinity; protobuf's mapping wants them as text."""
    if isinstance(value, dict):
        return {key: _quote_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quote_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


# ---- refusals and other failures ---------------------------------------------------------------


def refusal_to_status(refusal: Refusal, request_id: str) -> status_pb2.Status:
    """The gRPC status of a refusal, with the refusal and a google.rpc.ErrorInfo as details."""
    detail = _within_metadata(refusal)
    info = {name: _cut(getattr(detail, name), INFO_LIMIT) for name in ("expected", "found")}
    text = _cut(detail.message, TEXT_LIMIT)
    status = failure_to_status(STATUS_OF_CODE[refusal.code], text, refusal.code, request_id, info)
    packed = any_pb2.Any()
    packed.Pack(to_wire(detail, refusal_pb2.Refusal()))
    status.details.append(packed)
    return status


def failure_to_status(
    code: grpc.StatusCode,
    text: str,
    reason: str,
    request_id: str,
    info: dict[str, str] | None = None,
    retry_s: float | None = None,
) -> status_pb2.Status:
    """The gRPC status of any failure, with details from google.rpc.

    Always an ErrorInfo and a RequestInfo; with `retry_s`, a RetryInfo that says after how many
    seconds the same call may succeed.
    """
    status = status_pb2.Status(code=code.value[0], message=text)
    known = {key: value for key, value in (info or {}).items() if value}
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=known),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if retry_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(retry_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def error_of(error: grpc.RpcError, target: str) -> SecateurError:
    """The exception that a failed call means: the other end of `refusal_to_status`."""
    status = status_pb2.Status()
    metadata: Any = error.trailing_metadata()  # pairs, of a class that differs by kind of channel
    for key, value in metadata or ():
        if key == STATUS_KEY:
            with contextlib.suppress(message.DecodeError):
                status.ParseFromString(value)
    code: grpc.StatusCode = error.code()
    refusal = _refusal_of(status)
    if refusal is not None:
        return raised(refusal)
    text = f"{target}: {code.name}: {error.details()}"
    if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
        return Cancelled(text)
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in status.details):
        return ServerBusy(text, retry.retry_delay.ToTimedelta().total_seconds())
    return ServerError(text)


def _refusal_of(status: status_pb2.Status) -> Refusal | None:
    for detail in status.details:
        found = refusal_pb2.Refusal()
        try:
            if detail.Unpack(found):
                return from_wire(found, Refusal)
        except (message.DecodeError, pydantic.ValidationError):
            return None  # a code of a newer server: the status' own text must do
    return None


def _within_metadata(refusal: Refusal) -> Refusal:
    """`refusal`, shortened where it would not fit in metadata: texts first, then the node list."""
    if len(refusal.model_dump_json().encode()) <= REFUSAL_LIMIT:
        return refusal
    fields = ("message", "expected", "found", "hint")
    cut = {field: _cut(getattr(refusal, field), TEXT_LIMIT) for field in fields}
    kept = list(refusal.nodes)
    while True:
        left_out = len(refusal.nodes) - len(kept)
        nodes = (*kept, f"… and {left_out} more") if left_out else tuple(kept)
        shorter = refusal.model_copy(update={**cut, "nodes": nodes})
        if not kept or len(shorter.model_dump_json().encode()) <= REFUSAL_LIMIT:
            return shorter
        kept = kept[: len(kept) * 3 // 4]


def _cut(text: str, size: int) -> str:
    """`text`, or its start when it takes more than `size` bytes."""
    encoded = text.encode()
    if len(encoded) <= size:
        return text
    return encoded[: size - 3].decode(errors="ignore") + "…"


# ---- channels ----------------------------------------------------------------------------------


# Calls that may be repeated when the server was not reached: what they do twice is what they do
# once. Write is not among them: it goes on where it broke off, which takes a question in between.
# A streaming call is repeated only until its first message has arrived.
_REPEATABLE = {
    "secateur.v1.Pruning": ("Prune", "StartPrune", "Inspect", "Profile"),
    "google.longrunning.Operations": (
        *("GetOperation", "ListOperations", "WaitOperation", "CancelOperation"),
    ),
    "google.bytestream.ByteStream": ("QueryWriteStatus",),
    "grpc.health.v1.Health": ("Check",),
}
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method}
                for service, methods in _REPEATABLE.items()
                for method in methods
            ],
            "retryPolicy": {  # gRPC spreads each pause by a fifth
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # a server that fails them all is left alone
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
}


def channel_options(target: str) -> tuple[tuple[str, int | str], ...]:
    """Options of a client's channel to `target`."""
    options = (
        *MESSAGE_OPTIONS,
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),  # notices a server that vanished without a word
    )
    if is_loopback(target.rpartition(":")[0]):
        # a proxy set in the environment knows no way back to this machine
        return (*options, ("grpc.enable_http_proxy", 0))
    return options


# ---- blobs -------------------------------------------------------------------------------------


def blob_name(sha256: str, size: int) -> str:
    """The resource name under which a blob is read."""
    return f"blobs/{sha256}/{size}"


def upload_name(uuid: str, sha256: str, size: int) -> str:
    """The resource name under which a blob is written."""
    return f"uploads/{uuid}/{blob_name(sha256, size)}"
