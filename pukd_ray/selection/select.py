"""Stage `select`: copies dropped, the rule applied, `selected/` written in seeded-hash order, estimates made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pukd_ray.config import RunConfig, to_plain
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.reading import read_blocks
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.units import Unit
from pukd_ray.errors import RunError
from pukd_ray.run.folder import SCORES_SCHEMA, SELECTED_SCHEMA, RunFolder
from pukd_ray.runtime.console import progress, say
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.runtime.metrics import record
from pukd_ray.selection.calibration import from_json
from pukd_ray.selection.histogram import bin_edges
from pukd_ray.selection.quality import estimate_quality
from pukd_ray.selection.rules import (
    EVERYTHING,
    NOTHING,
    Cut,
    Scores,
    eligible,
    groups_of,
    ordered_bits,
    ranking,
    target_counts,
)
from pukd_ray.selection.scoring import score_files, sort_key

FILES_PER_TASK = 64
# A shuffle makes tasks x parts objects, and the driver knows each of them: there both are bounded.
MAX_TASKS = 2000
MAX_WRITERS = 200
COPY_SHUFFLE_ROWS = 20_000_000
ROWS_PER_PART = 20_000
PART_BYTES = 256 << 20  # images in one file, and in the memory of one task
IMAGE_BYTES = 100_000  # of one image, where the pass kept none
COLUMNS = [
    "image_id",
    "content_hash",
    "error",
    "pu_logit",
    "pu_probability",
    "teacher_label",
    "teacher_confidence",
    "relevant",
]


@dataclass(frozen=True)
class Job:
    """What every task of this stage needs."""

    folder: RunFolder
    config: RunConfig
    edges: np.ndarray
    """Bin edges of pu_logit for the summaries, float64 [bins + 1], the outer ones infinite."""
    into: str
    """Folder to write."""


def run_select(run: RunContext) -> dict[str, Any]:
    """Run the stage; returns its counts."""
    summary = select_images(run.folder, run.config, run.units)
    estimated = summary["estimated"]
    return {k: summary[k] for k in ("n_selected", "n_duplicates")} | {
        "precision (estimated)": round(estimated["precision"], 3),
        "recall (estimated)": round(estimated["recall"], 3),
    }


def select_images(
    folder: RunFolder, config: RunConfig, units: Sequence[Unit], into: str = "selected"
) -> dict[str, Any]:
    """Select, writing to folder `into` of the run; returns what its `summary.json` says."""
    folder.delete_folder(into)
    files = score_files(folder)
    size = max(FILES_PER_TASK, -(-len(files) // MAX_TASKS))
    groups = [files[i : i + size] for i in range(0, len(files), size)]
    held_out = folder.read_table("selector/held_out.parquet")
    logits = held_out.column("logit").to_numpy().astype(np.float64)
    of_p = pc.equal(held_out.column("role"), "positives").to_numpy(zero_copy_only=False)
    job = Job(folder, config, bin_edges(logits), into)
    with progress("select", 3 * len(groups), "tasks") as bar:
        dropped, n_scored = _find_copies(job, groups, units)
        bar.update(len(groups))
        cuts = _find_cuts(job, groups, dropped, n_scored)
        bar.update(len(groups))
        summary = _write_selected(job, groups, dropped, cuts)
        bar.update(len(groups))
    summary["estimated"] = estimate_quality(
        np.array(summary["histogram"]["all"]),
        np.array(summary["histogram"]["selected"]),
        np.array(summary["histogram"]["logit"]),
        logits[of_p],
        held_out.column("weight").to_numpy()[of_p].astype(np.float64),
        *from_json(folder.read_json("selector/calibration.json")),
    )
    summary["rule"] = config.selection.rule
    summary["selection"] = to_plain(config.selection)
    if summary["n_selected"] == 0:
        raise RunError(
            f"selection: rule {config.selection.rule} takes none of {n_scored:,} scored images: "
            "lower selection.threshold or selection.target_precision, or choose another rule"
            + (" (it needs truth in the corpus)" if config.selection.rule == "truth" else "")
        )
    budget = config.selection.budget
    if budget is not None and config.selection.rule in ("budget", "quota") and summary["n_selected"] < budget:
        say(
            f"          warning: only {summary['n_selected']:,} images are positive, fewer than selection.budget = "
            f"{budget:,}: all are taken"
        )
    folder.write_json(f"{into}/summary.json", summary)
    record("images_selected", summary["n_selected"])
    return summary


# -- copies -----------------------------------------------------------------------------------------------------


def _read(folder: RunFolder, files: list[str], columns: list[str]) -> pa.Table:
    return pa.concat_tables([folder.read_table(f, columns) for f in files])


# Tasks get what other tasks made as arguments, never as lists of references: Ray then starts them when all of it is
# there, and no worker sits waiting for tasks that have no worker.


def _results(pieces: list[Any]) -> Any:
    """What a task with `num_returns=len(pieces)` returns, so that a reader of one piece fetches no other."""
    return pieces if len(pieces) > 1 else pieces[0]


def _by_part(results: list[Any]) -> list[tuple[ray.ObjectRef, ...]]:
    """The pieces of each part, from all tasks that returned `_results`."""
    return list(zip(*(r if isinstance(r, list) else [r] for r in results), strict=True))


@ray.remote(num_cpus=IO_CPUS)
def _hash_rows(job: Job, files: list[str], task: int, parts: int) -> Any:
    """(content hash, id hash, place) of readable rows, int64 [n, 3], split by content hash; place: `task` and row."""
    table = _read(job.folder, files, ["image_id", "content_hash", "error"])
    readable = table.column("error").is_null().to_numpy(zero_copy_only=False)
    good = table.filter(readable)  # first: a column with nulls would turn into floating point
    hashes = good.column("content_hash").to_numpy()
    ids = [sort_key(job.config.seed, i) for i in good.column("image_id").to_pylist()]
    rows = np.column_stack([hashes, np.array(ids, np.int64), (task << 32) + np.flatnonzero(readable)])
    return _results([rows[rows[:, 0] % parts == p] for p in range(parts)])


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


def _find_copies(job: Job, groups: list[list[str]], units: Sequence[Unit]) -> tuple[list[ray.ObjectRef], int]:
    """(places to drop, in pieces; readable rows)."""
    known = _known_hashes.remote([u for u in units if u.role != "corpus"], job.config)
    n_scored = int(sum(ray.get([_count_readable.remote(job.folder, g) for g in groups])))
    parts = 1 + n_scored // COPY_SHUFFLE_ROWS
    hashed = [_hash_rows.options(num_returns=parts).remote(job, group, t, parts) for t, group in enumerate(groups)]
    exact = job.config.selection.deduplicate == "exact"
    return [_copies_in.remote(known, exact, *pieces) for pieces in _by_part(hashed)], n_scored


@ray.remote(num_cpus=IO_CPUS)
def _count_readable(folder: RunFolder, files: list[str]) -> int:
    return sum(folder.read_table(f, ["error"]).column("error").null_count for f in files)


# -- the rule ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Score rows of one task, without images."""

    table: pa.Table
    scores: Scores
    index: np.ndarray
    """Row in the task's files of each of `scores`."""
    allowed: np.ndarray
    """Eligible and no copy."""
    copies: int


