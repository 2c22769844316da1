"""As many of the surest images as the prior says are relevant."""

from pukd_ray.config import SelectionConfig
from pukd_ray.selection.rules.base import Rule, Supply


def _share_of_prior(selection: SelectionConfig, supply: Supply) -> int:
    del selection
    relevant = supply.prior * supply.n_scored
    if supply.counts.sum() < supply.n_scored:  # what was dropped as copies may have been mostly relevant
        relevant = min(relevant, float(supply.probabilities @ supply.counts))
    return round(relevant)


RULE = Rule(name="prior", text="the top share of images that the prior says is relevant", count=_share_of_prior)
