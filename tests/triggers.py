"""Each error of the package, once: what it takes to see it. `test_messages.py` writes what they say into a page.

A trigger gets an empty folder and a sound config (the demo's, with its output there), and raises.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from small_files import units_of

from pukd_ray import RunConfig, load_config, storage
from pukd_ray.audit.drawing import check_selection
from pukd_ray.audit.forms import parse_labels, read_labels
from pukd_ray.audit.record import DESIGN, SAMPLE, load_sample
from pukd_ray.cli import DEMO_CONFIG, parse_arguments
from pukd_ray.commands import (
    audit,
    coverage_study,
    make_pools,
    measure_decoding,
    measure_near,
    run,
    show,
    soak,
)
from pukd_ray.config import SourceConfig
from pukd_ray.corpus.huggingface import choose_split
from pukd_ray.corpus.labelled import Labelled, check_same_names, index_sources
from pukd_ray.corpus.listing import FILES_SCHEMA, list_inputs
from pukd_ray.corpus.plan import plan_inputs
from pukd_ray.corpus.reading import read_rows
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.units import Unit
from pukd_ray.demo.pools import Bank
from pukd_ray.estimate import Prices, estimate_run
from pukd_ray.export.formats import trace
from pukd_ray.networks.zoo import build_network, find_weights, load_weights
from pukd_ray.outline import outline_run
from pukd_ray.pipeline import _check_cluster, open_folder, run_pipeline
from pukd_ray.preflight import config_of_run
from pukd_ray.report.publish import publish
from pukd_ray.report.show import find_images
from pukd_ray.report.status import status_lines
from pukd_ray.resume import check_progress, check_unchanged, fingerprints
from pukd_ray.run.folder import LEASES, RunFolder, open_run
from pukd_ray.run.lease import Lease
from pukd_ray.run.records import PRIOR
from pukd_ray.run.stages import STAGES
from pukd_ray.runtime.engine import Cluster, engine, gpus_of
from pukd_ray.selection import guards
from pukd_ray.selection.committing import ChunkLedger, merge_attempt
from pukd_ray.selection.features import load_last_tap
from pukd_ray.selection.labels import load_labels
from pukd_ray.selection.near import find_near
from pukd_ray.selection.scoring import _check_rejected
from pukd_ray.selection.select import select_images
from pukd_ray.storage import patiently, read_file
from pukd_ray.studies.cifar import RELEVANT, draw_share
from pukd_ray.studies.config import load_paper_table
from pukd_ray.studies.paper import _check_positives, _missing, _tables_beside
from pukd_ray.studies.selector import run_study


@dataclass(frozen=True)
class Home:
    """Where a trigger is at work."""

    path: Path
    config: RunConfig

    @property
    def run(self) -> RunFolder:
        return RunFolder(str(self.path / "run"))

    def file(self, name: str, content: str | bytes) -> Path:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
        return target

    def images(self, **columns: list[Any]) -> SourceConfig:
        """A Parquet file of two rows and more columns, as a source."""
        self.path.joinpath("data").mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [b"x", b"y"]} | columns), self.path / "data" / "a.parquet")
        return SourceConfig(uri=str(self.path / "data" / "a.parquet"))

    def unit(self) -> tuple[Unit, SourceConfig]:
        source = self.images()
        (unit,) = units_of(source)
        return unit, source


Trigger = Callable[[Home], object]
TRIGGERS: dict[str, list[Trigger]] = {}
"""By heading of the page."""


def under(heading: str) -> Callable[[Trigger], Trigger]:
    def add(trigger: Trigger) -> Trigger:
        TRIGGERS.setdefault(heading, []).append(trigger)
        return trigger

    return add


def several(heading: str, *triggers: Trigger) -> None:
    TRIGGERS.setdefault(heading, []).extend(triggers)


# -- arguments and config ---------------------------------------------------------------------------------------

several(
    "Command line",
    lambda _: parse_arguments(["--config"], None),
    lambda _: parse_arguments(["--config", "a.yaml", "stray"], None),
    lambda _: parse_arguments(["--config", "a.yaml", "--seed"], None),
    lambda _: parse_arguments(["--config", "a.yaml"], None, operand="FILE"),
    lambda _: parse_arguments(["--confg", "a.yaml"], None, demo=True),
    lambda _: run.main(["--redo", "export"]),
    lambda _: measure_decoding.main(["--images", "0"]),
    lambda _: measure_near.main(["--images", "nowhere"]),
    lambda _: make_pools.main(["--source", "nowhere"]),
    lambda home: show.main([str(home.path), "a", "--pictures", str(home.file("file", "x"))]),
    lambda _: coverage_study.parse_part("3/2"),
    lambda home: estimate_run(home.config, Prices(0, 0, 0), 10),
    lambda home: soak.main(["--folder", str(home.file("full/x", "x").parent)]),
)


def with_keys(**keys: Any) -> Trigger:
    """The demo's config with these keys, `__` for a dot."""
    overrides = {key.replace("__", "."): value for key, value in keys.items()}
    return lambda home: load_config(
        DEMO_CONFIG, {k: v.replace("HOME", str(home.path)) if isinstance(v, str) else v for k, v in overrides.items()}
    )


