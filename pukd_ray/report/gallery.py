"""Images of the page: for each teacher class the surest picks, those next to the cut, and those left out.

Tasks over score files keep a few candidates per class, merged as a tree, so nothing grows with the corpus but the
sorted 64-bit keys of the selected ids: 8 bytes each, once per node, 0.8 GB for 100 million.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pukd_ray.config import RunConfig, SelectionConfig
from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS, PixelSpec, Unreadable, decode, encode_png
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import SELECTION
from pukd_ray.runtime.engine import IO_CPUS
from pukd_ray.selection.chunks import score_files
from pukd_ray.selection.rules import RULES
from pukd_ray.selection.scoring import sort_key
from pukd_ray.selection.select import FILES_PER_TASK
from pukd_ray.storage import redact

MAX_CLASSES = 12
PER_KIND = 8
RANDOM_REJECTED = 4
MAX_SIDE = 64
MERGE_WIDTH = 32
# More candidates than are shown, so that no image is shown twice.
NEAREST = 2 * PER_KIND
DRAWN = 4 * PER_KIND

_COLUMNS = ["image_id", "source", "source_row", "error", "pu_logit", "pu_probability", "teacher_label", "relevant"]


@dataclass(frozen=True)
class Picture:
    """One image of the gallery."""

    image_id: str
    logit: float
    probability: float
    relevant: bool | None
    selected: bool
    uri: str | None
    """data: URI of a PNG; None if the image could not be fetched."""
    source: str = ""
    """The file that it is in."""
    source_row: int = 0

    @property
    def link(self) -> str | None:
        """Where a browser can open it; None of an image within a file, or in a store that browsers do not know."""
        if PurePosixPath(self.source).suffix.lower() not in IMAGE_EXTENSIONS:
            return None
        if self.source.startswith(("http://", "https://")):
            return redact(self.source)
        return Path(self.source).as_uri() if self.source.startswith("/") else None


@dataclass(frozen=True)
class ClassGallery:
    """The images of one teacher class, by falling logit."""

    label: int
    cut: float
    """Logit at which the rule divides this class."""
    top: tuple[Picture, ...]
    borderline: tuple[Picture, ...]
    rejected: tuple[Picture, ...]


@dataclass(frozen=True)
class Gallery:
    """All that the page shows of the corpus's images."""

    classes: tuple[ClassGallery, ...]
    ranked: bool
    """Whether the rule takes the highest logits; if not, the cut is only the classifier's own 0."""

    @property
    def count(self) -> int:
        """Images shown."""
        return sum(len(c.top) + len(c.borderline) + len(c.rejected) for c in self.classes)


def takes_highest(selection: SelectionConfig) -> bool:
    """Whether the rule takes the images with the highest logits, of all or of each class."""
    rule = RULES[selection.rule]
    return rule.takes_highest and not rule.draws(selection)


def class_cuts(selection: SelectionConfig, lowest: np.ndarray) -> np.ndarray:
    """Logit [K] at which the rule divides each class, from the lowest selected ones [K] (inf: none selected)."""
    rule, taken = RULES[selection.rule], np.isfinite(lowest)
    takes_all_positive = rule.positives_only and rule.count is None
    if takes_all_positive or not takes_highest(selection) or not taken.any():
        return np.zeros(len(lowest))
    if rule.per_class:
        return np.where(taken, lowest, 0.0)
    return np.full(len(lowest), lowest.min())


def shown_classes(class_counts: list[int]) -> list[int]:
    """All classes, or the `MAX_CLASSES` with most selected images, in their order."""
    order = sorted(range(len(class_counts)), key=lambda k: (-class_counts[k], k))
    return sorted(order[:MAX_CLASSES])


# -- candidates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kinds:
    """Rows of one class, by kind, best first."""

    top: np.ndarray
    above: np.ndarray
    below: np.ndarray
    highest: np.ndarray
    drawn: np.ndarray


def _kinds(table: pa.Table, label: int, cut: float, ranked: bool) -> _Kinds:
    logits, labels, selected, keys = (
        table.column(c).to_numpy() for c in ("pu_logit", "teacher_label", "selected", "key")
    )
    rows = np.flatnonzero(labels == label)
    if ranked:  # whatever lies above the cut and was not taken is a copy
        rows = rows[selected[rows] | (logits[rows] <= cut)]
    above = selected[rows] if ranked else logits[rows] > cut
    # The key decides among equals, so that the page does not depend on the order of files.
    falling = rows[np.lexsort((keys[rows], -logits[rows]))]
    rising = falling[::-1]
    is_above = np.zeros(len(logits), bool)
    is_above[rows] = above
    left_out = rows[~selected[rows]]
    return _Kinds(
        top=falling[selected[falling]][:PER_KIND],
        above=rising[is_above[rising]][:NEAREST],
        below=falling[~is_above[falling]][:NEAREST],
        highest=falling[~selected[falling]][:NEAREST],
        drawn=left_out[np.argsort(keys[left_out])][:DRAWN],
    )


