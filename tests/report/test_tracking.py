"""What trackers are told of a run: TensorBoard's files read back, a real MLflow server asked, W&B offline."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pukd_ray import ConfigError, load_config
from pukd_ray.cli import DEMO_CONFIG
from pukd_ray.config import RunConfig, TrackingConfig
from pukd_ray.preflight import to_yaml
from pukd_ray.report import tracking
from pukd_ray.report.tracking import TRACKED, collect, track
from pukd_ray.run.folder import RunFolder

CURVES = {
    "selector/risk": [(1, 0.75), (2, 0.5)],
    "selector/proxy_accuracy": [(10, 0.625)],
    "distill/loss/student": [(20, 1.5), (40, 0.25)],
}
FIGURES = {
    "n_selected": 20.0,
    "prior/value": 0.25,
    "student/top1": 0.75,
    "selection_estimated/precision_interval/lower": 0.5,
    "selection_estimated/precision_interval/upper": 1.0,
}


def config_of(path: Path, **changes: Any) -> RunConfig:
    return load_config(DEMO_CONFIG, {"output": str(path / "run"), "name": "tracked", **changes})


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return config_of(tmp_path)


@pytest.fixture
def folder(config: RunConfig) -> RunFolder:
    """What a finished run has recorded."""
    folder = RunFolder(config.output)
    folder.write_text("config.yaml", to_yaml(config))
    folder.write_text("report.html", "<p>the report")
    folder.write_json(
        "metrics.json",
        {
            "n_selected": 20, "prior": {"value": 0.25, "source": "bbe"}, "trust": {"level": "high", "reasons": []},
            "student": {"top1": 0.75, "top5": None, "per_class": [0.5, 1.0], "arch": "lenet5"},
            "selection_estimated": {"precision_interval": [0.5, 1.0]}, "audit": {"current": True},
        },
    )  # fmt: skip
    folder.write_json(
        "selector/training.json",
        {"loss": "nnpu", "risk": CURVES["selector/risk"], "proxy_accuracy": CURVES["selector/proxy_accuracy"]},
    )
    folder.write_json("student/training.json", {"loss": {"student": CURVES["distill/loss/student"]}})
    folder.finish("report", {}, 1.0, {})
    return folder


def only(**chosen: Any) -> dict[str, Any]:
    return {f"tracking.{k}": v for k, v in {"tensorboard": False, **chosen}.items()}


def test_what_a_run_recorded_is_told(folder: RunFolder, config: RunConfig) -> None:
    run = collect(folder, config)
    assert (run.curves, run.figures, run.name, run.failed) == (CURVES, FIGURES, "tracked", None)
    assert run.files["report.html"] == b"<p>the report"
    assert time.time() - 60 < run.ended < time.time() + 60


def test_a_run_that_failed_early_is_told_as_far_as_it_got(tmp_path: Path, config: RunConfig) -> None:
    run = collect(RunFolder(str(tmp_path / "none")), config, "RunError: no storage")
    assert (run.curves, run.figures, run.files, run.failed) == ({}, {}, {}, "RunError: no storage")


def test_a_tracker_that_fails_costs_a_warning(
    folder: RunFolder, config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []

    def broken(*_: Any) -> tuple[Any, str]:
        raise OSError("https://x/?token=abc\nis away")

    def sound(*arguments: Any) -> tuple[Any, str]:
        told.append(arguments[3])
        return {"run": len(told)}, "somewhere"

    monkeypatch.setattr(tracking, "_TRACKERS", {"mlflow": broken, "wandb": sound})
    monkeypatch.setattr(tracking, "_is_wanted", lambda *_: True)
    for _ in range(2):
        track(folder, config)
    said = capsys.readouterr().out
    assert said.count("warning: tracking.mlflow: OSError: https://x/?token=*** is away: the run itself") == 2
    assert said.count("tracking  wandb: somewhere") == 2
    assert told == [None, {"run": 1}]  # a run that is started again goes on with its own
    track(folder, config_of(Path(folder.root).parent, seed=7))
    assert told[2] is None  # one of other settings is another run


def test_nobody_is_told_who_was_not_named(folder: RunFolder, config: RunConfig) -> None:
    track(folder, config_of(Path(folder.root).parent, **only()))
    assert not folder.exists(TRACKED)
    assert TrackingConfig() == config.tracking


@pytest.mark.parametrize(
    ("name", "value"), [("tensorboard", True), ("mlflow", "http://nowhere:5000"), ("wandb", "project")]
)
def test_a_tracker_that_is_not_installed_is_a_fault(
    tmp_path: Path, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pukd_ray.preflight.loading.find_spec", lambda _: None)
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, **{f"tracking.{name}": value})
    assert caught.value.faults == [f"tracking.{name}: {name} is not installed: pip install 'pukd_ray[{name}]'"]
    assert config_of(tmp_path, **{"tracking.tensorboard": "auto"})


def test_tensorboard_reads_its_files(folder: RunFolder, config: RunConfig) -> None:
    pytest.importorskip("tensorboard", reason="extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # started again, a run replaces its files
        track(folder, config)
    assert len(folder.files("tensorboard")) == 1
    events = EventAccumulator(folder.path("tensorboard"))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == CURVES | {name: [(0, value)] for name, value in FIGURES.items()}
    assert "name: tracked" in events.Tensors("config.yaml/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, with a database and artefacts of its own."""
    if find_spec("mlflow") is None or find_spec("mlflow.server") is None or find_spec("sqlalchemy") is None:
        pytest.skip("mlflow's server is not installed (pip install mlflow)")
    place = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--backend-store-uri=sqlite:///{place}/db", f"--artifacts-destination={place}/files", "--workers=1"]
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", *options]
    with (
        (place / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, process_group=0) as process,
    ):
        try:
            for _ in range(120):
                time.sleep(1)
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, (place / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def test_a_real_mlflow_server_has_the_run(server: str, folder: RunFolder, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    config = config_of(tmp_path, **only(mlflow=server))
    track(folder, config, "RunError: no storage")
    client = MlflowClient(server)
    run_id = folder.read_json(TRACKED)["mlflow"]["run"]
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["failed"] == "RunError: no storage"
    track(folder, config)  # started again, it goes on with the same run, and tells no point twice
    assert folder.read_json(TRACKED)["mlflow"]["run"] == run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tracked")
    assert run.data.params["selector.steps"] == str(config.selector.steps)
    assert run.data.params["teacher.arch"] == "lenet5"
    assert FIGURES.items() <= run.data.metrics.items()
    for name, points in CURVES.items():
        assert sorted((m.step, m.value) for m in client.get_metric_history(run_id, name)) == points
    assert {file.path for file in client.list_artifacts(run_id)} == {"report.html", "metrics.json", "config.yaml"}
    fetched = client.download_artifacts(run_id, "report.html", str(tmp_path))
    assert Path(fetched).read_text() == "<p>the report"
    client.delete_run(run_id)
    track(folder, config)
    assert folder.read_json(TRACKED)["mlflow"]["run"] != run_id


def test_a_server_that_is_away_costs_seconds(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="extra `mlflow` is not installed")
    began = time.monotonic()
    track(folder, config_of(tmp_path, **only(mlflow="http://127.0.0.1:9")))
    assert time.monotonic() - began < 60
    assert "warning: tracking.mlflow: " in capsys.readouterr().out


def test_wandb_offline_keeps_the_run(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(folder, config_of(tmp_path, **only(wandb="a-project")))
    assert "tracking  wandb: project a-project, " in capsys.readouterr().out
    (kept,) = Path(folder.path("wandb")).glob("offline-run-*/run-*.wandb")
    data = kept.read_bytes()
    for word in (b"distill/loss/student", b"student/top1", b"report.html", b"tracked"):
        assert word in data
