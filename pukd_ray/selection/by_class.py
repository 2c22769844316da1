"""The density ratio within each of the teacher's classes: P has as many images of each, a corpus has not.

Taken together, P is a biased sample of what is relevant in U: the prior too low by exp(-KL) of the two class mixes, a
half where a hundred classes follow Zipf's law. So P(relevant | z, class c) = sigmoid(a z + b + d_c), and P's images
of a class are compared with U's of that class alone (`pukd_ray.selection.calibration` has the likelihood). The d_c are
normal around 0; what they say of each class gives the prior, the class mix, and by it weights of P.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_expit

from pukd_ray.selection.calibration import MAX_SLOPE, Binned

SHRINK = (
    0.3  # inverse variance of the d_c; at 3 a hundred classes by Zipf's law lose a third of the prior, at 0.1 20 of P
)
# per class make it a third too high
ENOUGH = 10  # relevant images of U for each class: with fewer the mix cannot be told, and all are taken together


@dataclass(frozen=True)
class ByClass:
    """What the density ratio says."""

    prior: float
    p_weights: np.ndarray
    """Under which the classes of P are as frequent as in what is relevant of U, [n_p], mean 1."""
    probability: np.ndarray
    """P(relevant) of U, [n_u]."""


@dataclass(frozen=True)
class ClassBins:
    """Held-out logits of P and U, standardised by U; U as bins within classes."""

    p: np.ndarray
    """[n_p]."""
    p_class: np.ndarray
    """From 0 to K - 1, [n_p]."""
    u_cell: np.ndarray
    """Cell of each of U, [n_u]; the last one holds the classes that P has not."""
    z: np.ndarray
    """Mean logit of each cell, [M]."""
    cell_class: np.ndarray
    """[M]."""

    @classmethod
    def of(cls, p_logits: np.ndarray, u_logits: np.ndarray, p_classes: np.ndarray, u_classes: np.ndarray) -> ClassBins:
        """Of logits and the teacher's labels of P [n_p] and U [n_u]."""
        binned = Binned.of(p_logits, u_logits)
        names, p_class = np.unique(p_classes, return_inverse=True)
        if binned.fit()[1] * len(u_logits) < ENOUGH * len(names):
            names, p_class, u_classes = names[:1], np.zeros_like(p_class), np.full(len(u_logits), names[0])
        u_class = np.searchsorted(names, u_classes).clip(0, len(names) - 1)
        mean, sd = float(u_logits.mean()), float(u_logits.std()) or 1.0
        cells, u_cell = np.unique(binned.u_bin * len(names) + u_class, return_inverse=True)
        z = (binned.u_mean[cells // len(names)] - mean) / sd
        u_cell = np.where(names[u_class] == u_classes, u_cell, len(cells))
        return cls((binned.p - mean) / sd, p_class, u_cell, z, cells % len(names))

    def fit(self, p_weights: np.ndarray | None = None, u_weights: np.ndarray | None = None) -> ByClass:
        """Weights [n_p] and [n_u] serve the bootstrap."""
        from scipy.optimize import minimize

        v = np.ones(len(self.p)) if p_weights is None else p_weights
        every = np.bincount(self.u_cell, u_weights, len(self.z) + 1).astype(np.float64)
        w, classes = every[:-1], int(self.p_class.max()) + 1
        size = np.bincount(self.cell_class, w, classes)
        v = v * (size > 0)[self.p_class]  # of a class that U has no image of P says nothing, and would pull a and b up
        drawn = np.bincount(self.p_class, v, classes)

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            offsets = theta[1] + theta[2:]
            t_p, s = theta[0] * self.p + offsets[self.p_class], expit(theta[0] * self.z + offsets[self.cell_class])
            total = np.bincount(self.cell_class, w * s, classes) + 1e-9
            value = (
                drawn @ np.log(total / np.maximum(size, 1)) - v @ log_expit(t_p) + SHRINK / 2 * theta[2:] @ theta[2:]
            )
            miss, slope = v * expit(-t_p), w * s * (1 - s) * (drawn / total)[self.cell_class]
            by_class = np.bincount(self.cell_class, slope, classes) - np.bincount(self.p_class, miss, classes)
            gradient = np.r_[slope @ self.z - miss @ self.p, by_class.sum(), by_class + SHRINK * theta[2:]]
            return float(value) / len(self.p), gradient / len(self.p)

        bounds = [(0.0, MAX_SLOPE), (-50.0, 50.0)] + [(-20.0, 20.0)] * classes
        theta = minimize(loss, np.r_[2.0, -2.0, np.zeros(classes)], jac=True, method="L-BFGS-B", bounds=bounds).x
        s = expit(theta[0] * self.z + (theta[1] + theta[2:])[self.cell_class])
        total = np.bincount(self.cell_class, w * s, classes)
        weights = (np.maximum(total, 1e-9) / np.maximum(drawn, 1))[self.p_class]
        return ByClass(float(total.sum() / every.sum()), weights / weights.mean(), np.r_[s, 0.0][self.u_cell])
