"""Selected rows moved from where they lie into files in seeded-hash order: a sort on storage, in two steps.

1. A task goes through some score files, row group by row group, fetches the images that the pass did not keep, and
   writes what it has gathered, sorted, as a run; a run is cut into buckets, which are ranges of the hash.
2. A task takes a part, a few buckets in a row, out of all runs, and writes it as a file.

Until its bytes are copied a row is its place in a score file. A task holds one run or one part; between tasks there
go only the ends of the buckets, through the driver: four bytes for each run and bucket.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pukd_ray.corpus.fetch import fetch_rows
from pukd_ray.run.folder import SELECTED_SCHEMA, RunFolder
from pukd_ray.selection.committing import ATTEMPTS
from pukd_ray.selection.cuts import Cut
from pukd_ray.selection.rows import SelectJob, load_rows

RUN_BYTES = 256 << 20
PART_BYTES = 256 << 20
PART_ROWS = 20_000
BUCKET_ROWS = 256
MAX_BUCKETS = 4096
READ_THREADS = 16

_SCHEMA = SELECTED_SCHEMA.append(pa.field("order", pa.uint64()))


@dataclass(frozen=True)
class Runs:
    """What the tasks of the first step write."""

    place: str
    """Folder."""
    buckets: int
    """In each run."""
    hashes: tuple[int, int]
    """Least and greatest, between which buckets are even ranges: a rule that draws takes some of all hashes."""
    most_bytes: int
    """In each run, where it has more than one piece of bounded size."""

    def bucket_of(self, order: np.ndarray) -> np.ndarray:
        """Bucket of each hash, uint64 [n]. Floating point is exact enough: any monotone map will do."""
        low, high = self.hashes
        share = (order - np.uint64(low)) / float(high - low + 1)
        return np.minimum((share * self.buckets).astype(np.int64), self.buckets - 1)


@dataclass(frozen=True)
class SortedRun:
    """A file of rows in rising order of the hash."""

    name: str
    ends: np.ndarray
    """Byte after each bucket, uint32 [B]; a bucket is an Arrow stream of its own."""


def move_selected(
    job: SelectJob,
    groups: list[list[str]],
    dropped: list[ray.ObjectRef],
    cuts: dict[int, Cut],
    count: int,
    hashes: tuple[int, int],
) -> tuple[int, int]:
    """(rows written, files): those of the `count` rows that `cuts` take of `groups` of score files.

    `hashes` are the least and the greatest of theirs.
    """
    buckets = min(MAX_BUCKETS, max(1, -(-count // BUCKET_ROWS)))
    job.folder.delete_folder(ATTEMPTS)  # of what was stopped here
    to = Runs(f"{ATTEMPTS}/{uuid.uuid4().hex[:12]}", buckets, hashes, RUN_BYTES)
    gathered = ray.get([_gather.remote(job, g, t, cuts, to, *dropped) for t, g in enumerate(groups)])
    runs: list[SortedRun] = [run for some, _ in gathered for run in some]
    if not runs:
        return 0, 0
    ends = np.stack([run.ends for run in runs])
    starts = cut_parts(sum(rows for _, rows in gathered), np.diff(ends.sum(0, dtype=np.int64), prepend=0))
    last = [*starts[1:], buckets]
    names = ray.put([run.name for run in runs])
    written = ray.get(
        [
            _write_part.remote(job, part, names, ends[:, first - 1] if first else 0 * ends[:, 0], ends[:, end - 1])
            for part, (first, end) in enumerate(zip(starts, last, strict=True))
        ]
    )
    job.folder.delete_folder(ATTEMPTS)
    return sum(written), len(written)


def cut_parts(rows: np.ndarray, sizes: np.ndarray) -> list[int]:
    """First bucket of each part, of buckets with so many rows and bytes, int64 [B]: as many as the limits allow."""
    starts, in_part, size = [0], 0, 0
    for bucket, (more, larger) in enumerate(zip(rows.tolist(), sizes.tolist(), strict=True)):
        if more and in_part and (in_part + more > PART_ROWS or size + larger > PART_BYTES):
            starts.append(bucket)
            in_part = size = 0
        in_part, size = in_part + more, size + larger
    return starts


@ray.remote(num_cpus=1)
def _gather(
    job: SelectJob, files: list[str], task: int, cuts: dict[int, Cut], to: Runs, *dropped: np.ndarray
) -> tuple[list[SortedRun], np.ndarray]:
    """(runs of the rows that are taken of some score files, how many of these are in each bucket, int64 [B])."""
    rows = load_rows(job, files, task, dropped)
    taken = rows.taken(cuts)
    index, order = rows.index[taken], rows.scores.tie_breaker[taken].view(np.uint64)
    del rows
    runs: list[SortedRun] = []
    waiting: list[pa.Table] = []
    size = 0
    for table in chain(_with_images(job, files, index, order), [None]):
        if waiting and (table is None or size + table.nbytes > to.most_bytes):
            name = f"{to.place}/{task:05d}-{len(runs):04d}.arrows"
            runs.append(_write_run(job.folder, name, pa.concat_tables(waiting), to))
            waiting, size = [], 0
        if table is not None:
            waiting.append(table)
            size += table.nbytes
    return runs, np.bincount(to.bucket_of(order), minlength=to.buckets)


def _with_images(job: SelectJob, files: list[str], index: np.ndarray, order: np.ndarray) -> Iterator[pa.Table]:
    """Rows `index`, rising, counted through all files, with their images, in tables of bounded size; in any order.

    Missing images are fetched here, where those of a unit are still together: hash order would read units for each.
    """
    start = 0
    for file in files:
        with job.folder.open(file) as source:
            parquet = pq.ParquetFile(source)
            for group in range(parquet.metadata.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                here = slice(*np.searchsorted(index, [start, stop]))
                if len(index[here]):
                    table = parquet.read_row_group(group, SELECTED_SCHEMA.names).select(SELECTED_SCHEMA.names)
                    table = table.take(index[here] - start).append_column("order", pa.array(order[here]))
                    yield from _fetched(job, table.cast(_SCHEMA))
                start = stop


def _fetched(job: SelectJob, table: pa.Table) -> Iterator[pa.Table]:
    kept = pc.is_valid(table.column("image"))
    if pc.any(kept).as_py():
        yield table.filter(kept)
    column = _SCHEMA.get_field_index("image")
    for rows, images in fetch_rows(job.folder, job.config, table):
        yield table.take(rows).set_column(column, "image", pa.array(images, pa.binary()))


def _write_run(folder: RunFolder, name: str, table: pa.Table, to: Runs) -> SortedRun:
    order = table.column("order").to_numpy()
    table = table.take(np.argsort(order))
    rows = np.bincount(to.bucket_of(order), minlength=to.buckets)
    starts = np.cumsum(rows) - rows
    ends = np.zeros(to.buckets, np.uint32)

    def write(sink: Any) -> None:
        for b in range(to.buckets):
            if rows[b]:
                with pa.ipc.new_stream(sink, _SCHEMA) as stream:
                    stream.write_table(table.slice(starts[b], rows[b]))
            ends[b] = sink.tell()

    folder.write(name, write)
    return SortedRun(name, ends)


@ray.remote(num_cpus=1)
def _write_part(job: SelectJob, number: int, names: list[str], starts: np.ndarray, ends: np.ndarray) -> int:
    """Write a file of bytes [start, end) of each run; returns its rows."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        read = pool.map(partial(_read_buckets, job.folder), names, starts.tolist(), ends.tolist())
        table = pa.concat_tables([_SCHEMA.empty_table(), *(table for tables in read for table in tables)])
    table = table.sort_by("order").select(SELECTED_SCHEMA.names).cast(SELECTED_SCHEMA)
    job.folder.write_table(f"{job.into}/part-{number:05d}.parquet", table)
    return int(table.num_rows)


def _read_buckets(folder: RunFolder, name: str, start: int, end: int) -> list[pa.Table]:
    if start == end:
        return []
    with folder.open(name) as source:
        source.seek(start)
        data = pa.BufferReader(source.read(end - start))
    tables = []
    while data.tell() < end - start:
        with pa.ipc.open_stream(data) as stream:
            tables.append(stream.read_all())
    return tables
