"""The whole pipeline on a tiny task with real Ray: what a run leaves, restarts, and what stops it."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from record_types import faults_of
from synthetic import labelled, write_config, write_task

from pukd_ray import ConfigError, RunConfig, RunError, load_config, load_student, run_pipeline
from pukd_ray.commands import main
from pukd_ray.corpus.perceptual import perceptual_hashes
from pukd_ray.corpus.pixels import decode, pixel_spec
from pukd_ray.networks.selector import SelectorHead
from pukd_ray.networks.teacher import Teacher
from pukd_ray.report.status import status_lines
from pukd_ray.run import records
from pukd_ray.run.folder import SCORES_SCHEMA, SELECTED_SCHEMA, RunFolder
from pukd_ray.run.stages import EVERY_RUN
from pukd_ray.selection.blend import Blend, Nearness
from pukd_ray.selection.features import as_half

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_task(folder)
    # Unreadable images, copies of each other and copies of P, appended to the first file.
    first = folder / "lake" / "part-0.parquet"
    table = pq.read_table(first)
    images = table.column("image").to_pylist()
    truth = table.column("relevant").to_pylist()
    good = images[0]
    extra = [None, b"", b"hello", good[:60], good, good, pq.read_table(folder / "p.parquet").column("image")[0].as_py()]
    whole = pa.table({"image": [*images, *extra], "relevant": [*truth, *[True] * len(extra)]})
    pq.write_table(whole, first, row_group_size=200)
    return folder


@pytest.fixture(scope="module")
def finished(task: Path) -> Path:
    result = run_pipeline(load_config(task / "config.yaml"))
    assert result.folder == str(task / "run")
    return task / "run"


def scores(run: Path) -> pa.Table:
    files = sorted((run / "scores").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files]).sort_by("image_id")


def test_every_image_is_scored_once_or_rejected_with_a_reason(task: Path, finished: Path) -> None:
    table = scores(finished)
    assert table.schema.equals(SCORES_SCHEMA)
    expected = {f"part-{i}.parquet#{row}" for i, n in enumerate((407, 400, 400)) for row in range(n)}
    ids = table.column("image_id").to_pylist()
    assert len(ids) == 1207
    assert set(ids) == expected
    errors = dict(zip(ids, table.column("error").to_pylist(), strict=True))
    found = {i: e.partition(":")[0] for i, e in errors.items() if e is not None}
    assert found == {
        "part-0.parquet#400": "empty",
        "part-0.parquet#401": "empty",
        "part-0.parquet#402": "not_an_image",
        "part-0.parquet#403": "truncated",
    }
    rejected = table.filter(pa.compute.is_valid(table.column("error")))
    for name in ("pu_logit", "pu_probability", "teacher_label", "teacher_confidence", "teacher_entropy"):
        assert rejected.column(name).null_count == 4
        assert table.column(name).null_count == 4
    assert set(table.column("source").to_pylist()) == {str(task / "lake" / f"part-{i}.parquet") for i in range(3)}


def test_the_records_of_a_run_are_as_typed(finished: Path) -> None:
    run = RunFolder(str(finished))
    kinds = (
        (records.PRIOR, records.PriorRecord),
        (records.SELECTOR, records.SelectorRecord),
        (records.SELECTION, records.SelectionRecord),
        (records.STUDENT, records.StudentRecord),
        (records.METRICS, records.MetricsRecord),
    )
    assert [f for file, kind in kinds for f in faults_of(run.read_record(file), kind, file.name)] == []
    assert [f for stage in EVERY_RUN for f in faults_of(run.marker(stage), records.StageMarker, stage)] == []
    chunks = run.files("markers/score")
    assert len(chunks) > 1
    assert [f for name in chunks for f in faults_of(run.read_json(name), records.ChunkMarker, name)] == []


def test_metrics_add_up(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["n_corpus"] == 1207
    assert metrics["n_scored"] == 1203
    assert metrics["n_rejected"] == 4
    assert metrics["rejected_by_reason"] == {"empty": 2, "not_an_image": 1, "truncated": 1}
    assert metrics["n_positives"] == 80
    # Two of three equal images, and the copy of a positive.
    assert metrics["n_duplicates"] == 3
    assert metrics["teacher"]["top1"] == 1.0
    assert metrics["student"]["top1"] > 0.9
    assert metrics["student"]["parameters"] < metrics["teacher"]["parameters"]
    assert metrics["prior"]["source"] == "bbe"
    assert metrics["prior"]["lower"] <= metrics["prior"]["value"] <= metrics["prior"]["upper"]
    assert abs(metrics["prior"]["value"] - 0.3) < 0.06
    assert metrics["selection"]["precision"] > 0.95
    assert metrics["selection"]["recall"] > 0.9
    assert metrics["selection"]["average_precision"] > 0.99
    estimated = metrics["selection_estimated"]
    for key in ("precision", "recall"):
        low, high = estimated[f"{key}_interval"]
        assert 0 <= low <= estimated[key] <= high <= 1
    assert set(metrics["seconds"]) == {"plan", "selector", "score", "select", "distill", "evaluate", "report"}
    assert metrics["images_per_second"]["score"] > 0


def test_the_folder_holds_what_the_contract_names(finished: Path) -> None:
    top = {p.name for p in finished.iterdir()}
    assert top == {
        "config.yaml",
        "environment.json",
        "files.parquet",
        "markers",
        "metrics.json",
        "plan.parquet",
        "report.html",
        "scores",
        "selected",
        "selection.json",
        "selector",
        "student",
        *(["tensorboard"] if find_spec("tensorboard") else []),
    }
    assert {p.name for p in (finished / "student").iterdir()} == {
        "class_weights.json",
        "meta.json",
        "student.pt",
        "student.safetensors",
        "training.json",
    }
    chunks = [json.loads(p.read_text()) for p in sorted((finished / "markers" / "score").iterdir())]
    assert [len(c["units"]) for c in chunks] == [2, 1]
    assert sorted(f for c in chunks for f in c["files"]) == sorted(
        f"scores/{p.name}" for p in (finished / "scores").iterdir()
    )
    weights = json.loads((finished / "student" / "class_weights.json").read_text())["class_weights"]
    assert sum(weights) == pytest.approx(4)
    resolved = load_config(finished / "config.yaml")
    assert resolved.teacher.weights == str(finished.parent / "teacher.pt")


def test_a_finished_run_is_looked_at_from_its_folder_alone(
    task: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = status_lines(RunFolder(str(finished)))
    assert lines[1].startswith("driver    none; the last was process ")
    assert [" done in " in line for line in lines[2:]] == [True] * len(EVERY_RUN)
    assert main(["show", str(finished), "part-0.parquet#404", "part-0.parquet#400", "--pictures", str(tmp_path)]) == 0
    assert "  unreadable    empty" in capsys.readouterr().out
    (picture,) = tmp_path.iterdir()
    assert picture.read_bytes() == pq.read_table(task / "lake/part-0.parquet").column("image")[404].as_py()
    assert main(["publish", str(finished), str(tmp_path / "hub")]) == 0
    published = pq.read_table(tmp_path / "hub/dataset/data")
    assert published.num_rows == json.loads((finished / "metrics.json").read_text())["n_selected"]
    assert "| student (lenet5_half) | " in (tmp_path / "hub/model/README.md").read_text()


def test_the_student_loads_and_is_as_good_as_the_metrics_say(task: Path, finished: Path) -> None:
    student = load_student(str(finished / "student"))
    test = pq.read_table(task / "test.parquet")
    probabilities = student(test.column("image").to_pylist())
    assert probabilities.shape == (80, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(80))
    hits = probabilities.argmax(1) == torch.tensor(test.column("label").to_pylist())
    assert float(hits.float().mean()) == json.loads((finished / "metrics.json").read_text())["student"]["top1"]
    assert student.classes == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match="image 1: not_an_image"):
        student([test.column("image")[0].as_py(), b"hello"])
    assert student([]).shape == (0, 4)


def test_a_finished_run_gains_an_export_and_a_page_that_shows_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = copy_of(finished, tmp_path, **{"export.formats": ["torch"]})
    before = {p: p.stat().st_mtime_ns for p in (run / "student").iterdir()}
    run_pipeline(config)
    assert before == {p: p.stat().st_mtime_ns for p in (run / "student").iterdir()}
    record = RunFolder(str(run)).read_record(records.EXPORT)
    assert faults_of(record, records.ExportRecord, "export.json") == []
    student = json.loads((run / "metrics.json").read_text())["student"]
    assert (record["images"], record["role"]) == (80, "test")
    assert record["files"]["torch"]["top1"] == record["pytorch"]["top1"] == student["top1"]
    assert record["files"]["torch"]["agreement"] == 1.0
    assert "export/student.pt2" in (run / "report.html").read_text()
    assert "export" not in (finished / "report.html").read_text().partition("<h2>Config")[0]
    assert list((run / "old").rglob("report.html"))
    assert "export" in json.loads((run / "metrics.json").read_text())["seconds"]
    capsys.readouterr()
    run_pipeline(config)
    assert "nothing to do" in capsys.readouterr().out
    other = load_config(
        finished.parent / "config.yaml", {"output": str(run), "export": {"formats": ["torch"], "input": "float32"}}
    )
    with pytest.raises(ConfigError, match=r"export\.input: has changed since stage export .*\n.*--redo export"):
        run_pipeline(other)
    run_pipeline(other, redo="export")
    assert RunFolder(str(run)).read_record(records.EXPORT)["input"]["type"] == "float32"
    run_pipeline(load_config(finished.parent / "config.yaml", {"output": str(run)}))  # not asked for: left as it is
    assert (run / "export/student.pt2").exists()


def test_every_readable_image_has_the_hash_of_what_the_teacher_sees(task: Path, finished: Path) -> None:
    table = scores(finished)
    readable = pa.compute.is_null(table.column("error"))
    assert pa.compute.is_valid(table.column("perceptual_hash")).to_pylist() == readable.to_pylist()
    kept = table.filter(pa.compute.is_valid(table.column("image")))
    spec = pixel_spec(load_config(task / "config.yaml").teacher)
    hashes, _ = perceptual_hashes(np.stack([decode(image, spec) for image in kept.column("image").to_pylist()]))
    assert kept.column("perceptual_hash").to_pylist() == [h.tobytes() for h in hashes]


def test_selected_rows_are_the_rule_and_in_hash_order(finished: Path) -> None:
    from pukd_ray.selection.scoring import sort_key

    selected = pa.concat_tables([pq.read_table(f) for f in sorted((finished / "selected").glob("*.parquet"))])
    assert selected.schema.equals(SELECTED_SCHEMA)
    table = scores(finished)
    good = table.filter(pa.compute.is_null(table.column("error")))
    positive = {
        i
        for i, z in zip(good.column("image_id").to_pylist(), good.column("pu_logit").to_pylist(), strict=True)
        if z > 0
    }
    ids = selected.column("image_id").to_pylist()
    assert len(ids) == len(set(ids))
    assert set(ids) <= positive
    assert len(positive - set(ids)) <= 3  # the copies
    keys = [sort_key(0, i) % 2**64 for i in ids]
    assert keys == sorted(keys)
    assert selected.column("image").null_count == 0


def test_a_finished_run_does_nothing_and_a_changed_key_needs_redo(
    task: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    run_pipeline(load_config(task / "config.yaml"))
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    changed = load_config(task / "config.yaml", {"selection.rule": "budget", "selection.budget": 100})
    with pytest.raises(ConfigError) as caught:
        run_pipeline(changed)
    assert [f.partition(":")[0] for f in caught.value.faults] == ["selection.budget", "selection.rule", "output"]
    assert "--redo select" in caught.value.faults[-1]
    with pytest.raises(ConfigError):
        run_pipeline(changed, redo="distill")  # too late a stage
    run_pipeline(load_config(task / "config.yaml", {"name": "renamed", "resources.train_workers": 1}))


def copy_of(finished: Path, tmp_path: Path, **overrides: Any) -> tuple[RunConfig, Path]:
    """A copy of the finished run, and a config that goes on with it."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    return load_config(finished.parent / "config.yaml", {"output": str(output), **overrides}), output


