"""Errors and warnings in colour, where a person reads them. Importing it does not import Ray."""

from __future__ import annotations

import os
import re
from typing import TextIO

RED, YELLOW = 31, 33
_WARNING = re.compile(r"\s*warning\b", re.IGNORECASE)


def coloured(text: str, stream: TextIO, colour: int | None = None) -> str:
    """`text` for `stream`, in `colour`, or yellow if it is a warning; as it is unless that is a terminal with colours.

    NO_COLOR (no-color.org) and TERM=dumb say that it has none.
    """
    if colour is None and _WARNING.match(text):
        colour = YELLOW
    plain = colour is None or not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"
