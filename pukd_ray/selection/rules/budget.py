"""PU-s2: some of what the selector takes for relevant, the surest or drawn at random."""

from pukd_ray.selection.rules.base import Rule, positive_logit, the_budget

RULE = Rule(
    name="budget",
    text="{budget:,} of the images with PU logit above 0, {order}",
    needs=("budget",),
    eligible=positive_logit,
    count=the_budget,
    follows_order=True,
)
