"""The network's logit and two scores of nearness to P in one logit, with weights learnt on held-out images.

    pu_logit = w_0 * z / sd_U(z) - sum_k w_k * log(share of U whose score k is as high) - cut

z is the network's logit; the scores are those of the rules in `EVIDENCE`, which need no training and go on ranking
where z saturates. A tail share is flat over the mass of U and rises where hardly anything of U is as near. The weights,
none below 0, maximise the conditional likelihood of held-out P against U, as the calibration does (`calibration`, with
one covariate instead of three): where z alone tells the most, the others get little, and the other way round. `cut` is
set so that as many of U stay positive: who is taken changes, not how many.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, log_expit

from pukd_ray.selection.rules import RULES
from pukd_ray.selection.rules.base import moments

EVIDENCE = ("knn", "rmds")
"""Rules with a scorer."""
# The first of them has at least this share of the logit's weight: held-out P is as biased as P is, and tells too much
# for the network that learnt the bias. On the tuning pools 0.2 gains 0.002 to 0.006 where P is biased or has other
# classes than U, and costs nothing elsewhere; 0.4 costs `hard` 0.001.
LEAST = 0.2
MAX_WEIGHT = 20.0  # where P and U part completely weights would run away
MOST_OF_U = 20_000  # rows that scorers are fitted to: their moments need no more, and their memory grows with it
# Wider last taps are seen along this many principal components of U: covariances of 2,048 channels would cost a pass
# more than the teacher does.
MOST_CHANNELS = 128


@dataclass(frozen=True)
class Tails:
    """-log of the share of U that scores as high, a column for each of `EVIDENCE`."""

    p: np.ndarray
    """float32 [n_p, E], each of P by scorers that were not fitted to it."""
    u: np.ndarray
    """[n_u, E]."""


@dataclass(frozen=True)
class Blend:
    """How one network's logit and the tails make `pu_logit`."""

    weights: tuple[float, ...]
    """Of the logit in standard deviations, and of each of `EVIDENCE`."""
    deviation: float
    """Of the logits of U."""
    cut: float = 0.0

    @classmethod
    def learn(cls, p_logits: np.ndarray, u_logits: np.ndarray, tails: Tails) -> Blend:
        """Of held-out logits [n_p] and [n_u]."""
        from scipy.optimize import minimize  # half a second that scoring actors need not spend

        deviation = float(u_logits.std()) or 1.0
        p, u = (np.c_[z / deviation, t].astype(np.float64) for z, t in ((p_logits, tails.p), (u_logits, tails.u)))
        for columns in (p, u):
            columns[:, 0] += LEAST * columns[:, 1]

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            t_p, t_u = p @ theta[:-1] + theta[-1], u @ theta[:-1] + theta[-1]
            s = expit(t_u)
            miss, slope = expit(-t_p) / len(p), s * (1 - s) / s.sum()
            value = np.log(s.mean()) - log_expit(t_p).mean()
            return float(value), np.r_[slope @ u - miss @ p, slope.sum() - miss.sum()]

        start, bounds = [1.0] * p.shape[1] + [-2.0], [(0.0, MAX_WEIGHT)] * p.shape[1] + [(-50.0, 50.0)]
        found = minimize(loss, np.array(start), jac=True, method="L-BFGS-B", bounds=bounds)
        weights = found.x[:-1]
        weights[1] += LEAST * weights[0]
        return cls(tuple(weights.tolist()), deviation).fitted_to(u_logits, tails.u)

    def fitted_to(self, u_logits: np.ndarray, u_tails: np.ndarray) -> Blend:
        """The same weights for another network's logits of U: of it as many stay positive."""
        bare = replace(self, deviation=float(u_logits.std()) or 1.0, cut=0.0)
        return replace(bare, cut=float(np.quantile(bare(u_logits, u_tails), 1 - (u_logits > 0).mean())))

    def __call__(self, logits: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """`pu_logit` float32 [n] of logits [n] and tails [n, E]."""
        blended: np.ndarray = np.c_[logits / self.deviation, tails].astype(np.float64) @ np.array(self.weights)
        return (blended - self.cut).astype(np.float32)


@dataclass(frozen=True)
class Nearness:
    """The scorers of `EVIDENCE`, fitted to the last tap."""

    projection: Mapping[str, np.ndarray]
    """`mean` and `std` [C] of U and its leading `axes` [C, D]; empty where the last tap is narrow enough as it is."""
    scorers: Mapping[str, Mapping[str, np.ndarray]]
    """By rule what its scorer learnt, and `sample`: its scores of U, ascending."""

    def seen(self, last_tap: np.ndarray) -> np.ndarray:
        """What the scorers see, float32 [n, D], of the last tap [n, C]."""
        if not self.projection:
            return last_tap
        projected: np.ndarray = (last_tap - self.projection["mean"]) / self.projection["std"] @ self.projection["axes"]
        return projected

    def tails(self, last_tap: np.ndarray) -> np.ndarray:
        """float32 [n, E] of the last tap float32 [n, C]: finite, and higher for a higher score."""
        seen, columns = self.seen(last_tap), []
        for rule in EVIDENCE:
            sample = self.scorers[rule]["sample"]
            as_high = len(sample) - np.searchsorted(sample, _score(rule, self.scorers[rule], seen))
            columns.append(-np.log((as_high + 0.5) / (len(sample) + 0.5)))
        return np.stack(columns, 1).astype(np.float32)

    def dump(self) -> bytes:
        """What `selector/nearness.npz` holds."""
        arrays = {
            f"{part}.{name}": array
            for part, of_part in {"": self.projection, **self.scorers}.items()
            for name, array in of_part.items()
        }
        sink = io.BytesIO()
        np.savez(sink, **arrays)  # type: ignore[arg-type]  # a stub that takes them for its options
        return sink.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Nearness:
        """Inverse of `dump`."""
        parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in ("", *EVIDENCE)}
        with np.load(io.BytesIO(data)) as arrays:
            for key in arrays.files:
                part, _, name = key.partition(".")
                parts[part][name] = arrays[key]
        return cls(parts.pop(""), parts)


