"""The bound that no selection passes: what truth says is relevant."""

import numpy as np

from pukd_ray.config import SelectionConfig
from pukd_ray.selection.cuts import Scores
from pukd_ray.selection.rules.base import Rule


def _relevant(selection: SelectionConfig, scores: Scores) -> np.ndarray:
    del selection
    return scores.relevant


RULE = Rule(
    name="truth",
    text="the images that are relevant by truth",
    eligible=_relevant,
    uses_selector=False,
    uses_scores=False,
    takes_highest=False,
    if_empty="it needs truth in the corpus",
)
