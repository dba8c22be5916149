"""What can go wrong, as values and as exceptions: one definition for every face.

    SecateurError
    ├── Refused                  model, recipe or calibration data cannot be honoured   exit 3
    │   └── VerificationFailed   the pruned model did not pass its checks               exit 4
    ├── ServerError              the server is unreachable or failed                    exit 5
    │   └── ServerBusy           it has no room now, and says when to come again        exit 5
    └── Cancelled                the call was cancelled, or its deadline passed         exit 130

A `Refusal` is the value inside: the same object is the text of the exception, the detail of a
gRPC status and the JSON of the command line.
"""

from __future__ import annotations

import enum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Code(enum.StrEnum):
    """Stable reasons for refusing. Programs may switch on them; they are never renamed."""

    INVALID_MODEL = "INVALID_MODEL"
    UNSAFE_EXTERNAL_DATA = "UNSAFE_EXTERNAL_DATA"
    MISSING_EXTERNAL_DATA = "MISSING_EXTERNAL_DATA"
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION"
    MODEL_DOES_NOT_RUN = "MODEL_DOES_NOT_RUN"
    INVALID_CALIBRATION = "INVALID_CALIBRATION"
    INVALID_RECIPE = "INVALID_RECIPE"
    INVALID_TARGET = "INVALID_TARGET"
    UNREACHABLE_TARGET = "UNREACHABLE_TARGET"
    UNMATCHED_IGNORE = "UNMATCHED_IGNORE"
    INVALID_PLAN = "INVALID_PLAN"
    NOTHING_TO_PRUNE = "NOTHING_TO_PRUNE"
    VERIFICATION_FAILED = "VERIFICATION_FAILED"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    INVALID_LABELS = "INVALID_LABELS"


class Refusal(BaseModel):
    """Why something was not done.

    Attributes:
        code: the stable reason.
        message: one sentence for people, naming the thing concerned.
        nodes: names of the nodes, tensors or inputs concerned, possibly none.
        expected: what was needed, as text; with `found`, the two numbers that disagree.
        found: what there was.
        hint: the way out, one sentence; may be empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: Code
    message: str
    nodes: tuple[str, ...] = ()
    expected: str = ""
    found: str = ""
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}"
        if self.expected or self.found:
            text += f" (expected {self.expected or 'nothing'}, found {self.found or 'nothing'})"
        if self.nodes:
            shown = ", ".join(self.nodes[:5])
            text += f" [{shown}{', …' if len(self.nodes) > 5 else ''}]"
        if self.hint:
            text += f". {self.hint}"
        return text


class SecateurError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class Refused(SecateurError):
    """The request cannot be honoured; `refusal` says why and what to do."""

    exit_code = 3

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal

    def __str__(self) -> str:
        return str(self.refusal)


class VerificationFailed(Refused):
    """The pruned model did not pass verification; nothing was written."""

    exit_code = 4


class ServerError(SecateurError):
    """The server cannot be reached, or failed for a reason that is not the request's fault."""

    exit_code = 5


class ServerBusy(ServerError):
    """The server has no room for the request now; `retry_s` seconds later it may have."""

    def __init__(self, text: str, retry_s: float) -> None:
        super().__init__(text)
        self.retry_s = retry_s


class Cancelled(SecateurError):
    """The call was cancelled, or its deadline passed."""

    exit_code = 130


def refuse(
    code: Code,
    message: str,
    *,
    nodes: tuple[str, ...] = (),
    expected: object = "",
    found: object = "",
    hint: str = "",
) -> Refused:
    """Builds the exception for a refusal: `raise refuse(Code.INVALID_MODEL, "…")`."""
    refusal = Refusal(
        code=code, message=message, nodes=nodes, expected=str(expected), found=str(found), hint=hint
    )
    return raised(refusal)


def raised(refusal: Refusal) -> Refused:
    """The exception class that carries `refusal`."""
    if refusal.code is Code.VERIFICATION_FAILED:
        return VerificationFailed(refusal)
    return Refused(refusal)
