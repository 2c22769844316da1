"""`ray job submit` on a head of a test's own: logs, exit statuses, stopping and going on, two at once, metrics."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from heads import Head, answered, environment, start_head, wait_for
from ray.job_submission import JobStatus
from synthetic import write_config, write_task

pytestmark = pytest.mark.timeout(600)

# What the seeds fix of the bundled demo. On one machine it is the same bit for bit; other processors, and other layouts
# in memory, round otherwise, which moves single images across the cut. A change of structure leaves these as they are.
PINNED = {
    "prior": (0.24862, 2e-3),
    "n_selected": (1538, 8),
    "precision": (0.95124, 4e-3),
    "recall": (0.91438, 4e-3),
    "average_precision": (0.98293, 1e-3),
    "student": (0.7632, 4e-3),
    "baseline_positives": (0.7456, 4e-3),
}
"""Figure -> (value, how far it may be off)."""

CHUNKS = 40  # a busy head takes seconds to stop a job


def write_run(folder: Path) -> Path:
    """A tiny task named after `folder`, scored in `CHUNKS` chunks; its config."""
    config = write_task(folder, images=60 * CHUNKS, files=CHUNKS) | {"name": folder.name}
    config["score"]["chunk_images"] = 60
    return write_config(folder, config)


def http_status(request: Request) -> int:
    """Of its answer, an error or not."""
    try:
        with urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def refuse_strangers(head: Head, folder: Path) -> None:
    """Neither a job nor a driver gets in without the token; jobs with it ran above."""
    for header, status in ({}, 401), ({"Authorization": "Bearer wrong"}, 403):
        submit = Request(f"{head.dashboard}/api/jobs/", b'{"entrypoint": "true"}', header, method="POST")
        assert answered(partial(http_status, submit)) == status
    script = Path(__file__).parents[1] / "jobs" / "full_pipeline.py"
    command = [sys.executable, str(script), "--output", str(folder / "strange")]
    strange = environment(RAY_ADDRESS=f"127.0.0.1:{head.gcs}", RAY_AUTH_TOKEN="wrong")
    ended = subprocess.run(command, env=strange, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "asks for its token" in ended.stderr, ended


def test_the_demo_passes_as_a_job_on_one_cpu(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    seen: dict[tuple[str, ...], float] = {}
    with start_head(tmp_path, 1) as head:
        relative = head.submit("--output runs/x")
        job = head.submit(f"--output {output}")
        deadline = time.monotonic() + 540
        while time.monotonic() < deadline and not head.status(job).is_terminal():
            seen |= head.figures()  # what Prometheus sees; the last of them lives for some two seconds
            time.sleep(0.3)
        logs = head.logs(job)
        assert head.status(job) == JobStatus.SUCCEEDED, logs
        trainings = {name: head.tasks(name) for name in ("train-selector", "train-student")}
        refuse_strangers(head, tmp_path)
        assert head.exit_status(relative) == 2
        assert "output: runs/x is relative" in head.logs(relative)
    assert logs.splitlines()[-1] == f"report: {output}/report.html"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["n_corpus"] == 6400
    assert metrics["rejected_by_reason"] == {
        "corrupt": 3,
        "empty": 6,
        "not_an_image": 4,
        "too_large": 3,
        "truncated": 4,
    }
    run = yaml.safe_load((output / "config.yaml").read_text())["name"]
    assert seen["images_scored_total", run] == metrics["n_scored"]
    reasons = {key[2]: value for key, value in seen.items() if key[:2] == ("images_rejected_total", run)}
    assert reasons == metrics["rejected_by_reason"]
    assert seen["images_selected", run] == metrics["n_selected"]
    assert seen["top1", run, "student"] == pytest.approx(metrics["student"]["top1"])
    assert seen["stage_done", run, "score"] == seen["stage_total", run, "score"] == 6400
    assert {key[2] for key in seen if key[:2] == ("loss", run)} == {"selector", "student", "baseline_positives"}
    for tasks in trainings.values():  # one worker on a CPU is a task
        assert [task.state for task in tasks] == ["FINISHED"]
        assert tasks[0].worker_pid
    figures = metrics["selection"] | {"prior": metrics["prior"]["value"], "n_selected": metrics["n_selected"]}
    figures |= {arm: metrics[arm]["top1"] for arm in ("student", "baseline_positives")}
    assert figures == {name: pytest.approx(value, abs=off) for name, (value, off) in PINNED.items()}
    assert metrics["selection"]["average_precision"] > 0.95
    assert metrics["student"]["top1"] > metrics["baseline_positives"]["top1"]
    assert json.loads((output / "environment.json").read_text())["cluster"]["cpus"] == 1


@pytest.mark.slow
def test_two_jobs_at_once_and_one_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    files = {name: write_run(tmp_path / name) for name in ("birds", "boats")}
    chunks = tmp_path / "boats" / "run" / "markers" / "score"
    wrong = write_run(tmp_path / "wrong")
    pq.write_table(pa.table({"image": [b"no image"] * 20, "label": [0] * 20}), tmp_path / "wrong" / "p.parquet")
    with start_head(tmp_path, 2) as head:
        birds, boats = (head.submit(f"--config {file}") for file in files.values())
        wait_for(lambda: len(list(chunks.glob("*.json"))) >= 2, 300)
        head.stop(boats)
        head.wait(boats)
        assert head.status(boats) == JobStatus.STOPPED
        kept = {path: path.stat().st_mtime_ns for path in chunks.glob("*.json")}
        assert 2 <= len(kept) < CHUNKS

        again = head.submit(f"--config {files['boats']}")
        failing = head.submit(f"--config {wrong}")
        head.wait(birds, again, failing)
        for name, job in {"birds": birds, "boats": again}.items():
            assert head.status(job) == JobStatus.SUCCEEDED, head.logs(job)
            assert head.exit_status(job) == 0
            assert head.logs(job).splitlines()[-1] == f"report: {tmp_path}/{name}/run/report.html"
            assert json.loads((tmp_path / name / "run" / "metrics.json").read_text())["n_scored"] == 60 * CHUNKS
        assert "images are scored already" in head.logs(again)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        assert head.exit_status(failing) == 1
        assert "positives: 0 readable images (20 unreadable)" in head.logs(failing)