several(
    "Config",
    lambda home: load_config(home.path / "none.yaml"),
    lambda home: load_config(home.file("a.yaml", "a: [")),
    lambda home: load_config(home.file("a.yaml", "seed: 1\nname: a\nseed: 2")),
    lambda home: load_config(home.file("a.yaml", "- a")),
    lambda home: load_config(home.file("a.yaml", b"\xff")),
    lambda home: load_config(home.file("a.yaml", "base: 3")),
    lambda home: load_config(home.file("a.yaml", "base: a.yaml")),
    with_keys(corpus__0__uri="x"),
    with_keys(selector__prior=2, distill__lrr=0.1),
    with_keys(output="s3://KEY:SECRET@bucket/run"),
    with_keys(teacher__mean=[0.1, 0.2]),
    with_keys(teacher__std=[0.0]),
    with_keys(teacher__transform_input=True),
    with_keys(export__formats=[]),
    with_keys(teacher__classes=["a"]),
    with_keys(teacher__classes=["a", "a", "b", "c", "d"]),
    with_keys(teacher__classes="HOME/classes.txt"),
    with_keys(teacher__weights="HOME/none.pt"),
    with_keys(teacher__weights=str(DEMO_CONFIG)),
    with_keys(teacher__arch="lenet5_half"),
    with_keys(teacher__arch="resnet9999"),
    with_keys(teacher__arch="nowhere.at:all"),
    with_keys(teacher__arch="math:pi"),
    with_keys(teacher__arch="builtins:dict"),
    with_keys(teacher__arch="builtins:len"),
    with_keys(corpus__uri="HOME/nowhere"),
    with_keys(corpus__uri="xyz://lake"),
    with_keys(corpus__uri=[]),
    with_keys(corpus=[]),
    with_keys(corpus__relevant=True),
    with_keys(corpus__rows=[3, 3]),
    with_keys(selector__batch_size=30),
    with_keys(selection__rule="budget"),
    with_keys(resources__score_actors=[3, 1]),
    with_keys(resources__train_workers=7),
)


@under("Config")
def timm_is_missing(home: Home) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "timm", None)
        with_keys(teacher__arch="timm:resnet18")(home)


@under("Config")
def an_output_that_no_library_serves(home: Home) -> None:
    open_folder(replace(home.config, output="xyz://runs/a"))


@under("Config")
def a_relative_output_under_a_job(home: Home) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        open_folder(replace(home.config, output="runs/a"))


@under("Config")
def an_output_that_cannot_be_made(home: Home) -> None:
    run_pipeline(replace(home.config, output=str(home.file("file", "x") / "run")))


@under("Config")
def an_output_that_is_read(_: Home) -> None:
    load_config(DEMO_CONFIG, {"output": str(DEMO_CONFIG.parent / "corpus" / "run")})


@under("Config")
def an_output_that_a_dry_run_could_not_make(home: Home) -> None:
    outline_run(RunFolder(str(home.file("file", "x") / "run")), home.config)


