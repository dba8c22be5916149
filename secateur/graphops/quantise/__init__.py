"""Quantises what pruning has left, by ONNX Runtime's own quantiser and converter."""
