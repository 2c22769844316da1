"""What a run commits is whole and there once, whatever its storage, its drivers and its images do meanwhile."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from synthetic import write_config, write_task

from pukd_ray import RunConfig, RunError, load_config, run_pipeline
from pukd_ray.networks.teacher import load_state

pytestmark = [pytest.mark.timeout(900)]

FILES, ROWS = 4, 150


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    config = write_task(folder, images=FILES * ROWS, files=FILES)
    config["score"]["chunk_images"] = ROWS
    write_config(folder, config)
    return folder


@pytest.fixture(scope="module")
def selector(task: Path, ray_cluster: None) -> Path:
    """A run of which nothing is left to do before the corpus is scored."""
    del ray_cluster
    run_pipeline(load_config(task / "config.yaml"), until="selector")
    return task / "run"


def start_from(run: Path, tmp_path: Path, **overrides: Any) -> tuple[RunConfig, Path]:
    output = tmp_path / "run"
    shutil.copytree(run, output)
    return load_config(run.parent / "config.yaml", {"output": str(output), **overrides}), output


def scores(run: Path) -> pa.Table:
    tables = [pq.read_table(file) for file in sorted((run / "scores").glob("*.parquet"))]
    return pa.concat_tables(tables).sort_by("image_id")


def check_whole(run: Path) -> None:
    """Every image once; every file named by one manifest."""
    expected = sorted(f"part-{i}.parquet#{row}" for i in range(FILES) for row in range(ROWS))
    assert scores(run).column("image_id").to_pylist() == expected
    manifests = [json.loads(p.read_text()) for p in sorted((run / "markers" / "score").glob("*.json"))]
    named = sorted(file for manifest in manifests for file in manifest["files"])
    assert named == sorted(f"scores/{p.name}" for p in (run / "scores").iterdir())
    units = [unit for manifest in manifests for unit in manifest["units"]]
    assert len(units) == len(set(units))
    assert not (run / "attempts").exists()


def chunks(run: Path) -> int:
    return len(list((run / "markers" / "score").glob("*.json")))


def wait_for_chunks(run: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while chunks(run) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_file_that_goes_missing_stops_the_run_and_makes_no_rows(selector: Path, tmp_path: Path) -> None:
    config, run = start_from(selector, tmp_path)
    last, away = selector.parent / "lake" / f"part-{FILES - 1}.parquet", tmp_path / "away"

    def take_away() -> None:
        wait_for_chunks(run, 1)
        last.rename(away)

    thread = Thread(target=take_away)
    thread.start()
    try:
        with pytest.raises(RunError) as caught:
            run_pipeline(config, until="score")
    finally:
        thread.join()
        away.rename(last)
    told = str(caught.value)
    assert told.startswith(f"{last}: is not there (")
    assert told.endswith("bring it back, and run the same command again to go on where this stopped")
    assert chunks(run) == FILES - 1
    run_pipeline(config, until="score")
    check_whole(run)
    assert scores(run).column("error").null_count == FILES * ROWS


def test_a_file_that_is_no_longer_listed_costs_its_images_only(
    selector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = start_from(selector, tmp_path, **{"score.max_rejected": 0.3})
    last, away = selector.parent / "lake" / f"part-{FILES - 1}.parquet", tmp_path / "away"
    last.rename(away)
    try:
        run_pipeline(config, until="score")
    finally:
        away.rename(last)
    assert (
        f"1 files of the corpus are gone since it was planned, such as {last}: what is not" in capsys.readouterr().out
    )
    check_whole(run)
    errors = {r["image_id"].partition("#")[0]: r["error"] for r in scores(run).to_pylist() if r["error"]}
    assert errors == {last.name: "io: no longer listed when its turn came"}
    assert scores(run).column("error").null_count == (FILES - 1) * ROWS
    strict, _ = start_from(selector, tmp_path / "strict")
    last.rename(away)
    try:
        with pytest.raises(RunError, match=r"150 of 600 images are unreadable \(150 io\), more than score\.max_rej"):
            run_pipeline(strict, until="score")
    finally:
        away.rename(last)
    assert chunks(tmp_path / "strict" / "run") == FILES - 1


def test_too_many_unreadable_images_are_never_committed(selector: Path, tmp_path: Path) -> None:
    config, run = start_from(selector, tmp_path)
    new = selector.parent / "lake" / "part-9.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 600, "relevant": [False] * 600}), new)
    try:
        for _ in range(2):  # started again, it says so again
            with pytest.raises(RunError, match=r"600 of 1,200 images .*600 not_an_image\), more than score\.max_rej"):
                run_pipeline(config, until="score")
            assert chunks(run) == FILES
        lenient = {"output": str(run), "score.max_rejected": 0.6}
        run_pipeline(load_config(selector.parent / "config.yaml", lenient), until="score")
        assert chunks(run) == FILES + 1
        (run / "markers" / "score.json").unlink()  # nothing is left to score: it is looked at all the same
        with pytest.raises(RunError, match=r"more than score\.max_rejected = 0\.2: .*--redo score"):
            run_pipeline(config, until="score")
    finally:
        new.unlink()


def test_score_files_are_merged_in_the_order_of_the_plan(selector: Path, tmp_path: Path) -> None:
    config, run = start_from(selector, tmp_path, **{"score.chunk_images": 10_000})
    (run / "attempts" / "00000-dead").mkdir(parents=True)
    (run / "attempts" / "00000-dead" / "x.parquet").write_bytes(b"half")
    (run / "scores").mkdir()
    (run / "scores" / "00000-dead.parquet").write_bytes(b"half")
    run_pipeline(config, until="score")
    check_whole(run)
    (file,) = (run / "scores").iterdir()
    ids = pq.read_table(file).column("image_id").to_pylist()
    assert [i.partition("#")[0] for i in ids] == [f"part-{i}.parquet" for i in range(FILES) for _ in range(ROWS)]


@pytest.mark.slow
def test_a_killed_train_worker_costs_the_steps_since_its_checkpoint(selector: Path, tmp_path: Path) -> None:
    settings = {"resources.train_workers": 2, "distill.steps": 2000}
    config, calm = start_from(selector, tmp_path / "calm", **settings)
    run_pipeline(config, until="distill")
    config, run = start_from(selector, tmp_path, **settings)
    checkpoint, steps, done = run / "student" / "checkpoint.pt", [], Event()

    def kill() -> None:
        import psutil  # of Ray, which has been imported

        while not done.wait(0.02):
            if checkpoint.exists():
                first = not steps
                with suppress(OSError):
                    steps.append(load_state(checkpoint.read_bytes())["step"])
                if first and steps:
                    processes = psutil.Process().children(recursive=True)
                    next(p for p in processes if "RayTrainWorker" in " ".join(p.cmdline())).kill()

    thread = Thread(target=kill)
    thread.start()
    try:
        run_pipeline(config, until="distill")
    finally:
        done.set()
        thread.join()
    assert steps[0] < 2000
    assert steps == sorted(steps)  # never behind what was saved
    ours, theirs = (load_state((r / "student" / "student.pt").read_bytes()) for r in (run, calm))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    ours, theirs = (json.loads((r / "student" / "training.json").read_text())["loss"] for r in (run, calm))
    assert [step for step, _ in ours["student"]] == [step for step, _ in theirs["student"]]
