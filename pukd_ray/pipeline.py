"""The story of a run: the stages in order, each skipped if it is done, each committed by its marker."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from pukd_ray import __version__
from pukd_ray.config import ConfigError, RunConfig, to_plain
from pukd_ray.corpus.plan import Drift, Listing, compare_listing, list_inputs, plan_inputs, sources_by_role
from pukd_ray.corpus.units import Unit, units_from_table
from pukd_ray.engine import Cluster, engine, gpus_per_actor, under_job
from pukd_ray.preflight import to_yaml
from pukd_ray.progress import Stopwatch, say
from pukd_ray.run_folder import FORMAT_VERSION, STAGES, RunFolder, absolute, changed_inputs
from pukd_ray.storage import is_local, open_storage, read_bytes

# The config keys that each stage adds to what its result depends on; a stage depends on all earlier ones too.
# `name`, `output` and `resources` change nothing, and neither do keys that only say how a stage is cut up.
DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "plan": ("positives", "corpus", "test"),
    "selector": ("seed", "teacher", "selector"),
    "score": ("score.keep_images", "score.keep_above"),
    "select": ("selection",),
    "distill": ("student", "distill"),
    "evaluate": (),
    "report": (),
}
NOT_A_RESULT = ("distill.memory_gib",)
# These go on with what an interrupted attempt left, finished chunks and checkpoints: never under other settings.
RESUMED = ("score", "distill")


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: str
    """Absolute path or URI."""
    metrics: dict[str, Any]
    """Content of `metrics.json`."""


@dataclass(frozen=True)
class Progress:
    """What is to do, found out without Ray."""

    pending: tuple[str, ...]
    inputs: dict[str, dict[str, Any]]
    listing: Listing
    drift: Drift
    weights: bytes


def run_pipeline(config: RunConfig, *, redo: str | None = None, until: str = "report") -> RunResult:
    """Run all stages that are not done, up to `until`, on the cluster of RAY_ADDRESS or a private one.

    Raises ConfigError for what the config's owner must mend (a changed key needs `redo`, the first stage to do
    again), RunError for a run that cannot go on.
    """
    folder = open_folder(config)
    stages = STAGES[: STAGES.index(until) + 1]
    progress = check_progress(folder, config, redo, stages)
    if progress.pending:
        for remark in progress.listing.remarks:
            say(f"          {remark}")
        watch = Stopwatch()
        with engine(config.name) as cluster:
            _check_cluster(config, cluster, folder)
            say(f"ray       {cluster.describe()}, started in {watch.seconds:.1f} s")
            _run_stages(folder, config, cluster, progress)
    else:
        say(f"finished  all stages of {folder.display} are done; nothing to do (--redo STAGE does a stage again)")
    return RunResult(folder.display, folder.read_json("metrics.json") or {})


def open_folder(config: RunConfig) -> RunFolder:
    """The run's folder; under a job a relative output would vanish with the job's working directory."""
    if (
        under_job()
        and is_local(config.output)
        and not Path(config.output.removeprefix("file://")).expanduser().is_absolute()
    ):
        raise ConfigError(
            [f"output: {config.output} is relative; under `ray job submit` give an absolute path or a URI"]
        )
    try:
        open_storage(config.output)
    except (ValueError, OSError) as error:
        raise ConfigError([f"output: {error}"]) from error
    return RunFolder(absolute(config.output))


# -- what is to do ----------------------------------------------------------------------------------------------


def fingerprints(config: RunConfig, weights: bytes) -> dict[str, dict[str, Any]]:
    """What each stage's result depends on: config keys, the weights' SHA-256, the format version of its files."""
    plain = to_plain(config)
    inputs: dict[str, dict[str, Any]] = {}
    known: dict[str, Any] = {}
    for stage in STAGES:
        for key in DEPENDS_ON[stage]:
            known |= {k: v for k, v in _flatten(key, _lookup(plain, key)).items() if k not in NOT_A_RESULT}
        if stage == "selector":
            known["teacher.weights"] = hashlib.sha256(weights).hexdigest()
        known[f"format.{stage}"] = FORMAT_VERSION[stage]
        inputs[stage] = dict(known)
    return inputs


def teacher_inputs(config: RunConfig, weights: bytes) -> dict[str, Any]:
    """Of the fingerprints what is the teacher's."""
    return {k: v for k, v in fingerprints(config, weights)["selector"].items() if k.startswith("teacher.")}


