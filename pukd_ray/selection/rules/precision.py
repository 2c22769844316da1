"""As many of the surest images as keep the estimated precision."""

from pukd_ray.config import SelectionConfig
from pukd_ray.selection.cuts import precision_count
from pukd_ray.selection.rules.base import Rule, Supply


def _most_with_precision(selection: SelectionConfig, supply: Supply) -> int:
    assert selection.target_precision is not None
    return precision_count(supply.probabilities, supply.counts, selection.target_precision)


RULE = Rule(
    name="precision",
    text="the most images whose estimated precision is at least {target_precision:g}",
    needs=("target_precision",),
    count=_most_with_precision,
)
