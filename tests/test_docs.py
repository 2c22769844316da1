"""The pages: what they point to is there, and what they list is complete."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)#?([^)\s]*)\)")  # (path, anchor) of links without a scheme
CITED = re.compile(r"docs/method\.md, ((?:\"[^\"]+\"(?:,? and |, )?)+)")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(FENCED.sub("", page.read_text())):
        target = page.parent / path if path else page
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}: no such heading"


def test_the_pages_have_links() -> None:
    linked = {path for page in PAGES for path, _ in LINK.findall(page.read_text())}
    assert {"docs/method.md", "SECURITY.md", "results.md"} <= linked


def test_code_cites_headings_of_the_method_that_are_there() -> None:
    files = [*ROOT.glob("pukd_ray/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.md")]
    text = "\n".join(re.sub(r"\n\s*#?\s*", " ", file.read_text()) for file in files)
    cited = {title for quoted in CITED.findall(text) for title in re.findall(r'"([^"]+)"', quoted)}
    headings = set(re.findall(r"^## (.*)", (ROOT / "docs/method.md").read_text(), re.MULTILINE))
    assert "Batches" in cited
    assert cited <= headings


def test_all_metrics_are_listed() -> None:
    from ray.util.metrics import Counter

    from pukd_ray.runtime.metrics import LABELS

    listed = re.findall(r"^\| `ray_pukd_(\w+)` \|", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE)
    assert listed == [name + "_total" * (kind is Counter) for name, (kind, *_) in LABELS.items()]


def told() -> list[str]:
    """Every string of the package that has words, with … for what is put in."""
    trees = [ast.parse(file.read_text()) for file in ROOT.glob("pukd_ray/**/*.py")]
    texts = []
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            texts.append(node.value)
    return texts


def test_symptoms_are_what_the_package_says() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    symptoms = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    messages = [message for cell in symptoms for message in re.findall(r"`([^`]+)`", cell) if " " in message]
    assert len(messages) > 35
    texts = told()
    assert [m for m in messages if not any(all(part in text for part in m.split("…")) for text in texts)] == []


def test_files_that_contributing_names_are_there() -> None:
    named = re.findall(r"`((?:pukd_ray|tests|jobs|docs|cluster)/[\w./-]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []
