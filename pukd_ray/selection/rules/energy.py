"""A rival: the images of lowest free energy -log sum_k exp(logit_k) of the teacher (Liu et al. 2020, T = 1)."""

from collections.abc import Mapping

import numpy as np

from pukd_ray.selection.rules.base import Rule, Scorer, by_column, the_budget


def _score(fitted: Mapping[str, np.ndarray], features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    del fitted, features
    z = teacher_logits.astype(np.float64)
    highest = z.max(1)
    negative_energy: np.ndarray = highest + np.log(np.exp(z - highest[:, None]).sum(1))
    return negative_energy.astype(np.float32)


RULE = Rule(
    name="energy",
    text="the {budget:,} images of lowest free energy by the teacher's logits, without the selector",
    needs=("budget",),
    rank_by=by_column("energy"),
    reads=("energy",),
    scorer=Scorer(lambda *_: {}, _score),
    count=the_budget,
    uses_selector=False,
    takes_highest=False,
)
