"""Where the rule cuts: the last row that it takes of each group, found without a list that grows with the corpus."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import ray

from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.cuts import EVERYTHING, NOTHING, Cut
from pukd_ray.selection.rows import SelectJob, load_rows
from pukd_ray.selection.rules.base import Supply


def find_cuts(job: SelectJob, groups: list[list[str]], dropped: list[ray.ObjectRef], n_scored: int) -> dict[int, Cut]:
    """The cut of each group of rows that compete; `dropped` are the copies, `n_scored` readable rows."""
    counted = [_count_keys.remote(job, g, t, *dropped) for t, g in enumerate(groups)]
    table = pa.concat_tables(ray.get(counted))
    table = table.group_by(["group", "bin"]).aggregate([("probability_count", "sum"), ("probability_sum", "sum")])
    table = table.sort_by([("bin", "descending")])
    group, key_bin, count, probability = (
        table.column(c).to_numpy() for c in ("group", "bin", "probability_count_sum", "probability_sum_sum")
    )
    size = job.config.teacher.num_classes if job.rule.per_class else 1
    available = np.bincount(group, weights=count, minlength=size).astype(np.int64)
    prior = job.folder.read_json("selector/prior.json")["value"]
    supply = Supply(prior, n_scored, probability / np.maximum(count, 1), count)
    targets = job.rule.targets(job.config.selection, available, supply)
    if targets is None:
        return dict.fromkeys(range(size), EVERYTHING)
    cuts: dict[int, Cut] = {}
    nth: dict[int, int] = {}
    cut_bins = np.full(size, -1)
    for g, wanted in enumerate(targets.tolist()):
        if wanted >= available[g]:
            cuts[g] = EVERYTHING
        elif wanted == 0:
            cuts[g] = NOTHING
        else:
            bins, counts = key_bin[group == g], np.cumsum(count[group == g])
            at = int(np.searchsorted(counts, wanted))
            cut_bins[g], nth[g] = bins[at], wanted - (int(counts[at - 1]) if at else 0)
    if nth:  # one pass for all groups
        pieces = [_rows_of_bins.remote(job, g, t, cut_bins, *dropped) for t, g in enumerate(groups)]
        cuts |= ray.get(_nth_rows.remote(nth, *pieces))
    return cuts


@ray.remote(num_cpus=IO_CPUS)
def _count_keys(job: SelectJob, files: list[str], task: int, *dropped: np.ndarray) -> pa.Table:
    """Allowed rows counted by group and upper half of the key, with their summed probability."""
    rows = load_rows(job, files, task, dropped)
    table = pa.table(
        {
            "group": rows.groups[rows.allowed],
            "bin": rows.bits[rows.allowed] >> 16,
            "probability": rows.scores.pu_probability[rows.allowed].astype(np.float64),
        }
    )
    return table.group_by(["group", "bin"]).aggregate([("probability", "count"), ("probability", "sum")])


@ray.remote(num_cpus=IO_CPUS)
def _rows_of_bins(job: SelectJob, files: list[str], task: int, bins: np.ndarray, *dropped: np.ndarray) -> np.ndarray:
    """(group, key bits, tie breaker) of the allowed rows in the bin of their group, [G]; int64 [n, 3]."""
    rows = load_rows(job, files, task, dropped)
    bits, groups = rows.bits, rows.groups
    here = rows.allowed & (bits >> 16 == bins[groups])
    return np.column_stack([groups[here], bits[here], rows.scores.tie_breaker[here]])


@ray.remote(num_cpus=IO_CPUS)
def _nth_rows(nth: dict[int, int], *pieces: np.ndarray) -> dict[int, Cut]:
    """The row with that rank of each group."""
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows[:, 2], -rows[:, 1], rows[:, 0]))]
    found = rows[np.searchsorted(rows[:, 0], list(nth)) + np.array(list(nth.values())) - 1]
    return {group: Cut(bits, tie) for group, (_, bits, tie) in zip(nth, found.tolist(), strict=True)}
