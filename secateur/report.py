"""What came out: the values that every face shows. Names equal the fields of the wire messages."""

from __future__ import annotations

import enum
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict


class Stage(enum.StrEnum):
    """The stages of a prune, in order."""

    LOAD = "LOAD"
    COUPLING = "COUPLING"
    CRITERIA = "CRITERIA"
    PLANNING = "PLANNING"
    SURGERY = "SURGERY"
    REPAIR = "REPAIR"
    SPARSITY = "SPARSITY"
    QUANTIZE = "QUANTIZE"
    VERIFY = "VERIFY"
    PROFILE = "PROFILE"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Progress(_Value):
    """One step forward. `fraction` of the whole job in [0, 1]; `message` is for people."""

    stage: Stage
    fraction: float
    message: str = ""


ProgressCallback = Callable[[Progress], object]


class Latency(_Value):
    """ONNX Runtime latency on the machine that ran the job, in milliseconds."""

    p50_ms: float
    p95_ms: float
    runs: int


class Cost(_Value):
    """What a model costs.

    Attributes:
        macs: multiply-accumulates of one forward pass at the example input shapes.
        params: weights: elements of floating-point and quantised constants.
        bytes: of the serialised model.
        latency: measured; absent when not asked for.
        peak_memory_bytes: growth of resident memory while a fresh process loads and runs the
            model in ONNX Runtime; absent when not asked for.
        nonzero: weights that are not zero, before quantisation; absent where no single weights
            went, and in a `Profile` where more than nine in ten are not zero.
        compressed_bytes: of the serialised model after zlib; absent likewise.
    """

    macs: int
    params: int
    bytes: int
    latency: Latency | None = None
    peak_memory_bytes: int | None = None
    nonzero: int | None = None
    compressed_bytes: int | None = None


class Drift(_Value):
    """How far one output moved from the original's, over the samples run.

    Attributes:
        output: its name.
        relative_error: ‖result − original‖₂ / ‖original‖₂.
        cosine: cosine similarity of the flattened outputs.
        top1_agreement: share of positions with the same argmax along the last axis; absent for
            outputs with fewer than two entries there.
        kl: mean Kullback-Leibler divergence Σ p·ln(p/q) of the result q from the original p, in
            nats; absent where the output is not a distribution along the last axis.
    """

    output: str
    relative_error: float
    cosine: float
    top1_agreement: float | None = None
    kl: float | None = None


class Verification(_Value):
    """What ONNX Runtime was asked and answered.

    Attributes:
        samples: input sets run (calibration samples, or random ones when none were given).
        from_calibration: whether those were calibration samples.
        held_back: whether they are samples that nothing was fitted or measured on.
        batch_sizes: batch sizes that ran; one entry when the batch is fixed.
        drift: one entry per floating-point output.
        resized: those of them that were of other sizes than the original's, along axes whose
            sizes the data decide; their drift is over the positions that both have.
        not_finite: outputs of which the original gave no finite number; of their drift nothing is
            known.
    """

    samples: int
    from_calibration: bool
    held_back: bool = False
    batch_sizes: tuple[int, ...]
    drift: tuple[Drift, ...]
    resized: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()


class Accuracy(_Value):
    """How often one output answers what labels say.

    Attributes:
        output: its name.
        labels: how many were scored; those below zero are not.
        top1_before, top1_after: share of them whose class has the highest score, in the original
            and in the result.
        top5_before, top5_after: share of them whose class has one of the five highest; absent
            where there are no more classes.
        from_calibration: whether the samples are calibration samples.
        held_back: whether they are calibration samples that nothing was fitted or measured on;
            false for samples that came with the labels.
    """

    output: str
    labels: int
    top1_before: float
    top1_after: float
    top5_before: float | None = None
    top5_after: float | None = None
    from_calibration: bool = False
    held_back: bool = False


