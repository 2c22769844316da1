"""What the JSON files of a run hold, field by field: the contract between stages, and with whoever reads a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

T = TypeVar("T")

Interval = list[float]
"""[lower, upper], of 90 %."""
PriorSource = Literal["config", "bbe", "audit"]
Trust = Literal["high", "low", "none"]
"""Of the estimates: none says that they cannot be told."""
Estimator = Literal["density_ratio", "boundary", "both", "bbe", "given", "audit"]
"""What a prior stands on: P's density ratio, U's emptiest boundary, the geometric mean of both, best bins (where
nothing can be told), the config, labels."""


# -- selector ---------------------------------------------------------------------------------------------------


class PriorRecord(TypedDict):
    """`selector/prior.json`: the share of relevant images in the corpus."""

    value: float
    lower: float
    """Of its interval."""
    upper: float
    source: PriorSource
    """The user's number, any estimate from P and U (the name is of the first one, best bin estimation), or labels."""
    estimator: NotRequired[Estimator]
    """What it really stands on; runs of earlier versions do not say."""
    trust: Trust
    reasons: list[str]
    """Why it is no higher."""
    used_for_training: float
    """Prior of the PU risk."""
    evidence: EvidenceRecord | None
    """What an estimate stands on; of a prior that was given what it makes of U, a grid of that one prior without a gap
    (null in runs of earlier versions)."""
    warnings: list[str]
    true_in_sample: float | None
    """Share of truly relevant images in the sample; null without truth."""


class EvidenceRecord(TypedDict):
    """What an estimate of the prior stands on: U's emptiest boundary, P's density ratio, P against what is taken."""

    priors: list[float]
    """Of the grid, ascending."""
    emptiness: list[float | None]
    """Density of U's held-out logits at the boundary that each prior draws, relative to that of the positive side; null
    where it takes next to none."""
    shares: list[float]
    """Of U, that each prior takes."""
    gap: bool
    """Whether there is a valley in `emptiness`."""
    boundary: float
    """The prior whose boundary is emptiest."""
    boundary_interval: Interval
    density_ratio: float
    """The prior by conditional likelihood: too low where P is biased."""
    density_ratio_interval: Interval
    bbe: float
    alike: float
    """Share of the relevant images that lies where the classes overlap."""
    auc: float
    """Of P against what is taken of U, cross-validated: 0.5 where they look alike."""
    auc_error: float


class SelectorRecord(TypedDict):
    """`selector/meta.json`: what the selector was trained on, and what it does with the sample."""

    classes: list[str] | None
    """Names in teacher order; null where labels are indices and the config names none."""
    positives_per_class: list[int]
    positive_weights: dict[str, float]
    """By the teacher's class, of those that P has: mean weight of an image of P in the estimates."""
    n_positives: int
    """Readable images of P."""
    n_labelled: NotRequired[int]
    """Images of the corpus that joined P because an audit found them relevant."""
    n_known_negatives: NotRequired[int]
    """Images of the corpus that an audit found irrelevant."""
    n_sample: int
    """Readable images of the sample of U."""
    rejected_positives: dict[str, str]
    """By image id: why it could not be read."""
    rejected_sample: dict[str, int]
    """By reason."""
    teacher_agreement: float
    """Share of P's labels that the teacher gives too."""
    steps: int
    """Of the final training."""
    proxy_accuracy: float
    """Held out, at those steps."""
    held_out_recall: float
    """Share of held-out P that is taken."""
    held_out_share: float
    """Share of held-out U that is taken."""
    share_selected: float
    """Share of the sample that the final selector takes."""
    share_above_half: float
    """Share of the sample with a calibrated probability above one half."""
    calibration: CalibrationRecord
    log_max_phi: float
    """What VPU's scores are shifted by; 0 of other losses."""


class CalibrationRecord(TypedDict):
    """Logit -> probability: the sigmoid of slope times logit plus offset."""

    slope: float
    offset: float
    at_bound: bool
    """Whether the slope was stopped at a bound."""
    tilt: NotRequired[float]
    """By which a biased P was made to stand for the relevant images; runs of earlier versions lack it."""


class LabelsRecord(TypedDict):
    """`labels/<audit>.json`: what the labels of an audit say of the prior; null, with a reason, where they cannot."""

    audit: str
    images: int
    """Of the corpus that it was drawn from, unreadable ones included."""
    labelled: int
    """With a yes or a no."""
    prior: float | None
    lower: float | None
    """90 %."""
    upper: float | None
    reason: str | None


