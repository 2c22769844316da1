"""The sample of an audit: drawn in tasks over score files, in two passes, with nothing in the driver that grows.

First rows are counted by fine bins of the logit; the selected ones (`selected/`) taken off all (`scores/`) leave the
rest. Then each task keeps, of each stratum, the rows with the smallest keys: a seeded hash of the image id, so that the
smallest keys of a stratum are a simple random sample of it, whatever the files' number and order. The counts tell below
which key those must lie; of the selected images only keys below it are passed around.

Unreadable images have no score and no place in the sample. They count as not known: in none of the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pukd_ray.audit.design import Bins, Stratum, plan_strata
from pukd_ray.audit.record import DESIGN, SAMPLE, SAMPLE_SCHEMA, Design, audit_id
from pukd_ray.config import RunConfig
from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import StageMarker
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.chunks import score_files
from pukd_ray.selection.cuts import ordered_bits
from pukd_ray.selection.scoring import sort_key

FILES_PER_TASK = 4
IMAGES_PER_TASK = 50  # each task reads the plan
_COLUMNS = ["image_id", "source", "source_row", "pu_logit", "pu_probability", "teacher_label"]


def draw_sample(folder: RunFolder, config: RunConfig, images: int, seed: int) -> tuple[pa.Table, Design]:
    """A stratified sample of min(`images`, all scored) images, SAMPLE_SCHEMA, in random order, and what was drawn from.

    RunError where the run has no finished selection, or an image of the sample cannot be found again.
    """
    marker = check_selection(folder)
    scored = _groups(score_files(folder), FILES_PER_TASK)
    taken = _groups([f for f in folder.files("selected") if f.endswith(".parquet")], FILES_PER_TASK)
    everything, unreadable = _count_all(folder, scored)
    chosen, _ = _count_all(folder, taken)
    rest = _difference(everything, chosen)
    try:
        strata = plan_strata(_bins(chosen), _bins(rest), images)
    except ValueError as error:
        raise RunError(f"audit: {error}: draw more (--images)") from error
    table = _draw(folder, seed, strata, scored, taken)
    table = table.take(np.argsort([_key(seed, "order", i) for i in table.column("image_id").to_pylist()]))
    table = _with_images(folder, config, table)
    design: Design = {
        "audit": audit_id(table),
        "seed": seed,
        "n_scored": int(sum(s.size for s in strata)),
        "n_unreadable": unreadable,
        "n_selected": int(sum(s.size for s in strata if s.selected)),
        "select_finished": marker["finished"],
    }
    return table, design


def check_selection(folder: RunFolder) -> StageMarker:
    """The marker of stage select; RunError if the run has no finished selection."""
    marker = folder.marker("select")
    if folder.marker("score") is None or marker is None:
        raise RunError(f"{folder.display}: an audit needs finished stages score and select: run the pipeline first")
    return marker


def save_sample(folder: RunFolder, sample: pa.Table, design: Design) -> None:
    """Write the sample; its Parquet file comes last and says that all of the audit is there."""
    folder.write_json(DESIGN, design)
    folder.write_table(SAMPLE, sample)


def _key(seed: int, use: str, image_id: str) -> int:
    """A hash that no other part of a run orders images by: copies, for one, are dropped by the plain one."""
    return sort_key(seed, f"audit/{use}/{image_id}")


def _groups(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


# -- counting ---------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=IO_CPUS)
def _count(folder: RunFolder, files: list[str]) -> tuple[pa.Table, int]:
    """(readable rows by bin, with their summed probability; unreadable rows)."""
    counts, unreadable = [], 0
    for file in files:
        table = folder.read_table(file, ["pu_logit", "pu_probability"])
        unreadable += table.column("pu_logit").null_count
        counts.append(_by_bin(table.filter(table.column("pu_logit").is_valid())))
    return _summed(counts), unreadable


def _by_bin(table: pa.Table) -> pa.Table:
    bins = _bin(table.column("pu_logit").to_numpy())
    names, index, count = np.unique(bins, return_inverse=True, return_counts=True)
    probability = np.bincount(index, table.column("pu_probability").to_numpy(), len(names))
    return pa.table({"bin": names, "count": count.astype(np.int64), "probability": probability.astype(np.float64)})


def _bin(logits: np.ndarray) -> np.ndarray:
    bins: np.ndarray = (ordered_bits(logits) >> 16).astype(np.int64)
    return bins


def _summed(counts: list[pa.Table]) -> pa.Table:
    """By bin, ascending."""
    table = pa.concat_tables(counts).group_by("bin").aggregate([("count", "sum"), ("probability", "sum")])
    return table.rename_columns(["bin", "count", "probability"]).sort_by("bin")


def _count_all(folder: RunFolder, groups: list[list[str]]) -> tuple[pa.Table, int]:
    counted = ray.get([_count.remote(folder, group) for group in groups])
    return _summed([table for table, _ in counted]), sum(n for _, n in counted)


def _difference(everything: pa.Table, chosen: pa.Table) -> pa.Table:
    negative = chosen
    for name in ("count", "probability"):
        at = negative.schema.get_field_index(name)
        negative = negative.set_column(at, name, pc.negate(negative.column(name)))
    rest = _summed([everything, negative])
    if len(rest) and pc.min(rest.column("count")).as_py() < 0:
        raise RuntimeError("selected/ holds images that scores/ does not: do stage select again")
    return rest.filter(pc.greater(rest.column("count"), 0))


def _bins(counts: pa.Table) -> Bins:
    bits, count, probability = (counts.column(c).to_numpy() for c in ("bin", "count", "probability"))
    return Bins(bits, count, probability / np.maximum(count, 1))


# -- drawing ----------------------------------------------------------------------------------------------------


def _limits(strata: Sequence[Stratum]) -> np.ndarray:
    """Key [H] below which a stratum has its sample: expected are so many that fewer are next to impossible."""
    enough = np.array([s.sampled + 10 * np.sqrt(s.sampled) + 50 for s in strata])
    share = np.minimum(1.0, enough / np.array([s.size for s in strata]))
    return np.array([min(int(f * 2**64) - 2**63, 2**63 - 1) for f in share.tolist()], np.int64)


def _low_rows(table: pa.Table, seed: int, strata: Sequence[Stratum], limits: np.ndarray) -> pa.Table:
    """Readable rows with their `stratum` (index) and `key`, those below the stratum's limit."""
    table = table.filter(table.column("pu_logit").is_valid())
    firsts = np.array([s.first for s in strata])
    stratum = np.maximum(np.searchsorted(firsts, _bin(table.column("pu_logit").to_numpy()), side="right") - 1, 0)
    keys = np.array([_key(seed, "draw", i) for i in table.column("image_id").to_pylist()], np.int64)
    table = table.append_column("stratum", pa.array(stratum)).append_column("key", pa.array(keys))
    return table.filter(pa.array(keys <= limits[stratum]))


