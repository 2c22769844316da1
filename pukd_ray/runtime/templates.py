"""Pages from templates: one way for all, in which foreign text is data."""

from __future__ import annotations

import jinja2


def load_templates(package: str) -> jinja2.Environment:
    """The templates of a package of this one: text is escaped, and what is not given is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pukd_ray", package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
