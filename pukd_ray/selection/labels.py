"""What people said of single corpus images: the labels of a run's audits, for the selector (`selector.prior: audit`).

`labels/` of the run folder has a pair of files for each audit whose labels were read back. No stage moves them, and an
audit that is drawn later adds to them:

- Each audit is a random sample of its own, whatever the scores that it was drawn by, so each gives the prior without
  bias. Together they weigh by their number of labels, which is fixed before anybody looks; the interval adds up the
  distances of the limits in quadrature (MOVER: Zou, Donner 2008).
- An image's weight, the inverse of its inclusion probability, is divided in the same way. Of an audit of a corpus that
  has grown since, the labels are known positives and negatives as before, but say nothing of the corpus as it is now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pukd_ray.config import ConfigError, RunConfig, SourceConfig
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import LabelsRecord, RecordFile
from pukd_ray.selection.features import LABELS
from pukd_ray.selection.verdict import LabelledPrior

LABELS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("relevant", pa.bool_(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("teacher_label", pa.int32(), nullable=False),
        pa.field("image", pa.binary()),
    ]
)
"""Of `labels/<audit>.parquet`: images with a yes or a no. `weight` is how many scored images one stands for, `image` is
as encoded."""
JOINED = "selector/labelled.parquet"
"""The labelled images, as they were read."""

ENOUGH_POSITIVES = 30
"""Effective number of relevant labelled images, from which on P itself is not asked."""


@dataclass(frozen=True)
class Labels:
    """Those of all audits."""

    table: pa.Table
    """LABELS_SCHEMA, by image id; those that were judged twice and not alike are left out."""
    prior: LabelledPrior


def save_labels(folder: RunFolder, record: LabelsRecord, table: pa.Table) -> None:
    """Write an audit's labels (LABELS_SCHEMA), or write them anew."""
    folder.write_table(f"{LABELS}/{record['audit']}.parquet", table.cast(LABELS_SCHEMA))
    folder.write_record(_record_of(record["audit"]), record)


def _record_of(audit: str) -> RecordFile[LabelsRecord]:
    return RecordFile(f"{LABELS}/{audit}.json")


def label_records(folder: RunFolder) -> list[LabelsRecord]:
    """Of all audits whose labels were read back."""
    names = [name for name in folder.files(LABELS) if name.endswith(".json")] if folder.exists(LABELS) else []
    return [folder.read_record(RecordFile[LabelsRecord](name)) for name in names]


def load_labels(folder: RunFolder, images: int) -> Labels:
    """The labels for a corpus of so many images. ConfigError where there are none, or too few to tell the prior."""
    records = label_records(folder)
    if not records:
        raise ConfigError(
            [
                f"selector.prior: audit needs labels, and {folder.display} has none: run with auto, then `pukd audit "
                "draw`, label the images, `pukd audit read`"
            ]
        )
    able = [r for r in records if r["prior"] is not None]
    if not able:
        raise ConfigError(
            [
                f"selector.prior: the labels in {folder.display}/{LABELS} do not tell the prior: "
                f"{records[-1]['reason']}; label more of them, and `pukd audit read` again"
            ]
        )
    sizes = {r["audit"]: r["images"] for r in able}
    current = [r for r in able if sizes[r["audit"]] == images]
    used = current or able
    total = sum(r["labelled"] for r in used)
    tables = []
    for record in records:
        table = folder.read_table(f"{LABELS}/{record['audit']}.parquet")
        share = record["labelled"] / total if record in used else 0.0
        weight = pc.multiply(table.column("weight"), share)
        tables.append(table.set_column(table.schema.get_field_index("weight"), "weight", weight))
    table = _pooled(pa.concat_tables(tables))
    reasons = []
    if not current:
        was = max(r["images"] for r in able)
        reasons.append(f"the audit is of {was:,} images, the corpus has {images:,} now")
    return Labels(table, pool_priors(used, reasons))


def _pooled(table: pa.Table) -> pa.Table:
    """One row of each image, its weights added up."""
    table = table.sort_by("image_id")
    ids, first, again = np.unique(
        np.array(table.column("image_id").to_pylist()), return_index=True, return_inverse=True
    )
    relevant = table.column("relevant").to_numpy()
    judged, yes = np.bincount(again, minlength=len(ids)), np.bincount(again, relevant, len(ids))
    weight = np.bincount(again, table.column("weight").to_numpy(), len(ids))
    table = table.take(first).set_column(2, "weight", pa.array(weight))
    return table.filter(pa.array((yes == 0) | (yes == judged)))


def pool_priors(records: Sequence[LabelsRecord], reasons: Sequence[str] = ()) -> LabelledPrior:
    """One prior of audits that tell one, each an independent sample."""
    n = np.array([r["labelled"] for r in records], float)
    share = n / n.sum()
    value, lower, upper = (np.array([r[k] for r in records], float) for k in ("prior", "lower", "upper"))
    mean = float(share @ value)
    down, up = (float(np.sqrt(((share * (limit - value)) ** 2).sum())) for limit in (lower, upper))
    return LabelledPrior(mean, max(mean - down, 0.0), min(mean + up, 1.0), int(n.sum()), tuple(reasons))


# -- in the selector --------------------------------------------------------------------------------------------


def join(folder: RunFolder, config: RunConfig, labels: Labels) -> tuple[RunConfig, list[ReadRequest]]:
    """(the config with labelled images as one more source of P and of the corpus, what to read of them).

    Those found relevant join P, with the teacher's label as their class; the others are known negatives. Their
    `source_row` counts the rows of `labels.table`.
    """
    folder.write_table(JOINED, labels.table)
    source = SourceConfig(uri=folder.uri_of(JOINED), id_column="image_id")
    relevant = labels.table.column("relevant").to_numpy()
    classes = labels.table.column("teacher_label").to_numpy().astype(np.int64)
    requests = []
    for role, number, rows in (
        ("positives", len(config.positives), np.flatnonzero(relevant)),
        ("corpus", len(config.corpus), np.flatnonzero(~relevant)),
    ):
        if len(rows):
            unit = Unit(
                unit_id=LABELS, role=role, source=number, format="parquet", files=source.uris, ids=(LABELS,), start=0,
                rows=len(labels.table), first_group=0,
            )  # fmt: skip
            requests.append(ReadRequest(unit, rows, classes[rows]))
    return replace(config, positives=(*config.positives, source), corpus=(*config.corpus, source)), requests


def label_weights(folder: RunFolder) -> np.ndarray:
    """Weight of each labelled image that has joined, in their order, float64 [n]."""
    weight: np.ndarray = folder.read_table(JOINED, ["weight"]).column("weight").to_numpy()
    return weight


def stand_in(p_units: np.ndarray, p_rows: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """Weights of P, float64 [n_p], by which its labelled images alone stand for the relevant ones of the corpus.

    They were drawn at random from these, P was not. None if there are too few: their effective number (Kish) is below
    ENOUGH_POSITIVES.

    Args:
        p_units: unit of each of P, [n_p].
        p_rows: its row there, int64 [n_p].
        weight: of labelled images, by row, [n].
    """
    joined = p_units == LABELS
    found = np.zeros(len(p_units))
    found[joined] = weight[p_rows[joined]]
    return stand_by(found)


def stand_by(found: np.ndarray) -> np.ndarray | None:
    """The same of weights [n_p] that are 0 of P's own images."""
    if not found.any() or found.sum() ** 2 / (found**2).sum() < ENOUGH_POSITIVES:
        return None
    return np.asarray(found / found.mean())
