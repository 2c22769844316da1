"""Prior, precision and recall from the labels of a stratified sample: design-based, no model of the scores.

Totals are sum_h N_h x_h / n_h (x_h relevant of n_h labelled of the N_h images of stratum h), unbiased whatever the
scores are worth; precision and recall are ratios of them.

Intervals must hold where most strata have no relevant image in the sample, or nothing else, so they are no Wald
intervals. A limit is a quantile of the figure over drawn totals: x_h plus a beta-binomial count of the N_h - n_h images
nobody looked at, which for one stratum gives the exact limits of Clopper and Pearson, finite population included. For
several strata the extra image that makes these limits exact is given once, to the stratum where an image weighs most,
as Fay and Feuer (1997) do for weighted sums of Poisson counts; giving it to every stratum would cost twice the width.
The other strata get the share of it that is relevant in their sample, which leaves their mean where it is.

Images of which the person was unsure are in the limits as both: all of them against the figure for the lower one, all
in its favour for the upper one. The values leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.9
DRAWS = 20_000


@dataclass(frozen=True)
class Counted:
    """One stratum and what the person said of it."""

    selected: bool
    size: int
    """Images in the stratum."""
    relevant: int
    irrelevant: int
    unsure: int

    @property
    def labelled(self) -> int:
        """Images with a yes or a no."""
        return self.relevant + self.irrelevant


@dataclass(frozen=True)
class Figure:
    """An estimate with its 90 % interval; nothing but a reason where it cannot be told."""

    value: float | None
    lower: float | None
    upper: float | None
    reason: str | None = None


@dataclass(frozen=True)
class AuditEstimate:
    """What the labels say of the scored images (unreadable ones are not known, and in none of the figures)."""

    prior: Figure
    """Share of relevant images among the scored ones."""
    precision: Figure
    """Share of relevant images among the selected ones."""
    recall: Figure
    """Share of selected images among the relevant ones; copies that the selection left out count as missed."""
    labelled: int
    unsure: int


def estimate_strata(strata: Sequence[Counted], *, seed: int = 0) -> AuditEstimate:
    """Figures of the strata; a figure with a stratum that has images and no label cannot be told."""
    filled = [s for s in strata if s.size]
    chosen = np.array([s.selected for s in filled], bool)
    blind = np.array([not s.labelled for s in filled], bool)
    size = np.array([s.size for s in filled], float)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = size * np.array([s.relevant for s in filled]) / np.array([s.labelled for s in filled])
    draws = _Draws(filled, seed)
    everything = np.ones(len(filled), bool)

    def untold(of: np.ndarray, what: str) -> Figure | None:
        missing = int((of & blind).sum())
        if not of.any():
            return Figure(None, None, None, f"there are no {what}")
        if missing:
            return Figure(None, None, None, f"{missing} of the {int(of.sum())} strata of {what} have no label")
        return None

    def share(of: np.ndarray) -> Figure:
        """Relevant share of some strata."""
        n = float(size[of].sum())
        lower, upper = (
            np.quantile(draws.totals(up & of, of.astype(float))[:, of].sum(axis=1), q) / n
            for up, q in ((~everything, (1 - LEVEL) / 2), (everything, (1 + LEVEL) / 2))
        )
        return _figure(float(total[of].sum()) / n, lower, upper)

    def recall() -> Figure:
        found, relevant = float(total[chosen].sum()), float(total.sum())
        if not relevant:
            return Figure(None, None, None, "no labelled image is relevant")
        at = found / relevant
        weight = np.where(chosen, 1 - at, at)

        def quantile(up: np.ndarray, q: float) -> float:
            totals = draws.totals(up, weight)
            hits, both = totals[:, chosen].sum(axis=1), totals.sum(axis=1)
            return float(np.quantile(np.where(both > 0, hits / np.maximum(both, 1), at), q))

        return _figure(at, quantile(~chosen, (1 - LEVEL) / 2), quantile(chosen, (1 + LEVEL) / 2))

    return AuditEstimate(
        prior=untold(everything, "scored images") or share(everything),
        precision=untold(chosen, "selected images") or share(chosen),
        recall=untold(everything, "scored images") or recall(),
        labelled=sum(s.labelled for s in filled),
        unsure=sum(s.unsure for s in filled),
    )


def _figure(value: float, lower: float, upper: float) -> Figure:
    return Figure(value, min(float(lower), value), max(float(upper), value))


@dataclass(frozen=True)
class _Draws:
    """Totals of relevant images that the labels allow."""

    strata: Sequence[Counted]
    seed: int

    def totals(self, up: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Relevant images of each stratum, float64 [DRAWS, H], as many as possible where `up`, else as few.

        `weight` [H] is what an image of the stratum weighs in the figure.
        """
        size, relevant, irrelevant, unsure = np.array(
            [(s.size, s.relevant, s.irrelevant, s.unsure) for s in self.strata], np.int64
        ).T
        seen = relevant + irrelevant + unsure
        # Counted are the images that move the figure the way it is asked to go.
        hits = np.where(up, relevant, irrelevant) + unsure
        extra = hits / np.maximum(seen, 1)
        unseen = size - seen
        extra[np.argmax(weight * unseen / np.maximum(seen, 1))] = 1.0
        a, b = hits + extra, seen - hits + 1 - extra
        rng = np.random.default_rng(self.seed)
        p = rng.beta(np.maximum(a, 1e-9), np.maximum(b, 1e-9), (DRAWS, len(size)))
        p = np.where(a <= 0, 0.0, np.where(b <= 0, 1.0, p))
        count = hits + rng.binomial(unseen, p)
        totals: np.ndarray = np.where(up, count, size - count).astype(np.float64)
        return totals