def lenet() -> torch.nn.Module:
    return build_network("lenet5", num_classes=5, channels=1, input_size=28)


several(
    "Weights",
    lambda _: find_weights(lenet(), cast(Any, [1])),
    lambda _: find_weights(lenet(), {"a": lenet().state_dict(), "b": lenet().state_dict()}),
    lambda _: load_weights(lenet(), {"x": torch.zeros(1)}, what="teacher.weights"),
)

# -- what the config names --------------------------------------------------------------------------------------


def listing(*uris: str, **more: Any) -> Trigger:
    return lambda home: list_inputs({"corpus": (SourceConfig(uri=[str(home.path / uri) for uri in uris], **more),)})


def with_files(trigger: Trigger, *names: str) -> Trigger:
    def act(home: Home) -> object:
        for name in names:
            home.file(name, b"x")
        return trigger(home)

    return act


several(
    "Corpus and labelled images",
    with_files(listing("lake/a.png", "lake/b.png"), "lake/a.png"),
    with_files(listing("lake"), "lake/a.txt"),
    with_files(listing("lake"), "lake/a.png", "lake/b.tar"),
    with_files(listing("lake", format="parquet"), "lake/a.png"),
)


@under("Corpus and labelled images")
def a_link_out_of_the_folder(home: Home) -> None:
    home.file("lake/a.png", b"x")
    (home.path / "lake" / "b.png").symlink_to(home.file("elsewhere/b.png", b"x"))
    listing("lake")(home)


SPLITS = {"configs": [{"data_files": [{"split": name, "path": f"{name}*"} for name in ("train", "test")]}]}
several(
    "Corpus and labelled images",
    lambda _: choose_split(SPLITS, ["train.parquet", "test.parquet"], None, "corpus"),
    lambda _: choose_split(SPLITS, ["train.parquet", "test.parquet"], "all", "corpus"),
    with_files(listing("lake/a.parquet", split="train"), "lake/a.parquet"),
)


def plan(home: Home, *sources: SourceConfig) -> object:
    roles = {"corpus": sources}
    return plan_inputs(home.run, roles, list_inputs(roles).table, print)


@under("Corpus and labelled images")
def files_without_images(home: Home) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), home.path / "a.parquet")
    plan(home, SourceConfig(uri=str(home.path / "a.parquet")))


@under("Corpus and labelled images")
def another_column(home: Home) -> None:
    plan(home, replace(home.images(), image_column="jpeg"))


@under("Corpus and labelled images")
def labels_as_truth_without_their_column(home: Home) -> None:
    plan(home, replace(home.images(), relevant_labels=(1,)))


@under("Corpus and labelled images")
def the_same_file_twice(home: Home) -> None:
    home.file("lake/a.png", b"x")
    plan(home, *[SourceConfig(uri=str(home.path / "lake"))] * 2)


@under("Corpus and labelled images")
def a_file_that_has_changed(home: Home) -> None:
    unit, source = home.unit()
    pq.write_table(pa.table({"image": [b"x"]}), unit.files[0])
    list(read_rows(unit, source))


def labels(*values: Any, classes: tuple[str, ...] | None = None, **more: Any) -> Trigger:
    def act(home: Home) -> object:
        source = replace(home.images(label=list(values)), **more)
        return index_sources("positives", (source,), replace(home.config.teacher, classes=classes), print)

    return act


several(
    "Corpus and labelled images",
    labels(None, 1),
    labels(True, False),
    labels("cat", "dog"),
    labels("cat", "dog", classes=("cat", "b", "c", "d", "e")),
    labels(1, 5),
    lambda _: check_same_names(Labelled((), ("cat", "dog"), 0), Labelled((), ("cat", "cow"), 0)),
)

# -- selector, scoring, selection -------------------------------------------------------------------------------


def light(labels: list[int], teacher: list[int]) -> Any:
    count = len(labels)
    return SimpleNamespace(p_units=np.zeros(count, int), p_labels=np.array(labels), p_teacher=np.array(teacher))


