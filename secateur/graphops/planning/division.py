"""How much of a budget goes as whole regions and how much as units: what the outputs miss least.

Regions leave in the order of what they cost the outputs for what they save (see `removal`), and
after any number of them units can make up the rest (see `planner`). Every such division meets the
same targets, so that which is best for what it saves is which drifts least once it is carried out.
Drift over their number falls and then rises: it is followed by halving.
"""

from __future__ import annotations

from collections.abc import Callable

_HALVINGS = 1  # rounds, of two divisions each at most


def search(
    most: int, drift: Callable[[int], float], tell: Callable[[float], None] = lambda share: None
) -> dict[int, float]:
    """Drift by number of regions, of the divisions that were tried.

    No regions, as many as there are, and half of them are always among them, so that the best is
    never worse than units alone or regions alone.

    Args:
        most: regions there are.
        drift: of the outputs with so many of them gone; infinite where the targets are out of
            reach there.
        tell: told the share that is done.
    """
    found: dict[int, float] = {}

    def attempt(count: int) -> None:
        if count not in found:
            found[count] = drift(count)
            tell(len(found) / (3 + 2 * _HALVINGS))

    for count in (0, most, most // 2):
        attempt(count)
    for _ in range(_HALVINGS):
        ordered = sorted(found)
        place = ordered.index(best(found))
        for other in ordered[max(place - 1, 0) : place + 2]:
            attempt((ordered[place] + other) // 2)
    return found


def best(found: dict[int, float]) -> int:
    """The number of regions that drifts least; of equals, the fewest."""
    return min(sorted(found), key=lambda count: found[count])
