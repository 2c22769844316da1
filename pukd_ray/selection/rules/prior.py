"""As many of the surest images as the prior says are relevant."""

from pukd_ray.config import SelectionConfig
from pukd_ray.selection.rules.base import Rule, Supply


def _share_of_prior(selection: SelectionConfig, supply: Supply) -> int:
    del selection
    return round(supply.prior * supply.n_scored)


RULE = Rule(name="prior", text="the top share of images that the prior says is relevant", count=_share_of_prior)
