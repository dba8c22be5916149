"""Runs the result: ONNX Runtime's answer is the only evidence."""
