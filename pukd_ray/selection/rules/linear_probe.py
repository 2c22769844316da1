"""A rival: logistic regression of P against the sample of U on the teacher's last tap."""

from collections.abc import Mapping

import numpy as np

from pukd_ray.selection.rules.base import Rule, Scorer, by_column, moments, the_budget

MAX_ITERATIONS = 1000


def _fit(p: np.ndarray, u: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    del labels
    by_u = moments(u)
    z = (np.concatenate([p, u]) - by_u["mean"]) / by_u["std"]
    is_p = np.arange(len(z)) < len(p)
    # Balanced: P is a few images beside U, and its weight decides how far the penalty holds the probe back.
    probe = LogisticRegression(class_weight="balanced", max_iter=MAX_ITERATIONS).fit(z, is_p)
    return {**by_u, "weight": probe.coef_[0].astype(np.float32), "bias": probe.intercept_.astype(np.float32)}


def _score(fitted: Mapping[str, np.ndarray], features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    del teacher_logits
    logits: np.ndarray = (features - fitted["mean"]) / fitted["std"] @ fitted["weight"] + fitted["bias"]
    return logits


RULE = Rule(
    name="linear_probe",
    text="the {budget:,} images that logistic regression on the teacher's last features takes most surely for P, "
    "without the selector",
    needs=("budget",),
    rank_by=by_column("linear_probe"),
    reads=("linear_probe",),
    scorer=Scorer(_fit, _score),
    count=the_budget,
    uses_selector=False,
    takes_highest=False,
)