UNREADABLE = [("corpus", f"lake/{i}.png", "not_an_image: no known image signature") for i in range(60)]
several(
    "Selector",
    lambda home: guards.check_sample(home.config, 3, 500, []),
    lambda home: guards.check_sample(home.config, 50, 90, UNREADABLE),
    lambda home: guards.check_sample(home.config, 50, 5, []),
    lambda home: guards.check_teacher_agrees(light([1, 2, 3, 4], [0, 1, 2, 3]), home.config),
    lambda home: guards.check_teacher_agrees(light([0, 1, 2, 3, 4], [0, 3, 1, 4, 2]), home.config),
    lambda home: guards.check_prior(home.config, cast(Any, SimpleNamespace(prior=0.001, trust="none"))),
    lambda home: guards.check_selection(home.config, 0.001, 0.2),
    lambda home: guards.check_selection(home.config, 0.99, 0.2),
    lambda home: load_labels(home.run, 0),
)


@under("Selector")
def labels_that_do_not_tell_the_prior(home: Home) -> None:
    home.run.write_json("labels/a.json", {"audit": "a", "prior": None, "reason": "3 of the 6 strata have no label"})
    load_labels(home.run, 0)


@under("Selector")
def features_of_an_older_version(home: Home) -> None:
    home.run.write_table("selector/features/a.parquet", pa.table({"a": [1]}))
    load_last_tap(home.run, ["selector/features/a.parquet"])


@under("Scores and selection")
def too_many_unreadable(home: Home) -> None:
    marker = {"n_rows": 200, "rejected_by_reason": {"not_an_image": 80}, "seconds": 1.0, "computing_seconds": 1.0}
    _check_rejected(home.config, [marker])


@under("Scores and selection")
def rows_that_were_not_scored(home: Home) -> None:
    unit, _ = home.unit()
    merge_attempt(home.run, "00000", [unit], ChunkLedger(), ())


@under("Scores and selection")
def rows_that_were_not_merged(home: Home) -> None:
    from pukd_ray.run.folder import SCORES_SCHEMA

    unit, _ = home.unit()
    home.run.write_table("attempts/a/x.parquet", SCORES_SCHEMA.empty_table())
    ledger = ChunkLedger([("attempts/a/x.parquet", 2, 10, unit.unit_id)], Counter({unit.unit_id: 2}))
    merge_attempt(home.run, "00000", [unit], ledger, ())


@under("Scores and selection")
def a_rule_without_its_column(home: Home) -> None:
    home.run.write_json("markers/score/00000.json", {"columns": [], "files": [], "units": []})
    select_images(home.run, replace(home.config, selection=replace(home.config.selection, rule="knn", budget=9)), [])


@under("Scores and selection")
def too_many_for_near_copies(home: Home) -> None:
    near = replace(home.config, selection=replace(home.config.selection, deduplicate="near"))
    find_near(cast(Any, SimpleNamespace(config=near)), [], [], [], 10**9)


class Untraceable(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{pixels.dim()} dimensions, and it goes by the hour of the day")


@under("Training and export")
def a_student_without_a_graph(_: Home) -> None:
    trace(Untraceable(), np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32), {})


# -- audit ------------------------------------------------------------------------------------------------------


def answers(text: str) -> Trigger:
    return lambda _: parse_labels(text, ["a", "b"], "0123", "labels.csv")


def export(audit: str, image_id: str, label: str) -> dict[str, Any]:
    result = {"from_name": "relevant", "value": {"choices": [label]}}
    return {"data": {"audit": audit, "image_id": image_id}, "annotations": [{"result": [result]}]}


several(
    "Audit",
    lambda home: check_selection(home.run),
    lambda home: load_sample(home.run),
    answers('{"audit": "0123", "labels": {}}'),
    answers('{"audit": "4567", "labels": {"a": "yes"}}'),
    answers('{"audit": "0123", "labels": {"c": "yes"}}'),
    answers('{"audit": "0123", "labels": {"a": "maybe"}}'),
    answers(json.dumps([export("0123", "a", "yes")] * 2)),
    answers("x,y\n1,2\n"),
    answers('{"x": 1}'),
)


def sample(home: Home) -> RunFolder:
    home.run.write_table(SAMPLE, pa.table({"image_id": ["a"]}))
    home.run.write_json(DESIGN, {"audit": "0123"})
    return home.run


