"""What is known of each operator; importing this package fills the registry.

| file | family |
|---|---|
| elementwise | unary, and everything that broadcasts |
| contraction | Gemm, MatMul, Einsum |
| convolution | Conv, ConvTranspose and their like |
| movement | transposes, reshapes and other changes of axes |
| indexing | Slice, Split, Gather, Concat, Pad |
| positions | Trilu, OneHot, GatherElements and others that leave some axes alone |
| reduction | reductions, Softmax, ArgMax |
| normalisation | Batch-, Layer-, Group-, Instance-, RMS- and LRNormalization |
| recurrent | RNN, GRU, LSTM |
| spatial | pooling, Resize, depth-to-space |
| attention | fused attention, rotary embedding |
| experts | mixtures of experts in one node |
| fused | what ONNX Runtime's optimizers emit, but for what `model.spelling` spells out |
| quantised | products of integers, likewise |
| control | If, Loop, Scan and their bodies |
| source | Constant, ConstantOfShape, Shape arithmetic |
| frozen | what has no rule on purpose, and why |
"""

from secateur.graphops.rules import (  # noqa: F401  importing registers
    attention,
    contraction,
    control,
    convolution,
    elementwise,
    experts,
    frozen,
    fused,
    indexing,
    movement,
    normalisation,
    positions,
    quantised,
    recurrent,
    reduction,
    source,
    spatial,
)
from secateur.graphops.rules.registry import Rule, all_reasons, all_rules, find, of, reason

__all__ = ["Rule", "all_reasons", "all_rules", "find", "of", "reason"]
