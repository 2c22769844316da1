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


HASTY = """
import sys
from pukd_ray.commands import main
from pukd_ray.run import lease
lease.BEAT_SECONDS, lease.LAPSE_SECONDS = 0.5, 4.0
sys.exit(main(["run", "--config", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_driver_that_was_thought_dead_wakes_up_and_changes_nothing(tmp_path: Path) -> None:
    config = write_task(tmp_path, images=1000, files=5)
    config["score"]["chunk_images"] = 200
    write_config(tmp_path, config)
    run = tmp_path / "run"
    command = [sys.executable, "-c", HASTY, str(tmp_path / "config.yaml")]
    first = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not list((run / "markers" / "score").glob("*.json")):
            assert first.poll() is None
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGSTOP)
        lease = run / "markers" / "lease" / "00000001.json"
        far = json.loads(lease.read_text()) | {"process": "far-away/boot/pid:[1]/5", "host": "far-away"}
        lease.write_text(json.dumps(far))
        second = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=500)
        assert second.returncode == 0, second.stderr
        markers = {p: p.read_bytes() for p in sorted((run / "markers").rglob("*.json"))}
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(timeout=120) == 1
    finally:
        first.kill()
    assert first.stderr is not None
    assert " was taken over by process " in first.stderr.read().splitlines()[-1]
    assert {p: p.read_bytes() for p in sorted((run / "markers").rglob("*.json"))} == markers
    named = [f for p in markers if p.parent.name == "score" for f in json.loads(p.read_text())["files"]]
    table = pa.concat_tables([pq.read_table(run / name) for name in named])
    assert sorted(table.column("image_id").to_pylist()) == sorted(
        f"part-{i}.parquet#{row}" for i in range(5) for row in range(200)
    )


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
    secret = environment(AWS_SECRET_ACCESS_KEY="a-secret-of-this-test")
    done = subprocess.run(command, env=secret, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    written = [done.stdout.encode(), done.stderr.encode(), *(p.read_bytes() for p in run.rglob("*") if p.is_file())]
    assert not [text for text in written if b"a-secret-of-this-test" in text]
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept} == kept
    assert {name: (run / name).stat().st_mtime_ns for name in files} == files
    assert not (run / "scores" / "00099-leftover.parquet").exists()
    table = pa.concat_tables([pq.read_table(f) for f in (run / "scores").glob("*.parquet")])
    expected = sorted(f"part-{i}.parquet#{row}" for i in range(7) for row in range(200))
    assert sorted(table.column("image_id").to_pylist()) == expected
    assert len(list((run / "markers" / "score").glob("*.json"))) == 7
