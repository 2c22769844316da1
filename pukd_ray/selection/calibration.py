"""From logits to P(relevant) without negatives, and what the estimates are worth.

PU-Platt: over a >= 0 and b minimise mean_U softplus(a z + b) - prior * mean_P (a z + b), the unbiased PU risk
of the logistic loss (du Plessis et al. 2015, since l(z, +1) - l(z, -1) = -z). Convex; at the optimum
mean_U sigmoid(a z + b) = prior. z must be held out: of images the head was not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

MAX_SLOPE = 10.0  # in units of 1 / sd_U(z): beyond, P scores higher than U's own positives and a would run away
BINS = 2048


@dataclass(frozen=True)
class Calibration:
    """P(relevant) = sigmoid(slope * logit + offset)."""

    slope: float
    offset: float
    at_bound: bool = False
    """The slope hit its bound: P and the relevant images of U differ, probabilities are too extreme."""

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities float64 of logits, any shape."""
        return expit(self.slope * np.asarray(logits, np.float64) + self.offset)


def binned(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(bin means, weights summing to 1) of at most `BINS` equal-count bins: a sample small enough to refit often."""
    order = np.argsort(values, kind="stable")
    v = np.asarray(values, np.float64)[order]
    w = np.full(len(v), 1.0) if weights is None else np.asarray(weights, np.float64)[order]
    if len(v) > BINS:
        edges = np.linspace(0, len(v), BINS + 1).astype(int)[:-1]
        total = np.add.reduceat(w, edges)
        mean = np.add.reduceat(v * w, edges) / np.where(total > 0, total, 1)
        v, w = mean[total > 0], total[total > 0]
    return v, w / w.sum()


def fit_platt(
    p_logits: np.ndarray,
    u_logits: np.ndarray,
    prior: float,
    *,
    p_weights: np.ndarray | None = None,
    u_weights: np.ndarray | None = None,
) -> Calibration:
    """Fit slope and offset on held-out logits of P [n_p] and U [n_u]; weights serve the bootstrap."""
    from scipy.optimize import minimize  # half a second that scoring actors need not spend

    u, w = binned(u_logits, u_weights)
    mean = float(w @ u)
    sd = float(np.sqrt(w @ (u - mean) ** 2)) or 1.0
    z = (u - mean) / sd
    p_mean = (float(np.average(p_logits, weights=p_weights)) - mean) / sd

    def risk(theta: np.ndarray) -> tuple[float, np.ndarray]:
        t = theta[0] * z + theta[1]
        s = expit(t)
        value = w @ np.logaddexp(0, t) - prior * (theta[0] * p_mean + theta[1])
        return float(value), np.array([w @ (s * z) - prior * p_mean, w @ s - prior])

    start = np.array([1.0, np.log(prior / (1 - prior))])
    found = minimize(risk, start, jac=True, method="L-BFGS-B", bounds=[(0, MAX_SLOPE), (None, None)])
    slope, offset = found.x
    return Calibration(float(slope / sd), float(offset - slope * mean / sd), bool(slope >= MAX_SLOPE * 0.999))


def match_prior(calibration: Calibration, u_logits: np.ndarray, prior: float) -> Calibration:
    """The same slope with the offset at which mean_U P(relevant) is `prior` again."""
    z, w = binned(u_logits)
    low, high = -50 - calibration.slope * z.max(), 50 - calibration.slope * z.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if w @ expit(calibration.slope * z + middle) < prior else (low, middle)
    return Calibration(calibration.slope, float((low + high) / 2), calibration.at_bound)


def resample_weights(rng: np.random.Generator, count: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Bootstrap weights [count]; with `groups` [count] whole groups (units of the corpus) are drawn together."""
    if groups is None:
        return np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 10:  # too few units to stand for the corpus: rows are drawn instead
        return resample_weights(rng, count)
    drawn = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
    return drawn[index].astype(np.float64)
