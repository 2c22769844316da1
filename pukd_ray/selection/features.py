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
        features = found["features"]
        is_p = np.array([role == "positives" for role in table.column("role").to_pylist()])[readable]
        shown: list[np.ndarray] = list(pixels)
        cached = [as_half(row) for row in features]
        if is_p.any():
            seeds = np.array(table.column("content_hash").filter(pa.array(readable)).to_pylist())[is_p] + self._seed
            views = random_views(pixels[is_p], self._selector.augment, self._selector.views, seeds)
            others = [self.run(views[:, v])["features"] for v in range(1, views.shape[1])]
            of_views = as_half(np.stack([features[is_p], *others], 1))
            for i, view, row in zip(np.flatnonzero(is_p), views, of_views, strict=True):
                shown[i], cached[i] = view, row
        columns = {
            "features": _as_bytes(cached, readable),
            "last_tap": _as_bytes(list(as_half(self.teacher.last_tap(features))), readable),
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
    """Raw bytes of the readable rows, nulls in the others; all nulls for None."""
    if rows is None:
        return pa.nulls(len(readable), pa.binary())
    values = iter(rows)
    return pa.array([next(values).tobytes() if good else None for good in readable], pa.binary())


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
    p_labels: np.ndarray
    p_teacher: np.ndarray
    """The teacher's label of each positive, int64 [n_p]."""
    u_teacher: np.ndarray
    """The same for U."""
    u_units: np.ndarray
    """Unit of each row of U."""
    u_relevant: np.ndarray
    """Truth of U where it is given: 1, 0, or -1."""


def load_features(folder: RunFolder, files: list[str]) -> Features:
    """Read the feature cache; sorted by id, so that nothing depends on the order in which blocks came."""
    table, is_p = _read_cache(folder, files, "features", "pixels", "label", "teacher_label", "relevant", "unit")
    p, u = _stacked(table, "features", is_p, np.float16)
    p_pixels, u_pixels = _stacked(table, "pixels", is_p, np.uint8)
    assert p is not None
    assert u is not None
    labels = np.array([int(v) if p else -1 for v, p in zip(table.column("label").to_pylist(), is_p, strict=True)])
    teacher = table.column("teacher_label").to_numpy()
    truth = np.array([-1 if v is None else int(v) for v in table.column("relevant").to_pylist()])
    units = np.array(table.column("unit").to_pylist())
    return Features(p, u, p_pixels, u_pixels, labels[is_p], teacher[is_p], teacher[~is_p], units[~is_p], truth[~is_p])


def load_last_tap(folder: RunFolder, files: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P float32 [n_p, C], U [n_u, C], labels of P int64 [n_p]): the teacher's last tap, averaged over its grid cells.

    RunError if the cache was made by a version that did not keep it.
    """
    with folder.fs.open_input_file(folder.path(files[0])) as source:
        if "last_tap" not in pq.read_schema(source).names:
            raise RunError(
                f"selector: the features in {folder.display} are of an older version, without what this selection.rule "
                "is fitted to: --redo selector makes them anew"
            )
    table, is_p = _read_cache(folder, files, "last_tap", "label")
    p, u = _stacked(table, "last_tap", is_p, np.float16)
    assert p is not None
    assert u is not None
    labels = np.array([int(v) for v in table.column("label").filter(pa.array(is_p)).to_pylist()], np.int64)
    return p[:, 0].astype(np.float32), u.astype(np.float32), labels


_ORDER = ("role", "unit", "source_row", "image_id")


def _read_cache(folder: RunFolder, files: list[str], *columns: str) -> tuple[pa.Table, np.ndarray]:
    """(`columns` of the readable rows, sorted by id; which of them are P, bool [n])."""
    names = [*dict.fromkeys([*_ORDER, "error", *columns])]
    table = pa.concat_tables([folder.read_table(f, names) for f in files])
    table = table.filter(pc.is_null(table.column("error"))).sort_by([(name, "ascending") for name in _ORDER])
    return table, np.array(table.column("role").to_pylist()) == "positives"


def _stacked(table: pa.Table, name: str, is_p: np.ndarray, kind: type) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(P [n_p, views, width], U [n_u, width]) of a column of raw bytes; None where it is empty."""
    column = table.column(name)
    if column.null_count:
        return None, None
    raw = column.to_pylist()
    p, u = ([row for row, here in zip(raw, mask, strict=True) if here] for mask in (is_p, ~is_p))
    width = len(u[0]) // np.dtype(kind).itemsize if u else -1
    stacked_p: np.ndarray = (
        np.frombuffer(b"".join(p), kind).reshape(len(p), -1, width) if p else np.zeros((0, 1, width), kind)
    )
    return stacked_p, np.frombuffer(b"".join(u), kind).reshape(len(u), width)
