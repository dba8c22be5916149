"""Which share of single weights goes, and in which pattern, as callers write it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.errors import Code, Refused, refuse

_BLOCK = re.compile(r"(?:(?P<share>[0-9.]+)@)?(?P<rows>[0-9]{1,3})x(?P<columns>[0-9]{1,3})")
_RUN = re.compile(r"(?P<kept>[0-9]{1,3}):(?P<run>[0-9]{1,3})")
_FORMS = "a share of zeros such as 0.7, N:M such as 2:4, or blocks such as 4x1 or 0.7@4x1"


@dataclass(frozen=True, slots=True)
class Pattern:
    """What of a weight matrix (outputs × what they read) becomes zero.

    Attributes:
        share: of the blocks, at least; not looked at where there is a run.
        kept, run: at most `kept` of every `run` consecutive input channels stay; run 0: no such
            pattern.
        rows, columns: of the blocks that go together.
    """

    share: float
    kept: int = 0
    run: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern that a text states: `0.7`, `2:4`, `4x1` (half of the blocks), `0.7@4x1`.

        Raises:
            Refused: `INVALID_RECIPE` when it states none.
        """
        if found := _RUN.fullmatch(text):
            kept, run = int(found["kept"]), int(found["run"])
            if not 0 < kept < run:
                raise _invalid(text)
            return cls(1 - kept / run, kept, run)
        if found := _BLOCK.fullmatch(text):
            rows, columns = int(found["rows"]), int(found["columns"])
            if not rows or not columns:
                raise _invalid(text)
            return cls(_share(found["share"] or "0.5", text), rows=rows, columns=columns)
        return cls(_share(text, text))


def _share(number: str, text: str) -> float:
    try:
        share = float(number)
    except ValueError:
        raise _invalid(text) from None
    if not 0 < share < 1:  # also refuses NaN
        raise _invalid(text)
    return share


def _invalid(text: str) -> Refused:
    return refuse(
        Code.INVALID_RECIPE,
        "sparsity is no share and no pattern",
        nodes=("sparsity",),
        expected=_FORMS,
        found=text,
        hint="In YAML, quote N:M: unquoted, 2:4 is the number 124.",
    )
