"""Typed records of a run; that those of a finished run are as typed is asserted in test_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from record_types import faults_of

from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import PRIOR, SELECTION, STUDENT, ChunkMarker, NetworkRecords, StageMarker, StudentRecord

PREPROCESSING = {"input_size": 8, "channels": 1, "mean": [0.5], "std": [1], "resize": "crop"}
RECORD: Any = {
    "arch": "a", "num_classes": 2, "classes": None, "preprocessing": PREPROCESSING, "teacher": "t", "steps": 1,
    "images": 2,
}  # fmt: skip


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.write_record(STUDENT, RECORD)
    assert run.read_record(STUDENT) == RECORD == run.read_json("student/meta.json")


def test_a_record_that_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run/selector/prior\.json is not there"):
        RunFolder(str(tmp_path / "run")).read_record(PRIOR)


def test_the_selection_of_an_older_run_is_read(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.write_json("selected/summary.json", {"n_selected": 1})
    assert run.read_record(SELECTION)["n_selected"] == 1
    run.write_json("selection.json", {"n_selected": 2})
    assert run.read_record(SELECTION)["n_selected"] == 2


def test_a_marker_is_as_typed(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.finish("plan", {"seed": 0}, 1.5, {"corpus": 3})
    assert faults_of(run.marker("plan"), StageMarker) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"classes": ["a", "b"]}, None),
        ({"classes": ["a", 3]}, "/classes/1: 3 is no str"),
        ({"classes": 3}, "/classes: 3 is no list"),
        ({"extra": 1}, ": extra is unknown"),
        ({"steps": 1.0}, "/steps: 1.0 is no int"),
        ({"steps": True}, "/steps: True is no int"),
        ({"preprocessing": PREPROCESSING | {"resize": "bend"}}, "/preprocessing/resize: 'bend' is none of"),
        ({"preprocessing": {k: v for k, v in PREPROCESSING.items() if k != "std"}}, "/preprocessing: std lacks"),
    ],
    ids=str,
)
def test_faults_are_found(changes: dict[str, Any], fault: str | None) -> None:
    found = faults_of(RECORD | changes, StudentRecord)
    assert len(found) == (fault is not None)
    assert fault is None or found[0].startswith(fault)


def test_what_need_not_be_there_may_be_there() -> None:
    network = {"top1": 0.5, "top5": None, "per_class": [1, None], "parameters": 3, "arch": "a"}
    both = {"teacher": network, "student": network}
    assert faults_of(both, NetworkRecords) == []
    assert faults_of(both | {"student_last": network}, NetworkRecords) == []
    assert faults_of(both | {"student_last": 1}, NetworkRecords) == ["/student_last: 1 is no dict"]


def test_faults_in_mappings_are_found() -> None:
    chunk = {
        "chunk": "00000", "units": ["u"], "files": [], "n_rows": 1, "rejected_by_reason": {"empty": 1},
        "seconds": 1, "computing_seconds": 0.5,
    }  # fmt: skip
    assert faults_of(chunk, ChunkMarker) == []
    assert faults_of(chunk | {"rejected_by_reason": {"empty": "1"}}, ChunkMarker) == [
        "/rejected_by_reason/empty: '1' is no int"
    ]
