"""The selection counted and written: rows shuffled into seeded-hash order, with their images, into Parquet files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.run.folder import SCORES_SCHEMA, SELECTED_SCHEMA, RunFolder
from pukd_ray.run.records import SelectionCounts, SelectionTruth
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.cuts import Cut
from pukd_ray.selection.histogram import BINNED, bin_scores
from pukd_ray.selection.rows import SelectJob, as_results, by_part, load_rows

# The shuffle makes tasks x writers objects, and the driver knows each of them.
MAX_WRITERS = 200
ROWS_PER_PART = 20_000
PART_BYTES = 256 << 20  # images in one file, and in the memory of one task
IMAGE_BYTES = 100_000  # of one image, where the pass kept none


def write_selected(
    job: SelectJob, groups: list[list[str]], dropped: list[ray.ObjectRef], cuts: dict[int, Cut]
) -> tuple[SelectionCounts, dict[str, np.ndarray]]:
    """Write the selected rows of `groups` of score files; returns the counts, and the scores as of `bin_scores`."""
    refs = [_summarise.remote(job, g, t, cuts, *dropped) for t, g in enumerate(groups)]
    average_precision = _average_precision.remote(*(keys for _, keys in refs))
    counted = ray.get([counts for counts, _ in refs])
    total = {k: sum(counts[k] for counts in counted) for k in counted[0]}
    images, image_bytes = total["kept"].tolist()
    size = image_bytes / images if images else IMAGE_BYTES
    writing, parts = _shuffle(job, groups, dropped, cuts, [counts["n_selected"] for counts in counted], size)
    written = sum(ray.get(writing))
    if written != total["n_selected"]:
        raise RuntimeError(f"{written} of {total['n_selected']} selected images were written: start again")
    in_bin = np.maximum(total["all"], 1)
    truth: SelectionTruth | None = None
    if total["truth"]:
        truth = {
            "precision": total["selected_relevant"] / total["selected_truth"] if total["selected_truth"] else None,
            "recall": total["selected_relevant"] / total["relevant"] if total["relevant"] else None,
            "average_precision": ray.get(average_precision),
            "relevant": total["relevant"],
            "selected_relevant": total["selected_relevant"],
        }
    counts: SelectionCounts = {
        "n_scored": int(total["n_scored"]),
        "n_duplicates": int(total["n_duplicates"]),
        "n_selected": int(total["n_selected"]),
        "n_positive": int(total["n_positive"]),
        "n_above_half": int(total["n_above_half"]),
        "class_counts": total["class_counts"].tolist(),
        "truth": truth,
        "histogram": {
            "logit": (total["logit_sum"] / in_bin).tolist(),
            "edges": job.edges[1:-1].tolist(),
            "all": total["all"].tolist(),
            "selected": total["selected"].tolist(),
            "relevant": total["relevant_histogram"].tolist() if total["truth"] else None,
        },
        "parts": parts,
    }
    return counts, {name: total[name] for name in BINNED}


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _summarise(
    job: SelectJob, files: list[str], task: int, cuts: dict[int, Cut], *dropped: np.ndarray
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """(counts, (ranking key, truth) of the rows with truth)."""
    rows = load_rows(job, files, task, dropped)
    taken = rows.taken(cuts)
    truth = rows.table.column("relevant")
    known = truth.is_valid().to_numpy(zero_copy_only=False)
    relevant = rows.scores.relevant
    everything = job.folder.read_table  # unreadable rows count in the recall's denominator
    relevant_all = sum(
        int(np.sum(everything(f, ["relevant"]).column("relevant").fill_null(False).to_numpy(zero_copy_only=False)))
        for f in files
    )
    classes = job.config.teacher.num_classes
    z, label = rows.scores.pu_logit, rows.scores.teacher_label
    soft = np.bincount(label[taken], minlength=classes)
    counts = {
        "n_scored": len(z),
        "n_duplicates": rows.copies,
        "n_selected": int(taken.sum()),
        "n_positive": int((z > 0).sum()),
        "n_above_half": int((rows.scores.pu_probability > 0.5).sum()),
        "class_counts": soft,
        **bin_scores(z, taken, job.edges),
        "relevant_histogram": np.histogram(z[relevant], job.edges)[0],
        "truth": int(known.sum()),
        "relevant": relevant_all,
        "selected_truth": int((taken & known).sum()),
        "selected_relevant": int((taken & relevant).sum()),
        "kept": _kept_images(job.folder, files),
    }
    return counts, (rows.ranking[known], relevant[known])


@ray.remote(num_cpus=IO_CPUS)
def _average_precision(*pieces: tuple[np.ndarray, np.ndarray]) -> float | None:
    from sklearn.metrics import average_precision_score

    keys, truth = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return float(average_precision_score(truth, keys)) if truth.any() else None


def _kept_images(folder: RunFolder, files: list[str]) -> np.ndarray:
    """(images, bytes) that the pass kept, as the footers have them, int64 [2]."""
    total = np.zeros(2, np.int64)
    for file in files:
        with folder.open(file) as source:
            footer = pq.read_metadata(source)
        for group in map(footer.row_group, range(footer.num_row_groups)):
            image = group.column(SCORES_SCHEMA.get_field_index("image"))
            nulls = image.statistics.null_count if image.statistics else 0  # none in an empty file
            total += image.num_values - nulls, image.total_uncompressed_size
    return total


@dataclass(frozen=True)
class Layout:
    """How the selection is spread over files and the tasks that write them, by ranges of the seeded hash."""

    parts: int
    writers: int

    def part_of(self, order: np.ndarray) -> np.ndarray:
        """File of each hash, uint64 [n]. Floating point is exact enough: any monotone map will do."""
        return np.minimum((order / 2.0**64 * self.parts).astype(np.int64), self.parts - 1)

    def writer_of(self, part: np.ndarray) -> np.ndarray:
        """Task that writes each file: all have as many, give or take one, and in order."""
        return part * self.writers // self.parts


@ray.remote(num_cpus=IO_CPUS)
def _take_rows(
    job: SelectJob,
    files: list[str],
    task: int,
    cuts: dict[int, Cut],
    share: tuple[int, int],
    to: Layout,
    *dropped: np.ndarray,
) -> Any:
    """The n-th of m shares of the selected rows, with images, split by the task that writes them."""
    rows = load_rows(job, files, task, dropped)
    taken = np.array_split(np.flatnonzero(rows.taken(cuts)), share[1])[share[0]]
    order = rows.scores.tie_breaker[taken].view(np.uint64)
    table = _with_images(job, files, rows.index[taken]).append_column("order", pa.array(order)).combine_chunks()
    writer = to.writer_of(to.part_of(order))
    return as_results([table.take(np.flatnonzero(writer == w)) for w in range(to.writers)])


def _with_images(job: SelectJob, files: list[str], index: np.ndarray) -> pa.Table:
    """Rows `index`, counted through all files, with their images.

    Missing images are fetched here, where those of a unit are still together: hash order would read units for each.
    """
    start, tables = 0, [SELECTED_SCHEMA.empty_table()]
    for file in files:  # one at a time: they may hold far more images than were selected
        with job.folder.open(file) as source:
            parquet = pq.ParquetFile(source)
            here = index[(index >= start) & (index < start + parquet.metadata.num_rows)] - start
            start += parquet.metadata.num_rows
            if len(here):
                tables.append(parquet.read(SELECTED_SCHEMA.names).select(SELECTED_SCHEMA.names).take(here))
    return fetch_images(job.folder, job.config, pa.concat_tables(tables))


@ray.remote(num_cpus=IO_CPUS)
def _write_parts(job: SelectJob, to: Layout, writer: int, *pieces: pa.Table) -> int:
    """Write the files of one writer; returns their rows."""
    table = pa.concat_tables(pieces)
    part_of_row = to.part_of(table.column("order").to_numpy())
    parts = np.arange(to.parts)
    for part in parts[to.writer_of(parts) == writer].tolist():
        rows = table.filter(part_of_row == part).sort_by([("order", "ascending")])
        job.folder.write_table(
            f"{job.into}/part-{part:05d}.parquet", rows.select(SELECTED_SCHEMA.names).cast(SELECTED_SCHEMA)
        )
    return int(table.num_rows)


def _shuffle(
    job: SelectJob,
    groups: list[list[str]],
    dropped: list[ray.ObjectRef],
    cuts: dict[int, Cut],
    selected: list[int],
    image_bytes: float,
) -> tuple[list[ray.ObjectRef], int]:
    """(rows that each writer writes, files), of so many `selected` rows of each group of score files."""
    size = sum(selected) * image_bytes / PART_BYTES
    parts = max(1, -(-sum(selected) // ROWS_PER_PART), math.ceil(size))
    # By size alone: pieces that are too small for the object store would travel through the driver.
    to = Layout(parts, min(parts, MAX_WRITERS, max(1, math.ceil(size))))
    shares = [math.ceil(n * image_bytes / PART_BYTES) for n in selected]
    taken = [
        _take_rows.options(num_returns=to.writers).remote(job, g, t, cuts, (n, shares[t]), to, *dropped)
        for t, g in enumerate(groups)
        for n in range(shares[t])
    ]
    return [_write_parts.remote(job, to, w, *pieces) for w, pieces in enumerate(by_part(taken))], parts
