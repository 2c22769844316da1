"""The config of the paper's table: a run's, and what to compare it with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from pukd_ray.config import (
    OPTIONS,
    Bool,
    ConfigError,
    Count,
    Float,
    Int,
    Listed,
    RunConfig,
    Sources,
    SupervisedConfig,
    Text,
    to_plain,
)
from pukd_ray.preflight import load
from pukd_ray.preflight.faults import validate
from pukd_ray.preflight.files import file_exists

# Rows of the paper's table that are built in; `pukd_ray.studies.rows` says what each is.
RowName = Literal[
    "p_only",
    "p_long",
    "kd",
    "kd_few",
    "truth",
    "random",
    "all",
    "teacher_confidence",
    "teacher_topk_per_class",
    "knn",
    "linear_probe",
    "pu_s1",
    "pu_s2_random",
    "pu_s2_top",
    "recommended",
]

NOT_OF_A_STUDENT = ("epochs", "baseline", "memory_gib")
"""Keys of `distill` that make no difference to a student with given steps, as all of the table are."""


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class MoreRowConfig:
    """A row of one's own: the row `recommended` with changes."""

    name: Annotated[str, Field(pattern=r"^[\w.=+@-]+$")]
    """Letters, digits and _ . = + @ -; the row's files are named after it."""
    selection: dict[str, Any] = Field(default_factory=dict)
    """Keys of `selection` to change."""
    distill: dict[str, Any] = Field(default_factory=dict)
    """Keys of `distill` to change; the length by `steps`."""
    once: Bool = False
    """Whether one repetition is enough."""


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class TableConfig:
    """The paper's table."""

    seeds: Count = 5
    """Repetitions: each draws other positives (`skip_per_class`) and everything random anew."""
    first_seed: Annotated[Int, Field(ge=0)] = 0
    """The first of them; it alone has the rows that are made once. Not 0: a table of other positives, or repetitions
    made apart, several at once, in one folder, which a call without it collects."""
    main_seeds: Count | None = None
    """Repetitions of the built-in rows with the first number of positives at equal steps, which the method is judged
    by; null: `seeds`."""
    main_rows: Listed(RowName) | None = None  # type: ignore[valid-type]
    """Which of them have `main_seeds`; null: all."""
    per_class: Listed(Count) = (100, 50, 20)  # type: ignore[valid-type]
    """Positives per class. All rows are made with the first number, `p_only`, `pu_s1`, `pu_s2_random`, `pu_s2_top` and
    `recommended` with the others too."""
    rows: Listed(RowName) = get_args(RowName)  # type: ignore[valid-type]
    """Built-in rows to make."""
    once: Listed(RowName) = ()  # type: ignore[valid-type]
    """Rows of which one repetition is enough."""
    more: Listed(MoreRowConfig) = ()  # type: ignore[valid-type]
    """Further rows, such as ablations."""
    budget: Count | None = None
    """Images that pu_s2_random and pu_s2_top take; null: half of what pu_s1 takes."""
    lengths: Listed(Annotated[Float, Field(gt=0)]) = ()  # type: ignore[valid-type]
    """Multiples of `distill.steps` that the built-in rows of the first repetition take too, each anew: accuracy against
    the images seen, in a table and a plot of its own."""
    beside: Listed(Text) = ()  # type: ignore[valid-type]
    """`table.json` (path or URI) of tables of other corpora: accuracy against the share of relevant images in the
    corpus, of all of them and this one, in a table and a plot of its own."""
    equal_epochs: Bool = True
    """A second table in which each student sees its images as often as `kd` (without it: one of all of U) does in the
    first, where all take the same steps."""

    @field_validator("per_class", "rows")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("is an empty list")
        return tuple(dict.fromkeys(value))

    @field_validator("more")
    @classmethod
    def _names_once(cls, value: tuple[MoreRowConfig, ...]) -> tuple[MoreRowConfig, ...]:
        names = [row.name for row in value]
        taken = {n for n in names if names.count(n) > 1 or n in get_args(RowName)}
        if taken:
            raise ValueError(f"the name {sorted(taken)[0]} is there already")
        return value


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class PaperConfig(RunConfig):
    """Config of `pukd paper-table`: a run, what to compare it with, and how often."""

    original: Sources | None = None
    """The teacher's own training images, for the row `kd`."""
    teacher_training: SupervisedConfig | None = None
    """How to train the teacher on `original` if `teacher.weights` is not there yet."""
    table: TableConfig = TableConfig()

    @model_validator(mode="after")
    def _has_an_original(self) -> PaperConfig:
        if self.teacher_training is not None and self.original is None:
            raise ValueError("teacher_training: needs the labelled images in `original`")
        if self.test is None:
            raise ValueError("test: is required for a table of accuracies")
        if len(self.positives) > 1:
            raise ValueError("positives: the table draws P from one source: give one")
        if self.positives[0].per_class is not None:
            raise ValueError("positives.per_class: the table draws P by table.per_class: leave it out")
        return self


def load_paper_table(path: str | Path, overrides: Mapping[str, Any] | None = None) -> PaperConfig:
    """As `load_config`, for `pukd paper-table`; with `teacher_training` the weights need not be there yet."""
    config = load(path, overrides, PaperConfig, writes_teacher=_trains_teacher)
    faults = [
        f"table.more.{i}.{section}.{fault}"
        for i, row in enumerate(config.table.more)
        for section, changes in (("selection", row.selection), ("distill", row.distill))
        for fault in validate({**to_plain(getattr(config, section)), **changes}, type(getattr(config, section)))[1]
    ]
    faults += [
        f"table.more.{i}.distill.{key}: cannot differ from row to row: "
        + ("use steps" if key == "epochs" else "leave it out")
        for i, row in enumerate(config.table.more)
        for key in NOT_OF_A_STUDENT
        if key in row.distill
    ]
    faults += [f"table.beside: no such file: {uri}" for uri in config.table.beside if not file_exists(uri)]
    if faults:
        raise ConfigError(faults)
    return config


def _trains_teacher(raw: Mapping[str, Any]) -> bool:
    """Whether the teacher is to be trained: the config says how, and its weights are not there."""
    weights = teacher.get("weights") if isinstance(teacher := raw.get("teacher"), dict) else None
    return bool(raw.get("teacher_training")) and not (isinstance(weights, str) and weights and file_exists(weights))
