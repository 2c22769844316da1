"""A rival: the images of which the teacher is surest, by its largest softmax (Hendrycks and Gimpel 2017)."""

import numpy as np

from pukd_ray.selection.cuts import Scores
from pukd_ray.selection.rules.base import Rule, the_budget


def _by_confidence(scores: Scores) -> np.ndarray:
    return scores.teacher_confidence


RULE = Rule(
    name="teacher_confidence",
    text="the {budget:,} images of which the teacher is surest, without the selector",
    needs=("budget",),
    rank_by=_by_confidence,
    count=the_budget,
    uses_selector=False,
    takes_highest=False,
)