def _lookup(plain: Any, key: str) -> Any:
    for part in key.split("."):
        plain = plain[part]
    return plain


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in _flatten(f"{prefix}.{name}", inner).items()}


class StaleResultsError(ConfigError):
    """The folder holds results of another config, other weights or other files; `changed` has a line for each."""

    def __init__(self, changed: list[str], advice: str) -> None:
        super().__init__([*changed, advice])
        self.changed = changed


def check_progress(folder: RunFolder, config: RunConfig, redo: str | None, stages: tuple[str, ...]) -> Progress:
    """Compare the run's markers with config, weights and files.

    StaleResultsError if they differ and no `redo` covers it.
    """
    weights = read_bytes(*open_storage(config.teacher.weights))
    inputs = fingerprints(config, weights)
    listing = list_inputs(sources_by_role(config))
    markers = {stage: folder.marker(stage) for stage in STAGES}
    stale: dict[str, list[str]] = {}
    for stage in STAGES:
        marker = markers[stage]
        if marker is not None and (keys := changed_inputs(marker["inputs"], inputs[stage])):
            stale[stage] = keys
    for stage in RESUMED:
        begun = folder.read_json(f"markers/{stage}.inputs.json")
        if begun is not None and markers[stage] is None and (keys := changed_inputs(begun, inputs[stage])):
            stale[stage] = keys
    drift = Drift(0, ())
    if markers["plan"] is not None and "plan" not in stale:
        drift = compare_listing(folder.read_table("files.parquet"), listing.table)
    if drift.faults:
        stale["plan"] = [*stale.get("plan", []), *drift.faults]
    first_stale = next((s for s in STAGES if s in stale), None)
    if first_stale and (redo is None or STAGES.index(redo) > STAGES.index(first_stale)):
        done = [s for s in STAGES[STAGES.index(first_stale) :] if markers[s] is not None or folder.has_outputs(s)]
        faults = [
            f if ":" in f else f"{f}: has changed since stage {first_stale} of {folder.display} was done"
            for f in stale[first_stale]
        ]
        raise StaleResultsError(
            faults,
            f"output: results of {', '.join(done)} are there; --redo {first_stale} moves them to old/ and does "
            "these stages again, or choose another output",
        )
    if redo is not None:
        again = STAGES[STAGES.index(redo) :]
        if any(folder.has_outputs(s) or markers[s] for s in again):
            say(f"          {', '.join(again)}: earlier results moved to {folder.retire(again)}")
        markers |= dict.fromkeys(again)
        drift = Drift(0, ()) if redo == "plan" else drift
    elif drift.added:
        grown = STAGES[STAGES.index("select") :]
        if any(folder.has_outputs(s) or markers[s] for s in grown):
            say(
                f"          the corpus has {drift.added} new files: only they are scored; what was made without "
                f"them moves to {folder.retire(grown)}"
            )
        markers |= dict.fromkeys((*grown, "plan", "score"))
    pending = tuple(s for s in stages if markers[s] is None)
    return Progress(pending, inputs, listing, drift, weights)


def _check_cluster(config: RunConfig, cluster: Cluster, folder: RunFolder) -> None:
    gpus_per_actor(config.resources, cluster)
    if (cluster.nodes == 1 and not cluster.autoscales) or config.output_is_shared:
        return
    faults = []
    if is_local(folder.uri):
        faults.append(
            f"output: {folder.display} is a local path, but the cluster has {cluster.describe()}: "
            "use object storage, or set output_is_shared: true if every node mounts it"
        )
    for role, sources in sources_by_role(config).items():
        faults += [
            f"{role}.uri: {uri} is a local path, but the cluster has {cluster.describe()}: use object storage, or "
            "set output_is_shared: true if every node mounts it"
            for source in sources
            for uri in source.uris
            if is_local(uri)
        ]
    if faults:
        raise ConfigError(faults)


