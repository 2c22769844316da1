"""Clocks: how long something took, and when work was really done, as opposed to waiting for engines to start."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

import pyarrow as pa


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Elapsed so far."""
        return time.monotonic() - self._start


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


def with_spans(table: pa.Table, spans: list[Span]) -> pa.Table:
    """Note `spans` on the first row, in a column `spans`: however blocks are cut and joined, each is kept once."""
    notes = [json.dumps(spans), *[None] * (table.num_rows - 1)]
    return table.append_column("spans", pa.array(notes[: table.num_rows], pa.string()))


def take_spans(table: pa.Table) -> tuple[pa.Table, list[Span]]:
    """(the table without its column `spans`, what was noted there)."""
    notes = table.column("spans").drop_null().to_pylist()
    return table.drop_columns("spans"), [(began, ended) for note in notes for began, ended in json.loads(note)]