def fit_nearness(
    p: np.ndarray, u: np.ndarray, labels: np.ndarray, folds: np.ndarray, seed: int
) -> tuple[Nearness, Tails]:
    """(fitted to all of P; the tails of P and U, those of P held out by `folds` int64 [n_p]).

    P float32 [n_p, C] and U [n_u, C] are the last tap, `labels` int64 [n_p] those of P.
    """
    some = u[np.sort(np.random.default_rng([seed, 7]).permutation(len(u))[:MOST_OF_U])]
    bare = Nearness(_project(some), {})
    seen_p, seen_u = bare.seen(p), bare.seen(some)

    def fitted_to(rows: np.ndarray) -> Nearness:
        return replace(bare, scorers={rule: _fit(rule, seen_p[rows], seen_u, labels[rows]) for rule in EVIDENCE})

    held_out = np.zeros((len(p), len(EVIDENCE)), np.float32)
    for fold in np.unique(folds):
        held_out[folds == fold] = fitted_to(folds != fold).tails(p[folds == fold])
    nearness = fitted_to(np.ones(len(p), bool))
    return nearness, Tails(held_out, nearness.tails(u))


def _project(u: np.ndarray) -> dict[str, np.ndarray]:
    """`Nearness.projection` for U [n_u, C]."""
    if u.shape[1] <= MOST_CHANNELS:
        return {}
    by_u = moments(u)
    z = (u - by_u["mean"]) / by_u["std"]
    _, axes = np.linalg.eigh(z.T @ z / len(z))
    return {**by_u, "axes": axes[:, -MOST_CHANNELS:]}


def _fit(rule: str, p: np.ndarray, u: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    scorer = RULES[rule].scorer
    assert scorer is not None
    fitted = scorer.fit(p, u, labels)
    return {**fitted, "sample": np.sort(_score(rule, fitted, u))}


def _score(rule: str, fitted: Mapping[str, np.ndarray], seen: np.ndarray) -> np.ndarray:
    """float32 [n]; these rules do not look at the teacher's logits."""
    scorer = RULES[rule].scorer
    assert scorer is not None
    return scorer.score(fitted, seen, np.zeros((len(seen), 0), np.float32))