def _load(job: Job, files: list[str], task: int, dropped: tuple[np.ndarray, ...]) -> _Rows:
    table = _read(job.folder, files, COLUMNS)
    index = np.flatnonzero(table.column("error").is_null().to_numpy(zero_copy_only=False))
    good = table.take(index)
    names = ("pu_logit", "pu_probability", "teacher_label", "teacher_confidence")
    hashes = [sort_key(job.config.seed, i) for i in good.column("image_id").to_pylist()]
    scores = Scores(
        **{n: good.column(n).to_numpy() for n in names},
        relevant=good.column("relevant").fill_null(False).to_numpy(zero_copy_only=False),
        tie_breaker=np.array(hashes, np.int64),
    )
    mine = [slice(*np.searchsorted(places, [task << 32, (task + 1) << 32])) for places in dropped]
    gone = np.concatenate([places[here] for places, here in zip(dropped, mine, strict=True)]) - (task << 32)
    keep = ~np.isin(index, gone)
    return _Rows(good, scores, index, eligible(job.config.selection, scores) & keep, len(gone))


@ray.remote(num_cpus=IO_CPUS)
def _count_keys(job: Job, files: list[str], task: int, *dropped: np.ndarray) -> pa.Table:
    """Allowed rows counted by group and upper half of the key, with their summed probability."""
    rows = _load(job, files, task, dropped)
    bits = ordered_bits(ranking(job.config.selection, rows.scores))[rows.allowed]
    table = pa.table(
        {
            "group": groups_of(job.config.selection, rows.scores)[rows.allowed],
            "bin": (bits >> 16).astype(np.int64),
            "probability": rows.scores.pu_probability[rows.allowed].astype(np.float64),
        }
    )
    return table.group_by(["group", "bin"]).aggregate([("probability", "count"), ("probability", "sum")])


