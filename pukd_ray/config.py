"""Every knob of a run: frozen dataclasses, one docstring per field, validated on construction.

Pydantic does the validating because it reports all faults of a config at once. What cannot be seen
in the values alone (files, weights that do not fit) is checked by `pukd_ray.preflight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

OPTIONS = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Of every class of configs."""

# Strict leaves: `"2000"` is no number and `true` is not 1.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Share = Annotated[Float, Field(gt=0, lt=1)]
Positive = Annotated[Float, Field(gt=0)]
Count = Annotated[Int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]

RENORMALISING = ("googlenet", "inception_v3")
"""Networks of torchvision with `transform_input`, which presumes these:"""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConfigError(ValueError):
    """A config that cannot run; `faults` has one line per fault, each naming its key."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_sources(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _keys_as_text(value: Any) -> Any:
    """Labels in files are compared as text, so that `0` and `"0"` are the same key (and JSON keeps it)."""
    if not isinstance(value, dict):
        return value
    return {str(k) if isinstance(k, int) and not isinstance(k, bool) else k: v for k, v in value.items()}


def Listed(item: Any) -> Any:  # noqa: N802  (reads as a type)
    """A tuple of `item` that YAML writes as a list."""
    return Annotated[tuple[item, ...], BeforeValidator(_as_tuple)]


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class TeacherConfig:
    """The trained network that defines the task."""

    arch: Text
    """lenet5 | lenet5_half | resnet20_cifar (or 8, 32, 44, 56, 110; resnet20_cifar_b: with projections) |
    resnet18_cifar | resnet34_cifar | any torchvision classifier | timm:NAME | package.module:factory."""
    weights: Text
    """state_dict, or a checkpoint with one in it, of torch or safetensors (path or URI); only tensors are loaded, and
    all of it fits."""
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
    transform_input: Bool | None = None
    """torchvision's switch of googlenet and inception_v3, which no state_dict holds: true if the network renormalised
    its input by it in training, as torchvision's own of ImageNet did. null: false, with a warning for these two."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in teacher order, or None; a file of names was read when the config was loaded."""
        return None if self.classes is None or isinstance(self.classes, str) else self.classes

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) that the network sees pixels in [0, 1] by: those given, and `transform_input`."""
        if not self.transform_input:
            return self.mean, self.std
        # torchvision: x * (std / 0.5) + (mean - 0.5) / 0.5 of the normalised x, with ImageNet's mean and std.
        std = tuple(s * 0.5 / imagenet for s, imagenet in zip(self.std, IMAGENET_STD, strict=True))
        shifts = ((0.5 - m) / 0.5 for m in IMAGENET_MEAN)
        return tuple(m + shift * s for m, shift, s in zip(self.mean, shifts, std, strict=True)), std

    @field_validator("transform_input")
    @classmethod
    def _needs_colour(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        arch = info.data.get("arch", RENORMALISING[0])  # absent if it is at fault itself
        if value and (arch not in RENORMALISING or info.data.get("channels") == 1):
            raise ValueError(f"true is for {' and '.join(RENORMALISING)} in three channels")
        return value

    @field_validator("mean", "std")
    @classmethod
    def _one_per_channel(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        channels = info.data.get("channels")  # absent if it is at fault itself
        if channels is not None and len(value) != channels:
            raise ValueError(f"needs {channels} value{'s' * (channels > 1)}, one per channel")
        if info.field_name == "std" and any(v <= 0 for v in value):
            raise ValueError("values must be above 0")
        return value

    @field_validator("classes")
    @classmethod
    def _one_name_per_class(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, tuple):
            number = info.data.get("num_classes", len(value))
            if len(value) != number:
                raise ValueError(f"{len(value)} names, but teacher.num_classes is {number}")
            if len(set(value)) != len(value):
                raise ValueError("a name is repeated")
        return value


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class SourceConfig:
    """Where images come from: files of one format. Relative paths resolve against the config's folder."""

    uri: Text | Listed(Text)  # type: ignore[valid-type]
    """File, folder, glob, `shard-{000..999}.tar`, or a list of them; local path or URI."""
    format: Literal["auto", "parquet", "images", "webdataset", "idx", "cifar", "jsonl"] = "auto"
    """auto goes by file name. images: a folder of files whose first sub-folder is the label; cifar: the binary version;
    jsonl: one JSON object a line, with the image as base64 or a path in the file's own folder."""
    image_column: str = "image"
    """Parquet column of images: encoded, base64 text, or struct{bytes, path} (where there is no `image`: the only one
    that the file's metadata calls an image, or `img`); JSON key (jsonl) of base64 text; extension (webdataset) of the
    members that are images where a sample has several: `jpg`, or `jpg;png`."""
    label_column: str | None = None
    """Column (Parquet) or JSON key (webdataset, jsonl) of the label: a teacher index or a class name; for
    `positives`, `test` and `train` it defaults to `label`."""
    id_column: str | None = None
    """Parquet column or JSON key (jsonl) of unique ids; null: `<path>#<row>`."""
    relevant_column: str | None = None
    """Boolean truth column, only ever used for evaluation."""
    relevant: Bool | None = None
    """Constant truth for the whole source, only ever used for evaluation."""
    relevant_labels: Listed(Int | str) | None = None  # type: ignore[valid-type]
    """Truth by label: images with one of these labels are relevant; only ever used for evaluation."""
    label_map: Annotated[dict[str, Int | str], BeforeValidator(_keys_as_text)] | None = None
    """Label in the files -> teacher index or class name. Images with any other label are not part of
    a labelled source (their number is printed)."""
    split: Text | None = None
    """Of a data set as Hugging Face keeps it, a folder or `hf://datasets/...`: the split to read (`config/split` where
    it has several configs); needed where it has several."""
    rows: Annotated[tuple[Int, Int] | None, BeforeValidator(_as_tuple)] = None
    """[start, stop): only these rows, counted over the source's files in path order."""
    per_class: Count | None = None
    """Only the first n images of each class, in (path, row) order."""
    skip_per_class: Annotated[Int, Field(ge=0)] = 0
    """The first of these n are counted after so many of the class."""
    follow_links: Bool = False
    """Local links in a folder are followed wherever they lead; false: one that leads out of it is an error."""

    @field_validator("uri")
    @classmethod
    def _some_uri(cls, value: Any) -> Any:
        if not value:
            raise ValueError("is an empty list")
        return value

    @field_validator("relevant", "relevant_labels")
    @classmethod
    def _one_truth(cls, value: Any, info: ValidationInfo) -> Any:
        others = [k for k in ("relevant_column", "relevant") if info.data.get(k) is not None and k != info.field_name]
        if value is not None and others:
            raise ValueError(f"there is {others[0]} too: give only one of them")
        return value

    @field_validator("rows")
    @classmethod
    def _rising(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError("is not 0 <= start < stop")
        return value

    @property
    def uris(self) -> tuple[str, ...]:
        """`uri` as a tuple."""
        return self.uri if isinstance(self.uri, tuple) else (self.uri,)


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_as_sources)]


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class SelectorConfig:
    """The positive-unlabelled classifier."""

    trunk: Literal["frozen", "finetune"] = "frozen"
    """frozen: a head on cached teacher features. finetune: a quarter of the steps more, in which the trunk is trained
    too, at a tenth of the learning rate (every image then needs a second, teacher forward)."""
    loss: Literal["nnpu", "naive", "vpu"] = "nnpu"
    """nnpu; naive: U as negatives, the rival to beat; vpu: needs no prior."""
    prior: Literal["auto", "audit"] | Share = "auto"
    """Share of relevant images in the corpus; auto estimates it, audit has it from the labels of `pukd audit`, which
    then serve the selector too."""
    sample: Count = 200_000
    """Images of the corpus that training sees."""
    steps: Count = 2000
    """Most training steps; the number taken is chosen by cross-fitted proxy accuracy."""
    batch_size: Annotated[Int, Field(ge=8)] = 1024
    """GLOBAL batch, P and U together, a quarter of it P."""
    lr: Positive = 0.001
    """Learning rate of Adam."""
    batches: Literal["balanced", "plain"] = "balanced"
    """balanced: a quarter of each batch is P. plain: P and U shuffled together, as published; to compare with."""
    grid: Literal["auto", 1, 2, 3] = "auto"
    """Feature maps are pooled in grid x grid cells; auto: 3, 2 or 1, the most with
    which an image's features stay within 4,096."""
    views: Count = 8
    """Views of each positive that training sees, the image itself among them."""
    augment: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """How they differ: shifts by up to 1/32 of the side, and horizontal flips where these leave the class as it is."""
    blend: Bool = True
    """The selector's logit is blended with how near an image is to P by rules knn and rmds, by weights learnt on
    held-out images. false: the logit alone."""

    @field_validator("batch_size")
    @classmethod
    def _has_a_quarter(cls, value: int) -> int:
        if value % 4:
            raise ValueError("is not a multiple of 4 (a quarter of it is P)")
        return value


