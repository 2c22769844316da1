"""The paper's table for any data set: selections, students and accuracies of all its rows, resumable row by row."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from typing import Any

import pyarrow.compute as pc

from pukd_ray.config import (
    ConfigError,
    DistillConfig,
    RunConfig,
    SelectionConfig,
    TeacherTrainingConfig,
    to_plain,
)
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.labelled import index_sources
from pukd_ray.corpus.listing import read_files
from pukd_ray.corpus.stored_units import read_units
from pukd_ray.corpus.units import Unit
from pukd_ray.distillation.evaluate import measure_accuracy
from pukd_ray.distillation.supervised import train_teacher
from pukd_ray.distillation.training import total_steps
from pukd_ray.distillation.training_set import TrainingSet, positives_of
from pukd_ray.errors import RunError
from pukd_ray.networks.teacher import new_network
from pukd_ray.networks.zoo import count_multiply_adds, count_parameters
from pukd_ray.pipeline import open_folder, run_pipeline
from pukd_ray.preflight.files import file_exists
from pukd_ray.resume import StaleResultsError, fingerprints
from pukd_ray.run.folder import RunFolder, changed_inputs
from pukd_ray.run.records import SelectionRecord, selection_in
from pukd_ray.runtime.console import say
from pukd_ray.runtime.engine import Cluster, cause_of, engine, gpus_per_actor
from pukd_ray.selection.select import select_images
from pukd_ray.storage import open_storage, read_bytes
from pukd_ray.studies.config import NOT_OF_A_STUDENT, PaperConfig
from pukd_ray.studies.pages import describe_machine
from pukd_ray.studies.paper_page import by_share, draw_accuracy, draw_lengths, draw_shares, render_table
from pukd_ray.studies.rows import BUILT_IN, TableRow, TableStudent, has_truth, own_columns, students_of
from pukd_ray.studies.students import StudentJob, train_students

KEPT_APART = ("loss", "inputs", "tested")
"""Of a student's result: stays in its own file."""
EVALUATED_BYTES = 2**30
"""Weights of the students that are evaluated in one pass."""


def train_missing_teacher(config: PaperConfig) -> bool:
    """Train the config's teacher on the original data if its weights are not there; whether that was so."""
    if config.teacher_training is None or file_exists(config.teacher.weights):
        return False
    assert config.original is not None
    say(f"teacher   {config.teacher.weights} is not there yet: it is trained on the original data")
    with engine(config.name, config.resources.autoscales) as cluster:
        training = TeacherTrainingConfig(
            teacher=config.teacher,
            train=config.original,
            test=config.test,
            gpus=gpus_per_actor(config.resources, cluster),
            **to_plain(config.teacher_training),
        )
        report = train_teacher(training, cluster)
    say(f"teacher   {report['images']:,} images, {report['steps']:,} steps, top-1 {report['top1']:.4f}")
    return True


def write_page(config: PaperConfig, table: dict[str, Any], command: str) -> str:
    """Write `table.md` and its plots into the folder; returns the page."""
    folder = open_folder(config)
    page = render_table(table, command)
    folder.write_bytes("table.svg", draw_accuracy(table))
    if config.table.lengths:
        folder.write_bytes("lengths.svg", draw_lengths(table))
    if table["by_share"]:
        folder.write_bytes("shares.svg", draw_shares(table))
    folder.write_text("table.md", page)
    return page


def make_table(config: PaperConfig) -> dict[str, Any]:
    """Make what is missing of the table and return all of it, as `table.json` has it.

    A selector or a student that fails is listed under `failed` and costs no other. Raises ConfigError if runs or
    students in the folder were made with other settings, or P is too small for the seeds.
    """
    folder = open_folder(config)
    weights = read_bytes(*open_storage(config.teacher.weights))
    inputs = fingerprints(config, weights)["distill"]
    teacher = {key: value for key, value in inputs.items() if key.startswith("teacher.")}
    start = inputs["student.start"]
    networks = teacher | ({"student.start": start} if start else {})  # tables of earlier versions have no such key
    beside = _tables_beside(config)
    with engine(config.name, config.resources.autoscales) as cluster:
        _check_positives(config)
        original = None
        if config.original is not None:
            labelled = index_sources("original", config.original, config.teacher, _warn)
            original = TrainingSet(labelled.count, labelled.requests, {"original": config.original}, folder)
        students = students_of(config)
        jobs: list[StudentJob] = []
        failed: dict[str, str] = {}
        runs: dict[str, dict[str, Any]] = {}
        for seed, per_class in dict.fromkeys((s.seed, s.per_class) for s in students):
            mine = [s for s in students if (s.seed, s.per_class) == (seed, per_class)]
            run = _run_config(config, folder, seed, per_class)
            say(f"selector  {per_class} per class, seed {seed}")
            try:
                _score(run, mine)
                made, runs[f"{per_class}-seed{seed}"] = _jobs_of_run(config, run, mine, folder, original, networks)
            except RunError as error:
                failed[f"{per_class} per class, seed {seed}"] = cause_of(error)
                say(f"          failed: {cause_of(error)}")
                continue
            jobs += made
        unlike: dict[str, StudentJob] = {}
        for job in jobs:
            unlike.setdefault(job.training, job)
        missing = _missing(folder, list(unlike.values()))
        shared = Shared.of(weights)
        lost = train_students(missing, len(unlike) - len(missing), shared, cluster)
        jobs = [job for job in jobs if unlike[job.training].key not in lost]
        if not jobs:
            raise RunError(f"none of the table's students could be made: {next(iter((failed | lost).values()))}")
        trained = list(dict.fromkeys(unlike[job.training].key for job in jobs))
        results = _measure_students(config, folder, cluster, trained, shared, teacher)
    table = {
        "name": config.name,
        "students": {
            job.key: {k: v for k, v in (results[unlike[job.training].key] | job.facts).items() if k not in KEPT_APART}
            for job in jobs
        },
        "teacher": {k: v for k, v in results["teacher"].items() if k not in KEPT_APART},
        "failed": failed | lost,
        "runs": runs,
        "networks": {"teacher": _size(config.teacher.arch, config), "student": _size(config.student.arch, config)},
        "batch_size": config.distill.batch_size,
        "machine": describe_machine() | {"gpus": cluster.gpus},
    }
    table["by_share"] = by_share([table, *beside]) if beside else {}
    folder.write_json("table.json", table)
    return table


def _tables_beside(config: PaperConfig) -> list[dict[str, Any]]:
    """Those of `table.beside`; ConfigError if one is none, or not one of a corpus with truth, as this must be too."""
    if config.table.beside and not has_truth(config):
        raise ConfigError(["table.beside: needs truth in `corpus`, such as relevant_labels"])
    tables = []
    for uri in config.table.beside:
        table = json.loads(read_bytes(*open_storage(uri)))
        if not any(run.get("relevant") for run in table["runs"].values()):
            raise ConfigError([f"table.beside: {uri} does not say what share of its corpus is relevant: make it anew"])
        tables.append(table)
    return tables


def _run_config(config: PaperConfig, folder: RunFolder, seed: int, per_class: int) -> RunConfig:
    """The run whose scores all rows with this seed and this many positives choose from."""
    largest = max(config.table.per_class)
    (positives,) = config.positives
    plain = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
    return RunConfig(
        **{
            **plain,
            "seed": config.seed + seed,
            # Nested: the 20 of a class are among its 100 of the same seed.
            "positives": replace(
                positives, per_class=per_class, skip_per_class=positives.skip_per_class + seed * largest
            ),
            "output": folder.uri_of(f"runs/{per_class}-seed{seed}"),
            # One pass serves all rows.
            "score": replace(config.score, also=tuple(sorted({*config.score.also, *own_columns(config)}))),
        }
    )


def _score(run: RunConfig, students: list[TableStudent]) -> None:
    """The run up to the scores, or to the plan if all learn from P or the original data."""
    try:
        run_pipeline(run, until="score" if _any_selects([s.row for s in students]) else "plan")
    except StaleResultsError as error:
        # Its own advice is `--redo`, which a table does not have.
        raise ConfigError(
            [
                *error.changed,
                f"output: {run.output} was made before that: delete that folder, or choose another output",
            ]
        ) from error


def _any_selects(rows: list[TableRow]) -> bool:
    """Whether any of them takes images of the corpus, or as many as one that does."""
    return any(row.data == "selection" or row.budget for row in rows)


def _warn(text: str) -> None:
    say(f"          warning: {text}")


def _check_positives(config: PaperConfig) -> None:
    """ConfigError unless there are positives for all seeds: before the first run, not after hours."""
    (source,) = config.positives
    labelled = index_sources("positives", (source,), config.teacher, _warn)
    counts = labelled.class_counts(config.teacher.num_classes)
    seeds = config.table.first_seed + max(config.table.seeds, config.table.main_seeds or 0)
    needed = seeds * max(config.table.per_class)
    if counts.min() < needed:
        raise ConfigError(
            [
                f"positives: class {int(counts.argmin())} has {counts.min()} images, but table.seeds = "
                f"{seeds} times {max(config.table.per_class)} per class are {needed}: give more labelled "
                "images, or lower one of them"
            ]
        )


def _jobs_of_run(
    config: PaperConfig,
    run: RunConfig,
    students: list[TableStudent],
    folder: RunFolder,
    original: TrainingSet | None,
    networks: dict[str, Any],
) -> tuple[list[StudentJob], dict[str, Any]]:
    """The students' trainings, their selections made, and what is known of the run; `networks` are their inputs."""
    run_folder = RunFolder(run.output)
    units = read_units(run_folder)
    positives = positives_of(run_folder, run, units)
    planned = run_folder.marker("plan")
    assert planned is not None
    reference = original.count if original else planned["counts"]["corpus"]
    steps = total_steps(config.distill, reference)
    selections = _make_selections(config, run, run_folder, units, [s.row for s in students])
    scored = run_folder.marker("score")
    jobs = []
    for student in students:
        row, made = student.row, selections.get(student.row.name)
        data = positives if row.data == "positives" else original
        if original and row.data == "original" and row.budget:
            data = original.sample(positives.count + selections["pu_s1"]["n_selected"], run.seed)
        if made is not None:
            data = positives.with_selected(f"rows/{row.name}", made["n_selected"])
        assert data is not None
        share = data.count / reference if student.epochs else student.length
        own_steps = max(1, round(steps * share)) * row.longer
        distill = DistillConfig(**{**to_plain(config.distill), "steps": own_steps, **row.distill})
        truth = made["truth"] if made else None
        facts = {
            "row": row.name,
            "title": row.title,
            "positives_per_class": student.per_class,
            "seed": student.seed,
            "equal": student.equal,
            "precision": truth["precision"] if truth else None,
            "recall": truth["recall"] if truth else None,
            "inputs": {
                "distill": {k: v for k, v in to_plain(distill).items() if k not in NOT_OF_A_STUDENT},
                "student": run.student.arch,
                "selection": made and made["selection"],
                # Scores and plan that were made anew, or that grew, are others.
                "scores": scored["finished"] if made and scored else None,
                "positives": planned["finished"] if row.data != "original" else None,
                "original": [data.count, to_plain(config)["original"]] if row.data == "original" else None,
                "seed": run.seed,
                **networks,
            },
        }
        jobs.append(StudentJob(student.key, replace(run, distill=distill), data, folder, facts))
    of_scores = selections["pu_s1"]["truth"] if selections else None
    known = {
        "prior": run_folder.read_json("selector/prior.json"),
        "average_precision": of_scores["average_precision"] if of_scores else None,
        "relevant": of_scores["relevant"] / planned["counts"]["corpus"] if of_scores else None,
        "seconds": {stage: run_folder.spent(stage) for stage in ("selector", "score")},
    }
    return jobs, known