# -- the stages -------------------------------------------------------------------------------------------------


def _run_stages(folder: RunFolder, config: RunConfig, cluster: Cluster, progress: Progress) -> None:
    folder.write_text("config.yaml", to_yaml(config))
    for stage in progress.pending:
        watch = Stopwatch()
        if stage in RESUMED:
            folder.write_json(f"markers/{stage}.inputs.json", progress.inputs[stage])
        try:
            counts = _stage(stage, folder, config, cluster, progress)()
        except BaseException:
            folder.record_attempt(stage, watch.seconds)
            raise
        folder.finish(stage, progress.inputs[stage], watch.seconds, counts)
        if stage == "report":
            _add_seconds(folder)
        shown = ", ".join(
            f"{key} {_shown(value)}"
            for key, value in counts.items()
            if not isinstance(value, dict) and key != "computing_seconds"
        )
        say(f"{stage:<9} done in {watch.seconds:5.1f} s: {shown}")


def _stage(
    stage: str, folder: RunFolder, config: RunConfig, cluster: Cluster, progress: Progress
) -> Callable[[], dict[str, Any]]:
    # Each stage is imported when it runs: the driver needs little of them, and a finished run none.
    if stage == "plan":
        return partial(_plan, folder, config, cluster, progress.listing.table)
    if stage == "selector":
        from pukd_ray.selection.selector import train_selector

        return partial(train_selector, folder, config, cluster, _units(folder), progress.weights)
    if stage == "score":
        from pukd_ray.selection.scoring import score_corpus

        return partial(score_corpus, folder, config, cluster, _units(folder), progress.weights)
    if stage == "select":
        from pukd_ray.selection.select import select_images

        def select() -> dict[str, Any]:
            summary = select_images(folder, config, _units(folder))
            estimated = summary["estimated"]
            return {k: summary[k] for k in ("n_selected", "n_duplicates")} | {
                "precision (estimated)": round(estimated["precision"], 3),
                "recall (estimated)": round(estimated["recall"], 3),
            }

        return select
    if stage == "distill":
        from pukd_ray.distillation.distill import distill_student

        return partial(distill_student, folder, config, cluster, _units(folder), progress.weights)
    if stage == "evaluate":
        from pukd_ray.distillation.evaluate import evaluate_run

        return partial(evaluate_run, folder, config, cluster, _units(folder), progress.weights)
    from pukd_ray.report.page import write_report

    return partial(write_report, folder, config)


def _units(folder: RunFolder) -> list[Unit]:
    return units_from_table(folder.read_table("plan.parquet"))


def _plan(folder: RunFolder, config: RunConfig, cluster: Cluster, listing: pa.Table) -> dict[str, Any]:
    counts = plan_inputs(folder, sources_by_role(config), listing, lambda text: say(f"          warning: {text}"))
    folder.write_json("environment.json", _environment(cluster))
    return counts


def _add_seconds(folder: RunFolder) -> None:
    markers = {stage: folder.marker(stage) for stage in STAGES}
    metrics = folder.read_json("metrics.json")
    metrics["seconds"] = {stage: marker["seconds"] for stage, marker in markers.items() if marker}
    # Stages without distributed passes compute all the time.
    metrics["computing_seconds"] = {
        stage: marker["counts"].get("computing_seconds", marker["seconds"])
        for stage, marker in markers.items()
        if marker
    }
    folder.write_json("metrics.json", metrics)


def _environment(cluster: Cluster) -> dict[str, Any]:
    packages = ("ray", "torch", "torchvision", "pyarrow", "numpy", "pillow", "scikit-learn")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"pukd_ray": __version__} | {name: version(name) for name in packages},
        "cluster": vars(cluster),
        "cpus_of_driver": os.cpu_count(),
        "commit": commit.stdout.strip() or None,
    }


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
