from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Criterion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CRITERION_UNSPECIFIED: _ClassVar[Criterion]
    CRITERION_L1: _ClassVar[Criterion]
    CRITERION_L2: _ClassVar[Criterion]
    CRITERION_RANDOM: _ClassVar[Criterion]
    CRITERION_BN_SCALE: _ClassVar[Criterion]
    CRITERION_ACTIVATION: _ClassVar[Criterion]
    CRITERION_RECONSTRUCTION: _ClassVar[Criterion]
    CRITERION_LAMP: _ClassVar[Criterion]
    CRITERION_FPGM: _ClassVar[Criterion]
    CRITERION_RMS: _ClassVar[Criterion]
    CRITERION_APOZ: _ClassVar[Criterion]
    CRITERION_VARIANCE: _ClassVar[Criterion]
    CRITERION_WANDA: _ClassVar[Criterion]
    CRITERION_FLUCTUATION: _ClassVar[Criterion]
    CRITERION_TAYLOR: _ClassVar[Criterion]
    CRITERION_FISHER: _ClassVar[Criterion]

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_SUM: _ClassVar[Reduction]
    REDUCTION_MEAN: _ClassVar[Reduction]
    REDUCTION_MAX: _ClassVar[Reduction]
    REDUCTION_FIRST: _ClassVar[Reduction]

