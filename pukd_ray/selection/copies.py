"""Copies: images with the same bytes as one of P, of the test set, or as another image of the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from pukd_ray.config import RunConfig
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.reading import read_blocks
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.rows import SelectJob, as_results, by_part, read_tables
from pukd_ray.selection.scoring import keep_key

# A shuffle makes tasks x parts objects, and the driver knows each of them: parts are as large as memory allows.
COPY_SHUFFLE_ROWS = 20_000_000


def find_copies(job: SelectJob, groups: list[list[str]], units: Sequence[Unit]) -> tuple[list[ray.ObjectRef], int]:
    """(places to drop, in pieces; readable rows) of `groups` of score files, each of them for one task."""
    known = _known_hashes.remote([u for u in units if u.role != "corpus"], job.config)
    n_scored = int(sum(ray.get([_count_readable.remote(job.folder, g) for g in groups])))
    parts = 1 + n_scored // COPY_SHUFFLE_ROWS
    hashed = [_hash_rows.options(num_returns=parts).remote(job, group, t, parts) for t, group in enumerate(groups)]
    exact = job.config.selection.deduplicate != "none"
    return [_copies_in.remote(known, exact, *pieces) for pieces in by_part(hashed)], n_scored


@ray.remote(num_cpus=IO_CPUS)
def _hash_rows(job: SelectJob, files: list[str], task: int, parts: int) -> Any:
    """(content hash, id hash, place) of readable rows, int64 [n, 3], split by content hash; place: `task` and row."""
    table = read_tables(job.folder, files, ["image_id", "content_hash", "error"])
    readable = table.column("error").is_null().to_numpy(zero_copy_only=False)
    good = table.filter(readable)  # first: a column with nulls would turn into floating point
    hashes = good.column("content_hash").to_numpy()
    ids = [keep_key(job.config.seed, i) for i in good.column("image_id").to_pylist()]
    rows = np.column_stack([hashes, np.array(ids, np.int64), (task << 32) + np.flatnonzero(readable)])
    return as_results([rows[rows[:, 0] % parts == p] for p in range(parts)])


@ray.remote(num_cpus=IO_CPUS)
def _copies_in(known: np.ndarray, exact: bool, *pieces: np.ndarray) -> np.ndarray:
    """Places to drop, int64 [n], sorted: all copies of P and test, and all but one of each group of equals."""
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    drop = np.isin(rows[:, 0], known)
    if exact and len(rows):
        drop |= np.r_[False, rows[1:, 0] == rows[:-1, 0]]
    return np.sort(rows[drop, 2])


@ray.remote(num_cpus=IO_CPUS)
def _known_hashes(units: list[Unit], config: RunConfig) -> np.ndarray:
    """Content hashes of P and the test images, int64 [n]: of those in use, not of whole files."""
    hashes = [
        block.column("content_hash").drop_null().to_numpy()
        for role, sources in sources_by_role(config).items()
        if role != "corpus"
        for wanted in index_labelled(role, units, sources, config.teacher).requests
        for block in read_blocks(wanted, sources[wanted.unit.source])
    ]
    return np.concatenate(hashes) if hashes else np.zeros(0, np.int64)


@ray.remote(num_cpus=IO_CPUS)
def _count_readable(folder: RunFolder, files: list[str]) -> int:
    return sum(folder.read_table(f, ["error"]).column("error").null_count for f in files)
