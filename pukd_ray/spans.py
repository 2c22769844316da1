"""When work was really done, as opposed to waiting for engines to start: intervals of wall-clock time."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[float, float]
"""(began, ended), seconds since the epoch."""


def covered_seconds(spans: Iterable[Span]) -> float:
    """Length of the union of `spans`: time in which at least one process was at work."""
    total, reach = 0.0, float("-inf")
    for began, ended in sorted(spans):
        if ended > reach:
            total += ended - max(began, reach)
            reach = ended
    return total
