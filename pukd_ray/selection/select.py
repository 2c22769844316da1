"""Stage `select`: copies dropped, the rule applied, `selected/` written in seeded-hash order, estimates made."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pukd_ray.config import RunConfig, to_plain
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.plan import sources_by_role
from pukd_ray.corpus.reading import Wanted, read_blocks
from pukd_ray.corpus.units import Unit, units_from_table
from pukd_ray.engine import IO_CPUS
from pukd_ray.errors import RunError
from pukd_ray.metrics import record
from pukd_ray.progress import progress, say
from pukd_ray.run_folder import SELECTED_SCHEMA, RunFolder
from pukd_ray.selection.calibration import from_json
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
ROWS_PER_PART = 20_000
COPY_SHUFFLE_ROWS = 20_000_000
BINS = 512
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
    """Bin edges of pu_logit for the summaries, float64 [BINS + 1], the outer ones infinite."""
    into: str
    """Folder to write."""


def select_images(folder: RunFolder, config: RunConfig, units: list[Unit], into: str = "selected") -> dict[str, Any]:
    """Run the stage, writing to folder `into` of the run; returns what its `summary.json` says."""
    folder.delete_folder(into)
    files = score_files(folder)
    groups = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    held_out = folder.read_table("selector/held_out.parquet")
    logits = held_out.column("logit").to_numpy().astype(np.float64)
    inner = np.unique(np.quantile(logits, np.linspace(0, 1, BINS - 1)))
    job = Job(folder, config, np.r_[-np.inf, inner, np.inf], into)
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
        logits[pc.equal(held_out.column("role"), "positives").to_numpy(zero_copy_only=False)],
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


@ray.remote(num_cpus=IO_CPUS)
def _hash_rows(job: Job, files: list[str], task: int, parts: int) -> list[np.ndarray]:
    """(content hash, id hash, task, row) of readable rows, split by content hash; int64 [n, 4] each."""
    table = _read(job.folder, files, ["image_id", "content_hash", "error"])
    readable = table.column("error").is_null().to_numpy(zero_copy_only=False)
    good = table.filter(readable)  # first: a column with nulls would turn into floating point
    hashes = good.column("content_hash").to_numpy()
    ids = [sort_key(job.config.seed, i) for i in good.column("image_id").to_pylist()]
    rows = np.column_stack([hashes, np.array(ids, np.int64), np.full(len(ids), task), np.flatnonzero(readable)])
    return [rows[rows[:, 0] % parts == p] for p in range(parts)]


@ray.remote(num_cpus=IO_CPUS)
def _copies_in(pieces: list[ray.ObjectRef], part: int, known: np.ndarray, exact: bool, tasks: int) -> list[np.ndarray]:
    """Rows to drop for each task, int64 [n]: all copies of P and test, and all but one of each group of equals."""
    rows = np.concatenate([table[part] for table in ray.get(pieces)])
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    drop = np.isin(rows[:, 0], known)
    if exact and len(rows):
        drop |= np.r_[False, rows[1:, 0] == rows[:-1, 0]]
    gone = rows[drop]
    return [gone[gone[:, 2] == t][:, 3] for t in range(tasks)]


@ray.remote(num_cpus=IO_CPUS)
def _known_hashes(units: list[Unit], config: RunConfig) -> np.ndarray:
    """Content hashes of P and the test images, int64 [n]: of those in use, not of whole files."""
    hashes = [
        block.column("content_hash").drop_null().to_numpy()
        for role, sources in sources_by_role(config).items()
        if role != "corpus"
        for wanted in index_labelled(role, units, sources, config.teacher).wanted
        for block in read_blocks(wanted, sources[wanted.unit.source])
    ]
    return np.concatenate(hashes) if hashes else np.zeros(0, np.int64)


def _find_copies(job: Job, groups: list[list[str]], units: list[Unit]) -> tuple[list[list[ray.ObjectRef]], int]:
    known = _known_hashes.remote([u for u in units if u.role != "corpus"], job.config)
    n_scored = int(sum(ray.get([_count_readable.remote(job.folder, g) for g in groups])))
    parts = 1 + n_scored // COPY_SHUFFLE_ROWS
    pieces = [_hash_rows.remote(job, group, t, parts) for t, group in enumerate(groups)]
    exact = job.config.selection.deduplicate == "exact"
    drops = [_copies_in.remote(pieces, p, known, exact, len(groups)) for p in range(parts)]
    return [drops for _ in groups], n_scored


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


def _load(job: Job, files: list[str], task: int, dropped: list[ray.ObjectRef]) -> _Rows:
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
    gone = np.concatenate([drops[task] for drops in ray.get(dropped)])
    keep = ~np.isin(index, gone)
    return _Rows(good, scores, index, eligible(job.config.selection, scores) & keep, len(gone))


@ray.remote(num_cpus=IO_CPUS)
def _count_keys(job: Job, files: list[str], task: int, dropped: list[ray.ObjectRef]) -> pa.Table:
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
def _rows_of_bin(
    job: Job, files: list[str], task: int, dropped: list[ray.ObjectRef], group: int, key_bin: int
) -> np.ndarray:
    """(key bits, tie breaker) of the allowed rows in one bin, int64 [n, 2]."""
    rows = _load(job, files, task, dropped)
    bits = ordered_bits(ranking(job.config.selection, rows.scores))
    here = rows.allowed & (groups_of(job.config.selection, rows.scores) == group) & (bits >> 16 == key_bin)
    return np.column_stack([bits[here].astype(np.int64), rows.scores.tie_breaker[here]])


@ray.remote(num_cpus=IO_CPUS)
def _nth_row(pieces: list[ray.ObjectRef], nth: int) -> Cut:
    rows = np.concatenate(ray.get(pieces))
    rows = rows[np.lexsort((rows[:, 1], -rows[:, 0]))]
    return Cut(int(rows[nth - 1, 0]), int(rows[nth - 1, 1]))


def _find_cuts(job: Job, groups: list[list[str]], dropped: list[list[ray.ObjectRef]], n_scored: int) -> dict[int, Cut]:
    """The cut of each group of rows that compete."""
    counted = [_count_keys.remote(job, g, t, dropped[t]) for t, g in enumerate(groups)]
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
    cuts: dict[int, Any] = {}
    for g, wanted in enumerate(targets.tolist()):
        if wanted >= available[g]:
            cuts[g] = EVERYTHING
        elif wanted == 0:
            cuts[g] = NOTHING
        else:
            bins, counts = key_bin[group == g], np.cumsum(count[group == g])
            at = int(np.searchsorted(counts, wanted))
            before = int(counts[at - 1]) if at else 0
            pieces = [_rows_of_bin.remote(job, f, t, dropped[t], g, int(bins[at])) for t, f in enumerate(groups)]
            cuts[g] = _nth_row.remote(pieces, wanted - before)
    return {g: ray.get(c) if isinstance(c, ray.ObjectRef) else c for g, c in cuts.items()}


# -- output -----------------------------------------------------------------------------------------------------


def _flags(job: Job, rows: _Rows, cuts: dict[int, Cut]) -> np.ndarray:
    bits = ordered_bits(ranking(job.config.selection, rows.scores)).astype(np.int64)
    groups = groups_of(job.config.selection, rows.scores)
    taken = np.zeros(len(bits), bool)
    for group, cut in cuts.items():
        taken |= (groups == group) & cut.admits(bits, rows.scores.tie_breaker)
    return taken & rows.allowed


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _summarise(
    job: Job, files: list[str], task: int, dropped: list[ray.ObjectRef], cuts: dict[int, Cut]
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
    }
    key = ranking(job.config.selection, rows.scores)
    return counts, (key[known], relevant[known])


@ray.remote(num_cpus=IO_CPUS)
def _average_precision(pieces: list[ray.ObjectRef]) -> float | None:
    from sklearn.metrics import average_precision_score

    keys, truth = (np.concatenate(part) for part in zip(*ray.get(pieces), strict=True))
    return float(average_precision_score(truth, keys)) if truth.any() else None


@ray.remote(num_cpus=IO_CPUS)
def _take_rows(
    job: Job, files: list[str], task: int, dropped: list[ray.ObjectRef], cuts: dict[int, Cut], parts: int
) -> list[pa.Table]:
    """Selected rows with images, split into ranges of the seeded hash."""
    rows = _load(job, files, task, dropped)
    taken = _flags(job, rows, cuts)
    table = _read(job.folder, files, SELECTED_SCHEMA.names).take(rows.index[taken])
    order = rows.scores.tie_breaker[taken].view(np.uint64)
    table = table.append_column("order", pa.array(order))
    # Floating point is exact enough: any monotone map from hash to part will do.
    part = np.minimum((order / 2.0**64 * parts).astype(np.int64), parts - 1)
    return [table.take(np.flatnonzero(part == p)) for p in range(parts)]


@ray.remote(num_cpus=IO_CPUS)
def _write_part(job: Job, pieces: list[ray.ObjectRef], part: int) -> int:
    table = pa.concat_tables([tables[part] for tables in ray.get(pieces)]).sort_by([("order", "ascending")])
    table = fetch_images(job.folder, job.config, table)
    job.folder.write_table(
        f"{job.into}/part-{part:05d}.parquet", table.select(SELECTED_SCHEMA.names).cast(SELECTED_SCHEMA)
    )
    return table.num_rows


def fetch_images(folder: RunFolder, config: RunConfig, table: pa.Table) -> pa.Table:
    """Fill null images of a table with (source, source_row) from the corpus itself."""
    images = table.column("image").to_pylist()
    missing: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for i, (image, source, row) in enumerate(
        zip(images, table.column("source").to_pylist(), table.column("source_row").to_pylist(), strict=True)
    ):
        if image is None:
            missing[source, row].append(i)
    if not missing:
        return table
    wanted_files = {source for source, _ in missing}
    for unit in units_from_table(folder.read_table("plan.parquet")):
        if unit.role != "corpus" or wanted_files.isdisjoint(unit.files):
            continue
        if unit.format == "images":
            positions = [i for i, file in enumerate(unit.files) if (file, 0) in missing]
        else:
            positions = [i for i in range(unit.rows) if (unit.files[0], unit.start + i) in missing]
        if not positions:
            continue
        for block in read_blocks(Wanted(unit, np.array(positions)), config.corpus[unit.source]):
            for source, row, image in zip(
                *(block.column(c).to_pylist() for c in ("source", "source_row", "image")), strict=True
            ):
                for i in missing[source, row]:
                    images[i] = image
    return table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))


def _write_selected(
    job: Job, groups: list[list[str]], dropped: list[list[ray.ObjectRef]], cuts: dict[int, Cut]
) -> dict[str, Any]:
    refs = [_summarise.remote(job, g, t, dropped[t], cuts) for t, g in enumerate(groups)]
    average_precision = _average_precision.remote([keys for _, keys in refs])
    total: dict[str, Any] = {}
    for counts in ray.get([counts for counts, _ in refs]):
        total = {k: total.get(k, 0) + v for k, v in counts.items()}
    parts = max(1, -(-total["n_selected"] // ROWS_PER_PART))
    pieces = [_take_rows.remote(job, g, t, dropped[t], cuts, parts) for t, g in enumerate(groups)]
    written = sum(ray.get([_write_part.remote(job, pieces, p) for p in range(parts)]))
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
