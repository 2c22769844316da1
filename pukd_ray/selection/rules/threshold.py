"""All images from a calibrated P(relevant) on."""

import numpy as np

from pukd_ray.config import SelectionConfig
from pukd_ray.selection.cuts import Scores
from pukd_ray.selection.rules.base import Rule


def _probable(selection: SelectionConfig, scores: Scores) -> np.ndarray:
    above: np.ndarray = scores.pu_probability >= selection.threshold
    return above


RULE = Rule(
    name="threshold",
    text="all images with P(relevant) of at least {threshold:g}",
    needs=("threshold",),
    eligible=_probable,
)