def _make_selections(
    config: PaperConfig, run: RunConfig, folder: RunFolder, units: list[Unit], rows: list[TableRow]
) -> dict[str, SelectionRecord]:
    """{row: summary} of the rows that select, and `pu_s1` with them; what is there is not made again."""
    summaries: dict[str, SelectionRecord] = {}
    selecting = {row.name: row for row in rows if row.data == "selection"}
    # What other rows take depends on what pu_s1 takes.
    for row in ({"pu_s1": BUILT_IN["pu_s1"]} | selecting).values() if _any_selects(rows) else ():
        changes = dict(row.selection)
        if row.budget:
            taken = summaries["pu_s1"]["n_selected"]
            changes["budget"] = taken if row.budget == "pu_s1" else config.table.budget or max(1, taken // 2)
        selection = SelectionConfig(**{**to_plain(run.selection), **changes})
        made = folder.find_record(selection_in(f"rows/{row.name}"))
        if made is None or made["selection"] != to_plain(selection):
            made = select_images(folder, replace(run, selection=selection), units, f"rows/{row.name}")
        summaries[row.name] = made
    return summaries


def _missing(folder: RunFolder, jobs: list[StudentJob]) -> list[StudentJob]:
    """Jobs without a result; ConfigError if there is one that was made with other settings."""
    missing = []
    changed: dict[str, list[str]] = {}
    for job in jobs:
        result = folder.read_json(f"students/{job.key}.json")
        if result is None:
            missing.append(job)
        elif result["inputs"] != job.facts["inputs"]:
            for key in changed_inputs(result["inputs"], job.facts["inputs"]):
                changed.setdefault(key, []).append(job.key)
    if changed:
        raise ConfigError(
            [
                f"{key}: has changed since {names[0]} and {len(names) - 1} other students in {folder.display}/students "
                "were made; delete their files there, or choose another output"
                for key, names in changed.items()
            ]
        )
    return missing


def _measure_students(
    config: PaperConfig,
    folder: RunFolder,
    cluster: Cluster,
    keys: list[str],
    weights: Shared,
    teacher: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """{key: result} of the students and `teacher`; test accuracies are added to those that have none."""
    run_config = _run_config(config, folder, config.table.first_seed, config.table.per_class[0])
    run_folder = RunFolder(run_config.output)
    units = read_units(run_folder)
    run = RunContext(run_folder, run_config, cluster, weights, units)
    files = {"teacher": "teacher.json"} | {key: f"students/{key}.json" for key in keys}
    results: dict[str, dict[str, Any]] = {name: folder.read_json(file) or {} for name, file in files.items()}
    tested = _test_set(run_folder, run_config)
    waiting = [key for key in keys if results[key].get("tested") != tested]
    networks = {}
    if (results["teacher"].get("inputs"), results["teacher"].get("tested")) != (teacher, tested):
        results["teacher"] = {"inputs": teacher}
        networks["teacher"] = (config.teacher.arch, weights)
    while waiting or networks:
        size = 0
        while waiting and size < EVALUATED_BYTES:
            key = waiting.pop(0)
            state = folder.read_bytes(f"students/{key}.pt")
            networks[key] = (config.student.arch, Shared.of(state))
            size += len(state)
        for name, accuracy in measure_accuracy(run, networks)[0].items():
            results[name] |= accuracy | {"tested": tested}
            folder.write_json(files[name], results[name])
        networks = {}
    return results


def _test_set(folder: RunFolder, config: RunConfig) -> str:
    """SHA-256 of what accuracies depend on beside the network: the test set's config, its files' sizes and times."""
    files = read_files(folder).filter(pc.field("role") == "test").select(["uri", "size", "mtime"])
    return hashlib.sha256(json.dumps([to_plain(config)["test"], files.to_pylist()]).encode()).hexdigest()


def _size(arch: str, config: PaperConfig) -> dict[str, Any]:
    network, t = new_network(arch, config.teacher), config.teacher
    return {
        "arch": arch,
        "parameters": count_parameters(network),
        "multiply_adds": count_multiply_adds(network, channels=t.channels, input_size=t.input_size),
    }
