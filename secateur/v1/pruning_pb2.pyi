import datetime

from google.longrunning import operations_pb2 as _operations_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from secateur.v1 import recipe_pb2 as _recipe_pb2
from secateur.v1 import report_pb2 as _report_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_QUEUED: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_SUCCEEDED: _ClassVar[OperationState]
    OPERATION_STATE_FAILED: _ClassVar[OperationState]
    OPERATION_STATE_CANCELLED: _ClassVar[OperationState]
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_QUEUED: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_SUCCEEDED: OperationState
OPERATION_STATE_FAILED: OperationState
OPERATION_STATE_CANCELLED: OperationState

class Payload(_message.Message):
    __slots__ = ("inline", "blob", "external_data")
    INLINE_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_DATA_FIELD_NUMBER: _ClassVar[int]
    inline: bytes
    blob: Blob
    external_data: _containers.RepeatedCompositeFieldContainer[DataFile]
    def __init__(self, inline: _Optional[bytes] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., external_data: _Optional[_Iterable[_Union[DataFile, _Mapping]]] = ...) -> None: ...

class DataFile(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: Payload
    def __init__(self, name: _Optional[str] = ..., content: _Optional[_Union[Payload, _Mapping]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("sha256", "size_bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size_bytes: int
    def __init__(self, sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[CalibrationPart]
    def __init__(self, parts: _Optional[_Iterable[_Union[CalibrationPart, _Mapping]]] = ...) -> None: ...

class CalibrationPart(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: Payload
    def __init__(self, name: _Optional[str] = ..., content: _Optional[_Union[Payload, _Mapping]] = ...) -> None: ...

class PruneRequest(_message.Message):
    __slots__ = ("model", "recipe", "calibration", "plan", "labels")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    model: Payload
    recipe: _recipe_pb2.Recipe
    calibration: Calibration
    plan: Payload
    labels: Calibration
    def __init__(self, model: _Optional[_Union[Payload, _Mapping]] = ..., recipe: _Optional[_Union[_recipe_pb2.Recipe, _Mapping]] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., plan: _Optional[_Union[Payload, _Mapping]] = ..., labels: _Optional[_Union[Calibration, _Mapping]] = ...) -> None: ...

class PruneResponse(_message.Message):
    __slots__ = ("progress", "result")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    progress: _report_pb2.Progress
    result: PruneResult
    def __init__(self, progress: _Optional[_Union[_report_pb2.Progress, _Mapping]] = ..., result: _Optional[_Union[PruneResult, _Mapping]] = ...) -> None: ...

class PruneResult(_message.Message):
    __slots__ = ("model", "plan", "report")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    model: Payload
    plan: Payload
    report: _report_pb2.Report
    def __init__(self, model: _Optional[_Union[Payload, _Mapping]] = ..., plan: _Optional[_Union[Payload, _Mapping]] = ..., report: _Optional[_Union[_report_pb2.Report, _Mapping]] = ...) -> None: ...

class StartPruneRequest(_message.Message):
    __slots__ = ("model", "recipe", "calibration", "plan", "request_id", "labels")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    model: Payload
    recipe: _recipe_pb2.Recipe
    calibration: Calibration
    plan: Payload
    request_id: str
    labels: Calibration
    def __init__(self, model: _Optional[_Union[Payload, _Mapping]] = ..., recipe: _Optional[_Union[_recipe_pb2.Recipe, _Mapping]] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., plan: _Optional[_Union[Payload, _Mapping]] = ..., request_id: _Optional[str] = ..., labels: _Optional[_Union[Calibration, _Mapping]] = ...) -> None: ...

class PruneMetadata(_message.Message):
    __slots__ = ("progress", "state", "queue_position", "attempts", "create_time", "start_time", "end_time", "expire_time", "estimated_end_time")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_END_TIME_FIELD_NUMBER: _ClassVar[int]
    progress: _report_pb2.Progress
    state: OperationState
    queue_position: int
    attempts: int
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    estimated_end_time: _timestamp_pb2.Timestamp
    def __init__(self, progress: _Optional[_Union[_report_pb2.Progress, _Mapping]] = ..., state: _Optional[_Union[OperationState, str]] = ..., queue_position: _Optional[int] = ..., attempts: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., estimated_end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("model", "recipe", "calibration")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    model: Payload
    recipe: _recipe_pb2.Recipe
    calibration: Calibration
    def __init__(self, model: _Optional[_Union[Payload, _Mapping]] = ..., recipe: _Optional[_Union[_recipe_pb2.Recipe, _Mapping]] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("inspection",)
    INSPECTION_FIELD_NUMBER: _ClassVar[int]
    inspection: _report_pb2.Inspection
    def __init__(self, inspection: _Optional[_Union[_report_pb2.Inspection, _Mapping]] = ...) -> None: ...

class ProfileRequest(_message.Message):
    __slots__ = ("model", "against")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AGAINST_FIELD_NUMBER: _ClassVar[int]
    model: Payload
    against: Payload
    def __init__(self, model: _Optional[_Union[Payload, _Mapping]] = ..., against: _Optional[_Union[Payload, _Mapping]] = ...) -> None: ...

class ProfileResponse(_message.Message):
    __slots__ = ("profile",)
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    profile: _report_pb2.Profile
    def __init__(self, profile: _Optional[_Union[_report_pb2.Profile, _Mapping]] = ...) -> None: ...
