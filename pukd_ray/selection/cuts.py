"""Keys, cuts and counts: the arithmetic that selection rules share. Plain NumPy, no images, no Ray.

The k-th best key of a corpus is found by counts: of its upper bits, then of the next ones among the rows of one bin,
until that bin is small (`find_cuts.py`), so no list that grows with the corpus is ever gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Scores:
    """Columns of readable rows that rules look at, each [N]."""

    pu_logit: np.ndarray
    pu_probability: np.ndarray
    teacher_label: np.ndarray
    teacher_confidence: np.ndarray
    relevant: np.ndarray
    """Truth, bool; False where it is not known. Only the rule `truth` looks at it."""
    tie_breaker: np.ndarray
    """Seeded hash of the id, int64: random order, and the order among equal keys."""
    more: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further columns of the score table that the rule reads, by name."""


def unit_interval(hashes: np.ndarray) -> np.ndarray:
    """int64 hashes -> float32 in [0, 1)."""
    return ((hashes.view(np.uint64) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)).astype(np.float32)


def ordered_bits(keys: np.ndarray) -> np.ndarray:
    """uint32 [N] that sort as the float32 keys do; -0.0 is 0.0."""
    bits = (np.asarray(keys, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


DIGITS = 6


def digits(bits: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """uint16 [DIGITS, N] of `ordered_bits` and tie breakers int64 [N]: as one number it rises as rows are taken."""
    key = ~np.asarray(bits).astype(np.uint32)
    tie = np.asarray(ties, np.int64).view(np.uint64) ^ np.uint64(1 << 63)
    parts = [key >> 16, key, *(tie >> np.uint64(shift) for shift in (48, 32, 16, 0))]
    return np.stack([part.astype(np.uint16) for part in parts])


@dataclass(frozen=True)
class Cut:
    """The last row taken of a group: higher keys are in, and equal ones with a tie breaker up to its."""

    bits: int
    tie: int

    def admits(self, bits: np.ndarray, ties: np.ndarray) -> np.ndarray:
        """bool [N] for `ordered_bits` and tie breakers [N]."""
        admitted: np.ndarray = (bits > self.bits) | ((bits == self.bits) & (ties <= self.tie))
        return admitted


EVERYTHING = Cut(-1, 0)
NOTHING = Cut(1 << 32, 0)


def share_quota(available: np.ndarray, budget: int) -> np.ndarray:
    """Take int64 [K] of `available` [K] for a total of min(budget, sum): even, unused quota passed on."""
    available = np.asarray(available, np.int64)
    take = np.zeros_like(available)
    left = min(budget, int(available.sum()))
    while left > 0:
        open_classes = np.flatnonzero(take < available)
        each = max(1, left // len(open_classes))
        for k in open_classes:
            step = min(each, int(available[k] - take[k]), left)
            take[k] += step
            left -= step
    return take


def precision_count(probabilities: np.ndarray, counts: np.ndarray, target: float) -> int:
    """Largest number of top-ranked images whose mean probability is at least `target`.

    `probabilities` and `counts` [M] are of bins in falling order of logit.
    """
    total = np.cumsum(counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.cumsum(counts * probabilities) / total
    good = np.flatnonzero((precision >= target - 1e-12) & (total > 0))  # sums are rounded
    return int(total[good[-1]]) if len(good) else 0
