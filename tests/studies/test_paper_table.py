"""The paper's table on the tiny task: every row for real, resumed row by row; its page from figures by hand."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from synthetic import labelled, write_config, write_task

from pukd_ray import ConfigError
from pukd_ray.cli import parse_arguments
from pukd_ray.commands import paper_table
from pukd_ray.errors import RunError
from pukd_ray.networks.teacher import new_network
from pukd_ray.run.folder import RunFolder
from pukd_ray.studies import paper, students
from pukd_ray.studies.config import PaperConfig, load_paper_table
from pukd_ray.studies.paper import _run_config, make_table, train_missing_teacher, write_page
from pukd_ray.studies.paper_page import (
    by_share,
    comparisons,
    cost_rows,
    draw_accuracy,
    draw_lengths,
    draw_shares,
    further_rows,
    interval,
    lengths,
    render_table,
    table_rows,
)
from pukd_ray.studies.rows import own_columns, rows_of, students_of
from pukd_ray.studies.students import StudentJob, seconds_before

DOCS = Path(__file__).parents[2] / "docs"
JOB = Path(__file__).parents[2] / "jobs" / "paper_table.py"


def write_paper_task(folder: Path, **table: Any) -> Path:
    config = write_task(folder, images=600, relevant=0.4)
    pq.write_table(labelled(160, 11), folder / "original.parquet")
    config["original"] = config["positives"] = {"uri": "original.parquet"}
    config["output"] = str(folder / "table")
    config["selector"]["steps"] = 60
    config["distill"] |= {"steps": 30, "sample_weights": "pu_probability"}
    config["table"] = {"seeds": 1, "per_class": [12, 6], **table}
    return write_config(folder, config)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(400)
def test_the_whole_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        {"name": "selected@50", "selection": {"rule": "budget", "budget": 50}},
        {"name": "as-recommended", "distill": {"sample_weights": "pu_probability"}},
        {"name": "wild", "distill": {"lr": 1e12}},
        {"name": "still", "distill": {"lr": 1e-9}},
    ]
    file = write_paper_task(tmp_path, per_class=[12], more=more, lengths=[0.5, 1])
    start = new_network("lenet5_half", load_paper_table(file).teacher).state_dict()
    torch.save(start, tmp_path / "start.pt")
    write_config(tmp_path, yaml.safe_load(file.read_text()) | {"student": {"arch": "lenet5_half", "start": "start.pt"}})
    (tmp_path / "teacher.pt").unlink()
    raw = load_paper_table(file, {"teacher_training": {"epochs": 30, "batch_size": 40, "augment": "none"}})
    assert train_missing_teacher(raw)
    assert not train_missing_teacher(raw)
    config = load_paper_table(file)
    table = make_table(config)
    students = table["students"]
    # One that fails costs no other.
    assert set(students) == {s.key for s in students_of(config)} - {"wild-12-seed0"}
    assert table["failed"].keys() == {"wild-12-seed0"}
    assert "lower the learning rate" in table["failed"]["wild-12-seed0"]
    images = {key: s["images"] for key, s in students.items()}
    assert images["p_only-12-seed0"] == 48
    assert images["kd-12-seed0"] == 160
    assert images["all-12-seed0"] == 648
    assert images["selected@50-12-seed0"] == 98
    rivals = ("random", "teacher_confidence", "teacher_topk_per_class", "knn", "linear_probe")
    assert {images[f"{rival}-12-seed0"] for rival in rivals} == {images["pu_s1-12-seed0"]}
    assert images["kd_few-12-seed0"] == min(160, images["pu_s1-12-seed0"])
    assert images["pu_s2_top-12-seed0"] == 48 + (images["pu_s1-12-seed0"] - 48) // 2
    truth = students["truth-12-seed0"]
    assert (truth["precision"], truth["recall"]) == (1.0, 1.0)
    assert students["all-12-seed0"]["recall"] == 1.0
    assert students["pu_s1-12-seed0"]["precision"] > 0.6 > students["random-12-seed0"]["precision"]
    steps = {s["row"]: s["steps"] for s in students.values() if s["equal"] == "steps"}
    assert steps.pop("p_long") == 4 * 30
    assert set(steps.values()) == {30}
    assert [s["steps"] for s in students.values() if s["equal"] == "length"] == [15] * 14
    assert students["knn-12-seed0"]["precision"] > students["random-12-seed0"]["precision"]
    assert students["all-12-seed0-epochs"]["steps"] == round(30 * 648 / 160)
    still = torch.load(tmp_path / "table/students/still-12-seed0.pt", weights_only=True)
    for name, value in start.items():
        torch.testing.assert_close(still[name], value, rtol=0, atol=1e-5)
    # The same training under another name is not done twice.
    twins = [students[f"{name}-12-seed0"] for name in ("recommended", "as-recommended")]
    assert twins[0] == twins[1] | {"row": "recommended", "title": "recommended"}
    assert not (tmp_path / "table" / "students" / "as-recommended-12-seed0.pt").exists()
    assert table["teacher"]["top1"] > 0.9
    assert students["pu_s1-12-seed0"]["top1"] > 0.5
    assert table["networks"]["teacher"]["multiply_adds"] > table["networks"]["student"]["multiply_adds"] > 0
    page = write_page(config, table, "this test")
    assert "Students were trained on: CPU. Seconds are of one student" in page
    assert "| selected@50 | 98 |" in page
    assert "| Baseline-3: all of U | 12 | 648 |" in page
    assert f"| images seen | {15 * 64:,} | {30 * 64:,} |" in page
    assert "## Not made\n\n- wild-12-seed0: ValueError: the global batch is empty, or a logit is not finite" in page
    assert (tmp_path / "table" / "table.svg").read_bytes().startswith(b"<?xml")
    assert json.loads((tmp_path / "table" / "table.json").read_text()) == table

    # A student that is gone is made again, the same; nothing else is touched.
    folder = tmp_path / "table" / "students"
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    (folder / "pu_s1-12-seed0.json").unlink()
    torch.save({"inputs": "of another config", "step": 29}, folder / "pu_s1-12-seed0.state.pt")  # not gone on from
    again = make_table(config)
    assert {f.name for f in folder.iterdir() if f.stat().st_mtime_ns != before[f.name]} == {
        "pu_s1-12-seed0.json",
        "pu_s1-12-seed0.pt",
    }
    assert again["students"]["pu_s1-12-seed0"]["top1"] == students["pu_s1-12-seed0"]["top1"]
    # What was tested on other images is tested again.
    for path in (tmp_path / "table" / "teacher.json", folder / "kd-12-seed0.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"top1": 0.0, "tested": "on other images"}))
    beside = load_paper_table(file, {"table.beside": [f"{tmp_path}/table/table.json"]})
    drawn = make_table(beside)
    assert drawn["teacher"] == table["teacher"]
    assert drawn["students"]["kd-12-seed0"] == students["kd-12-seed0"]
    assert drawn["by_share"]["PU-s1"] == [(pytest.approx(0.4, abs=0.05), students["pu_s1-12-seed0"]["top1"])] * 2
    assert "| share of relevant images | 0." in write_page(beside, drawn, "this test")
    assert (tmp_path / "table" / "shares.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(ConfigError, match=r"distill: has changed since p_only-12-seed0 and 40 other students"):
        make_table(load_paper_table(file, {"distill.temperature": 4.0}))
    torch.save({"model": start}, tmp_path / "start.pt")
    with pytest.raises(
        ConfigError, match=r"student.start: has changed since p_only-12-seed0 and 4[0-9] other students"
    ):
        make_table(config)
    torch.save(start, tmp_path / "start.pt")
    marker = tmp_path / "table" / "runs" / "12-seed0" / "markers" / "score.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"finished": "later"}))
    with pytest.raises(ConfigError, match=r"scores: has changed since truth-12-seed0 and 3[0-9] other students"):
        make_table(config)
    with pytest.raises(ConfigError, match=r"output: .*/runs/12-seed0 was made before that: delete that folder") as old:
        make_table(load_paper_table(file, {"selector.steps": 61}))
    assert "--redo" not in str(old.value)
    with pytest.raises(ConfigError, match=r"class 0 has 40 images, but table.seeds = 2 times 30 per class are 60"):
        make_table(load_paper_table(file, {"table.per_class": [30], "table.seeds": 2, "output": f"{tmp_path}/other"}))
    capsys.readouterr()


def test_rows_and_faults_of_the_config(tmp_path: Path) -> None:
    file = write_paper_task(tmp_path, seeds=2)
    config = load_paper_table(file)
    keys = [s.key for s in students_of(config)]
    assert len(keys) == len(set(keys)) == 2 * (15 + 5 + 13)
    more = [{"name": "x"}]
    main = load_paper_table(file, {"table.main_seeds": 4, "table.more": more})
    assert len(students_of(main)) == 2 * (15 + 5 + 13 + 1) + 2 * 15
    some = load_paper_table(file, {"table.main_seeds": 4, "table.main_rows": ["knn", "recommended"]})
    last = [(s.row.name, s.seed) for s in students_of(some)][-4:]
    assert last == [(row, k) for k in (2, 3) for row in ("knn", "recommended")]
    assert len(students_of(some)) == len(keys) + 2 * 2
    once = load_paper_table(file, {"table.once": ["kd", "pu_s1"], "table.equal_epochs": False})
    assert {(s.row.name, s.seed) for s in students_of(once) if s.row.name in ("kd", "pu_s1", "all")} == {
        ("kd", 0),
        ("pu_s1", 0),
        ("all", 0),
        ("all", 1),
    }
    for first in (0, 5):  # of a table of other positives too: nothing is left out in silence
        own = load_paper_table(file, {"table.more": [{"name": "x", "once": True}], "table.first_seed": first})
        assert [s.seed for s in students_of(own) if s.row.name == "x"] == [first]
    parts = [load_paper_table(file, {"table.first_seed": k, "table.seeds": 1}) for k in range(2)]
    assert sorted(s.key for part in parts for s in students_of(part)) == sorted(keys)
    longer = [replace(c, table=replace(c.table, lengths=(0.5,))) for c in (config, *parts)]
    assert [sum(s.length == 0.5 for s in students_of(c)) for c in longer] == [14, 14, 14]
    assert own_columns(config) == ("knn", "linear_probe")
    nearest = {"name": "x", "selection": {"rule": "rmds", "budget": 9}}
    part = load_paper_table(file, {"table.rows": ["random", "pu_s1"], "table.more": [nearest]})
    assert own_columns(part) == ("knn", "linear_probe", "rmds")  # so that the other rows can be made later
    remote = _run_config(config, RunFolder("s3://bucket/table?region=x"), 1, 6)
    assert remote.output == "s3://bucket/table/runs/6-seed1?region=x"
    assert {s.row.name for s in students_of(main) if s.seed == 3} >= {"p_only", "recommended"}
    assert not [s for s in students_of(main) if s.seed > 1 and (s.per_class == 6 or s.epochs or s.row.name == "x")]
    assert [r.name for r in rows_of(load_paper_table(file, {"original": None}))][:3] == ["p_only", "p_long", "truth"]

    without_truth = load_paper_table(file, {"corpus.relevant_column": None})
    assert "truth" not in {r.name for r in rows_of(without_truth)}

    def faults(**overrides: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_paper_table(file, {k.replace("__", "."): v for k, v in overrides.items()})
        return caught.value.faults

    assert "p_only" in faults(table__rows=["p_onyl"])[0]
    assert faults(test=None) == ["test: is required for a table of accuracies"]
    assert faults(original=None, teacher_training={}) == ["teacher_training: needs the labelled images in `original`"]
    (unknown,) = faults(teacher__weights="nowhere://teacher.pt", teacher_training={"epochs": 1})
    assert unknown.startswith("teacher.weights: cannot read nowhere://teacher.pt")
    assert faults(table__more=[{"name": "all"}]) == ["table.more: the name all is there already"]
    assert faults(table__more=[{"name": "x", "distill": {"temperatur": 2}}]) == [
        "table.more.0.distill.temperatur: unknown key; did you mean temperature?"
    ]
    same = {"epochs": 60, "baseline": "positives", "memory_gib": 1.0}
    assert faults(table__more=[{"name": "x", "distill": {"steps": 9}}, {"name": "y", "distill": same}]) == [
        "table.more.1.distill.epochs: cannot differ from row to row: use steps",
        "table.more.1.distill.baseline: cannot differ from row to row: leave it out",
        "table.more.1.distill.memory_gib: cannot differ from row to row: leave it out",
    ]
    assert faults(positives=[{"uri": "p.parquet"}, {"uri": "p.parquet"}]) == [
        "positives: the table draws P from one source: give one"
    ]
    assert faults(positives={"uri": "original.parquet", "per_class": 5}) == [
        "positives.per_class: the table draws P by table.per_class: leave it out"
    ]


def student(row: str, per_class: int, seed: int, top1: float, **more: Any) -> dict[str, Any]:
    facts = {"row": row, "title": row, "positives_per_class": per_class, "seed": seed, "equal": "steps", "top1": top1}
    return {**facts, "images": 100, "steps": 10, "seconds": 1.0, "precision": None, "recall": None, **more}


def test_differences_are_paired_by_seed() -> None:
    students = [student("kd", 9, s, 0.9 + 0.05 * s) for s in range(3)]
    students += [student("pu_s1", 9, s, 0.88 + 0.05 * s + 0.01 * (s == 2)) for s in range(3)]
    students += [student("pu_s1", 3, s, 0.87 + 0.05 * s + 0.01 * (s == 2)) for s in range(2)]
    run = {"average_precision": 0.5, "prior": {"value": 0.25}}
    table = {
        "students": {f"{i}": s for i, s in enumerate(students)},
        "runs": {f"{n}-seed{s}": run for n in (9, 3) for s in range(3)},
    }
    found = dict(comparisons(table))
    # -2, -2, -1: mean -5/3, standard error 1/3, t(0.975, 2) = 4.303
    assert found["pu_s1 - kd"] == "-1.67 [-3.10, -0.23]"
    assert found["pu_s1 at 3 - at 9 per class"] == "-1.00 [-1.00, -1.00]"
    rows = table_rows(table, "steps")
    assert [(r["title"], r["per_class"], r["difference"]) for r in rows][:2] == [
        ("kd", "", ""),
        ("pu_s1", "9", "-1.67 [-3.10, -0.23]"),
    ]
    assert [r["seeds"] for r in rows] == ["3", "3", "2"]
    table["students"] |= {f"r{s}": student("recommended", 9, s, 0.5) for s in range(3)}
    table["students"] |= {f"x{s}": student("T=9", 9, s, 0.5 + 0.01 * s) for s in range(3)}
    assert [r["title"] for r in table_rows(table, "steps")] == ["kd", "pu_s1", "pu_s1", "recommended"]
    (further,) = further_rows(table)
    assert (further["title"], further["difference"]) == ("T=9", "+1.00 [-1.48, +3.48]")
    assert np.isnan(interval([1.0])).all()


def test_a_row_costs_what_it_needs() -> None:
    rows = ("p_only", "random", "knn", "pu_s1")
    students = [student(row, 9, s, 0.5, seconds=10.0, device="CPU") for row in rows for s in range(2)]
    students += [student("kd", 9, s, 0.8, seconds=20.0, device=("CPU", "H100")[s]) for s in range(2)]
    students += [student(row, n, 0, 0.5) for row, n in (("pu_s1", 3), ("T=9", 9))]
    runs = {f"{n}-seed{s}": {"seconds": {"selector": 100.0 + s, "score": 30.0}} for n in (9, 3) for s in range(2)}
    table = {"students": dict(enumerate(students)), "runs": runs, "machine": {"cpus": 4, "gpus": 2}}
    cells = {r["title"]: (r["selector"], r["score"], r["training"], r["cpu"], r["gpu"]) for r in cost_rows(table)}
    assert cells == {
        "p_only": ("", "", "10", "10", ""),
        "random": ("", "", "10", "10", ""),
        "knn": ("", "30", "10", "130", "60"),
        "pu_s1": ("100", "30", "10", "532", "261"),
        "kd": ("", "", "20", "20", ""),
    }
    assert cost_rows(table)[-1]["rate"] == "4.000"


def test_seconds_of_two_devices_make_no_mean() -> None:
    """A student of 30 s on a GPU and one of 700 s on a CPU are none of 365 s."""
    runs = {f"9-seed{s}": {"seconds": {"selector": 100.0, "score": 50.0}} for s in range(4)}
    known = {"average_precision": None, "prior": {"value": 0.25}, "relevant": 0.5}
    took = {"pu_s1": (30.0, 40.0, 700.0), "all": (60.0, 50.0, 40.0), "p_only": (600.0,), "T=9": (20.0, 800.0)}
    took["random"] = (45.0, None)  # gone on with on another device
    students = [
        student(row, 9, s, 0.5, seconds=seconds, device="H100" if not seconds or seconds < 100 else "CPU")
        for row, values in took.items()
        for s, seconds in enumerate(values)
    ]
    table = {
        "name": "x",
        "students": dict(enumerate(students)),
        "runs": {key: run | known for key, run in runs.items()},
        "machine": {"cpus": 4, "gpus": 1, "platform": "", "date": ""},
        "teacher": {"top1": 0.9},
        "networks": {},
        "batch_size": 64,
        "failed": {},
    }
    seconds = {r["title"]: r["seconds"] for r in [*table_rows(table, "steps"), *further_rows(table)]}
    assert seconds == {"pu_s1": "35", "all": "50", "p_only": "", "T=9": "20", "random": "45"}
    costs = {r["title"]: (r["selector"], r["training"], r["cpu"], r["gpu"], r["rate"]) for r in cost_rows(table)}
    assert costs == {
        "pu_s1": ("100", "35", "600", "185", "0.064"),
        "all": ("", "50", "", "50", "1.000"),
        "p_only": ("", "", "", "", ""),
        "random": ("", "45", "", "45", "1.111"),
    }
    assert "Seconds are of one student, means over those trained on H100 alone;" in render_table(table, "")
    alike = {key: s | {"device": "CPU", "seconds": None} for key, s in table["students"].items()}
    unknown = table | {"students": alike}
    assert {r["seconds"] for r in table_rows(unknown, "steps")} == {""}
    assert "Seconds are of one student;" in render_table(unknown, "")


def test_a_student_gone_on_with_on_another_device_has_no_seconds() -> None:
    assert seconds_before(None, "CPU") == 0.0
    assert seconds_before({"seconds": 5.0, "device": "CPU"}, "CPU") == 5.0
    assert seconds_before({"seconds": 5.0, "device": "H100"}, "CPU") is None
    assert seconds_before({"seconds": 5.0}, "CPU") is None  # a state of an earlier version does not say
    assert seconds_before({"seconds": None, "device": "CPU"}, "CPU") is None  # it was on another before that


@pytest.mark.usefixtures("ray_cluster", "one_thread")
def test_a_training_that_moves_keeps_no_seconds_of_two_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_paper_table(write_paper_task(tmp_path, rows=["p_only"], per_class=[12], equal_epochs=False))
    jobs: list[StudentJob] = []
    with monkeypatch.context() as patch:
        patch.setattr(paper, "train_students", lambda missing, *_: jobs.extend(missing) or {"p_only-12-seed0": "later"})
        with pytest.raises(RunError, match="none of the table's students could be made: later"):
            make_table(config)
    (job,) = jobs
    states: list[dict[str, Any]] = []
    write = RunFolder.write_bytes

    def keep(folder: RunFolder, path: str, data: bytes) -> None:
        if path.endswith(".state.pt"):
            states.append(torch.load(io.BytesIO(data), weights_only=True))
        write(folder, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_bytes", keep)
        students._train_student._function(job, (tmp_path / "teacher.pt").read_bytes(), None)
    assert states[0]["device"] == "CPU"
    for device, before in (("CPU", 1000.0), ("H100", None)):
        torch.save(states[-1] | {"device": device, "seconds": 1000.0}, tmp_path / f"table/students/{job.key}.state.pt")
        students._train_student._function(job, (tmp_path / "teacher.pt").read_bytes(), None)
        result = json.loads((tmp_path / f"table/students/{job.key}.json").read_text())
        assert result["device"] == "CPU"
        assert result["seconds"] is None if before is None else result["seconds"] > before
    capsys.readouterr()


def test_the_table_at_equal_epochs_has_the_original_data_at_the_usual_length() -> None:
    run = {"average_precision": None, "prior": {"value": 0.25}}
    made = [student("kd", 9, 0, 0.9, steps=10), student("kd", 9, 0, 0.5, steps=5, equal="length")]
    made += [student("all", 9, 0, 0.8, steps=30, equal="epochs"), student("all", 9, 0, 0.7)]
    rows = table_rows({"students": dict(enumerate(made)), "runs": {"9-seed0": run}}, "epochs")
    assert [(r["title"], r["top1"], r["steps"], r["difference"]) for r in rows] == [
        ("kd", "90.00", "10", ""),
        ("all", "80.00", "30", "-10.00"),
    ]


def test_all_rows_of_the_first_number_of_positives_are_drawn() -> None:
    students = [student(row, n, 0, top1) for row, n, top1 in (("pu_s1", 3, 0.5), ("p_only", 9, 0.6), ("T=9", 3, 0.7))]
    table = {"students": {str(i): s for i, s in enumerate(students)}, "teacher": {"top1": 0.9}}
    drawn = draw_accuracy(table).decode()
    assert "<!-- pu_s1 -->" in drawn
    assert "<!-- p_only -->" in drawn
    assert "T=9" not in drawn


def test_rows_of_several_lengths_are_lines_against_the_images_seen() -> None:
    students = [student("pu_s1", 3, s, 0.5 + s / 10, images_seen=640) for s in range(2)]
    students += [student("pu_s1", 3, 0, 0.4, images_seen=64, equal="length"), student("kd", 3, 0, 0.9, images_seen=640)]
    students += [student("pu_s1", 9, 0, 0.8, images_seen=640)]
    table = {"students": {str(i): s for i, s in enumerate(students)}, "teacher": {"top1": 0.9}}
    assert lengths(table) == {"pu_s1": {64: 0.4, 640: 0.5}}
    drawn = draw_lengths(table).decode()
    assert "<!-- pu_s1 -->" in drawn
    assert "<!-- kd -->" not in drawn
    assert lengths({"students": {"0": students[0]}}) == {}
    run = {"average_precision": 0.5, "prior": {"value": 0.25}}
    rows = table_rows({**table, "runs": {f"{n}-seed{s}": run for n in (3, 9) for s in range(2)}}, "steps")
    assert [r["seeds"] for r in rows] == ["2", "1", "1"]


def test_rows_of_several_tables_are_lines_against_the_share_of_relevant_images() -> None:
    tables = []
    for share in (0.5, 0.02):
        students = [student(row, 3, s, share + s / 10) for row in ("pu_s1", "all") for s in range(2)]
        students += [student(row, 9, 0, 0.9) for row in ("pu_s1", "selected@9")]
        students += [student("knn", 3, 0, 0.9)] if share == 0.5 else []
        runs = {f"{n}-seed{s}": {"relevant": share} for n in (3, 9) for s in range(2)}
        runs["3-seed2"] = {"relevant": None}  # of rows that select nothing
        tables.append({"students": dict(enumerate(students)), "runs": runs})
    points = [(0.02, pytest.approx(0.07)), (0.5, pytest.approx(0.55))]
    assert by_share(tables) == {"pu_s1": points, "all": points}
    nowhere = tables[0] | {"runs": {"3-seed0": {"relevant": None}}}
    assert by_share([*tables, nowhere]) == by_share(tables)
    drawn = draw_shares({"by_share": by_share(tables)}).decode()
    assert "<!-- pu_s1 -->" in drawn


JUDGED = {
    "P only": "PU-s1 - student on P only",
    "random of U, as many": "PU-s1 - Baseline-2: random of U",
    "all of U": "PU-s1 - Baseline-3: all of U",
    "selected by truth": "PU-s1 - Baseline-1: selected by truth",
    "KD on the original data": "PU-s1 - KD on the original data",
}
"""Rows of docs/paper.md: what a table calls them."""
RECOMMENDED = {
    "random of U, as many as PU-s1": "Baseline-2: random of U",
    "all of U": "Baseline-3: all of U",
    "nearest to P (`knn`)": "nearest to P (knn)",
    "linear probe of P against U": "linear probe of P against U",
    "surest of the teacher": "surest of the teacher",
    "selected by truth": "Baseline-1: selected by truth",
    "P only": "student on P only",
    "as many original images as PU-s1 takes": "KD on as many original images",
}
"""The same of its second table."""

TOGETHER = {
    "cifar10-tiny and averaged": ("cifar10-tiny", "cifar10-tiny-averaged"),
    "cifar10-tiny-hidden-quarter and averaged": ("cifar10-tiny-hidden-quarter", "cifar10-tiny-hidden-averaged"),
}
"""Pages of other seeds, taken as one."""
REAL_POOLS = {
    "`cifar10-tiny`": "cifar10-tiny",
    "the same, a better teacher, other P": "cifar10-tiny-averaged",
    "these two together": "cifar10-tiny and averaged",
    "the first with a quarter P": "cifar10-tiny-quarter",
    "hidden images": "cifar10-tiny-hidden",
    "hidden images, a quarter P": "cifar10-tiny-hidden-quarter",
    "that with a better teacher, other P": "cifar10-tiny-hidden-averaged",
    "the last two together": "cifar10-tiny-hidden-quarter and averaged",
}
"""Columns of the second table, and the page or pages that each is of."""
CHANGES = {
    "batches of 64, at half the learning rate, as many images": "batches_of_64",
    "DFND's noise-adapted loss of the teacher's hard labels, weight 0.5": "noise_adapted=0.5",
    "near misses, from P(relevant) 0.05, as a tenth of each batch": "near_miss_share=0.1",
    "the last tenth of the steps on P alone": "last_on_positives=0.1",
    "P's labels, weight 0.2": "label_weight=0.2",
    "mixup, at a quarter of a million images": "mixup=1",
}
"""Rows of the third table, which are of one page, and what that calls them."""


def test_published_tables_come_from_their_figures() -> None:
    pages = sorted(DOCS.glob("paper/*/table.md"))
    assert pages
    text = ""
    judged: dict[str, dict[str, str]] = {}
    for page in pages:
        table = json.loads((page.parent / "table.json").read_text())
        text += page.read_text()
        judged[table["name"].removeprefix("fashion-")] = dict(comparisons(table))
        command = f"python jobs/paper_table.py --config jobs/configs/paper/{table['name'].replace('-', '_')}.yaml"
        assert render_table(table, command) == page.read_text()
        assert (page.parent / "lengths.svg").exists() == bool(lengths(table))
        assert (page.parent / "shares.svg").exists() == bool(table.get("by_share"))
        assert (page.parent / "table.svg").read_bytes().startswith(b"<?xml")
    for name, of in TOGETHER.items():
        one, other = (json.loads((DOCS / "paper" / page / "table.json").read_text())["students"] for page in of)
        assert not one.keys() & other.keys()  # other seeds
        judged[name] = dict(comparisons({"students": one | other}))
        text += " ".join(judged[name].values())
    remarks = (DOCS / "paper.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in remarks.splitlines() if line.startswith("| ")]
    starts = {row[0]: i for i, row in enumerate(cells)}
    header, *rows = cells[starts["PU-s1 minus"] :][: 1 + len(JUDGED)]
    pools = [name.strip("`") for name in header[1:]]
    assert set(pools) == {name for name in judged if not name.startswith("cifar10")}
    assert rows == [[what, *(judged[pool][JUDGED[what]] for pool in pools)] for what in JUDGED]
    header, *rows = cells[starts["recommended minus"] :][: 1 + len(RECOMMENDED)]
    assert header[1:] == list(REAL_POOLS)
    assert rows == [
        [what, *(judged[pool].get(f"recommended - {row}", "not made") for pool in REAL_POOLS.values())]
        for what, row in RECOMMENDED.items()
    ]
    tuning = json.loads((DOCS / "paper" / "cifar10-hidden-tuning" / "table.json").read_text())
    changes = {row["title"]: row["difference"] for row in further_rows(tuning)}
    assert cells[starts["change"] + 1 :] == [[what, changes[row]] for what, row in CHANGES.items()]
    # What the remarks cite is in a table.
    cited = re.findall(r"[+-]?\d+\.\d+", remarks)
    assert cited
    assert [figure for figure in cited if figure not in text] == []


def test_quick_leaves_the_tables_folder_alone(tmp_path: Path) -> None:
    file = write_paper_task(tmp_path, more=[{"name": "x"}], main_seeds=8, lengths=[2])

    def load(*flags: str) -> PaperConfig:
        return paper_table.load(parse_arguments(["--config", str(file), *flags], "", add_flags=paper_table.add_flags))

    quick = load("--quick", "--distill.steps", "7", "--rows", "pu_s1,all")
    assert quick.output == f"{tmp_path / 'table'}-quick"
    assert (quick.table.seeds, quick.table.per_class, quick.table.more) == (2, (20,), ())
    assert quick.table.lengths == ()
    assert (quick.table.rows, quick.distill.steps) == (("pu_s1", "all"), 7)
    assert load("--seeds", "3").output == str(tmp_path / "table")
    assert load("--quick", "--output", "s3://bucket/t?region=x").output == "s3://bucket/t-quick?region=x"
    assert (load("--seeds", "3").table.seeds, load("--seeds", "3").table.main_seeds) == (3, None)


def test_the_job_names_faults_and_lists_its_flags(tmp_path: Path) -> None:
    file = write_paper_task(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(JOB), "--config", str(file), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    bad = run("--rows", "pu_s1,none", "--seeds", "0")
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 2
    assert "table.seeds: 0 should be at least 1" in bad.stderr
    assert "--quick" in run("--help").stdout
