"""A rival: the images with the largest logit of the teacher, before any softmax (Hendrycks et al. 2022)."""

from collections.abc import Mapping

import numpy as np

from pukd_ray.selection.rules.base import Rule, Scorer, by_column, the_budget


def _score(fitted: Mapping[str, np.ndarray], features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    del fitted, features
    largest: np.ndarray = teacher_logits.max(1).astype(np.float32)
    return largest


RULE = Rule(
    name="max_logit",
    text="the {budget:,} images with the largest logit of the teacher, without the selector",
    needs=("budget",),
    rank_by=by_column("max_logit"),
    reads=("max_logit",),
    scorer=Scorer(lambda *_: {}, _score),
    count=the_budget,
    uses_selector=False,
    takes_highest=False,
)