def best_candidates(table: pa.Table, classes: list[int], cuts: np.ndarray, ranked: bool) -> pa.Table:
    """The few rows of `table` that a gallery of it may show; the best of parts are the best of the whole."""
    kept = [np.zeros(0, np.int64)]
    for label in classes:
        kinds = _kinds(table, label, float(cuts[label]), ranked)
        kept += [kinds.top, kinds.above, kinds.below, kinds.highest, kinds.drawn]
    return table.take(np.unique(np.concatenate(kept)))


def pick(table: pa.Table, label: int, cut: float, ranked: bool) -> dict[str, np.ndarray]:
    """Rows of `table` to show for a class, by kind and falling logit; none twice."""
    kinds = _kinds(table, label, cut, ranked)
    above = kinds.above[~np.isin(kinds.above, kinds.top)]
    below = kinds.below[~np.isin(kinds.below, kinds.top)]
    n_below = min(len(below), PER_KIND - min(len(above), PER_KIND // 2))
    borderline = np.concatenate([above[: PER_KIND - n_below][::-1], below[:n_below]])
    highest = kinds.highest[~np.isin(kinds.highest, borderline)][: PER_KIND - RANDOM_REJECTED]
    drawn = kinds.drawn[~np.isin(kinds.drawn, np.concatenate([borderline, highest]))]
    rejected = np.concatenate([highest, drawn[: PER_KIND - len(highest)]])
    logits = table.column("pu_logit").to_numpy()
    return {"top": kinds.top, "borderline": borderline, "rejected": rejected[np.argsort(-logits[rejected])]}


@ray.remote(num_cpus=IO_CPUS, num_returns=2)
def _selected_facts(folder: RunFolder, config: RunConfig, files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(keys of the ids, lowest logit of each class) of some files of `selected/`."""
    keys, lowest = [np.zeros(0, np.int64)], np.full(config.teacher.num_classes, np.inf)
    for file in files:
        table = folder.read_table(file, ["image_id", "pu_logit", "teacher_label"])
        keys.append(_keys(config.seed, table))
        np.minimum.at(lowest, table.column("teacher_label").to_numpy(), table.column("pu_logit").to_numpy())
    return np.concatenate(keys), lowest


def _keys(seed: int, table: pa.Table) -> np.ndarray:
    return np.array([sort_key(seed, i) for i in table.column("image_id").to_pylist()], np.int64)


@ray.remote(num_cpus=IO_CPUS)
def _sorted_keys(pieces: list[ray.ObjectRef]) -> np.ndarray:
    return np.sort(np.concatenate([np.zeros(0, np.int64), *ray.get(pieces)]))


@ray.remote(num_cpus=IO_CPUS)
def _candidates_in(
    folder: RunFolder,
    seed: int,
    files: list[str],
    taken: np.ndarray,
    classes: list[int],
    cuts: np.ndarray,
    ranked: bool,
) -> pa.Table:
    """Candidates of some score files, read one at a time and without images."""
    best: list[pa.Table] = []
    for file in files:
        table = folder.read_table(file, _COLUMNS)
        table = table.append_column("file", pa.array([file] * table.num_rows, pa.string()))
        table = table.append_column("file_row", pa.array(np.arange(table.num_rows)))
        table = table.filter(pa.compute.is_null(table.column("error"))).drop_columns(["error"])
        keys = _keys(seed, table)
        at = np.searchsorted(taken, keys)
        is_taken = (taken[np.minimum(at, len(taken) - 1)] == keys) if len(taken) else np.zeros(len(keys), bool)
        table = table.append_column("key", pa.array(keys)).append_column("selected", pa.array(is_taken))
        best = [best_candidates(pa.concat_tables([*best, table]), classes, cuts, ranked)]
    return best[0]


@ray.remote(num_cpus=IO_CPUS)
def _merge(pieces: list[ray.ObjectRef], classes: list[int], cuts: np.ndarray, ranked: bool) -> pa.Table:
    return best_candidates(pa.concat_tables(ray.get(pieces)), classes, cuts, ranked)


# -- images -----------------------------------------------------------------------------------------------------


def thumbnail(data: bytes | None, spec: PixelSpec) -> str | None:
    """data: URI of a PNG of an encoded image, or None."""
    try:
        return png_uri(encode_png(decode(data, spec)))
    except Unreadable:
        return None


def png_uri(data: bytes | None) -> str | None:
    """data: URI of a PNG."""
    return None if data is None else "data:image/png;base64," + b64encode(data).decode()


def thumbnail_spec(config: RunConfig) -> PixelSpec:
    """What the teacher sees, but not larger than `MAX_SIDE`."""
    t = config.teacher
    return PixelSpec(min(t.input_size, MAX_SIDE), t.channels, t.resize)


@ray.remote(num_cpus=IO_CPUS)
def _thumbnails(folder: RunFolder, config: RunConfig, table: pa.Table) -> list[str | None]:
    """Thumbnails of rows of one score file; bytes that the pass did not keep come from the corpus."""
    try:
        rows = table.column("file_row").to_numpy()
        images: dict[int, bytes | None] = {}
        start = 0
        with folder.open(table.column("file")[0].as_py()) as source:
            for batch in pq.ParquetFile(source).iter_batches(batch_size=1024, columns=["image"]):
                for row in rows[(rows >= start) & (rows < start + batch.num_rows)].tolist():
                    images[row] = batch.column("image")[row - start].as_py()
                start += batch.num_rows
        table = table.append_column("image", pa.array([images[r] for r in rows.tolist()], pa.binary()))
        table = fetch_images(folder, config, table)
    except Exception:  # a corpus that is gone by now, say, costs its pictures, not the page
        return [None] * table.num_rows
    return [thumbnail(data, thumbnail_spec(config)) for data in table.column("image").to_pylist()]


def collect_gallery(folder: RunFolder, config: RunConfig) -> Gallery:
    """Find and fetch the images to show; the driver sees only those."""
    ranked = takes_highest(config.selection)
    parts = [f for f in folder.files("selected") if f.endswith(".parquet")]
    facts = [_selected_facts.remote(folder, config, group) for group in _groups(parts, FILES_PER_TASK)]
    taken = _sorted_keys.remote([keys for keys, _ in facts])
    lowest = np.full(config.teacher.num_classes, np.inf)
    for piece in ray.get([low for _, low in facts]):
        lowest = np.minimum(lowest, piece)
    cuts = class_cuts(config.selection, lowest)
    classes = shown_classes(folder.read_record(SELECTION)["class_counts"])
    refs = [
        _candidates_in.remote(folder, config.seed, group, taken, classes, cuts, ranked)
        for group in _groups(score_files(folder), FILES_PER_TASK)
    ]
    while len(refs) > 1:
        refs = [_merge.remote(group, classes, cuts, ranked) for group in _groups(refs, MERGE_WIDTH)]
    if not refs:
        return Gallery((), ranked)
    table: pa.Table = ray.get(refs[0])
    picks = {k: pick(table, k, float(cuts[k]), ranked) for k in classes}
    pictures = _fetch(folder, config, table, np.unique(np.concatenate([r for p in picks.values() for r in p.values()])))
    return Gallery(
        tuple(
            ClassGallery(k, float(cuts[k]), **{kind: tuple(pictures[r] for r in rows) for kind, rows in p.items()})
            for k, p in picks.items()
        ),
        ranked,
    )


def _fetch(folder: RunFolder, config: RunConfig, table: pa.Table, rows: np.ndarray) -> dict[int, Picture]:
    files = np.array(table.column("file").to_pylist(), dtype=object)
    groups = [rows[files[rows] == file] for file in dict.fromkeys(files[rows])]
    refs = [_thumbnails.remote(folder, config, table.take(group)) for group in groups]
    uris = dict(zip(_flat(groups), [uri for piece in ray.get(refs) for uri in piece], strict=True))
    pictures = {}
    for row, uri in uris.items():
        r = table.slice(row, 1).to_pylist()[0]
        scores = r["pu_logit"], r["pu_probability"], r["relevant"], r["selected"]
        pictures[row] = Picture(r["image_id"], *scores, uri, r["source"], r["source_row"])
    return pictures


def _flat(groups: list[np.ndarray]) -> list[int]:
    return [int(row) for group in groups for row in group]


def _groups(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
