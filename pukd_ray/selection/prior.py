"""Estimates the class prior: the share of the unlabelled corpus U that is positive.

All estimators take scores of positives P and of U, higher = more positive, from a scorer that was **not**
trained on those very images (cross-fitting): its own training positives would put the estimate far too low.
All assume that P and the positives in U look alike; where they do not, the estimates fall towards 0, and no
score shows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.isotonic import isotonic_regression

_BINS = 40  # of DEDPUL
_P_QUANTILE = 0.75  # where it reads the density ratio: far up, with enough of P above to be stable


@dataclass(frozen=True)
class PriorEstimate:
    """A class prior with its confidence interval."""

    value: float
    """Estimated share of positives in U, in [0, 1]."""
    lower: float
    """Lower confidence bound, clipped to [0, 1]."""
    upper: float
    """Upper confidence bound, clipped to [0, 1]."""
    threshold: float
    """Score at which it was read: P and the positives of U are compared at and above it."""


def bbe_prior(p_scores: ArrayLike, u_scores: ArrayLike, *, gamma: float = 0.01, delta: float = 0.1) -> PriorEstimate:
    """Best Bin Estimation (Garg et al. 2021, algorithm 1).

    Let ``q_p(c)`` and ``q_u(c)`` be the shares of P and U that score at least c, and
    ``k = (1 + gamma) * (sqrt(ln(4 / delta) / (2 n_u)) + sqrt(ln(4 / delta) / (2 n_p)))``. The c with the
    least upper bound ``(q_u(c) + k) / q_p(c)``, the lowest of equals, gives the estimate ``q_u(c) / q_p(c)``
    and its interval, ``k / q_p(c)`` to both sides. There must be a score above which positives are found and
    hardly any negatives; otherwise the estimate is too high. O(n log n).

    Args:
        p_scores: [n_p], of held-out positives.
        u_scores: [n_u], of unlabelled images.
        gamma: the paper's safety margin on ``k``, >= 0.
        delta: 1 - the confidence level of the interval, in (0, 1).

    Raises:
        ValueError: an empty or non-finite input, or a bad ``gamma`` or ``delta``.
    """
    if not (gamma >= 0 and 0 < delta < 1):
        raise ValueError(f"gamma must be >= 0 and delta in (0, 1), not {gamma} and {delta}")
    p, u = np.sort(_checked("p_scores", p_scores)), np.sort(_checked("u_scores", u_scores))
    # q_p is constant from one P score (exclusive) to the next and q_u never rises: the best c is a P score.
    thresholds = np.unique(p)
    q_p, q_u = ((s.size - np.searchsorted(s, thresholds)) / s.size for s in (p, u))
    k = (1 + gamma) * sum(math.sqrt(math.log(4 / delta) / (2 * n)) for n in (u.size, p.size))
    best = np.argmin((q_u + k) / q_p)
    value, margin = q_u[best] / q_p[best], k / q_p[best]
    return PriorEstimate(
        value=float(min(1.0, value)),
        lower=float(np.clip(value - margin, 0.0, 1.0)),
        upper=float(np.clip(value + margin, 0.0, 1.0)),
        threshold=float(thresholds[best]),
    )


def dedpul_prior(p_scores: ArrayLike, u_scores: ArrayLike) -> float:
    """A light version of DEDPUL (Ivanov 2020), to check `bbe_prior` by another route.

    The prior is the least ``f_u / f_p``, reached where scores are highest. Here ``f_p / (f_p + f_u)`` is the
    share of P in each of 40 bins of equal mass (P and U weighing the same), made monotone by isotonic
    regression, and read at the score below which 3/4 of P lie. DEDPUL reads it where 95 % of U lie below:
    among the negatives as soon as fewer than 5 % of U are positive, the normal case in a data lake, and then
    it says 1 even for perfect scores.

    Args:
        p_scores: [n_p], of held-out positives.
        u_scores: [n_u], of unlabelled images.

    Returns:
        The prior, in [0, 1].

    Raises:
        ValueError: an empty or non-finite input.
    """
    p, u = _checked("p_scores", p_scores), _checked("u_scores", u_scores)
    scores = np.concatenate([p, u])
    weights = np.concatenate([np.full(p.size, 0.5 / p.size), np.full(u.size, 0.5 / u.size)])
    order = np.argsort(scores)
    cuts = np.searchsorted(np.cumsum(weights[order]), np.arange(1, _BINS) / _BINS)
    edges = np.unique(scores[order][cuts])  # ties leave fewer bins
    mass_p, mass_u = (
        np.bincount(np.searchsorted(edges, s, side="right"), minlength=edges.size + 1) / s.size for s in (p, u)
    )
    filled = mass_p + mass_u > 0
    mass_p, mass_u = mass_p[filled], mass_u[filled]
    # The share P / (P + U) and not the ratio P / U: bins without U need no special case.
    share = isotonic_regression(mass_p / (mass_p + mass_u), sample_weight=mass_p + mass_u)
    top = share[np.searchsorted(np.cumsum(mass_p), _P_QUANTILE)]
    return float(min(1.0, (1 - top) / top))


def elkan_noto_ratio(p_probabilities: ArrayLike, u_probabilities: ArrayLike) -> float:
    """An upper bound of the prior, ``mean_U g / mean_P g`` with ``g = f_p / (f_p + f_u)`` (Elkan, Noto 2008).

    As the positives of U score like P, it equals ``prior + (1 - prior) * mean_N g / mean_P g``. ``g`` is the
    output of a classifier of P against U with equal class weights: the sigmoid of one trained by
    `naive_risk`.

    Args:
        p_probabilities: [n_p] in [0, 1], of held-out positives.
        u_probabilities: [n_u] in [0, 1], of unlabelled images.

    Returns:
        The ratio, not clipped: above 1 the scorer is worse than chance.

    Raises:
        ValueError: an empty or non-finite input, values outside [0, 1], or only zeros for P.
    """
    p, u = _checked("p_probabilities", p_probabilities), _checked("u_probabilities", u_probabilities)
    if min(p.min(), u.min()) < 0 or max(p.max(), u.max()) > 1:
        raise ValueError("probabilities must lie in [0, 1]: apply a sigmoid to logits")
    if p.max() == 0:
        raise ValueError("p_probabilities are all 0: the scorer has learnt nothing about the positives")
    return float(u.mean() / p.mean())


def prior_warnings(estimate: PriorEstimate, *, dedpul: float, elkan_noto: float) -> list[str]:
    """Reasons to distrust an estimated prior, each with what to do about it; empty if there are none.

    Args:
        estimate: from `bbe_prior`.
        dedpul: from `dedpul_prior` on the same scores.
        elkan_noto: from `elkan_noto_ratio` on the same data.
    """
    value = estimate.value
    warnings = []
    if abs(value - dedpul) > 0.05:
        warnings.append(
            f"Two estimates of the class prior disagree: BBE {value:.3f}, DEDPUL {dedpul:.3f}. Set "
            "selector.prior: labelling 300 random corpus images gives it to a standard error of 0.03."
        )
    if value > elkan_noto:
        warnings.append(
            f"The class prior {value:.3f} exceeds its upper bound {elkan_noto:.3f} (Elkan-Noto ratio): too "
            "few positives, or an overfitted scorer. Give more positives, lower selector.steps, or set "
            "selector.prior."
        )
    if value < 0.01:
        warnings.append(
            f"The class prior {value:.4f} is below 0.01: relevant images are rare, or unlike the positives, "
            "which makes every estimate too low. Set selector.prior, or choose by rank with "
            "selection.rule: budget."
        )
    return warnings


def _checked(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a non-empty list of finite numbers")
    return array
