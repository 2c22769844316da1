"""Seeded global batches with random access: every rank, and a restarted one, computes the same batch of a step."""

from __future__ import annotations

import numpy as np


class EndlessOrder:
    """An endless concatenation of seeded permutations of range(count), cut into batches of `size`."""

    def __init__(self, count: int, size: int, *seed: int) -> None:
        if count < 1:
            raise ValueError("an order needs at least one element")
        self._count, self._size, self._seed = count, size, seed
        self._cached: dict[int, np.ndarray] = {}

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._cached:
            if len(self._cached) > 2 + self._size // self._count:
                self._cached.clear()
            self._cached[number] = np.random.default_rng([*self._seed, number]).permutation(self._count)
        return self._cached[number]

    def batch(self, step: int) -> np.ndarray:
        """Indices int64 [size] of step `step` (from 0)."""
        start, stop = step * self._size, (step + 1) * self._size
        passes = range(start // self._count, (stop - 1) // self._count + 1)
        joined = np.concatenate([self._pass(n) for n in passes])
        offset = start - passes[0] * self._count
        return joined[offset : offset + self._size]


class SharedOrder:
    """As `EndlessOrder`, but of every batch `share` are of the rows that are `marked` (bool [count]), the rest others.

    The marked ones come first. Where all rows are of one kind there is nothing to share.
    """

    def __init__(self, marked: np.ndarray, share: float | None, size: int, *seed: int) -> None:
        marked = np.asarray(marked, bool)
        if share is None or marked.all() or not marked.any():
            self._parts = [(np.arange(len(marked)), EndlessOrder(len(marked), size, *seed))]
            return
        of_marked = marked_rows(share, size)
        self._parts = [
            (rows, EndlessOrder(len(rows), part, *own_seed))
            for rows, part, own_seed in (
                (np.flatnonzero(marked), of_marked, (*seed, 10)),
                (np.flatnonzero(~marked), size - of_marked, seed),
            )
            if part
        ]

    def batch(self, step: int) -> np.ndarray:
        """Indices int64 [size] of step `step` (from 0)."""
        return np.concatenate([rows[order.batch(step)] for rows, order in self._parts])


def marked_rows(share: float, size: int) -> int:
    """Rows of a batch of `size` that are a share of it: some of each kind, where there is room for both."""
    return min(max(1, round(share * size)), size - 1) if size > 1 else round(share)
