"""An audit of a pool by its truth: what `pukd audit` would draw, and labels that are right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pukd_ray.audit.design import Bins, plan_strata
from pukd_ray.audit.estimate import Counted, estimate_strata
from pukd_ray.selection.cuts import ordered_bits
from pukd_ray.selection.verdict import LabelledPrior


@dataclass(frozen=True)
class TrueLabels:
    """Labelled images of a corpus."""

    rows: np.ndarray
    """Of the corpus, int64 [n]."""
    relevant: np.ndarray
    """bool [n]."""
    weight: np.ndarray
    """Images that one stands for, float64 [n]."""
    prior: LabelledPrior

    def of_relevant(self, n_p: int) -> np.ndarray:
        """Weights of P [n_p], whose last images are the relevant ones, 0 of all others."""
        mine = self.weight[self.relevant]
        weights: np.ndarray = np.r_[np.zeros(n_p - len(mine)), mine]
        return weights

    def of_irrelevant(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features, shares) of the known negatives, of the corpus's features [n_u, C]."""
        weight = self.weight[~self.relevant]
        return u[self.rows[~self.relevant]], weight / weight.sum()


def label_by_truth(
    logits: np.ndarray, probability: np.ndarray, relevant: np.ndarray, images: int, seed: int
) -> TrueLabels:
    """Labels of `images` images of a corpus [n_u], drawn by the scores of a selector that takes those above 0."""
    taken, bits = logits > 0, (ordered_bits(logits) >> 16).astype(np.int64)
    sides = {side: _bins(bits[taken == side], probability[taken == side]) for side in (True, False)}
    rng = np.random.default_rng([seed, 5])
    rows, weight, counted = [], [], []
    for stratum in plan_strata(sides[True], sides[False], images):
        mine = (taken == stratum.selected) & (bits >= stratum.first) & (bits <= stratum.last)
        rows.append(rng.choice(np.flatnonzero(mine), stratum.sampled, replace=False))
        weight.append(np.full(stratum.sampled, 1 / stratum.inclusion_probability))
        hits = int(relevant[rows[-1]].sum())
        counted.append(Counted(stratum.selected, stratum.size, hits, stratum.sampled - hits, 0))
    prior = estimate_strata(counted).prior
    assert prior.value is not None
    assert prior.lower is not None
    assert prior.upper is not None
    said = LabelledPrior(prior.value, prior.lower, prior.upper, images)
    drawn = np.concatenate(rows)
    return TrueLabels(drawn, relevant[drawn], np.concatenate(weight), said)


def _bins(bits: np.ndarray, probability: np.ndarray) -> Bins:
    names, index, count = np.unique(bits, return_inverse=True, return_counts=True)
    return Bins(names, count, np.bincount(index, probability, len(names)) / np.maximum(count, 1))
