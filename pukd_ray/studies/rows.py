"""The rows of the paper's table: which images each student learns from, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pukd_ray.studies.config import PaperConfig

Data = Literal["positives", "original", "selection"]


@dataclass(frozen=True)
class TableRow:
    """One row; a student of it is trained for each number of positives and each seed."""

    name: str
    title: str
    data: Data
    """P alone, the teacher's own training images without P, or P and a selection."""
    selection: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `selection` that differ from the config."""
    distill: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `distill` that differ from the config."""
    budget: Literal["pu_s1", "table"] | None = None
    """As many images as `pu_s1` takes, or `table.budget`."""
    fewer: bool = False
    """Made with all numbers of `table.per_class`, not only the first."""


# Per-sample weights and P's labels belong to the recommended recipe; the published rows, and the rivals, go without.
PLAIN = {"sample_weights": "none", "label_weight": 0.0}

BUILT_IN = {
    row.name: row
    for row in (
        TableRow("p_only", "student on P only", "positives", distill=PLAIN, fewer=True),
        TableRow("kd", "KD on the original data", "original", distill=PLAIN),
        TableRow("truth", "Baseline-1: selected by truth", "selection", {"rule": "truth"}, PLAIN),
        TableRow("random", "Baseline-2: random of U", "selection", {"rule": "random"}, PLAIN, "pu_s1"),
        TableRow("all", "Baseline-3: all of U", "selection", {"rule": "all"}, PLAIN),
        TableRow(
            "teacher_confidence",
            "surest of the teacher",
            "selection",
            {"rule": "teacher_confidence"},
            PLAIN,
            "pu_s1",
        ),
        TableRow("pu_s1", "PU-s1", "selection", {"rule": "positive"}, PLAIN, fewer=True),
        TableRow(
            "pu_s2_random",
            "PU-s2, random",
            "selection",
            {"rule": "budget", "order": "random"},
            PLAIN,
            "table",
            fewer=True,
        ),
        TableRow(
            "pu_s2_top", "PU-s2, top", "selection", {"rule": "budget", "order": "top"}, PLAIN, "table", fewer=True
        ),
        TableRow("recommended", "recommended", "selection", fewer=True),
    )
}


def rows_of(config: PaperConfig) -> list[TableRow]:
    """The config's rows, built-in ones in their own order: `kd` and `truth` only where there is what they need."""
    wanted = set(config.table.rows)
    if config.original is None:
        wanted -= {"kd"}
    if not any(s.relevant_column or s.relevant is not None or s.relevant_labels for s in config.corpus):
        wanted -= {"truth"}
    more = [TableRow(r.name, r.name, "selection", r.selection, r.distill) for r in config.table.more]
    return [row for name, row in BUILT_IN.items() if name in wanted] + more


@dataclass(frozen=True)
class TableStudent:
    """One student of the table."""

    row: TableRow
    per_class: int
    seed: int
    epochs: bool = False
    """Of the second table, at equal epochs."""

    @property
    def key(self) -> str:
        """Names its files."""
        return f"{self.row.name}-{self.per_class}-seed{self.seed}{'-epochs' if self.epochs else ''}"


def students_of(config: PaperConfig) -> list[TableStudent]:
    """All students of the table, seed by seed."""
    first, *others = config.table.per_class
    students, rows = [], rows_of(config)
    for seed in range(config.table.seeds):
        students += [TableStudent(row, first, seed) for row in rows]
        students += [TableStudent(row, n, seed) for n in others for row in rows if row.fewer]
        if config.table.equal_epochs:
            # `kd` is the same in both tables.
            built_in = [row for row in rows if row.name in BUILT_IN and row.name != "kd"]
            students += [TableStudent(row, first, seed, epochs=True) for row in built_in]
    for seed in range(config.table.seeds, config.table.main_seeds or 0):
        students += [TableStudent(row, first, seed) for row in rows if row.name in BUILT_IN]
    return students
