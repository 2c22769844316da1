"""A rival without a budget: the whole corpus."""

from pukd_ray.selection.rules.base import Rule

RULE = Rule(
    name="all", text="all images, without the selector", uses_selector=False, uses_scores=False, takes_highest=False
)