class Normaliser(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NORMALISER_UNSPECIFIED: _ClassVar[Normaliser]
    NORMALISER_NONE: _ClassVar[Normaliser]
    NORMALISER_MEAN: _ClassVar[Normaliser]
    NORMALISER_MAX: _ClassVar[Normaliser]
    NORMALISER_ISOMORPHIC: _ClassVar[Normaliser]

class Granularity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRANULARITY_UNSPECIFIED: _ClassVar[Granularity]
    GRANULARITY_CHANNEL: _ClassVar[Granularity]
    GRANULARITY_HEAD: _ClassVar[Granularity]
    GRANULARITY_HEAD_DIM: _ClassVar[Granularity]
    GRANULARITY_WEIGHT: _ClassVar[Granularity]
    GRANULARITY_LAYER: _ClassVar[Granularity]
    GRANULARITY_RANK: _ClassVar[Granularity]
    GRANULARITY_EXPERT: _ClassVar[Granularity]

class WeightCriterion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_CRITERION_UNSPECIFIED: _ClassVar[WeightCriterion]
    WEIGHT_CRITERION_MAGNITUDE: _ClassVar[WeightCriterion]
    WEIGHT_CRITERION_WANDA: _ClassVar[WeightCriterion]
    WEIGHT_CRITERION_SECOND_ORDER: _ClassVar[WeightCriterion]

class Quantize(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZE_UNSPECIFIED: _ClassVar[Quantize]
    QUANTIZE_INT8: _ClassVar[Quantize]
    QUANTIZE_INT8_DYNAMIC: _ClassVar[Quantize]
    QUANTIZE_FP16: _ClassVar[Quantize]

class Grouped(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUPED_UNSPECIFIED: _ClassVar[Grouped]
    GROUPED_AUTO: _ClassVar[Grouped]
    GROUPED_WHOLE: _ClassVar[Grouped]
    GROUPED_BALANCED: _ClassVar[Grouped]

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_LOCAL: _ClassVar[Scope]
    SCOPE_GLOBAL: _ClassVar[Scope]
    SCOPE_MEASURED: _ClassVar[Scope]
CRITERION_UNSPECIFIED: Criterion
CRITERION_L1: Criterion
CRITERION_L2: Criterion
CRITERION_RANDOM: Criterion
CRITERION_BN_SCALE: Criterion
CRITERION_ACTIVATION: Criterion
CRITERION_RECONSTRUCTION: Criterion
CRITERION_LAMP: Criterion
CRITERION_FPGM: Criterion
CRITERION_RMS: Criterion
CRITERION_APOZ: Criterion
CRITERION_VARIANCE: Criterion
CRITERION_WANDA: Criterion
CRITERION_FLUCTUATION: Criterion
CRITERION_TAYLOR: Criterion
CRITERION_FISHER: Criterion
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_SUM: Reduction
REDUCTION_MEAN: Reduction
REDUCTION_MAX: Reduction
REDUCTION_FIRST: Reduction
NORMALISER_UNSPECIFIED: Normaliser
NORMALISER_NONE: Normaliser
NORMALISER_MEAN: Normaliser
NORMALISER_MAX: Normaliser
NORMALISER_ISOMORPHIC: Normaliser
GRANULARITY_UNSPECIFIED: Granularity
GRANULARITY_CHANNEL: Granularity
GRANULARITY_HEAD: Granularity
GRANULARITY_HEAD_DIM: Granularity
GRANULARITY_WEIGHT: Granularity
GRANULARITY_LAYER: Granularity
GRANULARITY_RANK: Granularity
GRANULARITY_EXPERT: Granularity
WEIGHT_CRITERION_UNSPECIFIED: WeightCriterion
WEIGHT_CRITERION_MAGNITUDE: WeightCriterion
WEIGHT_CRITERION_WANDA: WeightCriterion
WEIGHT_CRITERION_SECOND_ORDER: WeightCriterion
QUANTIZE_UNSPECIFIED: Quantize
QUANTIZE_INT8: Quantize
QUANTIZE_INT8_DYNAMIC: Quantize
QUANTIZE_FP16: Quantize
GROUPED_UNSPECIFIED: Grouped
GROUPED_AUTO: Grouped
GROUPED_WHOLE: Grouped
GROUPED_BALANCED: Grouped
SCOPE_UNSPECIFIED: Scope
SCOPE_LOCAL: Scope
SCOPE_GLOBAL: Scope
SCOPE_MEASURED: Scope

class Recipe(_message.Message):
    __slots__ = ("target", "criterion", "granularity", "scope", "ignore", "round_to", "repair", "seed", "grouped", "reduction", "normaliser", "sparsity", "weight_criterion", "sparse_initializers", "quantize", "vocabulary", "rotate")
    class TargetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CRITERION_FIELD_NUMBER: _ClassVar[int]
    GRANULARITY_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    IGNORE_FIELD_NUMBER: _ClassVar[int]
    ROUND_TO_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    GROUPED_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    SPARSITY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_CRITERION_FIELD_NUMBER: _ClassVar[int]
    SPARSE_INITIALIZERS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    ROTATE_FIELD_NUMBER: _ClassVar[int]
    target: _containers.ScalarMap[str, float]
    criterion: Criterion
    granularity: _containers.RepeatedScalarFieldContainer[Granularity]
    scope: Scope
    ignore: _containers.RepeatedScalarFieldContainer[str]
    round_to: int
    repair: bool
    seed: int
    grouped: Grouped
    reduction: Reduction
    normaliser: Normaliser
    sparsity: str
    weight_criterion: WeightCriterion
    sparse_initializers: bool
    quantize: Quantize
    vocabulary: _containers.RepeatedScalarFieldContainer[int]
    rotate: bool
    def __init__(self, target: _Optional[_Mapping[str, float]] = ..., criterion: _Optional[_Union[Criterion, str]] = ..., granularity: _Optional[_Iterable[_Union[Granularity, str]]] = ..., scope: _Optional[_Union[Scope, str]] = ..., ignore: _Optional[_Iterable[str]] = ..., round_to: _Optional[int] = ..., repair: _Optional[bool] = ..., seed: _Optional[int] = ..., grouped: _Optional[_Union[Grouped, str]] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., normaliser: _Optional[_Union[Normaliser, str]] = ..., sparsity: _Optional[str] = ..., weight_criterion: _Optional[_Union[WeightCriterion, str]] = ..., sparse_initializers: _Optional[bool] = ..., quantize: _Optional[_Union[Quantize, str]] = ..., vocabulary: _Optional[_Iterable[int]] = ..., rotate: _Optional[bool] = ...) -> None: ...