class Group(_Value):
    """Units that slice the same tensors on the same axes and are ranked against one another.

    Attributes:
        id: stable within one model.
        kind: `channel`, `head`, `head_dim` or `expert`.
        units: how many there are.
        kept: how many are kept (equal to `units` in `inspect`).
        channels_per_unit: positions of the widest tensor axis that one unit takes.
        tensors: `name[axis]` of every constant the units slice.
        frozen: always empty: what may not go is in no group, and `Inspection.frozen` says why.
        normalised_by: nodes that normalise or reduce across these channels, where the exactness
            law has named exceptions (LayerNormalization, Softmax, ReduceMean …).
    """

    id: str
    kind: str
    units: int
    kept: int
    channels_per_unit: int
    tensors: tuple[str, ...]
    frozen: str = ""
    normalised_by: tuple[str, ...] = ()


class Frozen(_Value):
    """A reason for which channels stay.

    Attributes:
        code: stable: `NO_RULE`, `UNSUPPORTED_FORM`, `UNKNOWN_SHAPE`, `SUBGRAPH`, `GRAPH_OUTPUT`,
            `IGNORED`; `BARE_AXIS` where it meets what cannot be cut; or what must stay whole:
            `BATCH`, `SEQUENCE`, `SPATIAL`, `ORDERED`, `DIRECTION`, `BLOCK`, `HEAD_SIZE`,
            `SHARED_HEAD`, or `INDEXED` where positions are named by numbers.
        node: the node where it arises (its name, or its first output's when unnamed).
        op_type: its operator, with domain and opset: `ai.onnx::TopK-11`; empty for graph outputs.
        detail: one sentence.
        channels: positions that this reason alone keeps, first reason counted.
    """

    code: str
    node: str
    op_type: str
    detail: str
    channels: int


class Region(_Value):
    """A part of the model between two values of one shape and type, or why a layer is in none.

    Attributes:
        entry: the value that takes the place of `exit` when the region goes.
        exit: the value it ends in; empty in a refusal where paths only meet at the outputs.
        layers: matrix products with weights in it, by node.
        macs: multiply-accumulates of one forward pass that go with it.
        params: weights that go with it.
        refused: why it may not go; empty when it may.
    """

    entry: str
    exit: str
    layers: tuple[str, ...]
    macs: int
    params: int
    refused: str = ""


class Removal(_Value):
    """A region that went.

    Attributes:
        region: itself.
        influence: 1 − cos(entry, exit) in the original, on calibration samples; absent where a
            plan was replayed.
        drift: Σ‖y′ − y‖² / Σ‖y − ȳ‖² over the outputs, with this region and those chosen before
            it gone and nothing repaired; absent where a plan was replayed.
    """

    region: Region
    influence: float | None = None
    drift: float | None = None


class Rotated(_Value):
    """A stream of channels, cut in another basis than the original's.

    Attributes:
        group: id of its group of units.
        channels: that it had.
        needed: of the new basis, for 0.99 of what the nodes that read them make of them.
    """

    group: str
    channels: int
    needed: int


class Factored(_Value):
    """A matrix product that was split in two.

    Attributes:
        node: itself.
        inputs, outputs, rank: channels before, behind and between the two.
        error: E‖y − ŷ‖² / E‖y‖² on calibration data, before repair; without them
            ‖W − Ŵ‖² / ‖W‖².
    """

    node: str
    inputs: int
    outputs: int
    rank: int
    error: float


class Division(_Value):
    """A division of the budget that was carried out and measured; units made up the rest.

    Attributes:
        regions: that went whole.
        factored: matrix products that were split.
        drift: Σ‖y′ − y‖² / Σ‖y − ȳ‖² over the outputs, repaired as asked, on samples that no fit
            had seen, decided and repaired from few samples; absent where units could not make up
            the rest.
        chosen: whether it was taken.
        final_drift: the same from all samples and with the whole repair, where more than one
            division was carried out so; the least was taken.
    """

    regions: int
    factored: int = 0
    drift: float | None = None
    chosen: bool = False
    final_drift: float | None = None


class RepairStep(_Value):
    """One fit.

    Attributes:
        node: whose numbers were fitted, or kept where no fit helped.
        error_before, error_after: E‖y − ŷ‖² / Var(y) of the node's output on calibration batches
            that its fit did not see.
        method: what was fitted: weight and bias (`refit`); where that does not apply, scale and
            shift per channel (`scale_shift`), or one of them (`scale`, `shift`); or the layers of
            a block together, of which `node` is the last (`joint`).
    """

    node: str
    error_before: float
    error_after: float
    method: str = "refit"


