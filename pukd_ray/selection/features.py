"""The feature cache: multi-scale teacher features of P (in several views) and the sample of U, on storage.

Imported by every task of the pass, so nothing here imports torch or Ray Train.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pukd_ray.config import SelectorConfig, TeacherConfig
from pukd_ray.corpus.streaming import scatter_rows
from pukd_ray.errors import RunError
from pukd_ray.networks.actor import TeacherActor
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import Precision
from pukd_ray.selection.views import random_views


class ExtractFeatures(TeacherActor):
    """Multi-scale features and the teacher's opinion of each row; of positives, features of all views."""

    def __init__(
        self, teacher: TeacherConfig, weights: Any, selector: SelectorConfig, seed: int, precision: Precision
    ) -> None:
        super().__init__(teacher, weights, selector.grid, precision)
        self._selector, self._seed = selector, seed

    def work(self, table: pa.Table) -> pa.Table:
        """Decoded rows -> rows of `selector/features/`."""
        table, readable, pixels, found = self.forward(table)
        features = found["features"]  # float16: half the space; float32 again where they are used
        is_p = np.array([role == "positives" for role in table.column("role").to_pylist()])[readable]
        shown: list[np.ndarray] = list(pixels)
        cached = list(features)
        if is_p.any():
            seeds = np.array(table.column("content_hash").filter(pa.array(readable)).to_pylist())[is_p] + self._seed
            views = random_views(pixels[is_p], self._selector.augment, self._selector.views, seeds)
            others = [self.run(views[:, v])["features"] for v in range(1, views.shape[1])]
            of_views = np.stack([features[is_p], *others], 1)
            for i, view, row in zip(np.flatnonzero(is_p), views, of_views, strict=True):
                shown[i], cached[i] = view, row
        columns = {
            "features": _as_bytes(cached, readable),
            "last_tap": _as_bytes(list(found["last_tap"]), readable),
            "pixels": _as_bytes(shown if self._selector.trunk == "finetune" else None, readable),
            "teacher_label": scatter_rows(found["teacher_label"], readable, pa.int32()),
            "teacher_confidence": scatter_rows(found["teacher_confidence"], readable, pa.float32()),
            "teacher_entropy": scatter_rows(found["teacher_entropy"], readable, pa.float32()),
        }
        table = table.drop_columns(["image", "source"])
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table


def as_half(features: np.ndarray) -> np.ndarray:
    """float16 of features of any shape, as the cache holds them: half the space; float32 again where it is used."""
    finite: np.ndarray = np.clip(features, -65504, 65504)
    return finite.astype(np.float16)


def _as_bytes(rows: list[np.ndarray] | None, readable: np.ndarray) -> pa.Array:
    """Raw bytes of the readable rows, nulls in the others; all nulls for None. Many views of P may be over 2 GiB."""
    if rows is None:
        return pa.nulls(len(readable), pa.large_binary())
    values = iter(rows)
    return pa.array([next(values).tobytes() if good else None for good in readable], pa.large_binary())


@dataclass(frozen=True)
class WriteFeatures:
    """Writes a block to `selector/features/` and returns its name and counts."""

    folder: RunFolder

    def __call__(self, table: pa.Table) -> pa.Table:
        """Feature rows -> one ledger row."""
        name = f"selector/features/{uuid.uuid4().hex}.parquet"
        self.folder.write_table(name, table)
        rows = table.select(["role", "image_id", "error"]).to_pylist()
        errors = [f"{r['role']}|{r['image_id']}|{r['error']}" for r in rows if r["error"] is not None]
        return pa.table({"file": [name], "rows": [table.num_rows], "errors": [errors]}, schema=_FEATURE_LEDGER)


_FEATURE_LEDGER = pa.schema([("file", pa.string()), ("rows", pa.int64()), ("errors", pa.list_(pa.string()))])


@dataclass(frozen=True)
class Features:
    """Cached features of P and the sample of U, readable rows only, in the order of their ids."""

    p: np.ndarray
    """float16 [n_p, views, C], the image itself first."""
    u: np.ndarray
    """float16 [n_u, C]."""
    p_pixels: np.ndarray | None
    """uint8 [n_p, views, C * H * W], where the trunk is fine-tuned."""
    u_pixels: np.ndarray | None
    """uint8 [n_u, C * H * W], likewise."""
    p_units: np.ndarray
    """Unit of each positive."""
    p_rows: np.ndarray
    """Its row there, int64 [n_p]."""
    p_labels: np.ndarray
    p_teacher: np.ndarray
    """The teacher's label of each positive, int64 [n_p]."""
    u_teacher: np.ndarray
    """The same for U."""
    u_units: np.ndarray
    """Unit of each row of U."""
    u_relevant: np.ndarray
    """Truth of U where it is given: 1, 0, or -1."""
    known: np.ndarray | None
    """Images that people found irrelevant, float16 [n, C]; no part of U."""
    known_pixels: np.ndarray | None
    """uint8 [n, C * H * W], where the trunk is fine-tuned."""
    known_rows: np.ndarray
    """Row of each in the file of labelled images, int64 [n]."""


