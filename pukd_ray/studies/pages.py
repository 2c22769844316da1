"""What the studies' pages have in common: the machine they name, the templates they are made of."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent


def describe_machine() -> dict[str, Any]:
    """The machine and the date that figures come with."""
    return {"cpus": os.cpu_count(), "platform": platform.platform(), "date": time.strftime("%Y-%m-%d")}


def render_page(template: str, **values: Any) -> str:
    """A template of this folder with its values, Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), keep_trailing_newline=True, trim_blocks=True, autoescape=False
    )
    return environment.get_template(template).render(**values)
