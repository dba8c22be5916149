"""Names of nodes and values: which are free, and which a caller's globs mean."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterable


def free_name(wish: str, taken: Container[str | None], between: str = "_") -> str:
    """The name wished for if it is free, else that with the first number from 2 on that is."""
    name, number = wish, 2
    while name in taken:
        name, number = f"{wish}{between}{number}", number + 1
    return name


def matching(globs: Iterable[str], names: Iterable[str]) -> str | None:
    """The first glob (of `--ignore`) that one of some names matches; None where none does."""
    names = tuple(names)
    for glob in globs:
        if any(fnmatch.fnmatchcase(name, glob) for name in names):
            return glob
    return None
