"""An audit of a tiny finished run, drawn with real Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from synthetic import write_task

from pukd_ray import RunConfig, RunError, load_config, run_pipeline
from pukd_ray.audit import drawing
from pukd_ray.audit.commands import draw, take_back
from pukd_ray.audit.record import SAMPLE_SCHEMA, load_sample, summarise_audit
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import SELECTION

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 600 images, of which 6 cannot be read and 40 are copies of another."""
    folder = tmp_path_factory.mktemp("tiny")
    write_task(folder, images=600)
    first = folder / "lake" / "part-0.parquet"
    table = pq.read_table(first)
    images, truth = table.column("image").to_pylist(), table.column("relevant").to_pylist()
    images[:6] = [b"hello"] * 6
    for i in range(20, 60):
        images[i], truth[i] = images[19], truth[19]
    pq.write_table(pa.table({"image": images, "relevant": truth}), first, row_group_size=200)
    config = load_config(folder / "config.yaml", {"selector.steps": 60})
    run_pipeline(config, until="select")
    return config


@pytest.fixture(scope="module")
def audited(config: RunConfig) -> RunFolder:
    folder = RunFolder(config.output)
    draw(folder, config, images=150)
    return folder


@pytest.fixture(scope="module")
def truth(config: RunConfig) -> pa.Table:
    files = sorted((Path(config.output) / "scores").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files])


def test_the_sample_is_of_the_strata_it_claims(audited: RunFolder, truth: pa.Table) -> None:
    sample, design = load_sample(audited)
    assert sample.schema.equals(SAMPLE_SCHEMA)
    readable = truth.filter(truth.column("error").is_null())
    assert (design["n_scored"], design["n_unreadable"]) == (594, 6) == (len(readable), len(truth) - len(readable))
    parts = [audited.read_table(f) for f in audited.files("selected") if f.endswith(".parquet")]
    selected = set(pa.concat_tables(parts).column("image_id").to_pylist())
    assert design["n_selected"] == len(selected)
    assert len(set(sample.column("image_id").to_pylist())) == 150
    rows = {r["image_id"]: r for r in readable.to_pylist()}
    sizes = {}
    for row in sample.to_pylist():
        scored = rows[row["image_id"]]
        assert row["selected"] == (row["image_id"] in selected)
        assert all(row[c] == scored[c] for c in ("source", "source_row", "pu_logit", "teacher_label"))
        assert row["inclusion_probability"] == row["sampled"] / row["stratum_size"]
        sizes[row["stratum"]] = row["stratum_size"]
        image = pq.read_table(row["source"], columns=["image"]).column("image")[row["source_row"]].as_py()
        assert row["image"] == image
    assert sum(sizes.values()) == 594
    bands = sample.group_by(["selected", "stratum"]).aggregate([("pu_logit", "min"), ("pu_logit", "max")])
    for side in (True, False):
        mine = bands.filter(pc.equal(bands.column("selected"), side)).sort_by("stratum")
        low, high = mine.column("pu_logit_min").to_numpy(), mine.column("pu_logit_max").to_numpy()
        assert (high[:-1] < low[1:]).all()


def test_the_sample_depends_on_seed_and_scores_and_not_on_how_work_is_cut(
    config: RunConfig, audited: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, design = load_sample(audited)
    monkeypatch.setattr(drawing, "FILES_PER_TASK", 1)
    monkeypatch.setattr(drawing, "IMAGES_PER_TASK", 37)
    again, same = drawing.draw_sample(audited, config, 150, config.seed)
    assert again.equals(sample)
    assert same == design
    other, _ = drawing.draw_sample(audited, config, 150, 1)
    assert set(other.column("image_id").to_pylist()) != set(sample.column("image_id").to_pylist())


def test_nothing_but_chance_orders_the_sample(audited: RunFolder) -> None:
    sample, _ = load_sample(audited)
    logits = sample.column("pu_logit").to_numpy()
    assert abs(np.corrcoef(np.arange(len(logits)), logits)[0, 1]) < 3 / np.sqrt(len(logits))


def test_nothing_to_label_with_tells_the_score(audited: RunFolder) -> None:
    sample, design = load_sample(audited)
    tasks = json.loads(Path(audited.path("audit/label_studio.json")).read_text())
    assert [set(task["data"]) for task in tasks] == [{"audit", "image_id", "image"}] * 150
    assert [task["data"]["image_id"] for task in tasks] == sample.column("image_id").to_pylist()
    page = Path(audited.path("audit/label.html")).read_text()
    assert design["audit"] in page
    assert page.count("class 3") == 1
    assert page.count("data:image/png") == 150 + 4 * 4
    csv = Path(audited.path("audit/labels.csv")).read_text()
    assert csv.startswith("audit,number,image_id,source,source_row,label")
    assert csv.count(f"{design['audit']},") == 150


def test_labels_taken_back_hold_the_truth(
    audited: RunFolder, truth: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relevant = dict(zip(truth.column("image_id").to_pylist(), truth.column("relevant").to_pylist(), strict=True))
    sample, design = load_sample(audited)
    labels = {i: "yes" if relevant[i] else "no" for i in sample.column("image_id").to_pylist()}
    (tmp_path / "labels.json").write_text(json.dumps({"audit": design["audit"], "labels": labels}))
    record = take_back(audited, str(tmp_path / "labels.json"))
    readable = truth.filter(truth.column("error").is_null())
    summary = audited.read_record(SELECTION)["truth"]
    n_relevant = pc.sum(readable.column("relevant")).as_py()
    true = {
        "prior": n_relevant / len(readable),
        "precision": summary["selected_relevant"] / design["n_selected"],
        "recall": summary["selected_relevant"] / n_relevant,
    }
    for name, value in true.items():
        figure = record[name]  # type: ignore[literal-required]
        assert figure["lower"] <= value <= figure["upper"], name
        assert figure["upper"] - figure["lower"] < 0.35
    out = capsys.readouterr().out
    assert "150 labelled, 0 unsure" in out
    assert "90 % interval" in out
    found = summarise_audit(audited)
    assert found is not None
    assert found["current"]
    saved = audited.read_table(f"labels/{design['audit']}.parquet")
    assert len(saved) == 150
    assert sum(saved.column("weight").to_pylist()) == pytest.approx(594)


def test_a_second_draw_would_overwrite_and_is_refused(config: RunConfig, audited: RunFolder) -> None:
    with pytest.raises(RunError, match="holds a sample already: label that one, or move the folder away"):
        draw(audited, config)


def test_a_run_without_selection_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="needs finished stages score and select: run the pipeline first"):
        draw(RunFolder(str(tmp_path)), config)


def test_an_audit_of_an_earlier_selection_moves_aside(
    config: RunConfig, audited: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before, design = load_sample(audited)
    marker = audited.marker("select")
    assert marker is not None
    audited.write_json("markers/select.json", marker | {"finished": "2100-01-01T00:00:00+00:00"})
    draw(audited, config, images=100)
    (moved,) = Path(audited.path("old")).iterdir()
    assert f"the audit of an earlier selection moved to old/{moved.name}" in capsys.readouterr().out
    assert audited.read_table(f"old/{moved.name}/audit/sample.parquet").equals(before)
    sample, again = load_sample(audited)
    assert len(sample) == 100
    assert again["select_finished"] != design["select_finished"]
    assert summarise_audit(audited) is None
    assert again["seed"] == design["seed"] + 1  # the first draw's images are no more likely to come again
    assert audited.exists(f"labels/{design['audit']}.parquet")
