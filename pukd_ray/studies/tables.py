"""docs/results.md out of a study."""

from typing import Any


def render(study: dict[str, Any], command: str) -> str:
    """The page."""
    raise NotImplementedError
