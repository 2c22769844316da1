"""The stage runs the recipe on a cluster, the study in one process: what one finds, the other does, bit for bit."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import write_task

from pukd_ray import load_config, run_pipeline
from pukd_ray.config import SelectorConfig
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import SELECTION
from pukd_ray.selection.calibration import to_json
from pukd_ray.selection.chunks import score_files
from pukd_ray.selection.crossfit import Groups
from pukd_ray.selection.features import load_features, load_last_tap
from pukd_ray.selection.histogram import bin_edges, bin_scores, estimate_selection
from pukd_ray.selection.recipe import InProcess, fit_and_calibrate
from pukd_ray.selection.training import Examples
from pukd_ray.selection.verdict import Verdict


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_cluster", "one_thread")
def test_stage_and_study_find_the_same(tmp_path: Path) -> None:
    write_task(tmp_path)
    config = load_config(tmp_path / "config.yaml")
    run_pipeline(config, until="select")
    folder = RunFolder(str(tmp_path / "run"))

    cached = load_features(folder, folder.read_json("selector/features.json")["files"])
    last_tap = load_last_tap(folder, folder.read_json("selector/features.json")["files"])
    groups, _ = Groups(cached.u_units, cached.p_teacher, cached.u_teacher).with_tails(*last_tap, config.seed)
    fitted = fit_and_calibrate(InProcess(Examples(cached.p, cached.u), groups), config.selector, config.seed)

    prior, meta = folder.read_json("selector/prior.json"), folder.read_json("selector/meta.json")
    fit, verdict = fitted.fit, fitted.verdict
    assert (prior["value"], prior["lower"], prior["upper"]) == (verdict.prior, verdict.lower, verdict.upper)
    assert (prior["trust"], prior["reasons"]) == (verdict.trust, list(verdict.reasons))
    assert verdict.evidence is not None
    assert prior["evidence"]["priors"] == verdict.evidence.boundary.priors.tolist()
    assert prior["evidence"]["density_ratio"] == verdict.evidence.ratio.value
    assert prior["used_for_training"] == fitted.training.prior == verdict.train
    assert (meta["steps"], meta["proxy_accuracy"]) == (fit.steps, fit.proxy_accuracy)
    calibration = to_json(fitted.calibration, fitted.bootstrap)
    assert folder.read_json("selector/calibration.json") == json.loads(json.dumps(calibration))
    heads = [torch.load(source, weights_only=True) for source in
             (Path(folder.path("selector/head.pt")), io.BytesIO(fitted.final.head))]  # fmt: skip
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    assert fitted.final.blend is not None
    assert folder.read_json("selector/blend.json") == json.loads(json.dumps(asdict(fitted.final.blend)))
    held_out = folder.read_table("selector/held_out.parquet")
    np.testing.assert_array_equal(held_out.column("logit").to_numpy(), np.r_[fit.p_logits, fit.u_logits])

    rows = [folder.read_table(file, ["image_id", "pu_logit"]).to_pylist() for file in score_files(folder)]
    scored = {row["image_id"]: row["pu_logit"] for part in rows for row in part if row["pu_logit"] is not None}
    taken = {i for f in folder.files("selected") if f.endswith(".parquet")
             for i in folder.read_table(f, ["image_id"]).column("image_id").to_pylist()}  # fmt: skip
    logits, selected = np.array(list(scored.values()), np.float32), np.array([i in taken for i in scored])
    binned = bin_scores(logits, selected, bin_edges(np.r_[fit.p_logits, fit.u_logits]))
    estimated = estimate_selection(binned, fit.p_logits, fit.p_weights, fitted.calibration, fitted.bootstrap)
    summary = folder.read_record(SELECTION)
    assert summary["histogram"]["all"] == binned["all"].tolist()
    assert summary["estimated"] == estimated


def small_task() -> tuple[Examples, Groups]:
    rng = np.random.default_rng(0)
    truth = rng.random(600) < 0.3
    u = rng.normal(size=(600, 4)) + np.where(truth, 2, -2)[:, None]
    p = rng.normal(size=(60, 1, 4)) + 2
    groups = Groups(np.zeros(600), np.zeros(60, np.int64), np.zeros(600, np.int64))
    return Examples(p.astype(np.float16), u.astype(np.float16)), groups


@pytest.mark.usefixtures("one_thread")
def test_a_prior_that_is_refused_costs_no_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[str] = []

    def spied(method: str) -> None:
        original = getattr(InProcess, method)

        def spy(self: InProcess, name: str, *args: object, **kwargs: object) -> object:
            rounds.append(name)
            return original(self, name, *args, **kwargs)

        monkeypatch.setattr(InProcess, method, spy)

    def refuse(verdict: Verdict) -> None:
        raise ValueError(f"{verdict.prior:.2f}")

    spied("fit_grid")
    spied("fit_folds")
    selector = SelectorConfig(steps=20, batch_size=64, lr=0.01)
    with pytest.raises(ValueError, match=r"0\.\d\d"):
        fit_and_calibrate(InProcess(*small_task()), selector, 0, refuse)
    assert rounds == ["priors", "finer priors"]
    fit_and_calibrate(InProcess(*small_task()), selector, 0)
    assert rounds[2:] == ["priors", "finer priors", "nnpu"]
    fit_and_calibrate(InProcess(*small_task()), replace(selector, prior=0.3), 0)
    assert rounds[5:] == ["nnpu"]


@pytest.mark.usefixtures("one_thread")
def test_logits_of_every_loss_meet_the_prior_and_only_vpus_are_rescaled() -> None:
    scales = {}
    for loss in ("nnpu", "naive", "vpu"):
        selector = SelectorConfig(steps=40, batch_size=64, lr=0.01, loss=loss, prior=0.3)
        fitted = fit_and_calibrate(InProcess(*small_task()), selector, 0)
        assert fitted.calibration(fitted.final.u_logits).mean() == pytest.approx(0.3, abs=0.01)
        assert fitted.verdict.prior == 0.3
        assert fitted.training == replace(fitted.training, steps=fitted.fit.steps, horizon=40, prior=0.3, loss=loss)
        scales[loss] = fitted.final.log_max_phi
    assert scales["nnpu"] == scales["naive"] == 0.0 > scales["vpu"]
