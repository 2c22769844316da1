"""Average precision of a ranking of all rows with truth, exact, while no task holds the keys of all.

Each task hands in its distinct keys; ranges of keys, of about as many rows each, are merged and summed up apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.rows import as_results, by_part

RANGE_ROWS = 5_000_000
SAMPLED_ROWS = 1_000
"""Of each task, which say where the ranges are."""


def count_truth(bits: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(key, rows, relevant rows) of each distinct key, rising, int64 [M, 3], of keys int64 [N] and truth bool [N]."""
    return merge_truth(np.column_stack([bits, np.ones_like(bits), relevant.astype(np.int64)]))


def merge_truth(counts: np.ndarray) -> np.ndarray:
    """The same of int64 [N, 3] in which keys repeat."""
    keys, first = np.unique(counts[:, 0], return_inverse=True)
    sums = [np.bincount(first, weights=counts[:, c], minlength=len(keys)).astype(np.int64) for c in (1, 2)]
    return np.column_stack([keys, *sums])


def precision_sum(counts: np.ndarray, above: tuple[int, int]) -> float:
    """Sum over the relevant rows of `merge_truth`'s counts of the precision down to their key, given (rows, relevant
    rows) of higher keys: the average precision is the sum over all keys by the number of relevant rows."""
    counts = counts[::-1]
    rows, relevant = above[0] + np.cumsum(counts[:, 1]), above[1] + np.cumsum(counts[:, 2])
    return float((counts[:, 2] * (relevant / rows)).sum())


def average_precision(counted: Sequence[ray.ObjectRef]) -> float | None:
    """Of what `count_truth` found in each task; None if no row is relevant."""
    sampled = ray.get([_sample.remote(counts) for counts in counted])
    keys, rows = (np.concatenate(column) for column in zip(*sampled, strict=True))
    order = np.argsort(keys)
    ends = np.cumsum(rows[order])
    inner = np.arange(RANGE_ROWS, rows.sum(), RANGE_ROWS)
    starts = np.unique(keys[order][np.searchsorted(ends, inner)])
    split = [_split.options(num_returns=len(starts) + 1).remote(counts, starts) for counts in counted]
    merged = [_merge.remote(*pieces) for pieces in by_part(split)]
    totals = np.array(ray.get([total for _, total in merged]))
    above = np.cumsum(totals[::-1], 0)[::-1] - totals
    sums = ray.get([_precision_sum.remote(m, tuple(a)) for (m, _), a in zip(merged, above.tolist(), strict=True)])
    relevant = int(totals[:, 1].sum())
    return round(sum(sums) / relevant, 12) if relevant else None  # the digits beyond depend on the ranges


@ray.remote(num_cpus=IO_CPUS)
def _sample(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keys, rows up to each since the one before) at even distances in a task's rows."""
    ends = np.cumsum(counts[:, 1])
    if not len(ends):
        return ends, ends
    at = np.unique(np.searchsorted(ends, np.linspace(0, ends[-1], SAMPLED_ROWS + 1)[1:]))
    return counts[at, 0], np.diff(ends[at], prepend=0)


@ray.remote(num_cpus=IO_CPUS)
def _split(counts: np.ndarray, starts: np.ndarray) -> Any:
    return as_results(np.split(counts, np.searchsorted(counts[:, 0], starts)))


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _merge(*pieces: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """(counts of a range of keys, (rows, relevant rows))."""
    counts = merge_truth(np.concatenate(pieces))
    return counts, (int(counts[:, 1].sum()), int(counts[:, 2].sum()))


@ray.remote(num_cpus=IO_CPUS)
def _precision_sum(counts: np.ndarray, above: tuple[int, int]) -> float:
    return precision_sum(counts, above)
