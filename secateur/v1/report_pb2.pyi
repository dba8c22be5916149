from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_LOAD: _ClassVar[Stage]
    STAGE_COUPLING: _ClassVar[Stage]
    STAGE_CRITERIA: _ClassVar[Stage]
    STAGE_PLANNING: _ClassVar[Stage]
    STAGE_SURGERY: _ClassVar[Stage]
    STAGE_VERIFY: _ClassVar[Stage]
    STAGE_PROFILE: _ClassVar[Stage]
    STAGE_REPAIR: _ClassVar[Stage]
    STAGE_SPARSITY: _ClassVar[Stage]
    STAGE_QUANTIZE: _ClassVar[Stage]
STAGE_UNSPECIFIED: Stage
STAGE_LOAD: Stage
STAGE_COUPLING: Stage
STAGE_CRITERIA: Stage
STAGE_PLANNING: Stage
STAGE_SURGERY: Stage
STAGE_VERIFY: Stage
STAGE_PROFILE: Stage
STAGE_REPAIR: Stage
STAGE_SPARSITY: Stage
STAGE_QUANTIZE: Stage

class Progress(_message.Message):
    __slots__ = ("stage", "fraction", "message")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    fraction: float
    message: str
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., fraction: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ("p50_ms", "p95_ms", "runs")
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P95_MS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    p50_ms: float
    p95_ms: float
    runs: int
    def __init__(self, p50_ms: _Optional[float] = ..., p95_ms: _Optional[float] = ..., runs: _Optional[int] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("macs", "params", "bytes", "latency", "peak_memory_bytes", "nonzero", "compressed_bytes")
    MACS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONZERO_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_BYTES_FIELD_NUMBER: _ClassVar[int]
    macs: int
    params: int
    bytes: int
    latency: Latency
    peak_memory_bytes: int
    nonzero: int
    compressed_bytes: int
    def __init__(self, macs: _Optional[int] = ..., params: _Optional[int] = ..., bytes: _Optional[int] = ..., latency: _Optional[_Union[Latency, _Mapping]] = ..., peak_memory_bytes: _Optional[int] = ..., nonzero: _Optional[int] = ..., compressed_bytes: _Optional[int] = ...) -> None: ...

class Drift(_message.Message):
    __slots__ = ("output", "relative_error", "cosine", "top1_agreement", "kl")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    TOP1_AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    output: str
    relative_error: float
    cosine: float
    top1_agreement: float
    kl: float
    def __init__(self, output: _Optional[str] = ..., relative_error: _Optional[float] = ..., cosine: _Optional[float] = ..., top1_agreement: _Optional[float] = ..., kl: _Optional[float] = ...) -> None: ...

class Verification(_message.Message):
    __slots__ = ("samples", "from_calibration", "batch_sizes", "drift", "held_back", "resized", "not_finite")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FROM_CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZES_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    HELD_BACK_FIELD_NUMBER: _ClassVar[int]
    RESIZED_FIELD_NUMBER: _ClassVar[int]
    NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    samples: int
    from_calibration: bool
    batch_sizes: _containers.RepeatedScalarFieldContainer[int]
    drift: _containers.RepeatedCompositeFieldContainer[Drift]
    held_back: bool
    resized: _containers.RepeatedScalarFieldContainer[str]
    not_finite: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, samples: _Optional[int] = ..., from_calibration: _Optional[bool] = ..., batch_sizes: _Optional[_Iterable[int]] = ..., drift: _Optional[_Iterable[_Union[Drift, _Mapping]]] = ..., held_back: _Optional[bool] = ..., resized: _Optional[_Iterable[str]] = ..., not_finite: _Optional[_Iterable[str]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("id", "kind", "units", "kept", "channels_per_unit", "tensors", "frozen", "normalised_by")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_PER_UNIT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    NORMALISED_BY_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    units: int
    kept: int
    channels_per_unit: int
    tensors: _containers.RepeatedScalarFieldContainer[str]
    frozen: str
    normalised_by: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., units: _Optional[int] = ..., kept: _Optional[int] = ..., channels_per_unit: _Optional[int] = ..., tensors: _Optional[_Iterable[str]] = ..., frozen: _Optional[str] = ..., normalised_by: _Optional[_Iterable[str]] = ...) -> None: ...

class Frozen(_message.Message):
    __slots__ = ("code", "node", "op_type", "detail", "channels")
    CODE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    OP_TYPE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    code: str
    node: str
    op_type: str
    detail: str
    channels: int
    def __init__(self, code: _Optional[str] = ..., node: _Optional[str] = ..., op_type: _Optional[str] = ..., detail: _Optional[str] = ..., channels: _Optional[int] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("before", "after", "groups", "frozen", "verification", "warnings", "seconds", "sensitivity", "repair", "sparse_weights", "stage_drift", "removed", "accuracy", "divisions", "factored", "vocabulary", "folded", "rotated")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENSITIVITY_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    SPARSE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    STAGE_DRIFT_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    DIVISIONS_FIELD_NUMBER: _ClassVar[int]
    FACTORED_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    FOLDED_FIELD_NUMBER: _ClassVar[int]
    ROTATED_FIELD_NUMBER: _ClassVar[int]
    before: Cost
    after: Cost
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    frozen: _containers.RepeatedCompositeFieldContainer[Frozen]
    verification: Verification
    warnings: _containers.RepeatedScalarFieldContainer[str]
    seconds: _containers.ScalarMap[str, float]
    sensitivity: _containers.RepeatedCompositeFieldContainer[Sensitivity]
    repair: _containers.RepeatedCompositeFieldContainer[RepairStep]
    sparse_weights: _containers.RepeatedCompositeFieldContainer[SparseWeight]
    stage_drift: _containers.RepeatedCompositeFieldContainer[StageDrift]
    removed: _containers.RepeatedCompositeFieldContainer[Removal]
    accuracy: _containers.RepeatedCompositeFieldContainer[Accuracy]
    divisions: _containers.RepeatedCompositeFieldContainer[Division]
    factored: _containers.RepeatedCompositeFieldContainer[Factored]
    vocabulary: _containers.RepeatedScalarFieldContainer[int]
    folded: _containers.RepeatedCompositeFieldContainer[Folded]
    rotated: _containers.RepeatedCompositeFieldContainer[Rotated]
    def __init__(self, before: _Optional[_Union[Cost, _Mapping]] = ..., after: _Optional[_Union[Cost, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., frozen: _Optional[_Iterable[_Union[Frozen, _Mapping]]] = ..., verification: _Optional[_Union[Verification, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ..., seconds: _Optional[_Mapping[str, float]] = ..., sensitivity: _Optional[_Iterable[_Union[Sensitivity, _Mapping]]] = ..., repair: _Optional[_Iterable[_Union[RepairStep, _Mapping]]] = ..., sparse_weights: _Optional[_Iterable[_Union[SparseWeight, _Mapping]]] = ..., stage_drift: _Optional[_Iterable[_Union[StageDrift, _Mapping]]] = ..., removed: _Optional[_Iterable[_Union[Removal, _Mapping]]] = ..., accuracy: _Optional[_Iterable[_Union[Accuracy, _Mapping]]] = ..., divisions: _Optional[_Iterable[_Union[Division, _Mapping]]] = ..., factored: _Optional[_Iterable[_Union[Factored, _Mapping]]] = ..., vocabulary: _Optional[_Iterable[int]] = ..., folded: _Optional[_Iterable[_Union[Folded, _Mapping]]] = ..., rotated: _Optional[_Iterable[_Union[Rotated, _Mapping]]] = ...) -> None: ...

class Rotated(_message.Message):
    __slots__ = ("group", "channels", "needed")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    group: str
    channels: int
    needed: int
    def __init__(self, group: _Optional[str] = ..., channels: _Optional[int] = ..., needed: _Optional[int] = ...) -> None: ...

class Factored(_message.Message):
    __slots__ = ("node", "inputs", "outputs", "rank", "error")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    node: str
    inputs: int
    outputs: int
    rank: int
    error: float
    def __init__(self, node: _Optional[str] = ..., inputs: _Optional[int] = ..., outputs: _Optional[int] = ..., rank: _Optional[int] = ..., error: _Optional[float] = ...) -> None: ...

class Accuracy(_message.Message):
    __slots__ = ("output", "labels", "top1_before", "top1_after", "top5_before", "top5_after", "from_calibration", "held_back")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TOP1_BEFORE_FIELD_NUMBER: _ClassVar[int]
    TOP1_AFTER_FIELD_NUMBER: _ClassVar[int]
    TOP5_BEFORE_FIELD_NUMBER: _ClassVar[int]
    TOP5_AFTER_FIELD_NUMBER: _ClassVar[int]
    FROM_CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    HELD_BACK_FIELD_NUMBER: _ClassVar[int]
    output: str
    labels: int
    top1_before: float
    top1_after: float
    top5_before: float
    top5_after: float
    from_calibration: bool
    held_back: bool
    def __init__(self, output: _Optional[str] = ..., labels: _Optional[int] = ..., top1_before: _Optional[float] = ..., top1_after: _Optional[float] = ..., top5_before: _Optional[float] = ..., top5_after: _Optional[float] = ..., from_calibration: _Optional[bool] = ..., held_back: _Optional[bool] = ...) -> None: ...

class Division(_message.Message):
    __slots__ = ("regions", "drift", "chosen", "factored", "final_drift")
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    FACTORED_FIELD_NUMBER: _ClassVar[int]
    FINAL_DRIFT_FIELD_NUMBER: _ClassVar[int]
    regions: int
    drift: float
    chosen: bool
    factored: int
    final_drift: float
    def __init__(self, regions: _Optional[int] = ..., drift: _Optional[float] = ..., chosen: _Optional[bool] = ..., factored: _Optional[int] = ..., final_drift: _Optional[float] = ...) -> None: ...

class Removal(_message.Message):
    __slots__ = ("region", "influence", "drift")
    REGION_FIELD_NUMBER: _ClassVar[int]
    INFLUENCE_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    region: Region
    influence: float
    drift: float
    def __init__(self, region: _Optional[_Union[Region, _Mapping]] = ..., influence: _Optional[float] = ..., drift: _Optional[float] = ...) -> None: ...

class SparseWeight(_message.Message):
    __slots__ = ("node", "tensor", "density", "error", "dense", "stored_sparse", "criterion")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    STORED_SPARSE_FIELD_NUMBER: _ClassVar[int]
    CRITERION_FIELD_NUMBER: _ClassVar[int]
    node: str
    tensor: str
    density: float
    error: float
    dense: str
    stored_sparse: bool
    criterion: str
    def __init__(self, node: _Optional[str] = ..., tensor: _Optional[str] = ..., density: _Optional[float] = ..., error: _Optional[float] = ..., dense: _Optional[str] = ..., stored_sparse: _Optional[bool] = ..., criterion: _Optional[str] = ...) -> None: ...

class StageDrift(_message.Message):
    __slots__ = ("stage", "drift")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    stage: str
    drift: _containers.RepeatedCompositeFieldContainer[Drift]
    def __init__(self, stage: _Optional[str] = ..., drift: _Optional[_Iterable[_Union[Drift, _Mapping]]] = ...) -> None: ...

class RepairStep(_message.Message):
    __slots__ = ("node", "error_before", "error_after", "method")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_BEFORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_AFTER_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    node: str
    error_before: float
    error_after: float
    method: str
    def __init__(self, node: _Optional[str] = ..., error_before: _Optional[float] = ..., error_after: _Optional[float] = ..., method: _Optional[str] = ...) -> None: ...

class Folded(_message.Message):
    __slots__ = ("node", "channels", "folded")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    FOLDED_FIELD_NUMBER: _ClassVar[int]
    node: str
    channels: int
    folded: int
    def __init__(self, node: _Optional[str] = ..., channels: _Optional[int] = ..., folded: _Optional[int] = ...) -> None: ...

class Sensitivity(_message.Message):
    __slots__ = ("group", "removed", "drift")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    group: str
    removed: _containers.RepeatedScalarFieldContainer[int]
    drift: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, group: _Optional[str] = ..., removed: _Optional[_Iterable[int]] = ..., drift: _Optional[_Iterable[float]] = ...) -> None: ...

class Inspection(_message.Message):
    __slots__ = ("groups", "frozen", "cost", "sensitivity", "regions")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    SENSITIVITY_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    frozen: _containers.RepeatedCompositeFieldContainer[Frozen]
    cost: Cost
    sensitivity: _containers.RepeatedCompositeFieldContainer[Sensitivity]
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., frozen: _Optional[_Iterable[_Union[Frozen, _Mapping]]] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., sensitivity: _Optional[_Iterable[_Union[Sensitivity, _Mapping]]] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("entry", "exit", "layers", "macs", "params", "refused")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MACS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    entry: str
    exit: str
    layers: _containers.RepeatedScalarFieldContainer[str]
    macs: int
    params: int
    refused: str
    def __init__(self, entry: _Optional[str] = ..., exit: _Optional[str] = ..., layers: _Optional[_Iterable[str]] = ..., macs: _Optional[int] = ..., params: _Optional[int] = ..., refused: _Optional[str] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("model", "against", "latency_ratio", "drift")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AGAINST_FIELD_NUMBER: _ClassVar[int]
    LATENCY_RATIO_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    model: Cost
    against: Cost
    latency_ratio: float
    drift: _containers.RepeatedCompositeFieldContainer[Drift]
    def __init__(self, model: _Optional[_Union[Cost, _Mapping]] = ..., against: _Optional[_Union[Cost, _Mapping]] = ..., latency_ratio: _Optional[float] = ..., drift: _Optional[_Iterable[_Union[Drift, _Mapping]]] = ...) -> None: ...
