"""A rival: the images of whose class the teacher is least in doubt, by the entropy of its softmax (lowest first)."""

import numpy as np

from pukd_ray.selection.cuts import Scores
from pukd_ray.selection.rules.base import Rule, the_budget


def _by_certainty(scores: Scores) -> np.ndarray:
    certainty: np.ndarray = -scores.more["teacher_entropy"]
    return certainty


RULE = Rule(
    name="entropy",
    text="the {budget:,} images with the lowest entropy of the teacher's softmax, without the selector",
    needs=("budget",),
    rank_by=_by_certainty,
    reads=("teacher_entropy",),
    count=the_budget,
    uses_selector=False,
    takes_highest=False,
)
