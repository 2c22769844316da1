"""A rival: the images nearest to P in the teacher's last tap (k-nearest neighbours, Sun et al. 2022)."""

from collections.abc import Mapping

import numpy as np

from pukd_ray.selection.rules.base import Rule, Scorer, by_column, moments, the_budget

NEIGHBOUR = 10


def _units(features: np.ndarray, fitted: Mapping[str, np.ndarray]) -> np.ndarray:
    """Standardised and of length 1, float32 [n, C]."""
    z = (features - fitted["mean"]) / fitted["std"]
    lengths = np.linalg.norm(z, axis=1, keepdims=True)
    units: np.ndarray = z / np.maximum(lengths, np.float32(1e-12))
    return units


def _fit(p: np.ndarray, u: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    del labels
    by_u = moments(u)
    return {**by_u, "positives": _units(p, by_u)}


def _score(fitted: Mapping[str, np.ndarray], features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    del teacher_logits
    cosine = _units(features, fitted) @ fitted["positives"].T
    nth = max(0, cosine.shape[1] - NEIGHBOUR)  # of fewer positives the furthest
    nearest: np.ndarray = np.partition(cosine, nth, axis=1)[:, nth]
    return nearest


RULE = Rule(
    name="knn",
    text="the {budget:,} images most like a handful of positives (cosine similarity of the teacher's last features to "
    "the 10th nearest), without the selector",
    needs=("budget",),
    rank_by=by_column("knn"),
    reads=("knn",),
    scorer=Scorer(_fit, _score),
    count=the_budget,
    uses_selector=False,
    takes_highest=False,
)
