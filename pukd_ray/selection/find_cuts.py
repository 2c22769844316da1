"""Where the rule cuts: the last row that it takes of each group, found without a list that grows with the corpus."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import ray

from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.cuts import DIGITS, EVERYTHING, NOTHING, Cut, digits
from pukd_ray.selection.rows import SelectJob, load_rows
from pukd_ray.selection.rules.base import Supply

GATHERED_ROWS = 1_000_000
"""Most rows that come together in one task; as long as the cuts' bins have more, they are counted by one digit more."""
TABLES_AT_ONCE = 16
"""Tables of counts that one task adds up."""


def find_cuts(job: SelectJob, groups: list[list[str]], dropped: list[ray.ObjectRef], n_scored: int) -> dict[int, Cut]:
    """The cut of each group of rows that compete; `dropped` are the copies, `n_scored` readable rows."""
    size = job.config.teacher.num_classes if job.rule.per_class else 1
    bins = np.zeros((0, size), np.int64)  # the first digits of each group's last row; -1 where all or none are taken
    group, digit, count, probability = _count(job, groups, dropped, bins)
    available = np.bincount(group, weights=count, minlength=size).astype(np.int64)
    prior = job.folder.read_json("selector/prior.json")["value"]
    order = np.argsort(digit, kind="stable")  # by falling key
    supply = Supply(prior, n_scored, (probability / np.maximum(count, 1))[order], count[order])
    targets = job.rule.targets(job.config.selection, available, supply)
    if targets is None:
        return dict.fromkeys(range(size), EVERYTHING)
    cuts = {g: EVERYTHING if targets[g] else NOTHING for g in range(size)}
    rank = {g: int(n) for g, n in enumerate(targets) if 0 < n < available[g]}  # of the last row, from 1, in the bin
    while rank:
        chosen, rows = np.full(size, -1), 0
        for g in rank:
            mine = group == g
            ends = np.cumsum(count[mine])
            at = int(np.searchsorted(ends, rank[g]))
            chosen[g] = digit[mine][at]
            rank[g] -= int(ends[at - 1]) if at else 0
            rows += int(count[mine][at])
        bins = np.vstack([bins, chosen])
        if rows <= GATHERED_ROWS or len(bins) == DIGITS:
            pieces = [_rows_of_bins.remote(job, g, t, bins, *dropped) for t, g in enumerate(groups)]
            found: dict[int, Cut] = ray.get(_nth_rows.remote(rank, *pieces))
            return cuts | found
        group, digit, count, _ = _count(job, groups, dropped, bins)
    return cuts


def _count(
    job: SelectJob, groups: list[list[str]], dropped: list[ray.ObjectRef], bins: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What `_count_keys` counts, over all tasks: group, digit (rising within a group), rows, summed probability."""
    tables = [_count_keys.remote(job, g, t, bins, *dropped) for t, g in enumerate(groups)]
    while len(tables) > 1:
        tables = [_add_counts.remote(*tables[i : i + TABLES_AT_ONCE]) for i in range(0, len(tables), TABLES_AT_ONCE)]
    table = ray.get(tables[0]).sort_by([("group", "ascending"), ("digit", "ascending")])
    return tuple(column.to_numpy() for column in table.columns)


def _in_bins(found: np.ndarray, groups: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Which rows are in the bin of their group, bool [N], of digits [DIGITS, N], groups [N] and bins [L, G]."""
    inside: np.ndarray = (found[: len(bins)] == bins[:, groups]).all(0)
    return inside


def _sums(table: pa.Table) -> pa.Table:
    sums = table.group_by(["group", "digit"]).aggregate([("count", "sum"), ("probability", "sum")])
    return sums.select(["group", "digit", "count_sum", "probability_sum"]).rename_columns(table.column_names)


@ray.remote(num_cpus=IO_CPUS)
def _count_keys(job: SelectJob, files: list[str], task: int, bins: np.ndarray, *dropped: np.ndarray) -> pa.Table:
    """Allowed rows in the bin of their group, [L, G], by group and next digit: their number and summed probability."""
    rows = load_rows(job, files, task, dropped)
    found, groups = digits(rows.bits, rows.scores.tie_breaker), rows.groups
    here = rows.allowed & _in_bins(found, groups, bins)
    columns = {
        "group": groups[here],
        "digit": found[len(bins), here].astype(np.int64),
        "count": np.ones(int(here.sum()), np.int64),
        "probability": rows.scores.pu_probability[here].astype(np.float64),
    }
    return _sums(pa.table(columns))


@ray.remote(num_cpus=IO_CPUS)
def _add_counts(*tables: pa.Table) -> pa.Table:
    return _sums(pa.concat_tables(tables))


@ray.remote(num_cpus=IO_CPUS)
def _rows_of_bins(job: SelectJob, files: list[str], task: int, bins: np.ndarray, *dropped: np.ndarray) -> np.ndarray:
    """(group, key bits, tie breaker) of the allowed rows in the bin of their group, [L, G]; int64 [n, 3]."""
    rows = load_rows(job, files, task, dropped)
    bits, ties, groups = rows.bits, rows.scores.tie_breaker, rows.groups
    here = rows.allowed & _in_bins(digits(bits, ties), groups, bins)
    return np.column_stack([groups[here], bits[here], ties[here]])


@ray.remote(num_cpus=IO_CPUS)
def _nth_rows(nth: dict[int, int], *pieces: np.ndarray) -> dict[int, Cut]:
    """The row with that rank of each group."""
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows[:, 2], -rows[:, 1], rows[:, 0]))]
    found = rows[np.searchsorted(rows[:, 0], list(nth)) + np.array(list(nth.values())) - 1]
    return {group: Cut(bits, tie) for group, (_, bits, tie) in zip(nth, found.tolist(), strict=True)}