def test_other_chunks_give_the_same_scores(finished: Path, tmp_path: Path) -> None:
    config, again = copy_of(finished, tmp_path, **{"score.chunk_images": 10_000})
    run_pipeline(config, redo="score", until="score")
    first, second = scores(finished), scores(again)
    assert len(list((again / "markers" / "score").iterdir())) == 1
    for name in ("image_id", "source_row", "content_hash", "error", "teacher_label", "relevant", "image"):
        assert first.column(name).to_pylist() == second.column(name).to_pylist(), name
    logits = [t.column("pu_logit").drop_null().to_numpy() for t in (first, second)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    assert list((again / "old").rglob("scores/*.parquet")), "--redo must keep the old part"


def test_one_pass_writes_the_columns_of_several_rules(finished: Path, tmp_path: Path) -> None:
    budget = {"selection.rule": "knn", "selection.budget": 200}
    config, again = copy_of(finished, tmp_path, **budget)
    before = {p for p in again.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"selection\.rule: .* rule knn ranks by: --redo score") as caught:
        run_pipeline(config, redo="select")
    assert "--redo score" in caught.value.faults[-1]
    assert {p for p in again.rglob("*") if p.is_file()} == before, "nothing may have moved"
    config = load_config(
        finished.parent / "config.yaml", {"output": str(again), **budget, "score.also": ["linear_probe", "positive"]}
    )
    run_pipeline(config, redo="score", until="select")
    table = scores(again)
    assert table.column_names == [*SCORES_SCHEMA.names, "knn", "linear_probe"]
    logits = [t.column("pu_logit").drop_null().to_numpy() for t in (table, scores(finished))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    for name in ("knn", "linear_probe"):
        assert table.column(name).null_count == 4
    summaries = {"knn": json.loads((again / "selection.json").read_text())}
    other = load_config(
        finished.parent / "config.yaml", {"output": str(again), **budget, "selection.rule": "linear_probe"}
    )
    run_pipeline(other, redo="select", until="select")  # the scores have its column
    summaries["linear_probe"] = json.loads((again / "selection.json").read_text())
    for rule, summary in summaries.items():
        assert (summary["rule"], summary["n_selected"]) == (rule, 200)
        assert summary["truth"]["precision"] > 0.8
        assert summary["truth"]["average_precision"] > 0.8


def test_two_workers_train_the_same_head_and_stream_what_is_too_large_for_memory(
    finished: Path, tmp_path: Path
) -> None:
    config, two = copy_of(finished, tmp_path, **{"resources.train_workers": 2, "distill.memory_gib": 1e-6})
    run_pipeline(config, redo="selector", until="evaluate")
    ours, theirs = (torch.load(run / "selector/head.pt", weights_only=True) for run in (two, finished))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-2, atol=2e-3, msg=lambda m, k=key: f"{k}: {m}")
    metrics = json.loads((two / "metrics.json").read_text())
    assert metrics["student"]["top1"] > 0.9
    assert json.loads((two / "student/training.json").read_text())["images"] == metrics["n_selected"] + 80
    # Equal splits may drop a row; the weights of the classes hardly notice.
    weights = [json.loads((r / "student/class_weights.json").read_text())["class_weights"] for r in (two, finished)]
    assert weights[0] == pytest.approx(weights[1], rel=0.02)
    biases = [torch.load(run / "student/student.pt", weights_only=True)["fc3.bias"] for run in (two, finished)]
    assert not torch.equal(*biases), "the order of the stream differs from the one in memory: was it streamed at all?"


def test_a_student_begins_with_given_weights(finished: Path, tmp_path: Path) -> None:
    start = finished / "student/student.pt"
    config, run = copy_of(finished, tmp_path, **{"student.start": str(start), "distill.lr": 1e-9, "distill.steps": 2})
    with pytest.raises(ConfigError, match=r"student\.start: has changed since stage distill "):
        run_pipeline(config)
    run_pipeline(config, redo="distill", until="distill")
    given, begun = (torch.load(path, weights_only=True) for path in (start, run / "student/student.pt"))
    for name, value in given.items():
        torch.testing.assert_close(begun[name], value, rtol=0, atol=1e-5)


def test_a_finetuned_trunk_is_trained_by_two_workers_and_scores(finished: Path, tmp_path: Path) -> None:
    config, run = copy_of(finished, tmp_path, **{"selector.trunk": "finetune", "resources.train_workers": 2})
    run_pipeline(config, redo="selector", until="score")
    weights = Path(config.teacher.weights).read_bytes()
    trunk, head = (run / "selector" / name for name in ("trunk.pt", "head.pt"))
    tuned = Teacher(config.teacher, trunk.read_bytes(), torch.device("cpu"), "auto")
    teacher = Teacher(config.teacher, weights, torch.device("cpu"), "auto")
    changed = {
        name
        for name, value in tuned.extractor.model.state_dict().items()
        if not torch.equal(value, teacher.extractor.model.state_dict()[name])
    }
    assert changed
    assert not any(name.startswith("fc3") for name in changed)
    selector = SelectorHead(tuned.extractor.channels)
    state = torch.load(head, weights_only=True)
    state.pop("log_max_phi")
    selector.load_state_dict(state)
    table = scores(run)
    table = table.filter(pa.compute.is_valid(table.column("image"))).slice(0, 50)
    pixels = np.stack([decode(image, pixel_spec(config.teacher)) for image in table.column("image").to_pylist()])
    features, _ = tuned(pixels)
    with torch.no_grad():
        logits = selector(features.half().float()).numpy()
    # How near they are to P is the frozen teacher's opinion.
    of_teacher, opinion = teacher(pixels)
    nearness = Nearness.load((run / "selector/nearness.npz").read_bytes())
    blend = Blend(**json.loads((run / "selector/blend.json").read_text()))
    last_tap = as_half(teacher.last_tap(of_teacher).numpy()).astype(np.float32)
    expected = blend(logits, nearness.tails(last_tap))
    np.testing.assert_allclose(table.column("pu_logit").to_numpy(), expected, rtol=1e-2, atol=1e-2)
    assert table.column("teacher_label").to_pylist() == opinion.argmax(1).tolist()
    assert table.column("relevant").to_numpy(zero_copy_only=False).mean() > 0.9


def test_new_files_are_the_only_ones_scored(
    task: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, again = copy_of(finished, tmp_path)
    before = {p.name for p in (again / "scores").iterdir()}
    new = task / "lake" / "part-9.parquet"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        pq.write_table(pq.read_table(task / "lake" / "part-1.parquet").slice(0, 50), new)
        # Wherever a driver dies: the scores that were there are not taken for all.
        for place in ("run.folder.RunFolder.finish", "selection.scoring.score_corpus"):
            with monkeypatch.context() as broken:
                broken.setattr(f"pukd_ray.{place}", dies)
                with pytest.raises(KeyboardInterrupt):
                    run_pipeline(config, until="select")
        run_pipeline(config, until="select")
        after = {p.name for p in (again / "scores").iterdir()}
        assert before < after
        added = pa.concat_tables([pq.read_table(again / "scores" / name) for name in after - before])
        assert sorted(added.column("image_id").to_pylist()) == sorted(f"part-9.parquet#{i}" for i in range(50))
        summary = json.loads((again / "selection.json").read_text())
        assert summary["n_scored"] == 1253
        assert summary["n_duplicates"] == 53
        assert list((again / "old").rglob("selection.json"))
        # A file that changed is not a new one.
        pq.write_table(pq.read_table(task / "lake" / "part-1.parquet").slice(0, 60), new)
        with pytest.raises(ConfigError, match=r"part-9\.parquet has changed"):
            run_pipeline(config, until="select")
    finally:
        new.unlink()


def test_shifted_labels_are_found(task: Path, tmp_path: Path) -> None:
    table = labelled(80, 1)
    shifted = [(k + 1) % 4 for k in table.column("label").to_pylist()]
    pq.write_table(table.set_column(1, "label", pa.array(shifted)), tmp_path / "p.parquet")
    config = load_config(
        task / "config.yaml", {"positives.uri": str(tmp_path / "p.parquet"), "output": str(tmp_path / "run")}
    )
    with pytest.raises(RunError, match=r"positives: the teacher agrees with only \d+% of the labels, but with 100%"):
        run_pipeline(config)


def test_a_corpus_without_relevant_images_ends_at_the_selector(tmp_path: Path) -> None:
    config = write_task(tmp_path, relevant=0.0)
    with pytest.raises(RunError, match="corpus:"):
        run_pipeline(load_config(write_config(tmp_path, config)))
    assert any(line.startswith("error     selector failed at 20") for line in status_lines(RunFolder(config["output"])))
    assert not (tmp_path / "run" / "scores").exists()
    assert not (tmp_path / "run" / "student").exists()


def test_too_many_unreadable_images_stop_the_run(tmp_path: Path) -> None:
    config = write_task(tmp_path)
    broken = pa.table({"image": [b"x"] * 600, "relevant": [False] * 600})
    pq.write_table(broken, tmp_path / "lake" / "part-8.parquet")
    with pytest.raises(RunError, match=r"600 not_an_image\), more than score.max_rejected"):
        run_pipeline(load_config(write_config(tmp_path, config)))