class Folded(_Value):
    """What became of the means of channels that a matrix product no longer reads, without data.

    Attributes:
        node: that read them.
        channels: positions of its input that went.
        folded: those whose mean moved into its bias: all of them, or 0 where no statistics of
            BatchNormalizations tell it or the product can have no bias.
    """

    node: str
    channels: int
    folded: int


class Sensitivity(_Value):
    """What a cut of one group alone does to the outputs, after its consumers are compensated.

    Attributes:
        group: its id.
        removed: numbers of units that went, the least important ones.
        drift: Σ‖y′ − y‖² / Σ‖y − ȳ‖² over the outputs, at each of them.
    """

    group: str
    removed: tuple[int, ...]
    drift: tuple[float, ...]


class SparseWeight(_Value):
    """What became of one weight matrix whose single weights may go.

    Attributes:
        node: that reads it.
        tensor: name of the weight in the result.
        criterion: its weights were ranked by; another than was asked for where the matrix is too
            wide for second moments, empty where it was left alone.
        density: share of its entries that are not zero.
        error: E‖y − ŷ‖² / E‖y‖² of the node's output for what it reads on calibration data;
            absent without them.
        dense: why it was left as it was; empty where it was not.
        stored_sparse: whether it is stored as a sparse initializer.
    """

    node: str
    tensor: str
    criterion: str = ""
    density: float
    error: float | None = None
    dense: str = ""
    stored_sparse: bool = False


class StageDrift(_Value):
    """Drift of the outputs from the original's after one stage: `pruning` or `quantisation`."""

    stage: str
    drift: tuple[Drift, ...]


class Inspection(_Value):
    """What can go, what must stay and why.

    Attributes:
        groups, frozen: what can go, and reasons for which the rest stays.
        cost: of the model.
        sensitivity: of each group that was tried, where calibration data were given.
        regions: parts that can be left out whole, nested ones at every level; then the layers
            that are in none, with reasons.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    cost: Cost
    sensitivity: tuple[Sensitivity, ...] = ()
    regions: tuple[Region, ...] = ()


class Report(_Value):
    """The evidence that comes with a pruned model.

    Attributes:
        before, after: cost of the original and of the result.
        groups: every prunable group, with how much of it was kept.
        frozen: reasons for which channels stayed.
        removed: regions that went whole, in the order in which they were chosen.
        rotated: streams of channels that were cut in another basis than the original's.
        factored: matrix products that were split, in graph order.
        vocabulary: the original's id of each token that is left, by its new id; empty where none
            went.
        divisions: of the budget between regions, ranks and units, by how many regions and
            products; empty unless units and one of the others might go.
        sensitivity: of each group that was tried, where the scope was measured.
        folded: what became of the means of channels that went; empty with calibration data and
            without repair.
        repair: every fit, in graph order; empty without repair.
        sparse_weights: what became of each weight matrix; empty unless single weights went.
        stage_drift: drift as it grew, stage by stage; empty without quantisation.
        verification: what ONNX Runtime said.
        accuracy: one entry per output that labels were given for; empty without labels.
        warnings: things a person should know, such as a result that is slower.
        seconds: wall time of each stage.
    """

    before: Cost
    after: Cost
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    removed: tuple[Removal, ...] = ()
    rotated: tuple[Rotated, ...] = ()
    factored: tuple[Factored, ...] = ()
    vocabulary: tuple[int, ...] = ()
    divisions: tuple[Division, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    repair: tuple[RepairStep, ...] = ()
    folded: tuple[Folded, ...] = ()
    sparse_weights: tuple[SparseWeight, ...] = ()
    stage_drift: tuple[StageDrift, ...] = ()
    verification: Verification
    accuracy: tuple[Accuracy, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float]


class Profile(_Value):
    """Cost of a model, and of another one measured alternately with it when one was given."""

    model: Cost
    against: Cost | None = None
    latency_ratio: float | None = None
    drift: tuple[Drift, ...] = ()