several(
    "Audit",
    lambda home: read_labels(sample(home), str(home.path / "labels.json")),
    lambda home: read_labels(sample(home), str(home.file("labels.csv", b"\xff"))),
)

# -- storage, run folder, cluster -------------------------------------------------------------------------------


def asking(fault: Exception) -> Trigger:
    def fail() -> None:
        raise fault

    def act(_: Home) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "PATIENCE_SECONDS", 0.0)
            return patiently("s3://lake/a.parquet", fail)

    return act


several(
    "Storage",
    asking(FileNotFoundError(2, "No such file or directory")),
    asking(PermissionError(13, "Permission denied")),
    asking(OSError(5, "Input/output error")),
)

several(
    "Run folder",
    lambda _: open_run("xyz://runs/a"),
    lambda home: config_of_run(home.run),
    lambda home: config_of_run(RunFolder(str(home.file("run/config.yaml", "seed: 1").parent))),
    lambda home: status_lines(home.run),
    lambda home: find_images(home.run, ["a", "b"]),
    lambda home: publish(home.run, home.config, home.run),
    lambda home: home.run.read_record(PRIOR),
    lambda home: [home.run.commit_json("markers/score/00000.json", {"files": [name]}) for name in "ab"],
)


@under("Run folder")
def published_already(home: Home) -> None:
    home.run.write_json("markers/select.json", {"stage": "select"})
    home.file("target/dataset/README.md", "x")
    publish(home.run, home.config, RunFolder(str(home.path / "target")))


@under("Run folder")
def damaged(home: Home) -> None:
    home.file("run/markers/plan.json", "")
    home.run.marker("plan")


@under("Run folder")
def in_use(home: Home) -> None:
    with Lease(home.run) as lease:
        lease.take()
        Lease(home.run).__enter__()


@under("Run folder")
def taken_at_the_same_time(home: Home) -> None:
    with Lease(home.run) as one, Lease(home.run) as other:
        one.take()
        other.take()


def elsewhere(home: Home, token: int, beat: int) -> None:
    lease = {"token": token, "host": "far-away", "pid": 77, "process": "far-away/boot/pid:[1]/5", "driver": "x"}
    when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    home.run.write_json(
        f"{LEASES}/{token:08d}.json", lease | {"since": when, "last_beat": when, "beat": beat, "released": False}
    )


@under("Run folder")
def in_use_on_another_machine(home: Home) -> None:
    elsewhere(home, 1, 3)
    threading.Timer(0.3, lambda: elsewhere(home, 1, 4)).start()
    Lease(home.run).__enter__()


@under("Run folder")
def taken_over(home: Home) -> None:
    elsewhere(home, 2, 3)
    RunFolder(home.run.uri, 1).check_lease()


def of_other_settings(home: Home) -> RunFolder:
    inputs = fingerprints(home.config, read_file(home.config.teacher.weights))["selector"]
    home.run.write_json("markers/selector.json", {"stage": "selector", "inputs": inputs | {"seed": 1}})
    return home.run


several(
    "Run folder",
    lambda home: check_unchanged(of_other_settings(home), home.config),
    lambda home: audit.main(["draw", "--output", of_other_settings(home).uri]),
)


@under("Run folder")
def files_that_have_changed(home: Home) -> None:
    inputs = fingerprints(home.config, read_file(home.config.teacher.weights))["plan"]
    home.run.write_json("markers/plan.json", {"stage": "plan", "inputs": inputs})
    planned = list_inputs(sources_by_role(home.config)).table
    sizes = pa.array([size + 1 for size in planned.column("size").to_pylist()])
    at = FILES_SCHEMA.get_field_index("size")
    home.run.write_table("files.parquet", planned.set_column(at, "size", sizes).slice(0, 1))
    check_progress(home.run, home.config, None, STAGES)


several(
    "Cluster",
    lambda _: gpus_of("resources.gpus_per_actor", "auto", Cluster(0, 0, 1, True)),
    lambda home: _check_cluster(home.config, Cluster(4, 0, 2, False), home.run),
)


