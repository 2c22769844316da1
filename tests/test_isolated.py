"""Tests that kill a driver: each starts its own Ray and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heads import environment
from synthetic import write_config, write_task

ROOT = Path(__file__).parents[1]
JOB = ROOT / "jobs" / "full_pipeline.py"

pytestmark = pytest.mark.timeout(600)


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
        while time.monotonic() < deadline and not list((run / "markers" / "lease").glob("*.json")):
            time.sleep(0.05)
        second = run_job("--config", str(tmp_path / "config.yaml"))
        assert second.returncode == 1
        assert second.stderr.startswith(f"failed: output: {run} is in use by process {driver.pid} on ")
        assert len(second.stderr.splitlines()) == 1
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
