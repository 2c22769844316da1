"""Best bin estimation of the class prior: the share of the unlabelled corpus U that is positive.

It takes scores of positives P and of U, higher = more positive, from a scorer that was **not** trained on those very
images (cross-fitting): its own training positives would put the estimate far too low. It assumes that P and the
positives in U look alike; where they do not, it falls towards 0, and no score shows it: see
`pukd_ray.selection.verdict`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


def _weights(weights: ArrayLike | None, count: int) -> NDArray[np.float64]:
    return np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)


def _checked(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a non-empty list of finite numbers")
    return array
