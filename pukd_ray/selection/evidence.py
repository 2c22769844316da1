"""What speaks for a class prior: U's own emptiest boundary, P's density ratio, and whether P looks like what is taken.

Three pieces of evidence, each from held-out logits only:

- `boundary`: nnPU was fitted at a grid of priors; where its boundary runs through the emptiest part of U, the prior is
  right (low-density separation, Chapelle, Zien 2005). P is not counted, so that a biased P does no harm.
- `density_ratio`: conditional likelihood (`selection.calibration`) reads exp(-KL(P || U)). Without bias that is the
  prior, with bias prior * exp(-KL(P || relevant U)): always too low.
- `two_sample`: a classifier of P against what is taken of U; its AUC bounds KL(P || relevant U).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from pukd_ray.selection.by_class import ByClass, ClassBins
from pukd_ray.selection.calibration import Binned, resample_weights

LEVEL = 1.645  # two-sided 90 %


@dataclass(frozen=True)
class Boundary:
    """How empty U is at the boundaries of a grid of priors."""

    priors: np.ndarray
    """[G]."""
    emptiness: np.ndarray
    """Density of U's logits at the boundary relative to their mean density on the positive side, [G]: 1 = flat."""
    upper: np.ndarray
    """The same with one standard error of the count at the boundary on top, [G]."""
    best: int
    """Of the least `upper`."""
    inner: bool
    """Is there a gap: `emptiness` rises to both sides of it, by `CONTRAST`, and it is emptier than flat?"""
    value: float
    """The right foot of the valley: the greatest prior whose boundary is as empty as the emptiest, up to `AS_EMPTY`.

    From below, a larger prior moves the boundary along the few relevant images that are unlike P, and U stays thin
    there; beyond the truth it enters the mass of the others, and `emptiness` shoots up. On 17 tuning tasks
    with a gap, at a coarse grid, the minimum was 4 % (no bias) and 22 % (bias) too low, the foot 4 % and 17 %."""
    lower_bound: float
    upper_bound: float


# Measured on 47 tuning tasks (Fashion and mixtures, priors 0.002 to 0.6, P 10 to 100 per class, k 0 to 1.2):
CONTRAST = 1.3  # valleys rose 1.32 to 4.1 fold on their flatter side, without a gap the curve mostly falls to the end
FLAT = 1.1  # 1 is flat; valleys were at 0.48 to 1.08. Two of the 30 others would pass at 1.15: no wide margin
AS_EMPTY = 1.25  # noise of the curve between neighbouring priors
SHOULDER = 1.5  # up to which the interval goes on to the right
COVERS = 0.7  # share of held-out P beyond the boundary: a gap inside P parts P, not what is relevant from the rest


def emptiness(u_logits: np.ndarray) -> tuple[float, float]:
    """(emptiness, its standard error) of logits [n_u].

    The share with |z| < 1 over 2, relative to the share with z > 0 spread evenly over [0, 2 mean(z | z > 0)]. Where
    positives lie evenly it is 1 for any scale of the logits and any prior, in a gap it goes to 0.
    """
    u = np.asarray(u_logits, np.float64)
    above = u[u > 0]
    near = int((np.abs(u) < 1).sum())
    if len(above) < 5:
        return np.inf, np.inf
    value = near / len(above) * float(above.mean())
    return value, value / np.sqrt(near + 1) if near else float(above.mean()) / len(above)


def find_boundary(
    priors: Sequence[float] | np.ndarray, p_logits: np.ndarray, u_logits: np.ndarray, flat: float = FLAT
) -> Boundary:
    """The emptiest boundary of logits [G, n_p] and [G, n_u] at ascending `priors`."""
    pi = np.asarray(priors, np.float64)
    pairs = np.array([emptiness(row) for row in u_logits])
    recall = (p_logits > 0).mean(1)
    possible = np.isfinite(pairs[:, 0]) & (recall >= COVERS)
    value = pairs[:, 0]
    upper = np.where(possible, value + pairs[:, 1], np.inf)
    best = int(np.argmin(upper))
    seen = np.isfinite(value)
    rises = [
        bool((value[side] > CONTRAST * upper[best]).any()) if len(side) else False
        for side in (np.flatnonzero(seen[:best]), best + 1 + np.flatnonzero(seen[best + 1 :]))
    ]
    inner = bool(np.isfinite(upper[best]) and upper[best] < flat and all(rises))
    if not np.isfinite(upper[best]):
        return Boundary(pi, value, upper, best, False, float(pi[best]), float(pi[0]), float(pi[-1]))

    def reach(side: Sequence[int], bound: float) -> int:
        """The last of `side`, from `best` on, up to which all are at most `bound` times as full as the emptiest."""
        last = best
        for g in side:
            if not possible[g] or value[g] > bound * upper[best]:
                break
            last = g
        return last

    to_right = range(best, len(pi))
    low = pi[max(0, reach(range(best, -1, -1), AS_EMPTY) - 1)]
    high = pi[min(len(pi) - 1, reach(to_right, SHOULDER) + 1)]
    foot = pi[reach(to_right, AS_EMPTY)]
    return Boundary(pi, value, upper, best, inner, float(foot), float(low), float(high))


def generous(
    priors: Sequence[float] | np.ndarray, p_logits: np.ndarray, u_logits: np.ndarray, factor: float = 3.0
) -> int:
    """Index of the least prior, going down from the top, that is at least `factor` times its own density ratio's.

    The density ratio of nnPU's logits hardly depends on the prior given as long as that is above the true one (0.86 to
    1.10 of the truth even where the prior given is 50 times too high); below it everything collapses, so it is not
    iterated from there.
    """
    g = len(priors) - 1
    while g > 0:
        p, u = p_logits[g - 1], u_logits[g - 1]
        if (p > 0).mean() < COVERS or priors[g - 1] < factor * Binned.of(p, u).fit()[1]:
            break
        g -= 1
    return g