@ray.remote(num_cpus=IO_CPUS)
def _low_keys(
    folder: RunFolder, seed: int, files: list[str], strata: Sequence[Stratum], limits: np.ndarray
) -> np.ndarray:
    """Keys of selected images that a search for the rest would come upon, int64 [n]."""
    tables = (folder.read_table(file, ["image_id", "pu_logit"]) for file in files)
    keys = [_low_rows(table, seed, strata, limits).column("key").to_numpy() for table in tables]
    return np.concatenate(keys)


@ray.remote(num_cpus=IO_CPUS)
def _together(*pieces: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *pieces])


@ray.remote(num_cpus=IO_CPUS)
def _candidates(
    folder: RunFolder,
    seed: int,
    files: list[str],
    strata: Sequence[Stratum],
    limits: np.ndarray,
    left_out: np.ndarray | None,
) -> pa.Table:
    """Of each stratum the rows with the smallest keys, without those with keys `left_out`."""
    best: list[pa.Table] = []
    for file in files:
        table = _low_rows(folder.read_table(file, _COLUMNS), seed, strata, limits)
        if left_out is not None:
            table = table.filter(pa.array(~np.isin(table.column("key").to_numpy(), left_out)))
        best = [_smallest(pa.concat_tables([*best, table]), strata)]
    return best[0]


