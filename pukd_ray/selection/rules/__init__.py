"""Selection rules: which scored images become training data. A module here adds one, by its `RULE`.

Its name also goes into `pukd_ray.config.RuleName`, beside the names that need the same key.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from pukd_ray.selection.rules.base import Rule

_RULES: tuple[Rule, ...] = tuple(
    import_module(f"{__name__}.{module.name}").RULE for module in iter_modules(__path__) if module.name != "base"
)
RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _RULES})
"""By name."""
