"""`pukd run --dry-run`: the plan of a run, without Ray; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import write_config, write_task
from test_cli import imported

from pukd_ray import load_config
from pukd_ray.commands import main
from pukd_ray.config import SourceConfig
from pukd_ray.outline import count_images, outline_run
from pukd_ray.resume import fingerprints
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.stages import EVERY_RUN
from pukd_ray.storage import read_file


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_config(folder, write_task(folder, images=30, files=3))


def test_a_run_that_has_not_begun(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(task.parent.rglob("*"))
    assert main(["run", "--config", str(task), "--dry-run", "--resources.score_actors", "[1,4]"]) == 0
    said = {line[:9].strip(): line[10:] for line in capsys.readouterr().out.splitlines()}
    assert said["dry run"] == f"of tiny into {task.parent}/run: nothing is started, nothing is written"
    assert said["corpus"].startswith("3 files of parquet, 0.0 MiB: 30 images")
    assert said["positives"].endswith(": 80 images")
    assert said["networks"] == "teacher lenet5, student lenet5_half"
    assert said["plan"] == "to do: leaves plan.parquet, files.parquet, environment.json"
    assert "near.parquet" not in said["select"]
    assert set(EVERY_RUN) <= said.keys()
    assert said["resources"].startswith("gpus_per_actor auto, score_actors 1 to 4, train_workers 1; on a private Ray")
    assert said["cost"].startswith("not estimated")
    assert sorted(task.parent.rglob("*")) == before


def test_near_copies_are_left_where_they_are_asked_for(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(task), "--dry-run", "--selection.deduplicate", "near"]) == 0
    assert ", near.parquet\n" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "/run"])
def test_an_output_that_cannot_be_made_is_told(
    task: Path, tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["run", "--config", str(task), "--dry-run", "--output", f"{tmp_path}/file{below}"]) == 2
    assert capsys.readouterr().err == (
        f"output: {tmp_path}/file{below} cannot be written into, for {tmp_path}/file is no folder that this user may "
        "write to: name another\n"
    )


def test_it_starts_no_ray(task: Path) -> None:
    code = "import sys; from pukd_ray.commands import main; main(['run', '--config', sys.argv[1], '--dry-run']);"
    code = code.replace("sys.argv[1]", repr(str(task))) + "import ray; sys.exit(ray.is_initialized())"
    assert imported(code)[0] == 0


def test_redo_moves_nothing(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(task, {"output": str(tmp_path / "run")})
    folder = RunFolder(config.output)
    inputs = fingerprints(config, read_file(config.teacher.weights))
    from pukd_ray.corpus.listing import list_inputs
    from pukd_ray.corpus.sources import sources_by_role

    counts = {"plan": {"corpus": 29, "positives": 80, "test": 80}, "score": {"n_corpus": 29}}
    for stage in EVERY_RUN:
        folder.finish(stage, inputs[stage], 1.0, counts.get(stage, {}))
    folder.write_table("files.parquet", list_inputs(sources_by_role(config)).table)
    said = outline_run(folder, config)
    assert sum("done in 1 s: skipped" in line for line in said) == len(EVERY_RUN)
    assert any(line.startswith("corpus") and line.endswith("29 images, as planned") for line in said)
    said = outline_run(folder, config, "distill")
    assert sum("to do: leaves" in line for line in said) == 3
    assert "distill, evaluate, report: earlier results would move to old/" in capsys.readouterr().out
    assert folder.marker("report") is not None
    assert not folder.exists("old")


def test_many_files_are_counted_by_their_sizes(tmp_path: Path) -> None:
    for i in range(300):
        pq.write_table(pa.table({"image": [b"x"] * 10}), tmp_path / f"{i:03d}.parquet")
    files = pa.Table.from_pylist(
        [
            {"uri": str(p), "relative": p.name, "size": p.stat().st_size, "mtime": "1"}
            for p in sorted(tmp_path.iterdir())
        ]
    )
    source = SourceConfig(uri="x")
    assert count_images([files.slice(0, 101), files.slice(101)], "parquet", source) == "about 3,000 images"
    assert count_images([files.slice(0, 60)], "parquet", SourceConfig(uri="x", rows=[10, 50])) == "40 images"
    assert count_images([files], "webdataset", source).startswith("not counted")
    assert count_images([files], "images", source) == "300 images"