def _smallest(table: pa.Table, strata: Sequence[Stratum]) -> pa.Table:
    """As many rows of each stratum as it has in the sample, by key; those of parts hold those of the whole."""
    stratum, keys = table.column("stratum").to_numpy(), table.column("key").to_numpy()
    order = np.lexsort((keys, stratum))
    first = np.searchsorted(stratum[order], np.arange(len(strata)))
    rank = np.arange(len(order)) - first[stratum[order]]
    wanted = np.array([s.sampled for s in strata])
    return table.take(order[rank < wanted[stratum[order]]])


def _draw(
    folder: RunFolder,
    seed: int,
    strata: Sequence[Stratum],
    scored: list[list[str]],
    taken: list[list[str]],
) -> pa.Table:
    """The sample without images, by stratum."""
    sides = [s for s in strata if s.selected], [s for s in strata if not s.selected]
    limits = tuple(_limits(side) for side in sides)
    pieces: list[list[Any]] = [[], []]
    if sides[0]:
        pieces[0] = [_candidates.remote(folder, seed, g, sides[0], limits[0], None) for g in taken]
    if sides[1]:
        selected = _together.remote(*(_low_keys.remote(folder, seed, g, sides[1], limits[1]) for g in taken))
        pieces[1] = [_candidates.remote(folder, seed, g, sides[1], limits[1], selected) for g in scored]
    tables = []
    for chosen, side, refs in zip((True, False), sides, pieces, strict=True):
        if not side:
            continue
        table = _smallest(pa.concat_tables(ray.get(refs)), side)
        stratum = table.column("stratum").to_numpy()
        if np.bincount(stratum, minlength=len(side)).tolist() != [s.sampled for s in side]:
            raise RuntimeError("the strata hold fewer images than were counted: draw again, with another seed")
        facts = {
            "stratum": stratum + (0 if chosen else len(sides[0])),
            "stratum_size": np.array([s.size for s in side])[stratum],
            "sampled": np.array([s.sampled for s in side])[stratum],
            "inclusion_probability": np.array([s.inclusion_probability for s in side])[stratum],
            "selected": np.full(len(stratum), chosen),
        }
        tables.append(pa.table({c: table.column(c) for c in _COLUMNS} | facts))
    return pa.concat_tables(tables)


# -- images -----------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=IO_CPUS)
def _fetched(folder: RunFolder, config: RunConfig, table: pa.Table) -> pa.Table:
    return fetch_images(folder, config, table)


def _with_images(folder: RunFolder, config: RunConfig, table: pa.Table) -> pa.Table:
    """SAMPLE_SCHEMA, in the order of `table`; images that lie together are fetched together."""
    table = table.append_column("image", pa.nulls(len(table), pa.binary()))
    table = table.append_column("place", pa.array(np.arange(len(table))))
    together = table.sort_by([("source", "ascending"), ("source_row", "ascending")])
    parts = [together.slice(i, IMAGES_PER_TASK) for i in range(0, len(together), IMAGES_PER_TASK)]
    fetched = pa.concat_tables(ray.get([_fetched.remote(folder, config, part) for part in parts])).sort_by("place")
    if fetched.column("image").null_count:
        lost = fetched.filter(fetched.column("image").is_null()).column("source")[0].as_py()
        raise RunError(
            f"{lost}: {fetched.column('image').null_count} images of the sample are not there any more: bring the file "
            "back, or draw again"
        )
    return fetched.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
