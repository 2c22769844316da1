"""A Ray head of a test's own: dashboard, jobs, metrics, in its own process group and without tokens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).parents[1]
RUNTIME_ENV = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a cluster to join."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | more


@dataclass(frozen=True)
class Head:
    """Where it is reached."""

    dashboard: str
    metrics: str

    def submit(self, arguments: str) -> str:
        """`jobs/full_pipeline.py` with the repository as working directory; the job's id."""
        job = f"test-{uuid4().hex}"
        # The dashboard answers before the agent that starts jobs is there, and a busy one may answer too late.
        for attempt in range(60):
            try:
                return self.client().submit_job(
                    submission_id=job,
                    entrypoint=f"{sys.executable} jobs/full_pipeline.py {arguments}",
                    runtime_env={"working_dir": str(ROOT), **RUNTIME_ENV},
                )
            except (ConnectionError, RuntimeError) as error:
                if "already exists" in str(error):
                    return job
                if attempt == 59:
                    raise
                time.sleep(1)
        raise AssertionError

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.dashboard)

    def status(self, job: str) -> JobStatus:
        return self.client().get_job_status(job)

    def exit_status(self, job: str) -> int | None:
        """Of its driver; None while it runs, or if it was stopped."""
        return self.client().get_job_info(job).driver_exit_code

    def logs(self, job: str) -> str:
        return self.client().get_job_logs(job)

    def figures(self) -> dict[tuple[str, ...], float]:
        """{(name without ray_pukd_, run, other labels by their names): value} as Prometheus would see them."""
        page = urllib.request.urlopen(self.metrics, timeout=10).read().decode()
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
        return {
            (s.name.removeprefix("ray_pukd_"), s.labels["run"], *own_labels(s.labels)): s.value
            for s in samples
            if s.name.startswith("ray_pukd_")
        }

    def wait(self, *jobs: str, seconds: float = 400) -> None:
        """Until all have ended."""
        wait_for(lambda: all(self.status(job).is_terminal() for job in jobs), seconds)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until it holds; fails after that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


def own_labels(labels: dict[str, Any]) -> list[str]:
    return [labels[k] for k in ("network", "reason", "stage") if k in labels]


@contextmanager
def start_head(folder: Path, cpus: int) -> Iterator[Head]:
    """`ray start --head` on free ports, with `folder` as its home; gone at the end, with all it started."""
    sockets = [socket.socket() for _ in range(5)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    gcs, dashboard, client, agent, metrics = (s.getsockname()[1] for s in sockets)
    for s in sockets:
        s.close()
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client if client > 20000 else 24321}",
        "--include-dashboard=true", "--disable-usage-stats", f"--metrics-export-port={metrics}",
        f"--dashboard-agent-listen-port={agent}",  # its default is taken where another Ray runs
    ]  # fmt: skip
    env = environment(RAY_AUTH_MODE="disabled", HOME=str(folder), RAY_metrics_report_interval_ms="1000")
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "disabled")  # of the clients in this process
            yield Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
