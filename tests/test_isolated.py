"""Tests that kill, submit or need another cluster: each starts its own Ray and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from synthetic import write_config, write_task

ROOT = Path(__file__).parents[1]
JOB = ROOT / "jobs" / "full_pipeline.py"

pytestmark = pytest.mark.timeout(600)


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a cluster to join."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | more


def run_job(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOB), *arguments],
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def test_bad_configs_end_with_2_before_ray_starts(tmp_path: Path) -> None:
    config = write_task(tmp_path, images=50)
    config["selector"]["prior"] = 1.5
    config["selector"]["stepz"] = 3
    config["teacher"]["arch"] = "lenet5_half"
    config["corpus"]["uri"] = "nowhere"
    write_config(tmp_path, config)
    started = time.monotonic()
    done = run_job("--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "corpus.uri",
        "selector.prior",
        "selector.stepz",
        "teacher.weights",
    ]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run").exists()


def test_a_killed_driver_loses_at_most_a_chunk(tmp_path: Path) -> None:
    config = write_task(tmp_path, images=1400, files=7)
    config["score"]["chunk_images"] = 200
    write_config(tmp_path, config)
    run = tmp_path / "run"
    command = [sys.executable, str(JOB), "--config", str(tmp_path / "config.yaml")]
    driver = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and len(list((run / "markers" / "score").glob("*.json"))) < 2:
            assert driver.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted((run / "markers" / "score").glob("*.json"))}
    assert 2 <= len(kept) < 7
    files = {name: (run / name).stat().st_mtime_ns for p in kept for name in json.loads(p.read_text())["files"]}
    (run / "scores" / "00099-leftover.parquet").write_bytes(b"half a file")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept} == kept
    assert {name: (run / name).stat().st_mtime_ns for name in files} == files
    assert not (run / "scores" / "00099-leftover.parquet").exists()
    table = pa.concat_tables([pq.read_table(f) for f in (run / "scores").glob("*.parquet")])
    expected = sorted(f"part-{i}.parquet#{row}" for i in range(7) for row in range(200))
    assert sorted(table.column("image_id").to_pylist()) == expected
    assert len(list((run / "markers" / "score").glob("*.json"))) == 7


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """A head node of one CPU with a dashboard, in its own process group and with its own token."""
    ports = [socket.socket() for _ in range(4)]
    for s in ports:
        s.bind(("127.0.0.1", 0))
    gcs, dashboard, client, agent = (s.getsockname()[1] for s in ports)
    for s in ports:
        s.close()
    env = environment(RAY_AUTH_MODE="disabled", HOME=str(tmp_path))
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=1", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client if client > 20000 else 24321}",
        "--include-dashboard=true", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={agent}",  # its default is taken where another Ray runs
    ]  # fmt: skip
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_demo_passes_under_ray_job_submit_on_one_cpu(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.job_submission import JobStatus, JobSubmissionClient

    excludes = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    output = tmp_path / "demo"

    def submit(arguments: str) -> tuple[JobSubmissionClient, str]:
        # The dashboard answers before the agent that starts jobs is there.
        for attempt in range(60):
            try:
                client = JobSubmissionClient(head)
                command = f"{sys.executable} jobs/full_pipeline.py {arguments}"
                return client, client.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT), **excludes})
            except (ConnectionError, RuntimeError):
                if attempt == 59:
                    raise
                time.sleep(1)
        raise AssertionError

    client, relative = submit("--output runs/x")
    client, job = submit(f"--output {output}")
    deadline = time.monotonic() + 540
    while time.monotonic() < deadline and not client.get_job_status(job).is_terminal():
        time.sleep(2)
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs
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
    assert metrics["selection"]["average_precision"] > 0.95
    assert metrics["student"]["top1"] > metrics["baseline_positives"]["top1"]
    environment_json = json.loads((output / "environment.json").read_text())
    assert environment_json["cluster"]["cpus"] == 1
    assert client.get_job_status(relative) == JobStatus.FAILED
    assert "output: runs/x is relative" in client.get_job_logs(relative)
