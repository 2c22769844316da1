"""The coverage study: its tasks are what they say, its page counts right, and on a few of them the intervals hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pukd_ray.commands.coverage_study import parse_part
from pukd_ray.config import ConfigError
from pukd_ray.demo.build import CLASSES, OTHER_CLASSES, SOURCE_CLASSES
from pukd_ray.demo.pools import Bank
from pukd_ray.studies.coverage import (
    BIASES,
    FACTORS,
    FASHION,
    Case,
    bias_runs,
    draw_cases,
    draw_fashion,
    measure_case,
)
from pukd_ray.studies.coverage_page import TRUE, holds, render
from pukd_ray.studies.mixtures import draw_mixture


def test_cases_have_every_value_equally_often_and_tuning_has_others() -> None:
    cases = draw_cases()
    assert len(cases) >= 300
    for name, values in FACTORS.items():
        found = Counter(getattr(case, name.replace(" ", "_")) for case in cases if case.source != FASHION)
        assert set(found) == set(values) - {FASHION}
        total = Counter(getattr(case, name.replace(" ", "_")) for case in cases)
        assert min(total.values()) >= 40
    assert not {case.key for case in cases} & {case.key for case in draw_cases(tuning=True)}
    assert {run.seed for run in bias_runs(2)}.isdisjoint(run.seed for run in bias_runs(2, tuning=True))
    assert cases == draw_cases()


def mixture(**changes: object) -> object:
    plain = {"rows": 4000, "prior": 0.25, "classes": 5, "per_class": 200, "overlap": "hard", "mix": "balanced"}
    return draw_mixture(np.random.default_rng(3), **{**plain, "bias": 0.0, **changes})


def test_a_mixture_has_its_prior_and_its_classes() -> None:
    sample = mixture(mix="Zipf")
    assert sample.relevant.mean() == 0.25
    assert sample.p.shape == (1000, 4, 64)
    shares = np.bincount(sample.u_classes[sample.relevant], minlength=5) / sample.relevant.sum()
    np.testing.assert_allclose(shares, np.array([60, 30, 20, 15, 12]) / 137, atol=0.04)
    np.testing.assert_allclose(np.bincount(sample.p_classes, minlength=5) / 1000, 0.2, atol=0.04)


def test_easy_is_easier_than_hard_and_a_bias_moves_p_alone() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    def separable(a: np.ndarray, b: np.ndarray) -> float:
        x, y = np.r_[a, b].astype(float), np.r_[np.ones(len(a)), np.zeros(len(b))]
        return float(LinearDiscriminantAnalysis().fit(x, y).score(x, y))

    easy, hard = mixture(overlap="easy"), mixture(overlap="hard")
    assert separable(easy.u[easy.relevant], easy.u[~easy.relevant]) > separable(
        hard.u[hard.relevant], hard.u[~hard.relevant]
    )
    biased = mixture(bias=1.2)
    assert separable(biased.p[:, 0], biased.u[biased.relevant]) > 0.68
    assert separable(hard.p[:, 0], hard.u[hard.relevant]) < 0.62


@pytest.mark.parametrize("overlap", ["easy", "hard"])
@pytest.mark.parametrize(("prior", "mix"), [(0.6, "Zipf"), (0.01, "balanced")])
def test_fashion_has_the_prior_asked_for(prior: float, mix: str, overlap: str) -> None:
    kinds = np.array(SOURCE_CLASSES)[np.arange(60_000) % 10]
    bank = Bank(np.zeros((60_000, 1, 1), np.uint8), kinds, np.arange(60_000))
    case = Case(FASHION, prior, 20, 5, overlap, 0.0, mix, 4)
    pool, other = (draw_fashion(bank, case, tuning=tuning) for tuning in (False, True))
    assert pool.relevant.mean() == pytest.approx(prior, rel=0.02)
    others = set(OTHER_CLASSES) if overlap == "hard" else {"Sandal", "Sneaker", "Ankle boot"}
    assert set(kinds[pool.corpus]) == set(CLASSES) | others
    assert set(pool.corpus).isdisjoint(other.corpus)
    assert set(pool.positives).isdisjoint(other.positives)


def test_the_page_counts_given_figures_alone() -> None:
    good = {
        **{"trust": 1.0, "biased": 0.0, "seconds": 9.0, "auc": 0.5, "true_prior": 0.25},
        **{"prior_lower": 0.2, "prior_upper": 0.3, "precision": 0.9, "precision_lower": 0.8, "precision_upper": 1.0},
        **{"recall": 0.9, "recall_lower": 0.85, "recall_upper": 0.95},
    }
    missed, silent = {**good, "prior_upper": 0.22, "biased": 1.0}, {**good, "trust": 0.0, "prior_upper": 0.21}
    key = "simulated/0.25/100/10/hard/0.0/Zipf"
    runs = {f"{key}/1": good, f"{key}/2": missed, f"{key}/3": silent, "test/0.7/0": missed, "test/0.7/1": good}
    machine = {"cpus": 2, "platform": "Linux", "date": "2026-01-02"}
    page = render({"runs": runs, "machine": machine, "tuning": False})
    row = "| 3 | 2 | 1 | 2 | 2 | 1.30 | 0.20 | 0.10 | 1 |"
    assert f"| all {row}" in page
    assert f"| classes: 10 {row}" in page
    assert "| classes: 5 | 0 | 0 | 0 | 0 | 0 | - | - | - | 0 |" in page
    assert "2 of the 3 runs without bias" in page
    assert "| 0.7 | 2 | 1 | 0.500 ± 0.000 | 1 of 2 |" in page


def test_the_page_is_made_of_the_committed_figures() -> None:
    docs = Path(__file__).parents[2] / "docs"
    study = json.loads((docs / "results" / "coverage.json").read_text())
    assert (docs / "coverage.md").read_text() == render(study)


def test_committed_intervals_hold_as_often_as_the_page_says() -> None:
    study = json.loads((Path(__file__).parents[2] / "docs/results/coverage.json").read_text())
    given = study["runs"]
    assert sum(not key.startswith("test/") for key in given) >= 300
    cases = [(key.split("/")[:-1], f) for key, f in given.items() if not key.startswith("test/") and f["trust"] > 0]
    for i, (factor, values) in enumerate(FACTORS.items()):
        for value in dict.fromkeys(values):
            of = [f for case, f in cases if case[i] == str(value)]
            for figure in TRUE:
                held = sum(holds(f, figure) for f in of)
                assert held >= 0.85 * len(of), (factor, value, figure, held, len(of))
    tests = {bias: [f["biased"] for k, f in given.items() if k.startswith(f"test/{bias}/")] for bias in BIASES}
    assert [len(found) for found in tests.values()] == [20, 20]
    assert sum(tests[0.0]) <= 2
    assert sum(tests[0.7]) >= 16


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    assert list(range(7))[parse_part("2/3")] == [1, 4]
    with pytest.raises(ConfigError, match="is not I/N"):
        parse_part(text)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("changes", "is_given"),
    [({"overlap": "easy", "per_class": 20}, True), ({"prior": 0.6}, True), ({"overlap": "easy", "bias": 1.0}, False)],
    ids=["few", "hard", "biased"],
)
def test_intervals_hold_on_some_tasks(changes: dict[str, object], is_given: bool) -> None:
    settings = {"steps": 250, "batch_size": 256, "lr": 0.004, "views": 4}
    figures = measure_case(mixture(**{"per_class": 100, **changes}), 0, settings)
    if not is_given and not figures["trust"]:
        return  # a biased P without a gap in U: nothing is told
    assert figures["trust"] > 0
    for name, truth in TRUE.items():
        assert figures[f"{name}_lower"] <= figures[truth] <= figures[f"{name}_upper"]
    assert figures["prior_upper"] < 4 * figures["prior_lower"]
