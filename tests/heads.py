"""A Ray head of a test's own: dashboard, jobs, metrics, in its own process group, with this user's token."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen
from uuid import uuid4

import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._raylet import AuthenticationTokenLoader
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_tasks
from ray.util.state.common import TaskState
from ray.util.state.exception import RayStateApiException

from pukd_ray.runtime.devices import PRETENDED

ROOT = Path(__file__).parents[1]
RUNTIME_ENV = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())

T = TypeVar("T")


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a cluster to join."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | more


@dataclass(frozen=True)
class Head:
    """Where it is reached."""

    dashboard: str
    metrics: str
    gcs: int
    """Port of the head itself."""
    uploads: bool
    """Whether jobs run in a copy of the repository. Nodes of one machine share that copy, and each node that starts
    unpacks it anew, under the feet of the others' workers."""

    def submit(self, arguments: str) -> str:
        """`jobs/full_pipeline.py`; the job's id."""
        job = f"test-{uuid4().hex}"
        folder, runtime_env = (".", {"working_dir": str(ROOT), **RUNTIME_ENV}) if self.uploads else (ROOT, None)
        entrypoint = f"{sys.executable} {folder}/jobs/full_pipeline.py {arguments}"

        def send() -> str:
            try:
                return self.client().submit_job(submission_id=job, entrypoint=entrypoint, runtime_env=runtime_env)
            except RuntimeError as error:
                if "already exists" not in str(error):  # it got there, its answer did not
                    raise
                return job

        return answered(send)

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.dashboard)

    def status(self, job: str) -> JobStatus:
        return answered(lambda: self.client().get_job_status(job))

    def exit_status(self, job: str) -> int | None:
        """Of its driver; None while it runs, or if it was stopped."""
        return answered(lambda: self.client().get_job_info(job)).driver_exit_code

    def stop(self, job: str) -> None:
        answered(lambda: self.client().stop_job(job))

    def logs(self, job: str) -> str:
        return answered(lambda: self.client().get_job_logs(job))

    def figures(self) -> dict[tuple[str, ...], float]:
        """{(name without ray_pukd_, run, other labels by their names): value} as Prometheus would see them."""
        page = answered(lambda: urlopen(self.metrics, timeout=10).read()).decode()
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
        return {
            (s.name.removeprefix("ray_pukd_"), s.labels["run"], *own_labels(s.labels)): s.value
            for s in samples
            if s.name.startswith("ray_pukd_")
        }

    def tasks(self, name: str) -> list[TaskState]:
        """Of all jobs, those of that name, as the dashboard's pages show them."""
        named = [("name", "=", name)]
        found: list[TaskState] = answered(lambda: list_tasks(self.dashboard, filters=named, detail=True, timeout=60))
        return found

    def wait(self, *jobs: str, seconds: float = 400) -> None:
        """Until all have ended."""
        wait_for(lambda: all(self.status(job).is_terminal() for job in jobs), seconds)


def answered(ask: Callable[[], T]) -> T:
    """What a head answers. It does so before the agent that starts jobs is there, and a busy one may answer too late
    or hang up: `requests` and `urllib` each tell that by an OSError of its own."""
    for attempt in range(60):
        try:
            return ask()
        except (OSError, HTTPException, RuntimeError, RayStateApiException):
            if attempt == 59:
                raise
            time.sleep(1)
    raise AssertionError


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until it holds; fails after that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


def own_labels(labels: dict[str, Any]) -> list[str]:
    return [labels[k] for k in ("network", "reason", "stage") if k in labels]


def own_token() -> str:
    """Of this user, made if there is none, as `ray.init` does it; from here on this process's clients send it."""
    enable_token_auth_by_default()
    ensure_token_if_auth_enabled()
    return str(AuthenticationTokenLoader.instance().get_raw_token())


NodeTypes = Mapping[str, tuple[dict[str, int], int]]
"""By name: resources of a node, and how many there may be."""

HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # Ray's provider of fake nodes knows no other
AUTOSCALER = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


def autoscaling(gcs: int, node_types: NodeTypes) -> dict[str, Any]:
    """A cluster file whose nodes are further raylets on this machine; empty ones go after six seconds."""
    workers = {
        name: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most}
        for name, (resources, most) in node_types.items()
    }
    nothing = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    return {
        "cluster_name": "fake",
        "max_workers": sum(most for _, most in node_types.values()),
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": 0.1,
        "docker": {},
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "gcs_address": f"127.0.0.1:{gcs}",
            "head_node_id": HEAD_ID,
        },
        "auth": {"ssh_user": "ubuntu", "ssh_private_key": "/dev/null"},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **workers},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in nothing},
    }


@contextmanager
def start_head(folder: Path, cpus: int, node_types: NodeTypes | None = None) -> Iterator[Head]:
    """`ray start --head` on free ports, with `folder` as its home; gone at the end, with all it started.

    With `node_types` it has an autoscaler.
    """
    gcs, dashboard, client, agent, metrics = free_ports(5)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client if client > 20000 else 24321}",
        "--include-dashboard=true", "--disable-usage-stats", f"--metrics-export-port={metrics}",
        f"--dashboard-agent-listen-port={agent}",  # its default is taken where another Ray runs
    ]  # fmt: skip
    env = environment(RAY_AUTH_MODE="token", HOME=str(folder), RAY_metrics_report_interval_ms="1000")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(own_token())
    if node_types:
        (folder / "cluster.json").write_text(json.dumps(autoscaling(gcs, node_types)))
        command.append(f"--autoscaling-config={folder / 'cluster.json'}")
        env |= AUTOSCALER | {PRETENDED: "1"}
    with running(command, env, folder / "head.log"):
        yield Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", gcs, not node_types)


@contextmanager
def start_node(head: Head, folder: Path, cpus: int) -> Iterator[None]:
    """One more node of `start_head(folder, ...)`; lost at the end, without a word."""
    agent, metrics = free_ports(2)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", f"--address=127.0.0.1:{head.gcs}", "--block",
        f"--num-cpus={cpus}", "--disable-usage-stats", f"--metrics-export-port={metrics}",
        f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    env = environment(RAY_AUTH_MODE="token", HOME=str(folder))
    with running(command, env, folder / "node.log", signal.SIGKILL):
        yield


def free_ports(count: int) -> list[int]:
    """That nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def running(command: list[str], env: dict[str, str], log: Path, end: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """The command in a process group of its own, ended at the end with all it started."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, end)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
