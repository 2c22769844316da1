"""The stages of a run, in order: what each depends on, leaves behind, and is run by. One entry adds a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pukd_ray.config import RunConfig


@dataclass(frozen=True)
class Stage:
    """One stage; its marker says that it is done."""

    name: str
    runs: str
    """`module:function`; it is given the `RunContext` and returns the stage's counts. Imported when it runs: the driver
    needs little of most stages, and a finished run none."""
    outputs: tuple[str, ...]
    """Files and folders of the run folder that it writes; `--redo` renames exactly these."""
    depends_on: tuple[str, ...] = ()
    """Config keys that it adds to what its result depends on; a stage depends on all earlier ones too. `name`, `output`
    and `resources` change nothing, and neither do keys that only say how a stage is cut up."""
    except_for: tuple[str, ...] = ()
    """Keys below those of `depends_on` that change no result."""
    format_version: int = 1
    """Raised when its files change meaning: older runs are then redone, never misread."""
    resumable: bool = False
    """It goes on with what an interrupted attempt left, chunks or checkpoints: never under other settings."""
    asked_by: str | None = None
    """Config key without which a run has no such stage; nothing but the page shows what it leaves."""

    def is_asked(self, config: RunConfig) -> bool:
        """Whether a run of this config has it."""
        return self.asked_by is None or getattr(config, self.asked_by) is not None

    def function(self) -> Callable[[Any], dict[str, Any]]:
        """What runs it."""
        module, _, name = self.runs.partition(":")
        found: Callable[[Any], dict[str, Any]] = getattr(import_module(module), name)
        return found


STAGES = (
    Stage(
        "plan",
        "pukd_ray.corpus.plan:plan_run",
        ("plan.parquet", "files.parquet", "environment.json"),
        ("positives", "corpus", "test"),
    ),
    Stage(
        "selector",
        "pukd_ray.selection.selector:train_selector",
        ("selector",),
        ("seed", "teacher", "selector"),
        format_version=4,
    ),
    Stage(
        "score",
        "pukd_ray.selection.scoring:score_corpus",
        ("scores",),
        ("score.keep_images", "score.keep_above"),
        resumable=True,
    ),
    # `rows` has the selections of the paper's table.
    Stage(
        "select",
        "pukd_ray.selection.select:run_select",
        ("selected", "selection.json", "rows", "near.parquet"),
        ("selection",),
    ),
    Stage(
        "distill",
        "pukd_ray.distillation.distill:distill_student",
        ("student",),
        ("student", "distill"),
        except_for=("distill.memory_gib",),
        resumable=True,
    ),
    Stage("evaluate", "pukd_ray.distillation.evaluate:evaluate_run", ("metrics.json",)),
    Stage("export", "pukd_ray.export.stage:export_student", ("export",), ("export",), asked_by="export"),
    Stage("report", "pukd_ray.report.page:write_report", ("report.html",)),
)

STAGE_NAMES = tuple(stage.name for stage in STAGES)
EVERY_RUN = tuple(stage.name for stage in STAGES if stage.asked_by is None)
"""Those that a run has whatever its config asks for."""


def stages_from(first: str) -> tuple[Stage, ...]:
    """`first` and all stages after it."""
    return STAGES[STAGE_NAMES.index(first) :]


def stages_until(last: str) -> tuple[Stage, ...]:
    """All stages up to and with `last`."""
    return STAGES[: STAGE_NAMES.index(last) + 1]
