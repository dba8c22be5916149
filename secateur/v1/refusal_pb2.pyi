from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RefusalCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_CODE_UNSPECIFIED: _ClassVar[RefusalCode]
    REFUSAL_CODE_INVALID_MODEL: _ClassVar[RefusalCode]
    REFUSAL_CODE_UNSAFE_EXTERNAL_DATA: _ClassVar[RefusalCode]
    REFUSAL_CODE_MISSING_EXTERNAL_DATA: _ClassVar[RefusalCode]
    REFUSAL_CODE_UNSUPPORTED_VERSION: _ClassVar[RefusalCode]
    REFUSAL_CODE_MODEL_DOES_NOT_RUN: _ClassVar[RefusalCode]
    REFUSAL_CODE_INVALID_CALIBRATION: _ClassVar[RefusalCode]
    REFUSAL_CODE_INVALID_RECIPE: _ClassVar[RefusalCode]
    REFUSAL_CODE_INVALID_TARGET: _ClassVar[RefusalCode]
    REFUSAL_CODE_UNREACHABLE_TARGET: _ClassVar[RefusalCode]
    REFUSAL_CODE_UNMATCHED_IGNORE: _ClassVar[RefusalCode]
    REFUSAL_CODE_INVALID_PLAN: _ClassVar[RefusalCode]
    REFUSAL_CODE_NOTHING_TO_PRUNE: _ClassVar[RefusalCode]
    REFUSAL_CODE_VERIFICATION_FAILED: _ClassVar[RefusalCode]
    REFUSAL_CODE_LIMIT_EXCEEDED: _ClassVar[RefusalCode]
    REFUSAL_CODE_INVALID_LABELS: _ClassVar[RefusalCode]
REFUSAL_CODE_UNSPECIFIED: RefusalCode
REFUSAL_CODE_INVALID_MODEL: RefusalCode
REFUSAL_CODE_UNSAFE_EXTERNAL_DATA: RefusalCode
REFUSAL_CODE_MISSING_EXTERNAL_DATA: RefusalCode
REFUSAL_CODE_UNSUPPORTED_VERSION: RefusalCode
REFUSAL_CODE_MODEL_DOES_NOT_RUN: RefusalCode
REFUSAL_CODE_INVALID_CALIBRATION: RefusalCode
REFUSAL_CODE_INVALID_RECIPE: RefusalCode
REFUSAL_CODE_INVALID_TARGET: RefusalCode
REFUSAL_CODE_UNREACHABLE_TARGET: RefusalCode
REFUSAL_CODE_UNMATCHED_IGNORE: RefusalCode
REFUSAL_CODE_INVALID_PLAN: RefusalCode
REFUSAL_CODE_NOTHING_TO_PRUNE: RefusalCode
REFUSAL_CODE_VERIFICATION_FAILED: RefusalCode
REFUSAL_CODE_LIMIT_EXCEEDED: RefusalCode
REFUSAL_CODE_INVALID_LABELS: RefusalCode

class Refusal(_message.Message):
    __slots__ = ("code", "message", "nodes", "expected", "found", "hint")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    code: RefusalCode
    message: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    expected: str
    found: str
    hint: str
    def __init__(self, code: _Optional[_Union[RefusalCode, str]] = ..., message: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ..., expected: _Optional[str] = ..., found: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...
