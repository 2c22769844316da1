"""A rival: the images of each class of which the teacher is surest (Yalniz et al. 2019), a budget shared evenly."""

from dataclasses import replace

from pukd_ray.selection.rules.teacher_confidence import RULE as TEACHER_CONFIDENCE

RULE = replace(
    TEACHER_CONFIDENCE,
    name="teacher_topk_per_class",
    text="the {budget:,} images of which the teacher is surest, shared evenly over its classes, without the selector",
    per_class=True,
)
