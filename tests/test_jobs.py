"""`ray job submit` on a head of a test's own: logs, exit statuses, metrics."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from heads import start_head
from ray.job_submission import JobStatus

pytestmark = pytest.mark.timeout(600)


def test_the_demo_passes_as_a_job_on_one_cpu(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    seen: dict[tuple[str, ...], float] = {}
    with start_head(tmp_path, 1) as head:
        relative = head.submit("--output runs/x")
        job = head.submit(f"--output {output}")
        deadline = time.monotonic() + 540
        while time.monotonic() < deadline and not head.status(job).is_terminal():
            seen |= head.figures()  # what Prometheus sees
            time.sleep(2)
        logs = head.logs(job)
        assert head.status(job) == JobStatus.SUCCEEDED, logs
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
    assert metrics["selection"]["average_precision"] > 0.95
    assert metrics["student"]["top1"] > metrics["baseline_positives"]["top1"]
    assert json.loads((output / "environment.json").read_text())["cluster"]["cpus"] == 1
