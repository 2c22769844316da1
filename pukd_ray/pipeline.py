"""The story of a run: the stages in order, each skipped if it is done, each committed by its marker."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pukd_ray.config import ConfigError, RunConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.stored_units import read_units
from pukd_ray.errors import RunError
from pukd_ray.estimate import lines_of
from pukd_ray.preflight import to_yaml
from pukd_ray.report.tracking import track
from pukd_ray.resume import Progress, check_progress
from pukd_ray.run.ahead import duration, expected_seconds, seconds_left
from pukd_ray.run.folder import RunFolder, absolute
from pukd_ray.run.lease import Lease
from pukd_ray.run.records import ESTIMATE, METRICS
from pukd_ray.run.stages import STAGE_NAMES, Stage, stages_until
from pukd_ray.runtime.console import at_stage, doing, say
from pukd_ray.runtime.engine import Cluster, cause_of, engine, gpus_per_actor, told_by_worker
from pukd_ray.runtime.environment import under_job
from pukd_ray.runtime.timing import Stopwatch
from pukd_ray.storage import is_local, open_storage, redact


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: str
    """Absolute path or URI."""
    metrics: dict[str, Any]
    """Content of `metrics.json`."""


def run_pipeline(config: RunConfig, *, redo: str | None = None, until: str = "report") -> RunResult:
    """Run all stages that are not done, up to `until`, on the cluster of RAY_ADDRESS or a private one.

    Raises ConfigError for what the config's owner must mend (a changed key needs `redo`, the first stage to do
    again), RunError for a run that cannot go on.
    """
    folder = open_folder(config)
    _make(folder)
    with Lease(folder, doing) as lease:
        progress = check_progress(folder, config, redo, stages_until(until), lease.take)
        if progress.pending:
            for remark in progress.listing.remarks:
                say(f"          {remark}")
            watch = Stopwatch()
            with engine(config.name, config.resources.autoscales) as cluster:
                _check_cluster(config, cluster, folder)
                say(f"ray       {cluster.describe()}, started in {watch.seconds:.1f} s")
                held = lease.take()
                try:
                    _run_stages(held, config, cluster, progress)
                except Exception as error:
                    if not held.lease_is_lost():
                        _track(held, config, until, _told(error))
                    raise
                _track(held, config, until)
        else:
            say(f"finished  all stages of {folder.display} are done; nothing to do (--redo STAGE does a stage again)")
    return RunResult(folder.display, folder.read_json("metrics.json") or {})


def _track(folder: RunFolder, config: RunConfig, until: str, failed: str | None = None) -> None:
    """Tell the trackers of a whole run; parts of one, which studies make, are nothing to follow."""
    if until == STAGE_NAMES[-1]:
        track(folder, config, failed)


def open_folder(config: RunConfig) -> RunFolder:
    """The run's folder; under a job a relative output would vanish with the job's working directory."""
    path = Path(config.output.removeprefix("file://")).expanduser()
    if under_job() and is_local(config.output) and not path.is_absolute():
        raise ConfigError(
            [f"output: {config.output} is relative; under `ray job submit` give an absolute path or a URI"]
        )
    try:
        open_storage(config.output)
    except (ValueError, OSError) as error:
        raise ConfigError([f"output: {error}"]) from error
    return RunFolder(absolute(config.output))


def _make(folder: RunFolder) -> None:
    """A local folder that cannot be made is a fault of the config, and known before Ray starts."""
    if not is_local(folder.uri):
        return
    try:
        Path(folder.root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            [f"output: {folder.root} cannot be made ({error.strerror}): name a folder that this user may write to"]
        ) from error


def _run_stages(folder: RunFolder, config: RunConfig, cluster: Cluster, progress: Progress) -> None:
    folder.write_text("config.yaml", to_yaml(config))
    run = RunContext(folder, config, cluster, Shared.of(progress.weights), listing=progress.listing.table)
    expected = _expected_seconds(folder)
    for number, stage in enumerate(progress.pending, 1):
        if stage.name != "plan" and not run.units:
            run = replace(run, units=read_units(folder, progress.gone))
        later = seconds_left((each.name for each in progress.pending[number:]), expected, {})
        with at_stage(stage.name, expected.get(stage.name), later):
            seconds, counts = _run_stage(stage, run, progress.inputs[stage.name])
        against = f" (estimated {expected[stage.name]:.1f})" if stage.name in expected else ""
        left = f"; {duration(later)} left" if later else ""
        say(f"{stage.name:<9} done in {seconds:5.1f} s{against}: {_shown(counts)}{left}")
    if folder.exists("metrics.json"):
        _add_seconds(folder)


def _expected_seconds(folder: RunFolder) -> dict[str, float]:
    """By stage, as `pukd estimate` found for this run, whose lines are shown again; empty without."""
    found = folder.find_record(ESTIMATE)
    for line in lines_of(found) if found else ():
        say(line)
    return expected_seconds(found)


def _run_stage(stage: Stage, run: RunContext, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Run a stage and commit it: (seconds of this attempt, its counts)."""
    watch = Stopwatch()
    if stage.resumable:
        run.folder.write_json(f"markers/{stage.name}.inputs.json", inputs)
    try:
        counts = stage.function()(run)
    except BaseException as error:
        with suppress(RunError):  # of storage that fails: the first fault is the one to tell
            run.folder.record_attempt(stage.name, watch.seconds, _told(error))
        if isinstance(error, Exception) and (told := told_by_worker(error)):
            raise RunError(told) from error
        raise
    run.folder.finish(stage.name, inputs, watch.seconds, counts)
    return watch.seconds, counts


def _told(error: BaseException) -> str:
    """Why an attempt failed, on one line and without credentials."""
    cause = cause_of(error) if isinstance(error, Exception) else "interrupted"
    return redact(" ".join(cause.split())[:1000])


def _check_cluster(config: RunConfig, cluster: Cluster, folder: RunFolder) -> None:
    """ConfigError unless the cluster has what the config asks for, and all of its nodes reach all files."""
    gpus_per_actor(config.resources, cluster)
    if (cluster.nodes == 1 and not cluster.autoscales) or config.output_is_shared:
        return
    paths = [("output", folder.display)]
    for role, sources in sources_by_role(config).items():
        paths += [(f"{role}.uri", uri) for source in sources for uri in source.uris]
    faults = [
        f"{key}: {path} is a local path, but the cluster has {cluster.describe()}: use object storage, or set "
        "output_is_shared: true if every node mounts it"
        for key, path in paths
        if is_local(path)
    ]
    if faults:
        raise ConfigError(faults)


def _add_seconds(folder: RunFolder) -> None:
    """Add each stage's seconds to `metrics.json`; those of the last stages are known only at the end."""
    markers = {name: marker for name in STAGE_NAMES if (marker := folder.marker(name)) is not None}
    metrics = folder.read_record(METRICS)
    metrics["seconds"] = {name: marker["seconds"] for name, marker in markers.items()}
    # Stages without distributed passes compute all the time.
    metrics["computing_seconds"] = {
        name: marker["counts"].get("computing_seconds", marker["seconds"]) for name, marker in markers.items()
    }
    folder.write_record(METRICS, metrics)


def _shown(counts: dict[str, Any]) -> str:
    figures = {k: v for k, v in counts.items() if not isinstance(v, dict) and k != "computing_seconds"}
    return ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in figures.items())
