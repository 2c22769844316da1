"""PU-s1: all that the selector takes for relevant."""

from pukd_ray.selection.rules.base import Rule, positive_logit

RULE = Rule(name="positive", text="all images with PU logit above 0", eligible=positive_logit)