@ray.remote(num_cpus=IO_CPUS)
def _rows_of_bins(job: Job, files: list[str], task: int, bins: np.ndarray, *dropped: np.ndarray) -> np.ndarray:
    """(group, key bits, tie breaker) of the allowed rows in the bin of their group, [G]; int64 [n, 3]."""
    rows = _load(job, files, task, dropped)
    bits = ordered_bits(ranking(job.config.selection, rows.scores)).astype(np.int64)
    groups = groups_of(job.config.selection, rows.scores)
    here = rows.allowed & (bits >> 16 == bins[groups])
    return np.column_stack([groups[here], bits[here], rows.scores.tie_breaker[here]])


@ray.remote(num_cpus=IO_CPUS)
def _nth_rows(nth: dict[int, int], *pieces: np.ndarray) -> dict[int, Cut]:
    """The row with that rank of each group."""
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows[:, 2], -rows[:, 1], rows[:, 0]))]
    found = rows[np.searchsorted(rows[:, 0], list(nth)) + np.array(list(nth.values())) - 1]
    return {group: Cut(bits, tie) for group, (_, bits, tie) in zip(nth, found.tolist(), strict=True)}


def _find_cuts(job: Job, groups: list[list[str]], dropped: list[ray.ObjectRef], n_scored: int) -> dict[int, Cut]:
    """The cut of each group of rows that compete."""
    counted = [_count_keys.remote(job, g, t, *dropped) for t, g in enumerate(groups)]
    table = pa.concat_tables(ray.get(counted))
    table = table.group_by(["group", "bin"]).aggregate([("probability_count", "sum"), ("probability_sum", "sum")])
    table = table.sort_by([("bin", "descending")])
    group, key_bin, count, probability = (
        table.column(c).to_numpy() for c in ("group", "bin", "probability_count_sum", "probability_sum_sum")
    )
    config = job.config
    size = config.teacher.num_classes if config.selection.rule == "quota" else 1
    available = np.bincount(group, weights=count, minlength=size).astype(np.int64)
    prior = job.folder.read_json("selector/prior.json")["value"]
    targets = target_counts(config.selection, available, prior, n_scored, probability / np.maximum(count, 1), count)
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


# -- output -----------------------------------------------------------------------------------------------------


def _flags(job: Job, rows: _Rows, cuts: dict[int, Cut]) -> np.ndarray:
    bits = ordered_bits(ranking(job.config.selection, rows.scores)).astype(np.int64)
    groups = groups_of(job.config.selection, rows.scores)
    taken = np.zeros(len(bits), bool)
    for group, cut in cuts.items():
        taken |= (groups == group) & cut.admits(bits, rows.scores.tie_breaker)
    admitted: np.ndarray = taken & rows.allowed
    return admitted


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _summarise(
    job: Job, files: list[str], task: int, cuts: dict[int, Cut], *dropped: np.ndarray
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """(counts, (ranking key, truth) of the rows with truth)."""
    rows = _load(job, files, task, dropped)
    taken = _flags(job, rows, cuts)
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
        "all": np.histogram(z, job.edges)[0],
        "selected": np.histogram(z[taken], job.edges)[0],
        "logit_sum": np.histogram(z, job.edges, weights=z.astype(np.float64))[0],
        "relevant_histogram": np.histogram(z[relevant], job.edges)[0],
        "truth": int(known.sum()),
        "relevant": relevant_all,
        "selected_truth": int((taken & known).sum()),
        "selected_relevant": int((taken & relevant).sum()),
        "kept": _kept_images(job.folder, files),
    }
    key = ranking(job.config.selection, rows.scores)
    return counts, (key[known], relevant[known])


