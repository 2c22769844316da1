"""A budget that is shared evenly over the teacher's classes; what a class cannot fill goes to the others."""

from pukd_ray.selection.rules.base import Rule, positive_logit, the_budget

RULE = Rule(
    name="quota",
    text="{budget:,} images with PU logit above 0, shared evenly over the teacher's classes, {order}",
    needs=("budget",),
    eligible=positive_logit,
    count=the_budget,
    per_class=True,
    follows_order=True,
)
