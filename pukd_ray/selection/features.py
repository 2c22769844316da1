"""The feature cache: multi-scale teacher features of P and the sample of U, on storage.

Imported by every task of the pass, so nothing here imports torch or Ray Train.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pukd_ray.run_folder import RunFolder
from pukd_ray.selection.inference import TeacherActor, spread, teacher_opinion


class ExtractFeatures(TeacherActor):
    """Multi-scale features and the teacher's opinion of each row."""

    def keep(self, table: pa.Table) -> pa.Table:
        """Decoded rows -> rows of `selector/features/`."""
        table, readable, features, logits = self.forward(table)
        label, confidence, entropy = teacher_opinion(logits)
        half = np.clip(features, -65504, 65504).astype(np.float16)  # halves the cache; standardised in float32
        columns = {
            "features": pa.array([row.tobytes() for row in spread_rows(half, readable)], pa.binary(), mask=~readable),
            "teacher_label": spread(label, readable, pa.int32()),
            "teacher_confidence": spread(confidence, readable, pa.float32()),
            "teacher_entropy": spread(entropy, readable, pa.float32()),
        }
        table = table.drop_columns(["image", "source"])
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table


def spread_rows(values: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """`values` of the readable rows, zeros in the others."""
    full = np.zeros((len(readable), values.shape[1]), values.dtype)
    full[readable] = values
    return full


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
    """float16 [n_p, C]."""
    u: np.ndarray
    """float16 [n_u, C]."""
    p_labels: np.ndarray
    p_teacher: np.ndarray
    """The teacher's label of each positive, int64 [n_p]."""
    u_units: np.ndarray
    """Unit of each row of U."""
    u_relevant: np.ndarray
    """Truth of U where it is given: 1, 0, or -1."""


def load_features(folder: RunFolder, files: list[str]) -> Features:
    """Read the feature cache; sorted by id, so that nothing depends on the order in which blocks came."""
    table = pa.concat_tables([folder.read_table(f) for f in files])
    table = table.filter(pc.is_null(table.column("error")))
    table = table.sort_by(
        [("role", "ascending"), ("unit", "ascending"), ("source_row", "ascending"), ("image_id", "ascending")]
    )
    is_p = np.array(table.column("role").to_pylist()) == "positives"
    raw = table.column("features").to_pylist()
    values = np.frombuffer(b"".join(raw), np.float16).reshape(len(raw), -1)
    labels = np.array([int(v) if p else -1 for v, p in zip(table.column("label").to_pylist(), is_p, strict=True)])
    teacher = table.column("teacher_label").to_numpy()
    truth = np.array([-1 if v is None else int(v) for v in table.column("relevant").to_pylist()])
    units = np.array(table.column("unit").to_pylist())
    return Features(values[is_p], values[~is_p], labels[is_p], teacher[is_p], units[~is_p], truth[~is_p])
