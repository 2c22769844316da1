"""Estimates the class prior: the share of the unlabelled corpus U that is positive.

All estimators take scores of positives P and of U, higher = more positive, from a scorer that was **not**
trained on those very images (cross-fitting): its own training positives would put the estimate far too low.
All assume that P and the positives in U look alike; where they do not, the estimates fall towards 0, and no
score shows it. One difference is the rule, and is taken out by weights of P: owners give as many images of each
class, and corpora do not.
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


def positive_weights(
    p_scores: ArrayLike, u_scores: ArrayLike, p_classes: NDArray[np.int64], u_classes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Weights of P under which its classes are as frequent as among the positives of U.

    Classes are the teacher's, of P and of U alike: whatever it confuses, it confuses in both. `bbe_prior` of P and U
    of one class alone, times the share of U that has this class, is how much of U is positive and of this class.

    Args:
        p_scores: [n_p], of held-out positives.
        u_scores: [n_u], of unlabelled images.
        p_classes: the teacher's label of each of P, [n_p].
        u_classes: the same for U, [n_u].

    Returns:
        Weights [n_p], > 0, mean 1, the same within a class. Ten images of each class, on average, are taken to be in U
        as they are in P: where hardly any positives are in U there is nothing to tell, and the weights stay near 1.
    """
    p, u = _checked("p_scores", p_scores), _checked("u_scores", u_scores)
    names, index, counts = np.unique(p_classes, return_inverse=True, return_counts=True)
    p_parts = np.split(p[np.argsort(index, kind="stable")], np.cumsum(counts)[:-1])
    order = np.argsort(u_classes, kind="stable")
    first, last = (np.searchsorted(u_classes, names, side, sorter=order) for side in ("left", "right"))
    u_parts = [u[order[i:j]] for i, j in zip(first, last, strict=True)]
    positives = np.array(
        [bbe_prior(a, b).value * b.size if b.size else 0.0 for a, b in zip(p_parts, u_parts, strict=True)]
    )
    as_in_p = counts / p.size
    positives += 10 * names.size * as_in_p
    weights: NDArray[np.float64] = (positives / positives.sum() / as_in_p)[index]
    return weights


def bbe_prior(
    p_scores: ArrayLike,
    u_scores: ArrayLike,
    *,
    gamma: float = 0.01,
    delta: float = 0.1,
    p_weights: ArrayLike | None = None,
) -> PriorEstimate:
    """Best Bin Estimation (Garg et al. 2021, algorithm 1).

    Let ``q_p(c)`` and ``q_u(c)`` be the shares of P and U that score at least c, and
    ``k = (1 + gamma) * (sqrt(ln(4 / delta) / (2 n_u)) + sqrt(ln(4 / delta) / (2 n_p)))``, with weights of P the
    effective number ``n_p = (sum w)^2 / sum w^2``. The c with the
    least upper bound ``(q_u(c) + k) / q_p(c)``, the lowest of equals, gives the estimate ``q_u(c) / q_p(c)``
    and its interval, ``k / q_p(c)`` to both sides. There must be a score above which positives are found and
    hardly any negatives; otherwise the estimate is too high. O(n log n).

    Args:
        p_scores: [n_p], of held-out positives.
        u_scores: [n_u], of unlabelled images.
        gamma: the paper's safety margin on ``k``, >= 0.
        delta: 1 - the confidence level of the interval, in (0, 1).
        p_weights: of P, > 0, [n_p]; None: all the same.

    Raises:
        ValueError: an empty or non-finite input, or a bad ``gamma`` or ``delta``.

    Examples:
        A quarter of U scores as P does, the rest below all of P.

        >>> import numpy as np
        >>> from pukd_ray import bbe_prior
        >>> p = np.linspace(0.5, 1.0, 1000)
        >>> u = np.concatenate([p, np.linspace(0.0, 0.49, 3000)])
        >>> estimate = bbe_prior(p, u)
        >>> estimate.value, round(estimate.lower, 3), round(estimate.upper, 3), estimate.threshold
        (0.25, 0.185, 0.315, 0.5)
    """
    if not (gamma >= 0 and 0 < delta < 1):
        raise ValueError(f"gamma must be >= 0 and delta in (0, 1), not {gamma} and {delta}")
    p, u = _checked("p_scores", p_scores), np.sort(_checked("u_scores", u_scores))
    order = np.argsort(p)
    p, weights = p[order], _weights(p_weights, p.size)[order]
    # q_p is constant from one P score (exclusive) to the next and q_u never rises: the best c is a P score.
    thresholds = np.unique(p)
    q_p = np.cumsum(weights[::-1])[::-1][np.searchsorted(p, thresholds)] / weights.sum()
    q_u = (u.size - np.searchsorted(u, thresholds)) / u.size
    n_p = weights.sum() ** 2 / (weights**2).sum()
    k = (1 + gamma) * sum(math.sqrt(math.log(4 / delta) / (2 * n)) for n in (u.size, n_p))
    best = np.argmin((q_u + k) / q_p)
    value, margin = q_u[best] / q_p[best], k / q_p[best]
    return PriorEstimate(
        value=float(min(1.0, value)),
        lower=float(np.clip(value - margin, 0.0, 1.0)),
        upper=float(np.clip(value + margin, 0.0, 1.0)),
        threshold=float(thresholds[best]),
    )


