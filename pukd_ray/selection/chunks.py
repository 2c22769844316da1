"""What the finished chunks of the pass left: files of `scores/`, and which rules have a column of their own there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pukd_ray.config import RunConfig
from pukd_ray.run.folder import RunFolder
from pukd_ray.selection.rules import RULES

HASH_COLUMN = "perceptual_hash"
CHUNK_SECONDS = 600.0
"""Of a chunk's work, where `score.chunk_images` does not say how many images it has."""


def chunk_markers(folder: RunFolder) -> list[dict[str, Any]]:
    """Markers of the finished chunks, in order."""
    return [folder.read_json(name) for name in folder.files("markers/score") if name.endswith(".json")]


def score_files(folder: RunFolder) -> list[str]:
    """Files of finished chunks."""
    return [file for marker in chunk_markers(folder) for file in marker["files"]]


def rules_of_pass(config: RunConfig) -> tuple[str, ...]:
    """Rules whose column the pass writes: `selection.rule` and `score.also`, as far as they have one; sorted."""
    return tuple(sorted(rule for rule in {config.selection.rule, *config.score.also} if RULES[rule].scorer))


def missing_columns(folder: RunFolder, rules: Iterable[str]) -> list[str]:
    """Those of `rules` whose column some finished chunk lacks: it was made for other rules."""
    there = [marker.get("columns", ()) for marker in chunk_markers(folder)]
    return [rule for rule in rules if RULES[rule].scorer and not all(rule in columns for columns in there)]


def lacks_hashes(folder: RunFolder) -> bool:
    """Whether some finished chunk was made before images had perceptual hashes."""
    return any(HASH_COLUMN not in marker.get("columns", ()) for marker in chunk_markers(folder))


def missing_column(folder: RunFolder, rule: str) -> str:
    """The fault, for people."""
    return (
        f"the scores in {folder.display} lack the column that rule {rule} ranks by: --redo score writes it (with "
        f"score.also: [{rule}] a pass writes it whatever the rule)"
    )
