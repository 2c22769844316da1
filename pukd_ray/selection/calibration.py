"""From logits to P(relevant) and the class prior without negatives, and what the estimates are worth.

Conditional likelihood (Steinberg, Cardell 1992; Ward et al. 2009): if P(relevant | z) = sigmoid(a z + b), then P, a
sample of the relevant part of U, has density sigmoid(a z + b) / mean_U sigmoid(a z + b) relative to U. Its
log-likelihood, mean_P log sigmoid(a z + b) - log mean_U sigmoid(a z + b), is maximised over a >= 0 and b, and
mean_U sigmoid(a z + b) is then an estimate of the prior: the plateau of the sigmoid takes the place of a pure
top of U. With a prior that is known, b is tied to a by mean_U sigmoid(a z + b) = prior.

On the tuning pools (`pukd_ray.demo.pools`) this is closer to the truth than PU-Platt (docs/method.md, "Calibration"),
whose risk is ruled by the many clear negatives. z must be held out: of images the network was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit, log_expit

MAX_SLOPE = 10.0  # in units of 1 / sd_U(z): beyond, U parts cleanly or P scores above its positives; a would run away
BINS = 1024


@dataclass(frozen=True)
class Calibration:
    """P(relevant) = sigmoid(slope * logit + offset)."""

    slope: float
    offset: float
    at_bound: bool = False
    """The slope hit its bound: U parts cleanly, or P scores higher than the relevant images of U do."""
    tilt: float = 0.0
    """P stood for the relevant images with weights proportional to exp(-tilt * logit): above 0 where it may be a biased
    sample of them, that scores too high."""

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities float64 of logits, any shape."""
        probabilities: np.ndarray = expit(self.slope * np.asarray(logits, np.float64) + self.offset)
        return probabilities

    def shifted(self, by: float) -> Calibration:
        """The same for logits that are `by` lower."""
        return replace(self, offset=self.offset + self.slope * by)


@dataclass(frozen=True)
class Binned:
    """Held-out logits of P and U, U as means and weights of bins: small enough to refit often."""

    p: np.ndarray
    """[n_p]."""
    u_bin: np.ndarray
    """Bin of each of U, int64 [n_u]."""
    u_mean: np.ndarray
    """[M]."""

    @classmethod
    def of(cls, p_logits: np.ndarray, u_logits: np.ndarray) -> Binned:
        """Bins by quantiles of U and of P: where P lies U may be thin, and there it has to be resolved."""
        p, u = np.asarray(p_logits, np.float64), np.asarray(u_logits, np.float64)
        grid = np.linspace(0, 1, BINS + 1)[1:-1]
        edges = np.unique(np.concatenate([np.quantile(u, grid), np.quantile(p, grid)]))
        u_bin = np.searchsorted(edges, u, side="right")
        _, u_bin = np.unique(u_bin, return_inverse=True)
        return cls(p, u_bin, np.bincount(u_bin, weights=u) / np.bincount(u_bin))

    def fit(
        self, prior: float | None = None, p_weights: np.ndarray | None = None, u_weights: np.ndarray | None = None
    ) -> tuple[Calibration, float]:
        """(calibration, prior): of the prior that is given, or of the one that fits best.

        Weights [n_p] and [n_u] serve the bootstrap.
        """
        from scipy.optimize import minimize, minimize_scalar  # half a second that scoring actors need not spend

        w = np.bincount(self.u_bin, weights=u_weights, minlength=len(self.u_mean)).astype(np.float64)
        w /= w.sum()
        v = np.full(len(self.p), 1.0) if p_weights is None else p_weights
        v = v / v.sum()
        mean = float(w @ self.u_mean)
        sd = float(np.sqrt(w @ (self.u_mean - mean) ** 2)) or 1.0
        p, u = (self.p - mean) / sd, (self.u_mean - mean) / sd
        if prior is None:

            def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
                t_p, t_u = theta[0] * p + theta[1], theta[0] * u + theta[1]
                s = expit(t_u)
                total = w @ s
                value = -(v @ log_expit(t_p)) + np.log(total)
                miss, slope = v * expit(-t_p), w * s * (1 - s) / total
                return float(value), np.array([slope @ u - miss @ p, slope.sum() - miss.sum()])

            found = minimize(
                loss, np.array([2.0, -2.0]), jac=True, method="L-BFGS-B", bounds=[(0, MAX_SLOPE), (-50, 50)]
            )
            slope, offset = found.x
        else:
            found = minimize_scalar(
                lambda a: -(v @ log_expit(a * p + _offset(a, u, w, prior))), bounds=(0, MAX_SLOPE), method="bounded"
            )
            slope, offset = found.x, _offset(found.x, u, w, prior)
        estimate = float(w @ expit(slope * u + offset))
        at_bound = bool(slope >= MAX_SLOPE * 0.99)
        return Calibration(float(slope / sd), float(offset - slope * mean / sd), at_bound=at_bound), estimate