@under("Cluster")
def a_token_is_asked_for(_: Home) -> None:
    def refuses(**_: Any) -> None:
        raise ray.exceptions.AuthenticationError("no token")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        patch.setattr(ray, "init", refuses)
        patch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        engine("run").__enter__()


# -- studies ----------------------------------------------------------------------------------------------------


def table(**keys: Any) -> Trigger:
    def act(home: Home) -> object:
        raw = yaml.safe_load(DEMO_CONFIG.read_text())
        for key in ("weights", "classes"):
            raw["teacher"][key] = str(DEMO_CONFIG.parent / raw["teacher"][key])
        for role in ("positives", "corpus", "test"):
            raw[role]["uri"] = str(DEMO_CONFIG.parent / raw[role]["uri"])
        config = home.file("table.yaml", yaml.safe_dump(raw))
        return load_paper_table(config, {key.replace("__", "."): value for key, value in keys.items()})

    return act


several(
    "Paper table",
    table(table__rows=[]),
    table(table__more=[{"name": "pu_s1"}]),
    table(table__more=[{"name": "x", "distill": {"lr": -1}}]),
    table(table__more=[{"name": "x", "distill": {"epochs": 60, "baseline": "positives"}}]),
    table(teacher_training={"epochs": 1}),
    table(teacher_training={"epochs": 0}),
    table(test=None),
    table(positives=[{"uri": str(DEMO_CONFIG.parent / "positives.parquet")}] * 2),
    table(positives__per_class=3),
    table(table__beside=["none.json"]),
    lambda home: _check_positives(cast(Any, table(table__seeds=99)(home))),
    lambda home: tables_beside(home, corpus__relevant_column=None),
    lambda home: tables_beside(home),
    lambda home: run_study(home.file("study.json", '{"runs": {}}'), {}, [], tuning=True),
)


@under("Paper table")
def a_corpus_of_too_few_images(home: Home) -> object:
    del home
    few = Bank(np.zeros((2, 3, 32, 32), np.uint8), np.array([min(RELEVANT), "n0"]), np.array(["a", "b"]))
    return draw_share(few, 0.5, seed=0)


def tables_beside(home: Home, **keys: Any) -> object:
    beside = home.file("beside.json", '{"runs": {"100-seed0": {"prior": null}}}')
    return _tables_beside(cast(Any, table(table__beside=[str(beside)], **keys)(home)))


@under("Paper table")
def students_of_other_settings(home: Home) -> None:
    home.run.write_json("students/kd.json", {"inputs": {"distill": 1}})
    _missing(home.run, [cast(Any, SimpleNamespace(key="kd", facts={"inputs": {"distill": 2}}))])


# -- elsewhere --------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "parts of the table were not made": "tests/studies/test_paper_table.py",
    "none of the table's students could be made": "tests/studies/test_paper_table.py",
    "was made before that: delete that folder": "tests/studies/test_paper_table.py",
    "holds a sample already": "tests/audit/test_run.py",
    "images of the sample are not there any more": "tests/audit/test_run.py",
    "processes have died while they read": "tests/corpus/test_reading.py",
    "a worker's shard is smaller than its batch": "tests/distillation/test_training.py",
    "draw more (--images)": "tests/audit/test_design.py",
    "no node with a CPU came": "tests/runtime/test_engine.py",
    "scored images: lower selection.threshold": "tests/selection/test_select.py",
    "steps: lower ": "tests/distillation/test_supervised.py",
    "computes something else in that format": "tests/export/test_export.py",
    "the head of its own cluster is gone": "tests/test_soak.py",
}
"""What takes a run to see, by a part of it: the test that sees it."""

ALARMS = (
    "has changed while a run read it",
    "selected images were written: start again",
    "selected/ holds images that scores/ does not",
    "the strata hold fewer images than were counted",
    "its answers then differ by",
    "glyphs need a Pillow with FreeType",
    "its driver hangs",
    "not all came out as undisturbed",
    "a run does not come to its end",
    "the undisturbed run failed",
    "unit ids twice",
)
"""What says that the program is at fault, or what it stands on: nothing is known that makes it so."""
