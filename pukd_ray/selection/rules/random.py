"""The rival that any selection must beat: as many images, drawn at random."""

from pukd_ray.selection.rules.base import Rule, by_tie_breaker, the_budget

RULE = Rule(
    name="random",
    text="{budget:,} images at random, without the selector",
    needs=("budget",),
    rank_by=by_tie_breaker,
    count=the_budget,
    uses_selector=False,
    uses_scores=False,
    takes_highest=False,
)
