"""Operators that have no rule on purpose: whatever reaches them stays whole.

Each sentence is what a report says of a channel that such an operator keeps.
"""

from __future__ import annotations

from secateur.graphops.model.contrib import CONTRIB, LEARN
from secateur.graphops.model.spelling import SPELT
from secateur.graphops.rules.registry import explain

explain(
    "MaxUnpool NonMaxSuppression Unique",
    "positions are read or answered as numbers, and a cut would renumber them",
)
explain(
    "Bernoulli Multinomial RandomNormalLike RandomUniformLike",
    "it draws random numbers, and on another shape it draws others",
)
explain(
    "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert "
    "SequenceLength SequenceMap SplitToSequence",
    "it makes or reads a sequence of tensors, and which of them is read follows the data (where it "
    "does not, the sequence is taken apart)",
)
explain(
    "Optional OptionalGetElement OptionalHasElement",
    "it makes or reads an optional value, which may hold no tensor",
)
explain(
    "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    "it works on text or on counts of tokens, where there are no channels",
)
explain("ImageDecoder", "it reads the bytes of an image file, where there are no channels")
explain(
    "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "it is a training loss, whose classes are named by number",
)
explain(
    "BlackmanWindow HammingWindow HannWindow MelWeightMatrix STFT",
    "it is signal processing over the whole of an axis: every result depends on its length",
)
explain("Det", "a determinant needs both axes of its matrices whole")
explain("AffineGrid", "it makes positions in space from the entries of a matrix")
explain(
    "LinearAttention",
    "its recurrence ties the sizes of queries, keys, values and states to its numbers of heads",
)
explain("SwiGLU", "ONNX Runtime does not run it yet, so that no cut through it could be verified")
explain("Scan", "before opset 9 it scans a batch of sequences, each of its own length")

explain(
    "BiasAdd BiasSoftmax BiasSplitGelu GatedRelativePositionBias GemmFastGelu GroupNorm NhwcConv "
    "RelativePositionBias SkipGroupNorm",
    "ONNX Runtime runs it on GPUs only, so that no cut through it could be verified",
    domain=CONTRIB,
)
explain(
    "BeamSearch GreedySearch Sampling WhisperBeamSearch",
    "it holds whole models as subgraphs, and ties their sizes to its own attributes",
    domain=CONTRIB,
)
explain(
    "DecoderMaskedMultiHeadAttention PackedAttention PackedMultiHeadAttention PagedAttention "
    "SparseAttention",
    "it ties its heads to caches that come from outside",
    domain=CONTRIB,
)
explain(
    "GatherBlockQuantized MatMulBnb4 MatMulFpQ4",
    "its numbers are packed in blocks that run over rows",
    domain=CONTRIB,
)
for _domain, _op_type in SPELT:
    explain(
        _op_type,
        "its scales are not constants, or an attribute says what the plain operator that it stands "
        "for cannot say",
        domain=_domain,
    )
explain(
    "DynamicQuantizeLSTM",
    "its gates are packed side by side in integers whose scales are shared",
    domain=CONTRIB,
)
explain(
    "Conv MaxPool AveragePool GlobalMaxPool GlobalAveragePool ReorderInput ReorderOutput Upsample",
    "its weights are in blocks for the processor that the model was optimised on: prune the model "
    "before ONNX Runtime changes its layout",
    domain="com.microsoft.nchwc",
)

explain(
    "Binarizer FeatureVectorizer Imputer LinearClassifier LinearRegressor Normalizer Scaler "
    "SVMClassifier SVMRegressor TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor",
    "it reads its features by their place, and its weights are attributes",
    domain=LEARN,
)
explain(
    "ArrayFeatureExtractor CastMap CategoryMapper DictVectorizer LabelEncoder OneHotEncoder ZipMap",
    "it names classes or features, whose number is the model's face",
    domain=LEARN,
)