def dedpul_prior(p_scores: ArrayLike, u_scores: ArrayLike, p_weights: ArrayLike | None = None) -> float:
    """A light version of DEDPUL (Ivanov 2020), to check `bbe_prior` by another route.

    The prior is the least ``f_u / f_p``, reached where scores are highest. Here ``f_p / (f_p + f_u)`` is the
    share of P in each of 40 bins of equal mass (P and U weighing the same), made monotone by isotonic
    regression, and read at the score below which 3/4 of P lie. DEDPUL reads it where 95 % of U lie below:
    among the negatives as soon as fewer than 5 % of U are positive, the normal case in a data lake, and then
    it says 1 even for perfect scores.

    Args:
        p_scores: [n_p], of held-out positives.
        u_scores: [n_u], of unlabelled images.
        p_weights: as in `bbe_prior`.

    Returns:
        The prior, in [0, 1].

    Raises:
        ValueError: an empty or non-finite input.
    """
    p, u = _checked("p_scores", p_scores), _checked("u_scores", u_scores)
    scores = np.concatenate([p, u])
    of_p = _weights(p_weights, p.size)
    of_p = of_p / of_p.sum()
    weights = np.concatenate([0.5 * of_p, np.full(u.size, 0.5 / u.size)])
    order = np.argsort(scores)
    cuts = np.searchsorted(np.cumsum(weights[order]), np.arange(1, _BINS) / _BINS)
    edges = np.unique(scores[order][cuts])  # ties leave fewer bins
    mass_p, mass_u = (
        np.bincount(np.searchsorted(edges, s, side="right"), w, minlength=edges.size + 1)
        for s, w in ((p, of_p), (u, np.full(u.size, 1 / u.size)))
    )
    filled = mass_p + mass_u > 0
    mass_p, mass_u = mass_p[filled], mass_u[filled]
    # The share P / (P + U) and not the ratio P / U: bins without U need no special case.
    share = isotonic_regression(mass_p / (mass_p + mass_u), sample_weight=mass_p + mass_u)
    top = share[np.searchsorted(np.cumsum(mass_p), _P_QUANTILE)]
    return float(min(1.0, (1 - top) / top))


def elkan_noto_ratio(
    p_probabilities: ArrayLike, u_probabilities: ArrayLike, p_weights: ArrayLike | None = None
) -> float:
    """An upper bound of the prior, ``mean_U g / mean_P g`` with ``g = f_p / (f_p + f_u)`` (Elkan, Noto 2008).

    As the positives of U score like P, it equals ``prior + (1 - prior) * mean_N g / mean_P g``. ``g`` is the
    output of a classifier of P against U with equal class weights: the sigmoid of one trained by
    `naive_risk`.

    Args:
        p_probabilities: [n_p] in [0, 1], of held-out positives.
        u_probabilities: [n_u] in [0, 1], of unlabelled images.
        p_weights: as in `bbe_prior`.

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
    return float(u.mean() / np.average(p, weights=_weights(p_weights, p.size)))


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


def _weights(weights: ArrayLike | None, count: int) -> NDArray[np.float64]:
    return np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)


def _checked(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a non-empty list of finite numbers")
    return array