@dataclass(frozen=True)
class DensityRatio:
    """The prior that P's density ratio says."""

    value: float
    draws: np.ndarray
    """Bootstrap, [draws]."""


def density_ratio(bins: ClassBins, fitted: ByClass, units: np.ndarray, draws: int = 40, seed: int = 0) -> DensityRatio:
    """Of `bins`, to which `fitted` was fitted, with a bootstrap of P and units [n_u] of U."""
    rng, n_p, n_u = np.random.default_rng(seed), len(bins.p), len(bins.u_cell)
    drawn = [bins.fit(resample_weights(rng, n_p), resample_weights(rng, n_u, units)).prior for _ in range(draws)]
    return DensityRatio(fitted.prior, np.array(drawn))


@dataclass(frozen=True)
class TwoSample:
    """P against what is taken of U."""

    auc: float
    error: float
    """Standard error."""
    n_p: int
    n_u: int

    @property
    def lower(self) -> float:
        """Of the AUC, 95 %."""
        return self.auc - LEVEL * self.error

    @property
    def upper(self) -> float:
        """Of the AUC, 95 %; below 1/2 is chance, and no evidence against a bias."""
        return max(self.auc, 0.5) + LEVEL * self.error


def divergence(auc: float) -> float:
    """KL divergence of two Gaussians of equal covariance that a linear classifier parts with this AUC."""
    return float(ndtri(min(max(auc, 0.5), 0.999)) ** 2)


def class_weights(p_classes: np.ndarray, u_classes: np.ndarray) -> np.ndarray:
    """Weights of P [n_p], mean 1, under which its classes are as frequent as in U [n_u], one more of each in both."""
    names, index, counts = np.unique(p_classes, return_inverse=True, return_counts=True)
    at = np.searchsorted(names, u_classes).clip(0, len(names) - 1)
    in_u = np.bincount(at[names[at] == u_classes], minlength=len(names)) if len(names) else counts
    weights: np.ndarray = ((in_u + 1) / (counts + 1))[index]
    return weights / max(float(weights.sum()), 1e-9) * len(weights)


def two_sample(
    p: np.ndarray, u: np.ndarray, p_weights: np.ndarray, seed: int, folds: int = 5, shrink: float = 0.2, most: int = 4
) -> TwoSample:
    """Cross-validated AUC of a shrunk linear discriminant between features [n_p, C] and [n_u, C] on 40 components.

    On `hard` with the truth as U it has 0.49, 0.65, 0.75 at k = 0, 0.7, 1.2; on what lies beyond the gap 0.50, 0.62,
    0.71. The error is that of Hanley, McNeil (1982) with the effective number of P.
    """
    rng = np.random.default_rng(seed)
    u = u[rng.permutation(len(u))[: max(most * len(p), 200)]].astype(np.float64)
    p = p.astype(np.float64)
    if len(p) < 4 * folds or len(u) < 4 * folds:
        return TwoSample(0.5, 0.5, len(p), len(u))
    x = np.concatenate([p, u])
    v = np.concatenate([p_weights / p_weights.mean(), np.ones(len(u))])
    is_p = np.arange(len(x)) < len(p)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-4)
    from sklearn.decomposition import PCA  # here: most processes that import this module do without, a second less

    x = PCA(min(40, *x.shape), random_state=seed).fit_transform(x)
    x /= np.maximum(x.std(0), 1e-6)
    fold = np.concatenate([rng.permutation(np.arange(n) % folds) for n in (len(p), len(u))])
    parts = []
    for k in range(folds):
        means, scatter = [], np.zeros((x.shape[1], x.shape[1]))
        for side in (is_p, ~is_p):
            rows = side & (fold != k)
            mean = np.average(x[rows], axis=0, weights=v[rows])
            centred = x[rows] - mean
            scatter += 0.5 * (centred * (v[rows] / v[rows].sum())[:, None]).T @ centred
            means.append(mean)
        scatter = (1 - shrink) * scatter + shrink * np.trace(scatter) / len(scatter) * np.eye(len(scatter))
        direction = np.linalg.solve(scatter, means[0] - means[1])
        test = fold == k
        mine, theirs = test & is_p, test & ~is_p
        parts.append((weighted_auc(x[mine] @ direction, v[mine], x[theirs] @ direction), mine.sum()))
    auc = float(np.average([a for a, _ in parts], weights=[n for _, n in parts]))
    n1, n0 = p_weights.sum() ** 2 / (p_weights**2).sum(), len(u)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + (n1 - 1) * (q1 - auc**2) + (n0 - 1) * (q2 - auc**2)) / (n1 * n0))
    return TwoSample(auc, float(error), len(p), len(u))


def net_of(auc: float, others: float) -> float:
    """The AUC that is left if a share `others` of what was taken of U are no positives, told apart without error."""
    return (auc - others) / (1 - others) if others < 1 else 0.5


def weighted_auc(p: np.ndarray, weights: np.ndarray, u: np.ndarray) -> float:
    """P(a weighted draw of p scores above a draw of u)."""
    u = np.sort(u)
    rank = (np.searchsorted(u, p, "left") + np.searchsorted(u, p, "right")) / 2 / len(u)
    return float(np.average(rank, weights=weights))