class TallyRecord(TypedDict):
    """Images counted by groups that are alike, files or units: `pukd_ray.selection.drift.Tally`."""

    groups: int
    rows: float
    rows_squared: float
    counts: list[float]
    """Of images above each threshold, of P(relevant), of unreadable ones."""
    counts_squared: list[float]
    counts_rows: list[float]


class ReferenceRecord(TypedDict):
    """`selector/reference.json`: the sample, as images that come later are compared with it."""

    edges: list[float]
    """Thresholds of the final selector's logit."""
    by_file: bool
    """Whether groups are files; else units."""
    tally: TallyRecord


# -- selection --------------------------------------------------------------------------------------------------


class SelectionCounts(TypedDict):
    """What the rule took, counted."""

    n_scored: int
    n_duplicates: int
    """Copies that were dropped: of P, of test images, of each other."""
    n_selected: int
    n_positive: int
    """Scored images with a logit above 0."""
    n_above_half: int
    """Scored images with a probability above one half."""
    class_counts: list[int]
    """Selected images, by the teacher's class."""
    truth: SelectionTruth | None
    """Null where no image of the corpus has truth."""
    histogram: Histogram
    parts: int
    """Files of `selected/`."""


class NearRecord(TypedDict):
    """Near-copies that were found (`selection.deduplicate: near`), beyond images with the same bytes."""

    bits: int
    """Of a perceptual hash."""
    radius: int
    """In which near-copies may differ."""
    dropped: dict[str, int]
    """Images of the corpus, by what they are near to, the first that holds: `test`, `positives`, `corpus`."""
    positives_in_test: int
    """Pairs of an image of P and one of the test set."""


class SelectionRecord(SelectionCounts):
    """`selection.json`: what the rule took, and what that is worth."""

    estimated: QualityRecord
    rule: str
    selection: dict[str, Any]
    """The config's section."""
    near: NotRequired[NearRecord | None]
    """Null if they were not looked for; runs of earlier versions lack it."""


class SelectionTruth(TypedDict):
    """Quality of the selection by the corpus's own truth."""

    precision: float | None
    recall: float | None
    """Over all relevant images, unreadable ones included."""
    average_precision: float | None
    """Of the rule's ranking, over scored rows."""
    relevant: int
    selected_relevant: int


class Histogram(TypedDict):
    """Scored images by their logit, in bins; the outer ones are open."""

    logit: list[float]
    """Mean of each bin."""
    edges: list[float]
    """Between the bins: one less than bins."""
    all: list[int]
    selected: list[int]
    relevant: list[int] | None
    """Null without truth."""


class EstimatedQuality(TypedDict):
    """Quality of the selection as P and the calibration tell it, without truth."""

    precision: float
    precision_interval: Interval
    recall: float
    recall_interval: Interval


class QualityRecord(TypedDict):
    """What is reported of it: nulls where it cannot be told (`PriorRecord.trust` is none)."""

    precision: float | None
    precision_interval: Interval | None
    recall: float | None
    recall_interval: Interval | None


class TrustRecord(TypedDict):
    """How far to believe the estimates of prior, precision and recall."""

    level: Trust
    reasons: list[str]
    """Why it is no higher."""


NetworkName = Literal["teacher", "student", "student_last", "baseline_positives"]


# -- student ----------------------------------------------------------------------------------------------------


class StudentRecord(TypedDict):
    """`student/meta.json`: what `load_student` needs beside the weights."""

    arch: str
    num_classes: int
    classes: list[str] | None
    """As of `SelectorRecord`."""
    preprocessing: Preprocessing
    teacher: str
    """Its arch."""
    steps: int
    images: int
    """That it learnt from."""


class Preprocessing(TypedDict):
    """Keys of `teacher` in the config: how an encoded image becomes the network's input."""

    input_size: int
    channels: Literal[1, 3]
    mean: list[float]
    std: list[float]
    resize: Literal["crop", "squash", "pad"]


# -- export -----------------------------------------------------------------------------------------------------


class CheckedRecord(TypedDict):
    """A student's file on the check images, against PyTorch."""

    file: str
    """Of the run folder."""
    runtime: str
    """What ran it."""
    bytes: int
    top1: float | None
    """Null where the images have no labels."""
    agreement: float
    """Share of the images to which it gives the class that PyTorch gives."""
    largest_difference: float
    """Of a probability."""
    milliseconds: float
    """Of one image at a time on one thread, the median."""