def _offset(slope: float, u: np.ndarray, w: np.ndarray, prior: float) -> float:
    """The b with mean_U sigmoid(slope z + b) = prior, by bisection."""
    z = slope * u
    low, high = -50 - float(z.max()), 50 - float(z.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if w @ expit(z + middle) < prior else (low, middle)
    return (low + high) / 2


def tilted(weights: np.ndarray, logits: np.ndarray, tilt: float) -> np.ndarray:
    """`Calibration.tilt` put on weights of logits, both [n]."""
    tilted: np.ndarray = weights * np.exp(-tilt * (logits - logits.min()))
    return tilted


def tilt_of(divergence: float, logits: np.ndarray) -> float:
    """The tilt that moves logits [n] by a Kullback-Leibler divergence, as if they were normal."""
    return float(np.sqrt(2 * divergence) / max(float(np.std(logits)), 1e-6))


def rescale_logits(logits: np.ndarray, log_max_phi: float) -> np.ndarray:
    """Logits of phi / max phi, so that 0 is the threshold 1/2 of VPU too; unchanged where log_max_phi is 0."""
    if log_max_phi == 0.0:
        return logits
    log_phi = np.minimum(-np.logaddexp(0, -logits.astype(np.float64)) - log_max_phi, -1e-7)
    return (log_phi - np.log(-np.expm1(log_phi))).astype(np.float32)


def match_prior(calibration: Calibration, u_logits: np.ndarray, prior: float) -> Calibration:
    """The same slope with the offset at which mean_U P(relevant) is `prior` again."""
    u = np.asarray(u_logits, np.float64)
    weights = np.full(len(u), 1 / len(u))
    return replace(calibration, offset=_offset(calibration.slope, u, weights, min(prior, 1 - 1e-6)))


def carry_over(
    calibration: Calibration, bootstrap: Sequence[Calibration], u_logits: np.ndarray, prior: float
) -> tuple[Calibration, list[Calibration]]:
    """(calibration, its refits) for the logits of another network on U: `match_prior`, and all offsets moved alike."""
    moved = match_prior(calibration, u_logits, prior)
    shift = moved.offset - calibration.offset
    return moved, [replace(refit, offset=refit.offset + shift) for refit in bootstrap]


def resample_weights(rng: np.random.Generator, count: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Bootstrap weights [count]; with `groups` [count] whole groups (units of the corpus) are drawn together."""
    if groups is None:
        return np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 10:  # too few units to stand for the corpus: rows are drawn instead
        return resample_weights(rng, count)
    drawn = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
    return drawn[index].astype(np.float64)


def to_json(calibration: Calibration, bootstrap: Sequence[Calibration]) -> dict[str, Any]:
    """What `selector/calibration.json` holds; inverse of `from_json`."""
    return {**asdict(calibration), "bootstrap": [asdict(c) for c in bootstrap]}


def from_json(saved: dict[str, Any]) -> tuple[Calibration, list[Calibration]]:
    """(calibration, its refits on resampled data) of `selector/calibration.json`."""
    main = {name: value for name, value in saved.items() if name != "bootstrap"}
    return Calibration(**main), [Calibration(**draw) for draw in saved["bootstrap"]]
