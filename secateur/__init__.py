"""Secateur removes what a trained ONNX model does not need, and proves that the rest runs.

    import secateur
    result = secateur.prune("model.onnx", secateur.Recipe(target={"macs": 0.5}))
    result.save("slim.onnx")

    with secateur.Client("localhost:50051") as client:
        result = client.prune("model.onnx", secateur.Recipe(target={"macs": 0.5}))

Importing this package loads neither the engine (ONNX Runtime, SciPy) nor gRPC: both come with
the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur.errors import (
    Cancelled,
    Code,
    Refusal,
    Refused,
    SecateurError,
    ServerBusy,
    ServerError,
    VerificationFailed,
)
from secateur.operation import Operation
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report import Inspection, Profile, Progress, Report, Stage
from secateur.result import Result

if TYPE_CHECKING:
    import secateur.aio as aio
    from secateur._connect import Tls
    from secateur.client import Client
    from secateur.graphops import inspect, profile, prune

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "Client",
    "Code",
    "Inspection",
    "Operation",
    "Plan",
    "Profile",
    "Progress",
    "Recipe",
    "Refusal",
    "Refused",
    "Report",
    "Result",
    "SecateurError",
    "ServerBusy",
    "ServerError",
    "Stage",
    "Tls",
    "VerificationFailed",
    "__version__",
    "aio",
    "inspect",
    "profile",
    "prune",
]

_LAZY = {
    "Client": "secateur.client",
    "Tls": "secateur._connect",
    "inspect": "secateur.graphops",
    "profile": "secateur.graphops",
    "prune": "secateur.graphops",
}


def __getattr__(name: str) -> Any:
    if name == "aio":
        return importlib.import_module("secateur.aio")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
