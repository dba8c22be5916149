"""The engine: knows ONNX, NumPy and ONNX Runtime; knows nothing of gRPC.

The order in which data flows is the order in which to read:

    model → coupling → criteria → planning → surgery → repair → verify → profile

`pipeline` runs them; everything about an operator is in `rules`. Beside the way lie `calibration`
(what samples show of a model), `regions` (parts that can go whole), `rotation` (channels for which
any basis will do), `sparsity` and `quantise`.
"""

import os

# ONNX Runtime's official builds report their use, model names included, to their maker unless
# told not to before they are first imported. Models that pass here are other people's.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from secateur.graphops.pipeline import inspect, profile, prune

__all__ = ["inspect", "profile", "prune"]
