"""Data goes one way: no package imports one to its right."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pukd_ray

ROOT = Path(pukd_ray.__file__).parent
ORDER = (
    "errors",
    "storage",
    "config",
    "run",
    "runtime",
    "corpus",
    "networks",
    "preflight",
    "selection",
    "audit",
    "distillation",
    "export",
    "report",
    "resume",
    "estimate",
    "outline",
    "pipeline",
    "demo",
    "soak",
    "studies",
    "cli",
    "commands",
    "__main__",
)
"""Top-level modules and packages of `pukd_ray`, left to right. `pipeline` alone knows all stages, by name only."""


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of all imports from the package, those inside functions and for type checkers included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pukd_ray":
            parts = node.module.split(".")
            yield from ((node.lineno, parts[1] if parts[1:] else alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from ((node.lineno, parts[1]) for parts in names if parts[0] == "pukd_ray" and parts[1:])


def sources() -> list[Path]:
    return sorted(f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py")


def layer(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_order_names_everything() -> None:
    assert {layer(f) for f in sources()} == set(ORDER)


@pytest.mark.parametrize("file", sources(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_to_the_left(file: Path) -> None:
    mine = ORDER.index(layer(file))
    wrong = [
        f"line {line}: {layer(file)} imports {name}"
        for line, name in imported(file)
        if name in ORDER and ORDER.index(name) > mine
    ]
    assert not wrong
