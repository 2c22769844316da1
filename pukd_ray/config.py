"""Every knob of a run: frozen dataclasses, one docstring per field, validated on construction.

Pydantic does the validating because it reports all faults of a config at once. What cannot be seen
in the values alone (files, weights that do not fit) is checked by `pukd_ray.preflight`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, field_validator, model_validator
from pydantic.dataclasses import dataclass

_OPTIONS = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

# Strict leaves: `"2000"` is no number and `true` is not 1.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Share = Annotated[Float, Field(gt=0, lt=1)]
Positive = Annotated[Float, Field(gt=0)]
Count = Annotated[Int, Field(ge=1)]


class ConfigError(ValueError):
    """A config that cannot run; `faults` has one line per fault, each naming its key."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_sources(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def Listed(item: Any) -> Any:  # noqa: N802  (reads as a type)
    """A tuple of `item` that YAML writes as a list."""
    return Annotated[tuple[item, ...], BeforeValidator(_as_tuple)]


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class TeacherConfig:
    """The trained network that defines the task."""

    arch: str
    """lenet5 | lenet5_half | resnet20_cifar | resnet18_cifar | resnet34_cifar | any torchvision
    classifier | timm:NAME | package.module:factory."""
    weights: str
    """state_dict file (path or URI), loaded with weights_only=True and strict=True."""
    num_classes: Annotated[Int, Field(ge=2)]
    """Classes the teacher tells apart."""
    classes: Listed(str) | str | None = None  # type: ignore[valid-type]
    """Class names in teacher order, or a file with one per line; string labels are looked up here."""
    input_size: Annotated[Int, Field(ge=8)]
    """Side of the square input, pixels."""
    channels: Literal[1, 3] = 3
    """1 (gray) or 3 (RGB)."""
    mean: Listed(Float)  # type: ignore[valid-type]
    """Per-channel mean of pixels in [0, 1]."""
    std: Listed(Float)  # type: ignore[valid-type]
    """Per-channel standard deviation of pixels in [0, 1]."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """How other shapes become square: crop (short side, centre), squash, or pad; bilinear, antialiased."""
    taps: Listed(str) | None = None  # type: ignore[valid-type]
    """Node names of the multi-scale features; null: by table, else automatic."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in teacher order, or None; a file of names was read when the config was loaded."""
        return None if self.classes is None or isinstance(self.classes, str) else self.classes

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(f"teacher.{key}: needs {self.channels} values, one per channel")
        if min(self.std) <= 0:
            raise ValueError("teacher.std: values must be above 0")
        if isinstance(self.classes, tuple) and len(self.classes) != self.num_classes:
            raise ValueError(
                f"teacher.classes: {len(self.classes)} names, but teacher.num_classes is {self.num_classes}"
            )
        if isinstance(self.classes, tuple) and len(set(self.classes)) != len(self.classes):
            raise ValueError("teacher.classes: a name is repeated")
        return self


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class SourceConfig:
    """Where images come from: files of one format. Relative paths resolve against the config's folder."""

    uri: str | Listed(str)  # type: ignore[valid-type]
    """File, folder, glob, or a list of them; local path or URI."""
    format: Literal["auto", "parquet", "images", "webdataset", "idx", "cifar"] = "auto"
    """auto goes by file name. images: a folder of files whose sub-folder is the label; cifar: the binary version."""
    image_column: str = "image"
    """Parquet column with encoded images: binary, or struct{bytes, path}."""
    label_column: str | None = None
    """Column (Parquet) or JSON key (webdataset) of the label: a teacher index or a class name; for
    `positives`, `test` and `train` it defaults to `label`."""
    id_column: str | None = None
    """Parquet column of unique ids; null: `<path>#<row>`."""
    relevant_column: str | None = None
    """Boolean truth column, only ever used for evaluation."""
    relevant: Bool | None = None
    """Constant truth for the whole source, only ever used for evaluation."""
    relevant_labels: Listed(Int | str) | None = None  # type: ignore[valid-type]
    """Truth by label: images with one of these labels are relevant; only ever used for evaluation."""
    label_map: dict[Int | str, Int | str] | None = None
    """Label in the files -> teacher index or class name. Images with any other label are not part of
    a labelled source (their number is printed)."""
    rows: Annotated[tuple[Int, Int] | None, BeforeValidator(_as_tuple)] = None
    """[start, stop): only these rows, counted over the source's files in path order."""
    per_class: Count | None = None
    """Only the first n images of each class, in (path, row) order."""

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if not self.uri or (isinstance(self.uri, tuple) and not all(self.uri)):
            raise ValueError("uri: is empty")
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows: [{self.rows[0]}, {self.rows[1]}] is not 0 <= start < stop")
        truths = [k for k in ("relevant_column", "relevant", "relevant_labels") if getattr(self, k) is not None]
        if len(truths) > 1:
            raise ValueError(f"{' and '.join(truths)}: give only one of them")
        return self

    @property
    def uris(self) -> tuple[str, ...]:
        """`uri` as a tuple."""
        return self.uri if isinstance(self.uri, tuple) else (self.uri,)


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class SelectorConfig:
    """The positive-unlabelled classifier."""

    trunk: Literal["frozen", "finetune"] = "frozen"
    """frozen: a head on cached teacher features. finetune: the trunk is trained too (every image then needs a
    second, teacher forward)."""
    loss: Literal["nnpu", "naive", "vpu"] = "nnpu"
    """nnpu; naive: U as negatives, the rival to beat; vpu: needs no prior."""
    prior: Literal["auto"] | Share = "auto"
    """Share of relevant images in the corpus; auto estimates it."""
    sample: Count = 200_000
    """Images of the corpus that training sees."""
    steps: Count = 2000
    """Most training steps; the number taken is chosen by cross-fitted proxy accuracy."""
    batch_size: Annotated[Int, Field(ge=8)] = 1024
    """GLOBAL batch, P and U together, a quarter of it P."""
    lr: Positive = 0.001
    """Learning rate of Adam."""

    @model_validator(mode="after")
    def _consistent(self) -> SelectorConfig:
        if self.batch_size % 4:
            raise ValueError(f"selector.batch_size: {self.batch_size} is not a multiple of 4 (a quarter of it is P)")
        return self


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class ScoreConfig:
    """The one pass over the corpus."""

    keep_images: Literal["likely", "all", "none"] = "likely"
    """Whose encoded bytes the pass keeps; likely: P(relevant) >= keep_above, and a hashed 1e-4 sample of the rest."""
    keep_above: Annotated[Float, Field(ge=0, le=1)] = 0.2
    """Calibrated probability from which bytes are kept."""
    chunk_images: Count | None = None
    """Images per chunk, the unit of restart; null: about ten minutes' worth on the cluster at hand."""
    max_rejected: Annotated[Float, Field(ge=0, le=1)] = 0.2
    """Share of unreadable images that stops the run."""


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class SelectionConfig:
    """The rule that turns scores into a training set."""

    rule: Literal["positive", "threshold", "budget", "quota", "prior", "precision", "random", "teacher_confidence"] = (
        "positive"
    )
    """positive: pu_logit > 0. threshold: on pu_probability. budget: that many of the positives. quota: a budget
    shared evenly over teacher classes. prior: the top share that the prior says is relevant. precision: the most
    images whose estimated precision is target_precision. random, teacher_confidence: rivals, a budget without
    the selector."""
    threshold: Annotated[Float, Field(ge=0, le=1)] | None = None
    """On pu_probability, for rule `threshold`."""
    budget: Count | None = None
    """Images, for rules budget, quota, random and teacher_confidence."""
    order: Literal["top", "random"] = "top"
    """Which of the positives a budget takes."""
    target_precision: Share | None = None
    """For rule `precision`."""
    deduplicate: Literal["exact", "none"] = "exact"
    """exact: of images with the same bytes one is kept; copies of P and of test images are always dropped."""

    @model_validator(mode="after")
    def _consistent(self) -> SelectionConfig:
        needs = {"threshold": "threshold", "precision": "target_precision"} | dict.fromkeys(
            ("budget", "quota", "random", "teacher_confidence"), "budget"
        )
        key = needs.get(self.rule)
        if key and getattr(self, key) is None:
            raise ValueError(f"selection.{key}: is needed by selection.rule {self.rule}")
        return self


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class StudentConfig:
    """The compact network."""

    arch: str = "resnet18_cifar"
    """As teacher.arch."""


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class DistillConfig:
    """Robust knowledge distillation on P + selected images."""

    epochs: Count = 30
    """Passes over P + selected."""
    steps: Count | None = None
    """Training steps; if set, wins over epochs."""
    batch_size: Count = 256
    """GLOBAL batch."""
    lr: Positive = 0.1
    """Peak learning rate of SGD."""
    momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[Float, Field(ge=0)] = 5e-4
    """L2 penalty of SGD."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """cosine to 0 or step (x 0.1 at 1/4, 1/2 and 3/4 of the steps), after a linear warm-up of 5 % of the steps."""
    temperature: Positive = 1.0
    """Softens both softmaxes; the loss is scaled by its square."""
    augment: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """One view for teacher and student alike: random crop of the image padded by 1/8, and horizontal flip."""
    class_weights: Literal["soft", "hard", "none"] = "soft"
    """Inverse of the teacher's class mass over P + selected: summed softmax (soft) or argmax counts (hard)."""
    epsilon: Annotated[Float, Field(ge=0)] = 0.1
    """Radius of the set of class weights that the adversary may choose from."""
    adversary: Literal["l2_sum_zero", "l2", "linf", "linf_sum_zero", "draws", "none"] = "l2_sum_zero"
    """Worst case over that set in closed form; draws: the published method's random vectors."""
    baseline: Literal["positives", "none"] = "none"
    """positives: a second student, trained on P alone for the same number of steps, to compare with."""
    memory_gib: Positive = 4.0
    """Decoded images up to this size are held in each worker's memory; larger sets are streamed."""


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class ResourcesConfig:
    """What the run may take of the cluster; never affects results."""

    gpus_per_actor: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """auto: 1 if the CLUSTER has GPUs, 0 if it has none and no autoscaler."""
    score_actors: Literal["auto"] | Count | Annotated[tuple[Count, Count], BeforeValidator(_as_tuple)] = "auto"
    """auto | n | [min, max]."""
    train_workers: Count = 1
    """Data-parallel workers of both trainings; must divide the global batches."""

    @model_validator(mode="after")
    def _consistent(self) -> ResourcesConfig:
        if isinstance(self.score_actors, tuple) and self.score_actors[0] > self.score_actors[1]:
            raise ValueError("resources.score_actors: min is above max")
        return self


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class RunConfig:
    """A whole run."""

    name: str = "my-run"
    """For people."""
    output: str = "runs/my-run"
    """Run folder: path (relative ones resolve against the working directory) or URI."""
    output_is_shared: Bool = False
    """A local `output` is mounted on every node (and local inputs too)."""
    seed: Annotated[Int, Field(ge=0, lt=2**31)] = 0
    """Of every random choice."""
    teacher: TeacherConfig
    positives: Sources
    """P: the few labelled images."""
    corpus: Sources
    """U: the unlabelled corpus."""
    test: Sources | None = None
    """Labelled images that are only ever read to evaluate."""
    selector: SelectorConfig = SelectorConfig()
    score: ScoreConfig = ScoreConfig()
    selection: SelectionConfig = SelectionConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("positives", "corpus", "test")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("is an empty list")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        workers = self.resources.train_workers
        if (self.selector.batch_size // 4) % workers:
            raise ValueError(
                f"resources.train_workers: {workers} does not divide a quarter of selector.batch_size "
                f"({self.selector.batch_size // 4})"
            )
        if self.distill.batch_size % workers:
            raise ValueError(
                f"resources.train_workers: {workers} does not divide distill.batch_size ({self.distill.batch_size})"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=_OPTIONS)
class TeacherTrainingConfig:
    """Config of `jobs/train_teacher.py`."""

    teacher: TeacherConfig
    """`teacher.weights` is the file to write."""
    train: Sources
    """Labelled images to train on."""
    test: Sources | None = None
    """Labelled images to report accuracy on."""
    epochs: Count = 10
    """Passes over `train`."""
    batch_size: Count = 128
    """Images per step."""
    lr: Positive = 0.05
    """Peak learning rate of SGD with momentum, cosine schedule."""
    seed: Annotated[Int, Field(ge=0, lt=2**31)] = 0
    """Of initialisation and order."""


def to_plain(config: Any) -> dict[str, Any]:
    """`config` as the dict that YAML or JSON would hold."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain
