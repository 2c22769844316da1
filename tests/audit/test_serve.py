"""The whole way of an audit: run, draw, label, read, and run again with the labels; and once more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from record_types import faults_of
from synthetic import write_task

from pukd_ray import ConfigError, RunConfig, estimate, load_config, run_pipeline
from pukd_ray.audit.commands import draw
from pukd_ray.audit.record import load_sample
from pukd_ray.commands import main
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import PRIOR, SELECTION, SELECTOR, PriorRecord, SelectorRecord
from pukd_ray.selection.labels import LABELS, label_records, load_labels

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(500)]

STEPS = {"selector.steps": 60}


def label_all(folder: RunFolder, path: Path) -> None:
    """Write a file of the page with the truth of every image of the sample."""
    truth = pa.concat_tables([folder.read_table(f, ["image_id", "relevant"]) for f in folder.files("scores")])
    relevant = dict(zip(*(truth.column(c).to_pylist() for c in ("image_id", "relevant")), strict=True))
    sample, design = load_sample(folder)
    labels = {i: "yes" if relevant[i] else "no" for i in sample.column("image_id").to_pylist()}
    path.write_text(json.dumps({"audit": design["audit"], "labels": labels}))


def read_back(folder: RunFolder, task: Path, prior: str, capsys: pytest.CaptureFixture[str]) -> str:
    """`pukd audit read` of all labels; its last line."""
    label_all(folder, task / "labels.json")
    flags = ["--config", str(task / "config.yaml"), "--selector.steps", "60", "--selector.prior", prior]
    assert main(["audit", "read", *flags, str(task / "labels.json")]) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_labels_serve_the_selector_and_are_never_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path, images=600)
    config = load_config(tmp_path / "config.yaml", STEPS)
    with_labels = load_config(tmp_path / "config.yaml", STEPS | {"selector.prior": "audit"})
    folder = RunFolder(config.output)
    run_pipeline(config, until="select")

    # Without labels nothing is moved.
    with pytest.raises(ConfigError, match="audit needs labels"):
        run_pipeline(with_labels, redo="selector", until="select")
    assert folder.marker("select") is not None

    draw(folder, config, images=150)
    assert read_back(folder, tmp_path, "auto", capsys) == (
        f"next      the labels serve the selector too: pukd run --config {tmp_path}/config.yaml --selector.steps 60 "
        "--selector.prior audit --redo selector"
    )
    run_pipeline(with_labels, redo="selector", until="select")

    (said,) = label_records(folder)
    prior, meta = folder.read_record(PRIOR), folder.read_record(SELECTOR)
    assert faults_of(prior, PriorRecord) == []
    assert faults_of(meta, SelectorRecord) == []
    assert (prior["source"], prior["estimator"]) == ("audit", "audit")
    assert (prior["value"], prior["lower"], prior["upper"]) == (said["prior"], said["lower"], said["upper"])
    assert prior["used_for_training"] == prior["value"]
    assert prior["evidence"] is not None
    trials: list[RunConfig] = []
    monkeypatch.setattr(estimate, "make_trial", lambda run, *_: trials.append(run.config))
    monkeypatch.setattr(estimate, "conclude", lambda *_: {})
    estimate.estimate_run(with_labels, estimate.Prices(), 200)
    Path(config.output, "estimate.json").unlink()  # of no trial
    assert {trial.selector.prior for trial in trials} == {said["prior"]}  # the labels are the run's, not the trials'
    labels = folder.read_table(f"labels/{said['audit']}.parquet").sort_by("image_id")
    joined = labels.filter(pc.field("relevant"))
    assert meta["n_positives"] == 80
    assert meta["n_labelled"] == len(joined) > 30
    assert meta["n_known_negatives"] == len(labels) - len(joined)
    assert meta["n_sample"] == 600
    cached = pa.concat_tables([folder.read_table(f) for f in folder.files("selector/features")])
    mine = cached.filter(pc.equal(cached.column("unit"), LABELS)).sort_by("image_id")
    roles = ["positives" if relevant else "corpus" for relevant in labels.column("relevant").to_pylist()]
    assert mine.column("image_id").to_pylist() == labels.column("image_id").to_pylist()
    assert mine.column("role").to_pylist() == roles
    assert [int(k) for k in mine.column("label").to_pylist()] == labels.column("teacher_label").to_pylist()
    held_out = folder.read_table("selector/held_out.parquet")
    weight = held_out.filter(pc.equal(held_out.column("role"), "positives")).column("weight").to_numpy()
    assert (weight > 0).sum() == len(joined)  # they alone stand for the relevant images
    truth, estimated = folder.read_record(SELECTION)["truth"], folder.read_record(SELECTION)["estimated"]
    assert truth is not None
    assert truth["recall"] is not None
    assert truth["recall"] > 0.9
    # Some 40 labels tell no more, and held-out logits of folds this small are below those of the whole.
    assert estimated["recall"] == pytest.approx(truth["recall"], abs=0.15)

    # Another audit, of the new selection, adds to the first.
    draw(folder, with_labels, images=100)
    read_back(folder, tmp_path, "audit", capsys)
    assert {r["labelled"] for r in label_records(folder)} == {150, 100}
    labels = load_labels(folder, 600)
    assert labels.prior.labelled == 250
    files = sorted((tmp_path / "lake").glob("*.parquet"))
    relevant = [pq.read_table(f, columns=["relevant"]).column(0).to_numpy(zero_copy_only=False) for f in files]
    assert labels.prior.lower <= np.concatenate(relevant).mean() <= labels.prior.upper
    run_pipeline(with_labels, redo="selector", until="select")
    assert folder.read_record(PRIOR)["value"] == labels.prior.value
    assert folder.read_record(SELECTOR)["n_labelled"] > len(joined)
