"""The study: its figures are right on a case small enough to check, and docs/results.md is what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pukd_ray.demo
from pukd_ray.demo import pools
from pukd_ray.demo.build import CLASSES, OTHER_CLASSES, SOURCE_CLASSES
from pukd_ray.demo.pools import Bank
from pukd_ray.preflight import load_config
from pukd_ray.studies import selector as study
from pukd_ray.studies.selector import (
    ALL_SETTINGS,
    BIASED,
    RIVALS,
    SETTINGS,
    Run,
    Source,
    all_runs,
    describe,
    extract,
    measure,
    quick_runs,
)
from pukd_ray.studies.tables import render


def test_quality_against_a_case_by_hand() -> None:
    relevant = np.array([True, True, False, True, False])
    logits = np.array([3.0, 2.0, 1.0, -1.0, -2.0])
    figures = study._quality(logits, relevant)
    assert figures["precision"] == figures["recall"] == figures["f1"] == pytest.approx(2 / 3)
    assert figures["ap"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert figures["best_f1"] == pytest.approx(6 / 7)  # the first four
    assert figures["recall_at_target"] == pytest.approx(2 / 3)
    taken = study._at_target(logits, np.array([0.9, 0.9, 0.6, 0.1, 0.1]), relevant)
    assert taken == {"target_precision": pytest.approx(2 / 3), "target_recall": pytest.approx(2 / 3)}
    assert study._calibration_error(np.full(4, 0.5), np.array([True, True, True, False])) == pytest.approx(0.25)


def small_bank(monkeypatch: pytest.MonkeyPatch) -> Bank:
    """Known kinds are the bright ones."""
    rng = np.random.default_rng(0)
    kinds = np.array(SOURCE_CLASSES)[np.arange(2400) % 10]
    known = np.isin(kinds, CLASSES)
    images = (rng.normal(size=(2400, 28, 28)) * 50 + np.where(known, 160, 80)[:, None, None]).clip(0, 255)
    bank = Bank(images.astype(np.uint8), kinds, np.array([f"train/{i}" for i in range(2400)]))
    monkeypatch.setattr(pools, "TEACHER_IMAGES", 1000)
    monkeypatch.setattr(pools, "POOLS", {"hard": dict.fromkeys(CLASSES, 40) | dict.fromkeys(OTHER_CLASSES, 100)})
    return bank


@pytest.mark.usefixtures("one_thread")  # a run sets it
@pytest.mark.parametrize(
    "setting",
    [
        "default",
        "trunk: finetune",
        "prior: half",
        "taps: last",
        "loss: vpu",
        "P biased, 1.2",
        "blend: false",
        "P biased, 1.2, 300 labels",
    ],
)  # fmt: skip
def test_a_run_measures_every_figure(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = small_bank(monkeypatch)
    demo = load_config(Path(pukd_ray.demo.__path__[0]) / "demo.yaml").teacher
    weights = Path(demo.weights).read_bytes()
    chosen = ALL_SETTINGS[setting]
    source = Source(bank, replace(demo, taps=chosen.taps), weights)
    cache = extract(source, "auto")
    base = {"steps": 40, "batch_size": 64, "lr": 0.003, "views": 2}
    figures = measure(source, cache, "hard", 0, replace(chosen, per_class=40), base)
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["true_prior"] == pytest.approx(2 / 7)
    assert figures["ap"] > 2 * figures["true_prior"]
    assert {f"ap_{name}" for name in (*RIVALS, "supervised")} <= figures.keys()
    assert figures["ap_supervised"] > 0.8  # of 2 / 7: known kinds are the bright ones
    assert describe(Run("quick", "hard", setting, 0), figures).startswith(f"quick/hard/{setting}/0: prior 0.")
    if chosen.labels:
        assert figures["prior_lower"] <= figures["true_prior"] <= figures["prior_upper"]
        assert "gap" not in figures  # no grid of priors
    if setting == "prior: half":
        assert figures["prior"] == figures["prior_used"] == pytest.approx(1 / 7)


@pytest.mark.usefixtures("one_thread")
def test_the_teacher_sees_those_images_only_that_pools_have(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load_config(Path(pukd_ray.demo.__path__[0]) / "demo.yaml").teacher
    bank = small_bank(monkeypatch)
    source = Source(bank, demo, Path(demo.weights).read_bytes())
    runs = [Run("quick", "hard", "50 per class", 0), Run("quick", "hard", "P biased, 1.2", 1)]
    rows = study._needed_rows({"hard": source}, runs, tuning=False)[id(source)]
    drawn = [source.draw("hard", ALL_SETTINGS[run.setting], run.seed, tuning=False) for run in runs]
    assert set(rows) >= {row for pool in drawn for part in (pool.positives, pool.corpus) for row in part}
    assert len(rows) < len(bank.images)
    join = study._join._function
    cache = join(len(bank.images), rows, extract(source, 1, rows[:100]), extract(source, 1, rows[100:]))
    whole = extract(source, 1)
    np.testing.assert_allclose(cache.features[rows], whole.features[rows], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(cache.logits[rows], whole.logits[rows], rtol=1e-2, atol=1e-2)
    assert not cache.last_tap[np.setdiff1d(np.arange(len(bank.images)), rows)].any()


def test_runs_are_listed_once_and_settings_exist() -> None:
    for runs in (all_runs(5, cifar=True), quick_runs(5, cifar=True)):
        assert len({run.key for run in runs}) == len(runs)
        assert {run.setting for run in runs} <= set(ALL_SETTINGS)
        assert {run.pool for run in runs} == {*pools.MEASURED, "cifar"}
    assert {run.setting for run in all_runs(2, cifar=False)} == set(SETTINGS | BIASED)
    assert {run.pool for run in all_runs(2, cifar=False)} == set(pools.MEASURED)
    assert {run.base for run in quick_runs(2, cifar=True)} == {"quick"}


def fake_study() -> dict[str, object]:
    """Every run of a small study with figures that differ by seed only."""
    names = (
        *("ap", "precision", "recall", "f1", "best_f1", "recall_at_target", "target_precision", "target_recall"),
        *(f"ap_{name}" for name in (*RIVALS, "supervised")),
        *("true_prior", "prior", "prior_bbe", "calibration_error", "feature_seconds", "fit_seconds"),
        *(f"{name}_{end}" for name in ("precision", "recall") for end in ("estimated", "lower", "upper")),
        *("prior_lower", "prior_upper"),
    )
    runs = {run.key: dict.fromkeys(names, 0.5 + 0.01 * run.seed) for run in all_runs(3, cifar=True)}
    facts = {"images": 4, "relevant": 1, "by_kind": {"Bag": 1, "glyph": 3}, "ids_sha256": "abc"}
    machine = {"cpus": 2, "platform": "Linux", "date": "2026-01-02"}
    return {"runs": runs, "pools": {name: [facts] for name in (*pools.MEASURED, "cifar")}, "machine": machine}


def test_tables_pair_differences_by_seed_and_count_coverage() -> None:
    figures = fake_study()
    runs = figures["runs"]
    for seed in range(3):
        runs[f"quick/hard/loss: naive/{seed}"]["ap"] -= 0.125
        runs[f"quick/hard/trunk: finetune/{seed}"]["fit_seconds"] *= 19
    for run in runs.values():
        run["trust"] = 2.0
    for seed in (0, 1, 2):
        runs[f"default/cifar/default/{seed}"]["trust"] = 0.0
    runs["default/hard/default/2"]["prior_upper"] = 0.0
    runs["default/hard/P biased, 0.7, prior: true/1"]["ap"] = 0.81
    page = render(figures, "x")
    row = next(line for line in page.splitlines() if line.startswith("| loss: naive |"))
    assert row.startswith("| loss: naive | 0.385 ± 0.010 | -0.1250 ± 0.0000 |")
    assert "| 2 of 3 | 3 of 3 | 3 of 3 | 3 of 3 | 0 of 0 (3 cannot tell) |" in page
    assert "`cifar`, default settings" not in page
    assert "| prior | 2 of 3 | +0.0000 | -0.1733 |" in page
    assert "took 10.0 times the CPU seconds" in page
    assert f"| average precision |{' 0.5100 ± 0.0100 |' * 5}" in page
    assert f"| `knn` |{' 0.510 ± 0.010 |' * 5}" in page
    assert "| P biased, 0.7 | 0.510 ± 0.010 (0.610 ± 0.173) |" in page
    assert "| `hard` | 4 | 1 | Bag 1, glyph 3 | `abc` |" in page


def test_the_page_is_made_of_the_committed_figures() -> None:
    docs = Path(__file__).parents[2] / "docs"
    figures = json.loads((docs / "results" / "selector.json").read_text())
    assert (docs / "results.md").read_text() == render(figures, "python jobs/selector_study.py")
    # Of the 160 runs those that the page says it has.
    published = {(pool, seed) for pool in (*pools.MEASURED, "cifar") for seed in (0, 1)}
    assert {f"default/{pool}/default/{seed}" for pool, seed in published} <= set(figures["runs"])
    assert set(figures["runs"]) <= {run.key for run in all_runs(5, cifar=True)}
