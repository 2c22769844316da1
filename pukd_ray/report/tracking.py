"""Trackers: TensorBoard, MLflow, Weights & Biases. Each is one function of what a run has recorded in its folder.

The driver calls them when a run has ended, well or not; nothing else in the package knows of them, and no worker does.
A tracker that fails costs a warning, never the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from pukd_ray.config import RunConfig, TrackingConfig, to_plain
from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.stages import STAGE_NAMES
from pukd_ray.runtime.console import say
from pukd_ray.storage import as_json, is_local, redact

TRACKED = "tracking.json"
"""Of the run folder: which runs of trackers are its own, so that one that is started again goes on with them."""
EVENTS = "tensorboard"
EXPERIMENT = "pukd_ray"
FILES = ("report.html", "metrics.json", "config.yaml")
_PER_CALL = 500  # MLflow takes at most 1,000 metrics and 100 parameters a call
_VALUE_CHARS = 500
_MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # by default a server that is away is waited for for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Tracked:
    """What trackers are told of a run."""

    name: str
    config: Mapping[str, Any]
    """As `to_plain` has it."""
    figures: Mapping[str, float]
    """Of metrics.json, by path: `student/top1`."""
    curves: Mapping[str, list[tuple[int, float]]]
    """(step, value), by stage and name."""
    files: Mapping[str, bytes]
    """Of FILES those that are there."""
    ended: float
    """When its last stage was done, seconds since 1970: the time of all points, so that none counts twice."""
    failed: str | None
    """Why, if it did."""


def track(folder: RunFolder, config: RunConfig, failed: str | None = None) -> None:
    """Tell the trackers that the config names, and TensorBoard where it is installed."""
    wanted = {name: tell for name, tell in _TRACKERS.items() if _is_wanted(name, config.tracking)}
    if not wanted:
        return
    try:
        _tell_all(folder, config, failed, wanted)
    except RunError as error:  # the run's own storage fails: the run will say so itself, if it needs it
        say(f"          warning: tracking: {error}")


def _tell_all(folder: RunFolder, config: RunConfig, failed: str | None, wanted: Mapping[str, _Tell]) -> None:
    run = collect(folder, config, failed)
    mark = sha256(as_json(run.config)).hexdigest()  # a run of other settings is another one
    known = folder.read_json(TRACKED) or {}
    mine = dict(known) if known.get("config") == mark else {"config": mark}
    for name, tell in wanted.items():
        try:
            remember, where = tell(run, folder, config.tracking, mine.get(name))
            mine |= {} if remember is None else {name: remember}
            say(f"tracking  {name}: {where}")
        except Exception as error:  # whatever a tracker or its server does wrong
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            say(f"          warning: tracking.{name}: {why}: the run itself is not touched by it")
    if mine.keys() - {"config"}:
        folder.write_json(TRACKED, mine)


def _is_wanted(name: str, tracking: TrackingConfig) -> bool:
    chosen = getattr(tracking, name)
    return find_spec(name) is not None if chosen == "auto" else bool(chosen)


def collect(folder: RunFolder, config: RunConfig, failed: str | None = None) -> Tracked:
    """Read what the stages that are done have recorded."""
    selector, student = folder.read_json("selector/training.json"), folder.read_json("student/training.json")
    curves: dict[str, list[tuple[int, float]]] = {}
    if selector:
        curves["selector/risk"] = selector["risk"]
        curves["selector/proxy_accuracy"] = selector["proxy_accuracy"]
    for arm, points in student["loss"].items() if student else ():
        curves[f"distill/loss/{arm}"] = points
    finished = [m["finished"] for stage in STAGE_NAMES if (m := folder.marker(stage)) is not None]
    return Tracked(
        name=config.name,
        config=to_plain(config),
        figures=dict(_figures("", folder.read_json("metrics.json") or {})),
        curves={name: [(int(step), float(value)) for step, value in points] for name, points in curves.items()},
        files={name: folder.read_bytes(name) for name in FILES if folder.exists(name)},
        ended=datetime.fromisoformat(max(finished)).timestamp() if finished else 0.0,
        failed=failed,
    )


def _figures(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers below `value`; of lists intervals alone: figures of each class and chunk are in metrics.json."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _figures(f"{path}/{key}".lstrip("/"), inner)
    elif isinstance(value, list) and path.endswith("_interval") and len(value) == 2:
        yield from ((f"{path}/{end}", float(bound)) for end, bound in zip(("lower", "upper"), value, strict=True))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Leaves of a config as MLflow's parameters."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}".lstrip("."), inner)
    else:
        yield path, str(value)[:_VALUE_CHARS]


# -- each tracker: (run, folder, its config, what it returned before) -> (what to remember, where it is) ---------------


def _tensorboard(run: Tracked, folder: RunFolder, tracking: TrackingConfig, known: Any) -> tuple[Any, str]:
    """Event files; those of an earlier end of the run are replaced."""
    del tracking, known
    from torch.utils.tensorboard import SummaryWriter

    with TemporaryDirectory() as place:
        with SummaryWriter(place) as writer:
            for name, points in run.curves.items():
                for step, value in points:
                    writer.add_scalar(name, value, step, walltime=run.ended)
            for name, value in run.figures.items():
                writer.add_scalar(name, value, 0, walltime=run.ended)
            for name, text in _texts(run, folder):
                writer.add_text(name, text, walltime=run.ended)
        events = {file.name: file.read_bytes() for file in Path(place).iterdir()}
    folder.delete_folder(EVENTS)
    for name, data in events.items():
        folder.write_bytes(f"{EVENTS}/{name}", data)
    return None, f"{folder.display}/{EVENTS}"


def _texts(run: Tracked, folder: RunFolder) -> Iterator[tuple[str, str]]:
    """In Markdown: TensorBoard keeps no files."""
    for name in ("config.yaml", "metrics.json"):
        if name in run.files:
            text = run.files[name].decode()
            yield name, "\n".join(f"    {line}" for line in text.splitlines())
    yield "report", f"{folder.display}/report.html" if "report.html" in run.files else "the run has none yet"
    if run.failed:
        yield "failed", run.failed


def _mlflow(run: Tracked, folder: RunFolder, tracking: TrackingConfig, known: Any) -> tuple[Any, str]:
    """A run of the experiment `pukd_ray`, taken up again if the server has it still."""
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking.mlflow
    client = MlflowClient(tracking_uri=uri)
    run_id = known["run"] if known and known["uri"] == uri else None
    if run_id is not None:
        try:
            is_there = client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            is_there = False
        run_id = run_id if is_there else None
    if run_id is None:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
        run_id = client.create_run(number, run_name=run.name).info.run_id
        parameters = [Param(*pair) for pair in _flat("", run.config)]
        for start in range(0, len(parameters), 100):
            client.log_batch(run_id, params=parameters[start : start + 100])
    at = int(1000 * run.ended)
    metrics = [Metric(name, value, at, step) for name, points in run.curves.items() for step, value in points]
    metrics += [Metric(name, value, at, 0) for name, value in run.figures.items()]
    for start in range(0, len(metrics), _PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + _PER_CALL])
    for name, data in run.files.items():
        client.log_text(run_id, data.decode(), name)
    client.set_tag(run_id, "folder", redact(folder.display))
    client.set_tag(run_id, "failed", run.failed or "")
    client.set_terminated(run_id, "FAILED" if run.failed else "FINISHED")
    return {"uri": uri, "run": run_id}, f"run {run_id} of experiment {EXPERIMENT} at {uri}"


def _wandb(run: Tracked, folder: RunFolder, tracking: TrackingConfig, known: Any) -> tuple[Any, str]:
    """A run of the project, gone on with if it is there already."""
    import wandb

    project = tracking.wandb
    settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
    live = wandb.init(
        project=project,
        name=run.name,
        config=dict(run.config),
        id=known["run"] if known and known["project"] == project else None,
        resume="allow",
        dir=folder.root if is_local(folder.uri) else gettempdir(),
        settings=settings,
        notes=run.failed,
    )
    for name, points in run.curves.items():
        live.define_metric(name, step_metric=f"{name}/step")
        for step, value in points:
            live.log({name: value, f"{name}/step": step})
    live.summary.update(dict(run.figures))
    artifact = wandb.Artifact(f"run-{live.id}", type="run")
    for name, data in run.files.items():
        with artifact.new_file(name, mode="wb") as sink:
            sink.write(data)
    live.log_artifact(artifact)
    where = live.url or live.dir
    live.finish(exit_code=1 if run.failed else 0)
    return {"project": project, "run": live.id}, f"project {project}, {where}"


_Tell = Callable[[Tracked, RunFolder, TrackingConfig, Any], tuple[Any, str]]
_TRACKERS: dict[str, _Tell] = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