class TensorRecord(TypedDict):
    """An input or output of a graph."""

    name: str
    type: str
    shape: list[str | int]
    """`N`: any number of images."""
    range: NotRequired[list[int]]


class ExportRecord(TypedDict):
    """`export/export.json`: the student as files that run without this package."""

    arch: str
    classes: list[str]
    """In the order of the outputs; numbers as text where the run had no names."""
    input: TensorRecord
    output: TensorRecord
    preprocessing: Preprocessing
    """`resize` is the caller's part; `mean` and `std` are in the graph."""
    images: int
    """On which the files were checked."""
    role: Literal["test", "selected"]
    """What they are: selected ones, without labels, where the run has no test set."""
    calibration_images: int
    """That int8 ranges were taken from."""
    cpu: str
    pytorch: CheckedRecord
    files: dict[str, CheckedRecord]
    """By format."""


# -- metrics ----------------------------------------------------------------------------------------------------


class NetworkRecord(TypedDict):
    """A network on the test set; null without one."""

    top1: float | None
    """0 to 1, as all accuracies."""
    top5: float | None
    per_class: list[float | None] | None
    """Top-1 of each class; null of a class without test images."""
    parameters: int
    arch: str


class NetworkRecords(TypedDict):
    """The networks of a run."""

    teacher: NetworkRecord
    student: NetworkRecord
    student_last: NotRequired[NetworkRecord]
    """The last weights, where `student` is their average (`distill.ema`)."""
    baseline_positives: NotRequired[NetworkRecord]
    """The student that learns from P alone (`distill.baseline`)."""


class PriorSummary(TypedDict):
    """Of `PriorRecord`."""

    value: float
    lower: float
    upper: float
    source: PriorSource
    used_for_training: float


class SelectionQuality(TypedDict):
    """Of `SelectionTruth`; null without truth."""

    precision: float | None
    recall: float | None
    average_precision: float | None


class AuditSummary(TypedDict):
    """What a person's labels say of the scored images, `audit/audit.json`; a figure that they cannot tell is null."""

    prior: float | None
    prior_interval: Interval | None
    precision: float | None
    precision_interval: Interval | None
    recall: float | None
    recall_interval: Interval | None
    n_labelled: int
    """Images with a yes or a no."""
    current: bool
    """Whether precision and recall are of the selection that the run has; if not, of an earlier one."""


class DriftFigures(TypedDict):
    """Images of files that came after the selector was trained, against the sample that it was trained on."""

    images: int
    groups: int
    """Files, or units, that they are in."""
    distance: float
    """Greatest distance between the distribution functions of the logits, at the thresholds of the reference."""
    relevant: float
    """Mean of P(relevant), unreadable ones counted as 0."""
    relevant_in_sample: float
    rejected: float
    """Share of unreadable images."""
    rejected_in_sample: float


class ChunkDrift(DriftFigures):
    """Of one chunk."""

    chunk: str


class DriftRecord(DriftFigures):
    """Of all such images, and chunk by chunk."""

    found: bool
    """Whether a difference is beyond chance and large enough to matter."""
    reasons: list[str]
    chunks: list[ChunkDrift]


class ScoreRate(TypedDict):
    """Throughput."""

    score: float
    """Corpus images per second, over all chunks."""


class MetricsRecord(NetworkRecords):
    """`metrics.json`: the figures of a run. `n_scored + n_rejected = n_corpus`."""

    n_positives: int
    n_corpus: int
    n_scored: int
    n_rejected: int
    """Unreadable images."""
    rejected_by_reason: dict[str, int]
    n_duplicates: int
    n_selected: int
    n_test_rejected: int
    prior: PriorSummary
    selection: SelectionQuality
    selection_estimated: QualityRecord
    trust: TrustRecord
    audit: NotRequired[AuditSummary | None]
    """Null without one; runs of earlier versions lack it."""
    drift: NotRequired[DriftRecord | None]
    """Null where nothing was scored that the sample could not hold; runs of earlier versions lack it."""
    images_per_second: ScoreRate
    seconds: NotRequired[dict[str, float]]
    """By stage, of all its attempts; added when the run ends."""
    computing_seconds: NotRequired[dict[str, float]]
    """By stage: seconds in which at least one worker was at work; the rest is engine start."""


# -- markers ----------------------------------------------------------------------------------------------------