LABELS = "labels"
"""Unit of the images of the corpus that people labelled: those found relevant have the role of P."""


def load_features(folder: RunFolder, files: list[str]) -> Features:
    """Read the feature cache; sorted by id, so that nothing depends on the order in which blocks came."""
    p, u, known = _read_cache(folder, files, "label", "teacher_label", "relevant")
    of_p, of_u, of_known = _stacked(folder, files, "features", np.float16, p, u, known)
    p_pixels, u_pixels, known_pixels = _stacked(folder, files, "pixels", np.uint8, p, u, known)
    assert of_u is not None
    return Features(
        p=_views(of_p, of_u),
        u=of_u,
        p_pixels=None if u_pixels is None else _views(p_pixels, u_pixels),
        u_pixels=u_pixels,
        p_units=np.array(p.column("unit").to_pylist()),
        p_rows=p.column("source_row").to_numpy(),
        p_labels=np.array([int(v) for v in p.column("label").to_pylist()]),
        p_teacher=p.column("teacher_label").to_numpy(),
        u_teacher=u.column("teacher_label").to_numpy(),
        u_units=np.array(u.column("unit").to_pylist()),
        u_relevant=np.array([-1 if v is None else int(v) for v in u.column("relevant").to_pylist()]),
        known=of_known,
        known_pixels=None if u_pixels is None else known_pixels,
        known_rows=known.column("source_row").to_numpy(),
    )


def load_last_tap(folder: RunFolder, files: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P float32 [n_p, C], U [n_u, C], labels of P int64 [n_p]): the teacher's last tap, averaged over its grid cells.

    RunError if the cache was made by a version that did not keep it.
    """
    with folder.open(files[0]) as source:
        if "last_tap" not in pq.read_schema(source).names:
            raise RunError(
                f"selector: the features in {folder.display} are of an older version, without what this selection.rule "
                "is fitted to: --redo selector makes them anew"
            )
    p, u, _ = _read_cache(folder, files, "label")
    of_p, of_u = _stacked(folder, files, "last_tap", np.float16, p, u)
    assert of_p is not None
    assert of_u is not None
    labels = np.array([int(v) for v in p.column("label").to_pylist()], np.int64)
    return of_p.astype(np.float32), of_u.astype(np.float32), labels


_ORDER = ("role", "unit", "source_row", "image_id")


def _read_cache(folder: RunFolder, files: list[str], *columns: str) -> tuple[pa.Table, pa.Table, pa.Table]:
    """`columns`, `_ORDER` and `place` of the readable rows of P, of U and of known negatives, each sorted by id.

    `place` counts rows over all files: features are fetched from there by `_stacked`, as there may be more of them than
    the 2 GiB that Arrow sorts at once.
    """
    names = [*dict.fromkeys([*_ORDER, "error", *columns])]
    table = pa.concat_tables([folder.read_table(f, names) for f in files])
    table = table.append_column("place", pa.array(np.arange(table.num_rows)))
    table = table.filter(pc.is_null(table.column("error"))).sort_by([(name, "ascending") for name in _ORDER])
    is_p = pc.equal(table.column("role"), "positives")
    is_known = pc.and_not(pc.equal(table.column("unit"), LABELS), is_p)
    return table.filter(is_p), table.filter(pc.invert(pc.or_(is_p, is_known))), table.filter(is_known)


def _stacked(folder: RunFolder, files: list[str], name: str, kind: type, *tables: pa.Table) -> list[np.ndarray | None]:
    """[n, width] of a column of raw bytes, for the rows of each table; None where it is empty. A file at a time."""
    stacked: list[np.ndarray | None] = [np.zeros((0, 0), kind) for _ in tables]
    places = [table.column("place").to_numpy() for table in tables]
    orders = [np.argsort(place) for place in places]
    begin = 0
    for file in files:
        column = folder.read_table(file, [name]).column(name)
        for number, (place, order) in enumerate(zip(places, orders, strict=True)):
            first, last = np.searchsorted(place, [begin, begin + len(column)], sorter=order)
            for target in order[first:last].tolist():
                into, raw = stacked[number], column[int(place[target]) - begin]
                if into is None or not raw.is_valid:
                    stacked[number] = None
                    break
                row: np.ndarray = np.frombuffer(raw.as_buffer(), kind)
                if not len(into):
                    into = stacked[number] = np.empty((len(place), len(row)), kind)
                into[target] = row
        begin += len(column)
    return stacked


def _views(p: np.ndarray | None, u: np.ndarray) -> np.ndarray:
    """P [n_p, views, width] of [n_p, views * width], as wide as U [n_u, width]."""
    assert p is not None
    width = max(1, u.shape[1])
    return p.reshape(len(p), p.shape[1] // width, width)
