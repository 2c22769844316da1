"""What `pukd status` says of a run, from what is in its folder and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pukd_ray.commands import main
from pukd_ray.report.status import status_lines
from pukd_ray.run.folder import LEASES, RunFolder
from pukd_ray.run.stages import STAGES

PARTS = {
    "plan": 1.0, "features": 5.0, "fits": 10.0, "score": 1000.0, "select": 20.0, "distill": 300.0, "evaluate": 4.0,
    "report": 6.0,
}  # fmt: skip


def start(folder: RunFolder, *, silent: float = 2.0, released: bool = False, doing: Any = None) -> None:
    """Plan and selector are done, and a quarter of the corpus is scored."""
    beat = (datetime.now(UTC) - timedelta(seconds=silent)).isoformat(timespec="seconds")
    folder.write_json(
        f"{LEASES}/00000003.json",
        {
            "token": 3, "driver": "d", "host": "far-away", "pid": 77, "process": "p", "since": beat, "beat": 5,
            "last_beat": beat, "doing": doing, "released": released,
        },
    )  # fmt: skip
    folder.finish("plan", {}, 1.5, {"corpus": 4000, "positives": 500})
    folder.finish("selector", {}, 14.0, {"n_positives": 500, "prior": "0.25"})
    for chunk in range(2):
        folder.write_json(f"markers/score/{chunk:05d}.json", {"n_rows": 500, "units": [], "files": []})


def estimated(folder: RunFolder) -> None:
    folder.write_json("estimate.json", {"seconds": PARTS})


def lines(folder: RunFolder) -> dict[str, str]:
    return {line[:9].strip(): line[10:] for line in status_lines(RunFolder(folder.uri))}


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_run_that_is_at_work(tmp_path: Path, scheme: str) -> None:
    folder = RunFolder(f"{scheme}{tmp_path}/run")
    doing = {
        "stage": "score", "seconds": 90.0, "part": "score", "done": 1300.0, "total": 4000.0, "unit": "images",
        "seconds_left": 600.0, "seconds_left_in_all": 930.0,
    }  # fmt: skip
    start(folder, doing=doing)
    estimated(folder)
    said = lines(folder)
    assert said["run"] == folder.display
    assert said["driver"].startswith("process 77 on far-away, since ")
    assert said["driver"].endswith(" s ago")
    assert said["plan"] == "done in 2 s, estimated 1 s: corpus 4,000, positives 500"
    assert said["selector"] == "done in 14 s, estimated 15 s: positives 500"
    assert said["score"] == ("at work for 90 s, estimated 16.7 min: 1,300 of 4,000 images, about 10.0 min left")
    assert said["distill"] == "to do, estimated 5.0 min"
    assert said["left"] == "about 15.5 min in all, by the estimate"
    assert "error" not in said


def test_a_driver_that_is_silent_and_what_it_left(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    start(folder, silent=300)
    estimated(folder)
    said = lines(folder)
    assert "silent for 5.0 min" in said["driver"]
    assert said["score"] == ("to do, estimated 16.7 min; 1,000 of 4,000 images are scored, in 2 of about 8 chunks")
    assert said["left"] == "about 18.0 min in all, by the estimate"  # 3/4 of the pass, and 330 s


def test_what_went_wrong_is_told_until_it_is_mended(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    start(folder, released=True)
    folder.record_attempt("score", 12.0, "RunError: no storage")
    said = lines(folder)
    assert said["driver"].startswith("none; the last was process 77 on far-away")
    assert said["left"] == "not known: `pukd estimate`, before a run, tells"
    assert said["error"].startswith("score failed at 20")
    assert said["error"].endswith(": RunError: no storage")
    folder.finish("score", {}, 1.0, {"n_corpus": 4000})
    said = lines(folder)
    assert "error" not in said
    assert said["score"] == "done in 13 s: corpus 4,000"


def test_a_run_that_is_done(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    for stage in STAGES:
        folder.finish(stage.name, {}, 1.0, {})
    assert [line[10:] for line in status_lines(folder)][1:] == ["done in 1 s"] * len(STAGES)


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"failed: {tmp_path}: holds no run: give the `output` of its config\n"
    assert main(["status", "nowhere://x"]) == 2
    assert capsys.readouterr().err.startswith("arguments: nowhere://x: ")
