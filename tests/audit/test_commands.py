"""`pukd audit` up to where Ray would start, and labels taken back into a run without a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from record_types import faults_of

from pukd_ray.audit.record import SAMPLE_SCHEMA, audit_id, summarise_audit
from pukd_ray.commands import main
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import AuditSummary


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has got as far as its selection, and metrics."""
    folder = RunFolder(str(tmp_path / "run"))
    folder.finish("score", {}, 1.0, {})
    folder.finish("select", {}, 1.0, {})
    folder.write_json("metrics.json", {"n_selected": 20})
    return folder


def draw_by_hand(folder: RunFolder) -> str:
    """10 of 20 selected images and 10 of 80 others; the audit's id."""
    rows = [
        {
            "image_id": f"i{i}", "source": "f", "source_row": i, "stratum": i // 10, "stratum_size": (20, 80)[i // 10],
            "sampled": 10, "inclusion_probability": (0.5, 0.125)[i // 10], "pu_logit": 1.0, "pu_probability": 0.5,
            "selected": i < 10, "teacher_label": 0, "image": b"",
        }
        for i in range(20)
    ]  # fmt: skip
    sample = pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)
    marker = folder.marker("select")
    assert marker is not None
    design = {"audit": audit_id(sample), "seed": 0, "n_scored": 100, "n_unreadable": 0, "n_selected": 20}
    folder.write_json("audit/design.json", design | {"select_finished": marker["finished"]})
    folder.write_table("audit/sample.parquet", sample)
    return audit_id(sample)


def labels_in(tmp_path: Path, audit: str, count: int = 20) -> str:
    """A file of the page: the first 9 images, and one that was not selected, are relevant."""
    labels = {f"i{i}": "yes" if i < 9 or i == 10 else "no" for i in range(count)}
    (tmp_path / "labels.json").write_text(json.dumps({"audit": audit, "labels": labels}))
    return str(tmp_path / "labels.json")


def pukd(folder: RunFolder, *arguments: str) -> int:
    return main(["audit", arguments[0], "--output", folder.uri, *arguments[1:]])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "the following arguments are required: {draw,read}"),
        (["show"], "argument {draw,read}: invalid choice: 'show'"),
        (["read"], "the following arguments are required: LABELS"),
        (["draw", "labels.json"], "unexpected 'labels.json'"),
        (["draw", "--images", "many"], "argument --images: invalid int value: 'many'"),
    ],
)
def test_arguments_that_are_faults(arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"arguments: {fault}")


@pytest.mark.parametrize(
    ("action", "fault"),
    [
        (["draw"], "an audit needs finished stages score and select: run the pipeline first"),
        (["read", "labels.json"], "holds no audit: draw one first (`pukd audit draw`)"),
    ],
)
def test_without_a_run_there_is_nothing_to_audit(
    action: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pukd(RunFolder(str(tmp_path / "nothing")), *action) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"failed: {tmp_path}/nothing")
    assert line.endswith(fault)
    assert not (tmp_path / "nothing").exists()


def test_a_run_of_another_config_is_refused(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    keep_inputs(folder)
    marker: Any = folder.marker("select")
    changed = marker["inputs"] | {"selection.rule": "budget", "format.select": 0}
    folder.write_json("markers/select.json", marker | {"inputs": changed})
    assert pukd(folder, "draw") == 2
    err = capsys.readouterr().err
    assert f"selection.rule: has changed since stage select of {folder.uri} was done" in err
    assert "; pukd run --redo select moves them to old/" in err
    assert "format" not in err


def test_an_audit_of_this_selection_is_not_drawn_over(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    draw_by_hand(folder)
    keep_inputs(folder)
    assert pukd(folder, "draw") == 1
    assert "holds a sample already: label that one, or move the folder away" in capsys.readouterr().err


def keep_inputs(folder: RunFolder) -> None:
    """Markers with the inputs of the demo's config: what `check_unchanged` compares."""
    from pukd_ray.cli import DEMO_CONFIG
    from pukd_ray.preflight import load_config
    from pukd_ray.resume import fingerprints

    config = load_config(DEMO_CONFIG)
    inputs = fingerprints(config, Path(config.teacher.weights).read_bytes())
    for stage in ("score", "select"):
        marker: Any = folder.marker(stage)
        folder.write_json(f"markers/{stage}.json", marker | {"inputs": inputs[stage]})
    folder.write_json("markers/score.inputs.json", inputs["score"])


def test_labels_are_read_into_the_metrics(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_inputs(folder)
    path = labels_in(tmp_path, draw_by_hand(folder))
    assert pukd(folder, "read", path) == 0
    out = capsys.readouterr().out
    assert "20 labelled, 0 unsure" in out
    command = f"pukd run --output {folder.uri} --selector.prior audit --redo selector"
    assert out.splitlines()[-1] == f"next      the labels serve the selector too: {command}"
    metrics = folder.read_json("metrics.json")
    assert metrics["n_selected"] == 20
    audit = metrics["audit"]
    assert faults_of(audit, AuditSummary) == []
    assert audit == summarise_audit(folder)
    assert (audit["precision"], audit["prior"]) == pytest.approx((0.9, 0.26))
    assert audit["recall"] == pytest.approx(18 / 26)
    assert audit["n_labelled"] == 20
    assert audit["current"]
    for name in ("prior", "precision", "recall"):
        lower, upper = audit[f"{name}_interval"]
        assert lower < audit[name] < upper


def test_an_audit_of_an_earlier_selection_says_so(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_inputs(folder)
    path = labels_in(tmp_path, draw_by_hand(folder))
    marker: Any = folder.marker("select")
    folder.write_json("markers/select.json", marker | {"finished": "2100-01-01T00:00:00+00:00"})
    assert pukd(folder, "read", path) == 0
    assert "precision and recall are of an earlier selection: draw again" in capsys.readouterr().out
    assert folder.read_json("metrics.json")["audit"]["current"] is False


def test_what_few_labels_cannot_tell_is_null(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_inputs(folder)
    folder.delete("metrics.json")
    assert pukd(folder, "read", labels_in(tmp_path, draw_by_hand(folder), count=10)) == 0
    audit = summarise_audit(folder)
    assert audit is not None
    assert faults_of(audit, AuditSummary) == []
    assert (audit["prior"], audit["prior_interval"], audit["recall"]) == (None, None, None)
    assert "--redo selector" not in capsys.readouterr().out
    assert audit["precision"] == pytest.approx(0.9)
    assert not folder.exists("metrics.json")


def test_a_file_of_another_audit_changes_nothing(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_inputs(folder)
    draw_by_hand(folder)
    assert pukd(folder, "read", labels_in(tmp_path, "0" * 16)) == 1
    assert "holds labels of audit '0000000000000000', but the run folder's is" in capsys.readouterr().err
    assert summarise_audit(folder) is None
    assert folder.read_json("metrics.json") == {"n_selected": 20}
