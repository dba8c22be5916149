"""Calibration: unlabelled samples, run through a model in ONNX Runtime, and what they tell."""

from secateur.graphops.calibration.data import (
    Array,
    Calibration,
    CalibrationSource,
    Feeds,
    Samples,
    open_calibration,
    sample_count,
)

__all__ = [
    "Array",
    "Calibration",
    "CalibrationSource",
    "Feeds",
    "Samples",
    "open_calibration",
    "sample_count",
]