@ray.remote(num_cpus=IO_CPUS)
def _average_precision(*pieces: tuple[np.ndarray, np.ndarray]) -> float | None:
    from sklearn.metrics import average_precision_score

    keys, truth = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return float(average_precision_score(truth, keys)) if truth.any() else None


def _kept_images(folder: RunFolder, files: list[str]) -> np.ndarray:
    """(images, bytes) that the pass kept, as the footers have them, int64 [2]."""
    total = np.zeros(2, np.int64)
    for file in files:
        with folder.fs.open_input_file(folder.path(file)) as source:
            footer = pq.read_metadata(source)
        for group in map(footer.row_group, range(footer.num_row_groups)):
            image = group.column(SCORES_SCHEMA.get_field_index("image"))
            nulls = image.statistics.null_count if image.statistics else 0  # none in an empty file
            total += image.num_values - nulls, image.total_uncompressed_size
    return total


@dataclass(frozen=True)
class _Layout:
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
    job: Job,
    files: list[str],
    task: int,
    cuts: dict[int, Cut],
    share: tuple[int, int],
    to: _Layout,
    *dropped: np.ndarray,
) -> Any:
    """The n-th of m shares of the selected rows, with images, split by the task that writes them."""
    rows = _load(job, files, task, dropped)
    taken = np.array_split(np.flatnonzero(_flags(job, rows, cuts)), share[1])[share[0]]
    order = rows.scores.tie_breaker[taken].view(np.uint64)
    table = _with_images(job, files, rows.index[taken]).append_column("order", pa.array(order)).combine_chunks()
    writer = to.writer_of(to.part_of(order))
    return _results([table.take(np.flatnonzero(writer == w)) for w in range(to.writers)])


def _with_images(job: Job, files: list[str], index: np.ndarray) -> pa.Table:
    """Rows `index`, counted through all files, with their images.

    Missing images are fetched here, where those of a unit are still together: hash order would read units for each.
    """
    start, tables = 0, [SELECTED_SCHEMA.empty_table()]
    for file in files:  # one at a time: they may hold far more images than were selected
        with job.folder.fs.open_input_file(job.folder.path(file)) as source:
            parquet = pq.ParquetFile(source)
            here = index[(index >= start) & (index < start + parquet.metadata.num_rows)] - start
            start += parquet.metadata.num_rows
            if len(here):
                tables.append(parquet.read(SELECTED_SCHEMA.names).select(SELECTED_SCHEMA.names).take(here))
    return fetch_images(job.folder, job.config, pa.concat_tables(tables))


@ray.remote(num_cpus=IO_CPUS)
def _write_parts(job: Job, to: _Layout, writer: int, *pieces: pa.Table) -> int:
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
    job: Job,
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
    to = _Layout(parts, min(parts, MAX_WRITERS, max(1, math.ceil(size))))
    shares = [math.ceil(n * image_bytes / PART_BYTES) for n in selected]
    taken = [
        _take_rows.options(num_returns=to.writers).remote(job, g, t, cuts, (n, shares[t]), to, *dropped)
        for t, g in enumerate(groups)
        for n in range(shares[t])
    ]
    return [_write_parts.remote(job, to, w, *pieces) for w, pieces in enumerate(_by_part(taken))], parts


def _write_selected(
    job: Job, groups: list[list[str]], dropped: list[ray.ObjectRef], cuts: dict[int, Cut]
) -> dict[str, Any]:
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
    truth = None
    if total["truth"]:
        truth = {
            "precision": total["selected_relevant"] / total["selected_truth"] if total["selected_truth"] else None,
            "recall": total["selected_relevant"] / total["relevant"] if total["relevant"] else None,
            "average_precision": ray.get(average_precision),
            "relevant": total["relevant"],
            "selected_relevant": total["selected_relevant"],
        }
    return {
        **{k: int(total[k]) for k in ("n_scored", "n_duplicates", "n_selected", "n_positive", "n_above_half")},
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
