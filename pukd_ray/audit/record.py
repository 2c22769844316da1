"""What an audit leaves in the run folder, and who reads it later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, TypedDict, cast

import numpy as np
import pyarrow as pa

from pukd_ray.audit.estimate import AuditEstimate, Counted, estimate_strata
from pukd_ray.corpus.reading import content_hash
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import AuditSummary, Interval, LabelsRecord
from pukd_ray.selection.labels import LABELS_SCHEMA, save_labels

SAMPLE = "audit/sample.parquet"
DESIGN = "audit/design.json"
RECORD = "audit/audit.json"

Label = Literal["yes", "no", "unsure"]

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("stratum", pa.int32(), nullable=False),
        pa.field("stratum_size", pa.int64(), nullable=False),
        pa.field("sampled", pa.int64(), nullable=False),
        pa.field("inclusion_probability", pa.float64(), nullable=False),
        pa.field("pu_logit", pa.float32(), nullable=False),
        pa.field("pu_probability", pa.float32(), nullable=False),
        pa.field("selected", pa.bool_(), nullable=False),
        pa.field("teacher_label", pa.int32(), nullable=False),
        pa.field("image", pa.binary()),
    ]
)
"""Of `audit/sample.parquet`; rows are in the random order in which they are to be labelled, `image` is as encoded."""


class Design(TypedDict):
    """Content of `audit/design.json`."""

    audit: str
    """`audit_id` of the sample."""
    seed: int
    n_scored: int
    n_unreadable: int
    """Images that no score and no audit can speak of."""
    n_selected: int
    select_finished: str
    """When the selection that this is about was made, as its marker says."""


class FigureRecord(TypedDict):
    """A figure with its 90 % interval; all null, with a reason, where it cannot be told."""

    value: float | None
    lower: float | None
    upper: float | None
    reason: str | None


class StratumRecord(TypedDict):
    """One stratum and its labels."""

    selected: bool
    size: int
    relevant: int
    irrelevant: int
    unsure: int


class AuditRecord(TypedDict):
    """Content of `audit/audit.json`: the design, and what the labels say."""

    design: Design
    sampled: int
    labelled: int
    unsure: int
    prior: FigureRecord
    precision: FigureRecord
    recall: FigureRecord
    strata: list[StratumRecord]


def audit_id(sample: pa.Table) -> str:
    """16 hexadecimal digits that stand for which images were drawn and how likely each was."""
    columns = ("image_id", "stratum", "stratum_size", "sampled", "selected")
    text = repr([sample.column(c).to_pylist() for c in columns])
    return f"{content_hash(text.encode()) % 2**64:016x}"


def load_sample(folder: RunFolder) -> tuple[pa.Table, Design]:
    """The sample that was drawn; RunError if none was."""
    if not folder.exists(SAMPLE):
        raise RunError(f"{folder.display} holds no audit: draw one first (`pukd audit draw`)")
    return folder.read_table(SAMPLE), folder.read_json(DESIGN)


def count_labels(sample: pa.Table, labels: Mapping[str, Label]) -> list[Counted]:
    """Labels by stratum. An image without one counts as not drawn: the order in which images are shown is random, so
    those that come first are as random a part of their stratum as all."""
    said = np.array([labels.get(i, "") for i in sample.column("image_id").to_pylist()], dtype=object)
    stratum, size, selected = (sample.column(c).to_numpy() for c in ("stratum", "stratum_size", "selected"))
    counted = []
    for h in np.unique(stratum):
        rows = np.flatnonzero(stratum == h)
        yes, no, unsure = (int((said[rows] == what).sum()) for what in ("yes", "no", "unsure"))
        counted.append(Counted(bool(selected[rows[0]]), int(size[rows[0]]), yes, no, unsure))
    return counted


def estimate_audit(sample: pa.Table, labels: Mapping[str, Label]) -> AuditEstimate:
    """Prior, precision and recall of the labels of a sample (SAMPLE_SCHEMA); image ids to labels, some or all."""
    return estimate_strata(count_labels(sample, labels))


def save_audit(folder: RunFolder, labels: Mapping[str, Label]) -> AuditRecord:
    """Write the run's `labels/` and then `audit/audit.json` from the labels of the folder's sample."""
    sample, design = load_sample(folder)
    counted = count_labels(sample, labels)
    estimate = estimate_strata(counted)
    known = np.array([labels.get(i) in ("yes", "no") for i in sample.column("image_id").to_pylist()], bool)
    rows = sample.filter(pa.array(known))
    weight = np.array([s.size / s.labelled if s.labelled else 0.0 for s in counted])
    _, stratum = np.unique(sample.column("stratum").to_numpy(), return_inverse=True)
    relevant = pa.array([labels[i] == "yes" for i in rows.column("image_id").to_pylist()], pa.bool_())
    rows = rows.append_column("relevant", relevant).append_column("weight", pa.array(weight[stratum[known]]))
    prior = estimate.prior
    said: LabelsRecord = {
        "audit": design["audit"],
        "images": design["n_scored"] + design["n_unreadable"],
        "labelled": estimate.labelled,
        "prior": prior.value,
        "lower": prior.lower,
        "upper": prior.upper,
        "reason": prior.reason,
    }
    save_labels(folder, said, rows.select(LABELS_SCHEMA.names))
    record: AuditRecord = {
        "design": design,
        "sampled": sample.num_rows,
        "labelled": estimate.labelled,
        "unsure": estimate.unsure,
        "prior": cast(FigureRecord, asdict(estimate.prior)),
        "precision": cast(FigureRecord, asdict(estimate.precision)),
        "recall": cast(FigureRecord, asdict(estimate.recall)),
        "strata": [cast(StratumRecord, asdict(s)) for s in counted],
    }
    folder.write_json(RECORD, record)
    return record


def is_current(folder: RunFolder, design: Design) -> bool:
    """Whether the sample was drawn from the selection that the folder holds now."""
    marker = folder.marker("select")
    return marker is not None and marker["finished"] == design["select_finished"]


def summarise_audit(folder: RunFolder) -> AuditSummary | None:
    """The figures of the audit whose labels were read back last, for `metrics.json`; None if there is none."""
    record: AuditRecord | None = folder.read_json(RECORD)
    if record is None:
        return None
    prior, precision, recall = record["prior"], record["precision"], record["recall"]
    return {
        "prior": prior["value"],
        "prior_interval": _interval(prior),
        "precision": precision["value"],
        "precision_interval": _interval(precision),
        "recall": recall["value"],
        "recall_interval": _interval(recall),
        "n_labelled": record["labelled"],
        "current": is_current(folder, record["design"]),
    }


def _interval(figure: FigureRecord) -> Interval | None:
    lower, upper = figure["lower"], figure["upper"]
    return None if lower is None or upper is None else [lower, upper]
