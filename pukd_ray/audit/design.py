"""How many images of which scores an audit draws. The scores decide the design alone: no estimate believes them.

Strata are bands of `pu_logit`, of the selected images and of the rest apart. Their bounds divide the sum of the model's
standard deviations sqrt(p (1 - p)) evenly (the rule of Dalenius, Hodges 1959, with the model's deviation in the place
of the square root of a density): narrow bands where the model is in doubt, one wide band of all that is far from it.

Half of the images go where they serve precision best, half where they serve recall best (Neyman 1934: in proportion to
N_h S_h, for recall the ratio's linearisation). S_h has a floor, DOUBT: the far rest, of which the model is sure, holds
almost the whole corpus, and what it may hide decides how far down recall can be. Without images from there nobody knows
it, however sure the model is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BANDS = 3
"""Of each side of the cut. Few: each needs images of its own."""
LEAST = 10
"""Images of each stratum, if it has them."""
DOUBT = 0.01
"""P(relevant) of no stratum is taken to be closer to 0 or 1."""


@dataclass(frozen=True)
class Bins:
    """Rows of one side of the cut in fine bins of similar logits, ascending."""

    bits: np.ndarray
    """Name of each bin, int64 [M]: the upper 16 of `ordered_bits` of the logit."""
    count: np.ndarray
    """Rows, int64 [M]."""
    probability: np.ndarray
    """Mean of P(relevant) over them, float64 [M]."""


@dataclass(frozen=True)
class Stratum:
    """Rows of one side of the cut in one band of logits, of which `sampled` are drawn at random."""

    selected: bool
    first: int
    """Lowest of its bins, by `Bins.bits`."""
    last: int
    """Highest of them."""
    size: int
    sampled: int

    @property
    def inclusion_probability(self) -> float:
        """Of each of its rows; exact."""
        return self.sampled / self.size


def plan_strata(selected: Bins, rest: Bins, images: int) -> tuple[Stratum, ...]:
    """Strata with min(`images`, all rows) images in all, at least one of each stratum; selected ones first.

    ValueError if there are fewer images than strata.
    """
    bands = [(True, b) for b in _bands(selected)] + [(False, b) for b in _bands(rest)]
    if images < len(bands):
        raise ValueError(f"{len(bands)} strata need at least as many images, not {images}")
    chosen = np.array([side for side, _ in bands], bool)
    size = np.array([int(b.count.sum()) for _, b in bands], np.int64)
    mean = np.array([b.count @ b.probability for _, b in bands]) / size
    p = np.clip(mean, DOUBT, 1 - DOUBT)
    spread = size * np.sqrt(p * (1 - p))
    taken, missed = float(size[chosen] @ mean[chosen]), float(size[~chosen] @ mean[~chosen])
    recall = np.clip(taken / max(taken + missed, 1e-9), DOUBT, 1 - DOUBT)
    wanted = np.zeros(len(bands))
    for share in (spread * chosen, spread * np.where(chosen, 1 - recall, recall)):
        wanted += share / (2 * share.sum() or 1.0)
    sampled = allocate(wanted, size, images)
    return tuple(
        Stratum(side, int(b.bits[0]), int(b.bits[-1]), int(rows), int(n))
        for (side, b), rows, n in zip(bands, size, sampled, strict=True)
    )


def _bands(bins: Bins) -> list[Bins]:
    """At most BANDS pieces, none empty."""
    if not len(bins.bits):
        return []
    p = np.clip(bins.probability, 0.0, 1.0)
    spread = bins.count * (np.sqrt(p * (1 - p)) + 1e-12)
    middle = np.cumsum(spread) - spread / 2
    band = np.minimum((BANDS * middle / spread.sum()).astype(int), BANDS - 1)
    pieces = [np.flatnonzero(band == k) for k in np.unique(band)]
    return [Bins(bins.bits[i], bins.count[i], bins.probability[i]) for i in pieces]


def allocate(wanted: np.ndarray, size: np.ndarray, images: int) -> np.ndarray:
    """Images of each stratum, int64 [H]: in proportion to `wanted`, at least LEAST, at most `size`.

    They sum to min(images, size.sum()); where LEAST is more than there are images for, it is lowered.
    """
    images = min(images, int(size.sum()))
    least = np.minimum(size, min(LEAST, images // len(size)))
    # Strata that are full, or below their least, are fixed; the others share what is left.
    ideal = np.zeros(len(size))
    low, high = np.zeros(len(size), bool), np.zeros(len(size), bool)
    weight = np.maximum(wanted, 1e-12)
    for _ in range(2 * len(size) + 1):
        free = ~(low | high)
        left = images - least[low].sum() - size[high].sum()
        ideal = np.where(low, least, size).astype(float)
        ideal[free] = left * weight[free] / weight[free].sum()
        over, under = free & (ideal > size), free & (ideal < least)
        if not (over.any() or under.any()):
            break
        if (ideal[over] - size[over]).sum() >= (least[under] - ideal[under]).sum():
            high |= over
        else:
            low |= under
    whole = np.floor(ideal + 1e-9).astype(np.int64)
    order = np.argsort(-(ideal - whole), kind="stable")
    room = order[whole[order] < size[order]]
    whole[room[: images - whole.sum()]] += 1
    return whole
