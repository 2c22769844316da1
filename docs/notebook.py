"""Makes docs/tutorial.ipynb of docs/tutorial.md: `python docs/notebook.py`. A test holds the two together."""

from __future__ import annotations

import json
import re
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of what a reader runs, in order; what is shown only (`text`) is none of it."""
    return [(language, code) for language, code in BLOCK.findall(page) if language != "text"]


def file_of(code: str) -> tuple[str, str]:
    """(name, content) of a YAML block, whose first line is its file's name."""
    first, content = code.split("\n", 1)
    return first.removeprefix("# "), content


def cell_of(language: str, code: str) -> str:
    """The block as a notebook's cell runs it."""
    if language == "yaml":
        name, content = file_of(code)
        return f"%%writefile {name}\n{content}"
    return f"%%bash\n{code}" if language == "bash" else code


def notebook(page: str) -> str:
    """The page as a notebook's JSON."""
    cells: list[dict[str, object]] = []

    def add(kind: str, text: str, **more: object) -> None:
        if text.strip():
            lines = text.strip("\n").splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines, **more})

    at = 0
    for found in BLOCK.finditer(page):
        if found[1] == "text":
            continue
        add("markdown", page[at : found.start()])
        add("code", cell_of(found[1], found[2]), execution_count=None, outputs=[])
        at = found.end()
    add("markdown", page[at:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.with_suffix(".ipynb").write_text(notebook(PAGE.read_text()))