class StageMarker(TypedDict):
    """`markers/<stage>.json`: the stage is done."""

    stage: str
    finished: str
    """ISO 8601, UTC."""
    seconds: float
    """Of all attempts."""
    counts: dict[str, Any]
    """What the stage returned."""
    inputs: dict[str, Any]
    """What its result depends on, by config key."""
    grows: NotRequired[bool]
    """Of the plan: it is being made anew for files that are new, and the score's marker is of fewer."""


class DoingRecord(TypedDict):
    """What a driver is at."""

    stage: str
    seconds: float
    """Since it began with the stage."""
    part: str
    """Of the stage: what `done` counts; empty before there is anything to count."""
    done: float
    total: float | None
    """Null while it is not known."""
    unit: str
    """Images, steps or others."""
    seconds_left: float | None
    """Of the stage; null where neither what is done nor an estimate tells."""
    seconds_left_in_all: float | None
    """Of all stages; null without `pukd estimate`."""


class AttemptsRecord(TypedDict):
    """`markers/<stage>.attempts.json`: what the attempts at a stage took, and why the last of them failed."""

    seconds: float
    error: NotRequired[str | None]
    """One line; null of an attempt that did not fail."""
    failed: NotRequired[str | None]
    """ISO 8601, UTC."""


class LeaseRecord(TypedDict):
    """`markers/lease/<token>.json`: who writes into the folder, or did."""

    token: int
    driver: str
    """Drawn at random."""
    host: str
    pid: int
    process: str
    """What tells it from all other processes, as far as its own machine can."""
    since: str
    """ISO 8601, UTC, as `last_beat`."""
    beat: int
    """Goes up every few seconds while the process lives."""
    last_beat: str
    doing: NotRequired[DoingRecord | None]
    """At the last beat; leases of earlier versions do not say."""
    released: bool
    """Given back: the folder is free."""


class ChunkMarker(TypedDict):
    """`markers/score/<chunk>.json`, the manifest of a chunk: these units are scored, their rows are in these files."""

    chunk: str
    units: list[str]
    """Their ids."""
    files: list[str]
    """Of the run folder, that hold their rows."""
    columns: NotRequired[list[str]]
    """Of these files: `perceptual_hash`, and rules that have a column of their own; of older runs none."""
    n_rows: int
    rejected_by_reason: dict[str, int]
    new: NotRequired[TallyRecord | None]
    """Of its images in files that came after the selector was trained; null without any."""
    seconds: float
    computing_seconds: float


# -- estimate ---------------------------------------------------------------------------------------------------


class CostRecord(TypedDict):
    """What a cluster is taken for."""

    cpu_hours: float
    gpu_hours: float
    money: float
    """At the prices given; 0 without."""


class TwiceRecord(CostRecord):
    """On a cluster twice as large."""

    total_seconds: float


class EstimateRecord(CostRecord):
    """`estimate.json`: what `pukd estimate` found."""

    cluster: str
    images: dict[str, float]
    """By role, and how many will be selected."""
    trial_images: int
    """Of the corpus, in the larger trial."""
    seconds: dict[str, float]
    """By part: the stages, `selector` as `features`, `prior` (the grid), `fits` (trained after it), `evidence` (the
    rest)."""
    total_seconds: float
    interval: Interval
    """Of `total_seconds`."""
    images_per_second: float | None
    """Of the corpus pass."""
    storage_gib: float
    storage_money_per_month: float
    twice: TwiceRecord


# -- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordFile(Generic[T]):
    """A JSON file of the run folder and the type of its content."""

    name: str
    older: tuple[str, ...] = ()
    """Where earlier versions wrote it: their runs are still read."""


PRIOR = RecordFile[PriorRecord]("selector/prior.json")
SELECTOR = RecordFile[SelectorRecord]("selector/meta.json")
SELECTION = RecordFile[SelectionRecord]("selection.json", older=("selected/summary.json",))
STUDENT = RecordFile[StudentRecord]("student/meta.json")
EXPORT = RecordFile[ExportRecord]("export/export.json")
METRICS = RecordFile[MetricsRecord]("metrics.json")
ESTIMATE = RecordFile[EstimateRecord]("estimate.json")


def selection_in(into: str) -> RecordFile[SelectionRecord]:
    """The record of the selection in folder `into`: beside the folder, which holds Parquet only."""
    return SELECTION if into == "selected" else RecordFile(f"{into}.json", older=(f"{into}/summary.json",))
