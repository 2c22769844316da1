"""The rows of the paper's table: which images each student learns from, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pukd_ray.selection.rules import RULES
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
    """As many images as `pu_s1` takes, or `table.budget`; of the original data so many and P's number."""
    fewer: bool = False
    """Made with all numbers of `table.per_class`, not only the first."""
    longer: int = 1
    """Multiple of the steps that the others take."""


# Per-sample weights and P's labels belong to the recommended recipe; the published rows, and the rivals, go without.
PLAIN = {"sample_weights": "none", "label_weight": 0.0}

BUILT_IN = {
    row.name: row
    for row in (
        TableRow("p_only", "student on P only", "positives", distill=PLAIN, fewer=True),
        TableRow("p_long", "P only, mixup, 4 x as long", "positives", distill={**PLAIN, "mixup": 1.0}, longer=4),
        TableRow("kd", "KD on the original data", "original", distill=PLAIN),
        TableRow("kd_few", "KD on as many original images", "original", distill=PLAIN, budget="pu_s1"),
        TableRow("truth", "Baseline-1: selected by truth", "selection", {"rule": "truth"}, PLAIN),
        TableRow("random", "Baseline-2: random of U", "selection", {"rule": "random"}, PLAIN, "pu_s1"),
        TableRow("all", "Baseline-3: all of U", "selection", {"rule": "all"}, PLAIN),
        *(
            TableRow(rule, title, "selection", {"rule": rule}, PLAIN, "pu_s1")
            for rule, title in (
                ("teacher_confidence", "surest of the teacher"),
                ("teacher_topk_per_class", "surest of the teacher per class"),
                ("knn", "nearest to P (knn)"),
                ("linear_probe", "linear probe of P against U"),
            )
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


def spends(row: TableRow) -> tuple[str, ...]:
    """Stages that the row needs before its student, of `selector` and `score`: some rows take any image."""
    if row.data != "selection":
        return ()
    rule = RULES[str(row.selection.get("rule", "positive"))]
    return (*("selector",) * rule.uses_selector, *("score",) * rule.uses_scores)


def has_truth(config: PaperConfig) -> bool:
    """Whether anything is known of what is relevant in the corpus."""
    return any(s.relevant_column or s.relevant is not None or s.relevant_labels for s in config.corpus)


def rows_of(config: PaperConfig) -> list[TableRow]:
    """The config's rows, built-in ones in their own order: only those for which there is what they need."""
    wanted = set(config.table.rows)
    if config.original is None:
        wanted -= {"kd", "kd_few"}
    if not has_truth(config):
        wanted -= {"truth"}
    more = [TableRow(r.name, r.name, "selection", r.selection, r.distill) for r in config.table.more]
    return [row for name, row in BUILT_IN.items() if name in wanted] + more


def own_columns(config: PaperConfig) -> tuple[str, ...]:
    """Rules whose column the pass writes only if asked to (`score.also`): the config's, and those of all built-in rows,
    so that a table that is made in part can grow."""
    rows = (*BUILT_IN.values(), *rows_of(config))
    rules = {str(row.selection.get("rule", config.selection.rule)) for row in rows if row.data == "selection"}
    return tuple(sorted(rule for rule in rules if RULES[rule].scorer))


@dataclass(frozen=True)
class TableStudent:
    """One student of the table."""

    row: TableRow
    per_class: int
    seed: int
    epochs: bool = False
    """Of the second table, at equal epochs."""
    length: float = 1.0
    """Multiple of the table's steps."""

    @property
    def key(self) -> str:
        """Names its files."""
        other = "-epochs" if self.epochs else f"-x{self.length:g}" if self.length != 1 else ""
        return f"{self.row.name}-{self.per_class}-seed{self.seed}{other}"

    @property
    def equal(self) -> str:
        """What those that it is compared with have in common: `steps`, `epochs`, or `length` other than the table's."""
        return "epochs" if self.epochs else "length" if self.length != 1 else "steps"


def students_of(config: PaperConfig) -> list[TableStudent]:
    """All students of the table, seed by seed."""
    first, *others = config.table.per_class
    students: list[TableStudent] = []
    start = config.table.first_seed
    main = BUILT_IN if config.table.main_rows is None else config.table.main_rows
    once = {*config.table.once, *(row.name for row in config.table.more if row.once)}
    for seed in range(start, start + max(config.table.seeds, config.table.main_seeds or 0)):
        rows = [row for row in rows_of(config) if seed == start or row.name not in once]
        if seed - start >= config.table.seeds:
            students += [TableStudent(row, first, seed) for row in rows if row.name in main]
            continue
        students += [TableStudent(row, first, seed) for row in rows]
        students += [TableStudent(row, n, seed) for n in others for row in rows if row.fewer]
        # What takes longer as it is has no place among other lengths, and compares at no epochs.
        usual = [row for row in rows if row.name in BUILT_IN and row.longer == 1]
        if seed == start:
            others_of = (length for length in config.table.lengths if length != 1)
            students += [TableStudent(row, first, seed, length=length) for length in others_of for row in usual]
        if config.table.equal_epochs:
            # `kd` is the same in both tables.
            students += [TableStudent(row, first, seed, epochs=True) for row in usual if row.name != "kd"]
    return students
