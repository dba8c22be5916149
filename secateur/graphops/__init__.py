"""The engine: knows ONNX, NumPy and ONNX Runtime; knows nothing of gRPC.

The order in which data flows is the order in which to read:

    model → coupling → criteria → planning → surgery → verify → profile

`pipeline` runs them; everything about an operator is in `rules`.
"""

from secateur.graphops.pipeline import inspect, profile, prune

__all__ = ["inspect", "profile", "prune"]
