"""A training with `resources.train_workers: [1, 2]` that loses a node goes on with the worker that is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from heads import Head, answered, own_token, start_head, start_node, wait_for
from ray.job_submission import JobStatus
from synthetic import write_config, write_task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def groups(head: Head) -> list[int]:
    """Sizes of the groups of workers that trained the student, in order."""
    ask = Request(f"{head.dashboard}/api/train/v2/runs/v1", headers={"Authorization": f"Bearer {own_token()}"})
    runs: list[dict[str, Any]] = json.loads(answered(lambda: urlopen(ask, timeout=30).read()))["train_runs"]
    of_student = sorted((run for run in runs if run["name"] == "train-student"), key=lambda run: run["start_time_ns"])
    return [len(attempt["workers"]) for run in of_student for attempt in run["attempts"]]


def student(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "student" / "student.pt", weights_only=True)
    return state


def test_a_training_goes_on_with_the_worker_that_is_left(tmp_path: Path) -> None:
    config = write_task(tmp_path, images=420, files=7) | {"output_is_shared": True}
    config["distill"] |= {"steps": 1500}
    file = write_config(tmp_path, config)
    checkpoint = tmp_path / "run" / "student" / "checkpoint.pt"
    with start_head(tmp_path, 1) as head:
        with start_node(head, tmp_path, 1):
            job = head.submit(f"--config {file} --resources.train_workers [1,2]")
            wait_for(lambda: checkpoint.exists() or head.status(job).is_terminal(), 300)
        head.wait(job)
        assert head.status(job) == JobStatus.SUCCEEDED, head.logs(job)
        assert groups(head) == [2, 1]
        alone = head.submit(f"--config {file} --output {tmp_path / 'alone'}")
        head.wait(alone)
    steps = [step for step, _ in json.loads((tmp_path / "run/student/training.json").read_text())["loss"]["student"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 1500
    expected = student(tmp_path / "alone")
    for name, value in student(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)
