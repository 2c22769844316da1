"""Rows of the score table as the tasks of stage `select` see them, and what these tasks hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pukd_ray.config import RunConfig
from pukd_ray.run.folder import RunFolder
from pukd_ray.selection.cuts import Cut, Scores, ordered_bits
from pukd_ray.selection.rules import RULES
from pukd_ray.selection.rules.base import Rule
from pukd_ray.selection.scoring import sort_key

_COLUMNS = (
    "image_id",
    "content_hash",
    "error",
    "pu_logit",
    "pu_probability",
    "teacher_label",
    "teacher_confidence",
    "relevant",
)


@dataclass(frozen=True)
class SelectJob:
    """What every task of the stage needs."""

    folder: RunFolder
    config: RunConfig
    edges: np.ndarray
    """Bin edges of pu_logit for the summaries, float64 [BINS + 1], the outer ones infinite."""
    into: str
    """Folder to write."""

    @property
    def rule(self) -> Rule:
        """The rule of the config."""
        return RULES[self.config.selection.rule]


@dataclass(frozen=True)
class ScoredRows:
    """Readable rows of one task's score files, without images."""

    job: SelectJob
    table: pa.Table
    scores: Scores
    index: np.ndarray
    """Row in the task's files of each of `scores`."""
    allowed: np.ndarray
    """Eligible and no copy, bool [N]."""
    copies: int

    @property
    def ranking(self) -> np.ndarray:
        """The rule's key of each row, float32 [N]."""
        return self.job.rule.ranking(self.job.config.selection, self.scores)

    @property
    def bits(self) -> np.ndarray:
        """The key as integers that sort as it does, int64 [N]."""
        return ordered_bits(self.ranking).astype(np.int64)

    @property
    def groups(self) -> np.ndarray:
        """Within which rows compete, int64 [N]."""
        return self.job.rule.groups(self.scores)

    def taken(self, cuts: dict[int, Cut]) -> np.ndarray:
        """Rows that the cuts of their groups admit, bool [N]."""
        bits, groups = self.bits, self.groups
        taken: np.ndarray = np.zeros(len(bits), bool)
        for group, cut in cuts.items():
            taken |= (groups == group) & cut.admits(bits, self.scores.tie_breaker)
        taken &= self.allowed
        return taken


def read_tables(folder: RunFolder, files: list[str], columns: list[str]) -> pa.Table:
    """Those columns of some score files."""
    return pa.concat_tables([folder.read_table(f, columns) for f in files])


def load_rows(job: SelectJob, files: list[str], task: int, dropped: tuple[np.ndarray, ...]) -> ScoredRows:
    """The rows of task number `task`; `dropped` are the places, sorted, that `find_copies` found."""
    table = read_tables(job.folder, files, [*_COLUMNS, *job.rule.reads])
    index = np.flatnonzero(table.column("error").is_null().to_numpy(zero_copy_only=False))
    good = table.take(index)
    names = ("pu_logit", "pu_probability", "teacher_label", "teacher_confidence")
    hashes = [sort_key(job.config.seed, i) for i in good.column("image_id").to_pylist()]
    scores = Scores(
        **{n: good.column(n).to_numpy() for n in names},
        relevant=good.column("relevant").fill_null(False).to_numpy(zero_copy_only=False),
        tie_breaker=np.array(hashes, np.int64),
        more={n: good.column(n).to_numpy() for n in job.rule.reads},
    )
    mine = [slice(*np.searchsorted(places, [task << 32, (task + 1) << 32])) for places in dropped]
    gone = np.concatenate([places[here] for places, here in zip(dropped, mine, strict=True)]) - (task << 32)
    allowed = job.rule.eligible(job.config.selection, scores) & ~np.isin(index, gone)
    return ScoredRows(job, good, scores, index, allowed, len(gone))


# Tasks get what other tasks made as arguments, never as lists of references: Ray then starts them when all of it is
# there, and no worker sits waiting for tasks that have no worker.


def as_results(pieces: list[Any]) -> Any:
    """What a task with `num_returns=len(pieces)` returns, so that a reader of one piece fetches no other."""
    return pieces if len(pieces) > 1 else pieces[0]


def by_part(results: list[Any]) -> list[tuple[ray.ObjectRef, ...]]:
    """The pieces of each part, from all tasks that returned `as_results`."""
    return list(zip(*(r if isinstance(r, list) else [r] for r in results), strict=True))