# Selection rules by the key that they need; `pukd_ray.selection.rules` has a module for each.
NeedsThreshold = Literal["threshold"]
NeedsPrecision = Literal["precision"]
NeedsBudget = Literal[
    "budget",
    "quota",
    "random",
    "teacher_confidence",
    "teacher_topk_per_class",
    "entropy",
    "energy",
    "max_logit",
    "knn",
    "linear_probe",
    "rmds",
]
RuleName = Literal["positive", "prior", NeedsThreshold, NeedsPrecision, NeedsBudget, "all", "truth"]
NEEDED_BY_RULES: dict[str, tuple[str, ...]] = {
    "threshold": get_args(NeedsThreshold),
    "budget": get_args(NeedsBudget),
    "target_precision": get_args(NeedsPrecision),
}


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
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
    also: Listed(RuleName) = ()  # type: ignore[valid-type]
    """Rules, beside selection.rule, whose own column the pass writes too, so that one pass serves several."""


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class SelectionConfig:
    """The rule that turns scores into a training set."""

    rule: RuleName = "positive"
    """positive: pu_logit > 0. threshold: on pu_probability. budget: that many of the positives. quota: a budget shared
    evenly over teacher classes. prior: the top share that the prior says is relevant. precision: the most images whose
    estimated precision is target_precision. random, teacher_confidence, teacher_topk_per_class, entropy, energy,
    max_logit, knn, linear_probe, rmds: rivals, a budget without the selector; teacher_topk_per_class shares it evenly
    over teacher classes, entropy takes the lowest of the teacher's softmax, energy the lowest free energy and max_logit
    the largest of the teacher's logits, knn takes what is nearest to P in the teacher's features, rmds the same by
    Mahalanobis distance relative to U, linear_probe what logistic regression tells from U there. all, truth: rivals
    without a budget, the whole corpus and what truth says is relevant."""
    threshold: Annotated[Annotated[Float, Field(ge=0, le=1)] | None, Field(validate_default=True)] = None
    """On pu_probability, for rule `threshold`."""
    budget: Annotated[Count | None, Field(validate_default=True)] = None
    """Images, for rules budget, quota, random, teacher_confidence, teacher_topk_per_class, entropy, energy, max_logit,
    knn, linear_probe and rmds."""
    order: Literal["top", "random"] = "top"
    """Which of the positives a budget takes."""
    target_precision: Annotated[Share | None, Field(validate_default=True)] = None
    """For rule `precision`."""
    deduplicate: Literal["exact", "near", "none"] = "exact"
    """exact: of images with the same bytes one is kept; copies of P and of test images are always dropped. near: so
    are images that look alike (docs/method.md, "Near-copies"); pairs across P, corpus and test set are shown."""

    @field_validator(*NEEDED_BY_RULES)
    @classmethod
    def _needed_by_rule(cls, value: Any, info: ValidationInfo) -> Any:
        rule = info.data.get("rule")
        if value is None and rule in NEEDED_BY_RULES[str(info.field_name)]:
            raise ValueError(f"is needed by selection.rule {rule}")
        return value


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class StudentConfig:
    """The compact network."""

    arch: Text = "resnet18_cifar"
    """As teacher.arch."""
    start: Text | None = None
    """Weights of such a network to begin with, in a file as of teacher.weights (path or URI); of other classes, such as
    ImageNet's, all but its classifier. null: random ones. Pixels are normalised for it as for the teacher."""


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
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
    """cosine: to 0, after a linear warm-up of 5 % of the steps; step: x 0.1 at 1/4, 1/2 and 3/4 of them."""
    positive_share: Share | None = None
    """Share of P in each batch, the rest are selected images; null: all images are seen equally often."""
    temperature: Positive = 1.0
    """Softens both softmaxes; the loss is scaled by its square."""
    augment: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """One view for teacher and student alike: random crop of the image padded by 1/8, and horizontal flip."""
    mixup: Annotated[Float, Field(ge=0)] = 0.0
    """Mixes each image with another of its batch, by a share drawn from Beta(mixup, mixup); the teacher sees the mix.
    0: off."""
    label_weight: Annotated[Float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy on P's own labels beside the distillation loss."""
    sample_weights: Literal["pu_probability", "none"] = "none"
    """pu_probability: each selected image counts by its calibrated P(relevant), P by 1."""
    ema: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an average of the student's weights, which is then the student; the last weights are kept as
    `student/student_last.pt` and measured too. 0: off."""
    class_weights: Literal["soft", "hard", "none"] = "soft"
    """Inverse of the teacher's class mass over P + selected: summed softmax (soft) or argmax counts (hard)."""
    normalise: Literal["sum", "mean_weight"] = "sum"
    """sum: class weights sum to the number of classes. mean_weight: their mean over the images is 1, so that imbalance
    does not act like a lower learning rate."""
    epsilon: Annotated[Float, Field(ge=0)] = 0.1
    """Radius of the set of class weights that the adversary may choose from."""
    adversary: Literal["l2_sum_zero", "l2", "linf", "linf_sum_zero", "draws", "none"] = "l2_sum_zero"
    """Worst case over that set in closed form; draws: the published method's random vectors."""
    baseline: Literal["positives", "none"] = "none"
    """positives: a second student, trained on P alone for the same number of steps, to compare with."""
    memory_gib: Positive = 4.0
    """Decoded images up to this size are held in each worker's memory; larger sets are streamed."""


ExportFormat = Literal["onnx", "onnx_int8", "torch", "executorch"]
_ONNX = dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export")
NEEDED_BY_FORMATS: dict[ExportFormat, dict[str, str]] = {
    "onnx": _ONNX,
    "onnx_int8": _ONNX,
    "torch": {},
    "executorch": {"executorch": "executorch"},
}
"""{package: extra that brings it}; `pukd_ray.export.formats` has an entry for each format."""


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class ExportConfig:
    """The student as files that run without this package (docs/export.md)."""

    formats: Listed(ExportFormat) = ("onnx", "torch")  # type: ignore[valid-type]
    """onnx: for ONNX Runtime and what reads ONNX. onnx_int8: the same, quantised, calibrated on P and the selection.
    torch: a program of `torch.export`. executorch: for ExecuTorch on phones, one image at a time."""
    input: Literal["uint8", "float32"] = "uint8"
    """Type of the pixels, 0 to 255, that go in."""

    @field_validator("formats")
    @classmethod
    def _some_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("is empty, or repeats a format")
        return value


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class ResourcesConfig:
    """What the run may take of the cluster; never affects results, but for rounding, for BatchNorm, which has the
    statistics of each worker where several train on CPUs, and for dropout, of which each worker draws its own."""

    gpus_per_actor: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """auto: 1 if the CLUSTER has GPUs, 0 if it has none and no autoscaler."""
    score_actors: Literal["auto"] | Count | Annotated[tuple[Count, Count], BeforeValidator(_as_tuple)] = "auto"
    """auto | n | [min, max]; without GPUs, tasks at a time, of which there is no least number."""
    train_workers: Count | Annotated[tuple[Count, Count], BeforeValidator(_as_tuple)] = 1
    """n | [min, max]: data-parallel workers of both trainings; n must divide the global batches. [min, max]: as many as
    there is room for, anew when a node is lost or has come; their parts of a batch may differ by an image."""
    gpus_per_train_worker: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """GPUs of each of them. auto: 1 if scoring actors have some, else 0."""
    autoscales: Literal["auto"] | Bool = "auto"
    """Whether nodes may come while the run waits. auto: if the head takes no work, as Ray tells nobody; say true where
    there is an autoscaler and the head has CPUs."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What networks compute in, while everything after them is float32 or float64. auto: on a GPU forward passes in
    float16, trainings in bfloat16 where the card has it; on a CPU float32. bfloat16 is used by a CPU too if it has the
    instructions for it, which makes networks about twice as fast (docs/benchmarks/README.md)."""

    @field_validator("score_actors", "train_workers")
    @classmethod
    def _rising(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("min is above max")
        return value


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class TrackingConfig:
    """Who is told of a run when it ends, from what it recorded: config, curves, figures, report. No result depends on
    it. Keys and passwords are given in the environment, as each tracker has it."""

    tensorboard: Literal["auto"] | Bool = "auto"
    """Event files in `tensorboard/` of the run folder. auto: if tensorboard is installed."""
    mlflow: Text | None = None
    """A tracking server, such as http://host:5000; runs go to its experiment `pukd_ray`."""
    wandb: Text | None = None
    """A project of Weights & Biases; with WANDB_MODE=offline it is told nothing, and `wandb/` of a local run folder has
    what `wandb sync` sends."""


def worker_faults(workers: int | Sequence[int], selector_batch: int, distill_batch: int) -> list[str]:
    """Why that many Train workers cannot share these global batches, evenly if their number is fixed; empty if they
    can."""
    faults = []
    batches = {"a quarter of selector.batch_size": selector_batch // 4, "distill.batch_size": distill_batch}
    for what, size in batches.items():
        if isinstance(workers, int) and size % workers:
            faults.append(f"{workers} does not divide {what} ({size})")
        if not isinstance(workers, int) and size < max(workers):
            faults.append(f"{max(workers)} is more than {what} ({size})")
    return [f"resources.train_workers: {fault}" for fault in faults]


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class RunConfig:
    """A whole run."""

    name: Text = "my-run"
    """For people; the namespace of the Ray job, and the label `run` of its metrics."""
    output: Text = "runs/my-run"
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
    export: ExportConfig | None = None
    """`{}` exports the student in the default formats; null: no such stage."""
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("positives", "corpus", "test")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("is an empty list")
        return value

    @model_validator(mode="after")
    def _workers_fit(self) -> RunConfig:
        faults = worker_faults(self.resources.train_workers, self.selector.batch_size, self.distill.batch_size)
        if faults:
            raise ValueError("\n".join(faults))
        return self


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class SupervisedConfig:
    """How a teacher is trained."""

    epochs: Annotated[Int, Field(ge=0)] = 10
    """Passes over the labelled images."""
    batch_size: Count = 128
    """Images per step."""
    lr: Positive = 0.05
    """Peak learning rate of SGD with momentum, cosine schedule."""
    swa_epochs: Annotated[Int, Field(ge=0)] = 0
    """Further passes at a constant rate; the teacher then is the mean of the weights after each of their steps:
    stochastic weight averaging (Izmailov et al., UAI 2018)."""
    swa_lr: Positive = 0.03
    """Learning rate of these."""
    augment: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """Random crop of the image padded by 1/8, and horizontal flip: crop for digits or text."""
    seed: Annotated[Int, Field(ge=0, lt=2**31)] = 0
    """Of initialisation and order."""

    @model_validator(mode="after")
    def _trains(self) -> SupervisedConfig:
        if not self.epochs + self.swa_epochs:
            raise ValueError("epochs: 0, and swa_epochs too: give one of them, at least 1")
        return self


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class TeacherTrainingConfig(SupervisedConfig):
    """Config of `pukd train-teacher`."""

    teacher: TeacherConfig
    """`teacher.weights` is the file to write."""
    start: Text | None = None
    """As student.start."""
    train: Sources
    """Labelled images to train on."""
    test: Sources | None = None
    """Labelled images to report accuracy on."""
    gpus: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """To train on. auto: 1 if the cluster has GPUs, 0 if it has none and no autoscaler."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """As `resources.precision` of a run."""


def to_plain(config: Any) -> dict[str, Any]:
    """`config` as the dict that YAML or JSON would hold."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain
