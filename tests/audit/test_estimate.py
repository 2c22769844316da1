"""Figures and intervals from labels, without Ray."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import hypergeom

from pukd_ray.audit import estimate
from pukd_ray.audit.design import Bins, plan_strata
from pukd_ray.audit.estimate import Counted, Figure, estimate_strata
from pukd_ray.selection.cuts import ordered_bits


def bounds(figure: Figure) -> tuple[float, float, float]:
    assert figure.value is not None
    assert figure.lower is not None
    assert figure.upper is not None
    return figure.lower, figure.value, figure.upper


def test_values_are_stratified_totals() -> None:
    found = estimate_strata(
        [Counted(True, 100, 9, 1, 0), Counted(True, 300, 19, 1, 0), Counted(False, 10_000, 1, 99, 0)]
    )
    assert found.precision.value == pytest.approx((90 + 285) / 400)
    assert found.recall.value == pytest.approx(375 / 475)
    assert found.prior.value == pytest.approx(475 / 10_400)
    assert (found.labelled, found.unsure) == (130, 0)


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_one_stratum_has_the_exact_limits(hits: int) -> None:
    """Clopper and Pearson's of a finite population: what is excluded would show so few, or so many, in under 5 %."""
    size, n = 60, 20
    lower, _, upper = bounds(estimate_strata([Counted(True, size, hits, n - hits, 0)]).precision)
    totals = np.arange(size + 1)
    high = totals[hypergeom.cdf(hits, size, totals, n) >= 0.05].max()
    low = totals[hypergeom.sf(hits - 1, size, totals, n) >= 0.05].min()
    assert lower * size == pytest.approx(low, abs=1)
    assert upper * size == pytest.approx(high, abs=1)


def test_strata_without_a_hit_cost_no_more_than_one_would() -> None:
    whole = estimate_strata([Counted(False, 100_000, 0, 200, 0)])
    parts = estimate_strata([Counted(False, 25_000, 0, 50, 0)] * 4)
    assert whole.prior.upper is not None
    assert parts.prior.upper == pytest.approx(whole.prior.upper, rel=0.1)
    assert parts.prior.upper == pytest.approx(np.log(20) / 200, rel=0.1)
    assert parts.prior.lower == 0


def test_recall_stays_open_below_where_the_rest_shows_no_hit() -> None:
    lower, value, upper = bounds(
        estimate_strata([Counted(True, 200, 100, 0, 0), Counted(False, 100_000, 0, 200, 0)]).recall
    )
    assert value == upper == 1
    assert lower == pytest.approx(200 / (200 + 100_000 * np.log(20) / 200), rel=0.1)


def test_a_whole_stratum_leaves_nothing_open() -> None:
    found = estimate_strata([Counted(True, 20, 15, 5, 0), Counted(False, 30, 3, 27, 0)])
    assert bounds(found.precision) == (0.75, 0.75, 0.75)
    assert bounds(found.recall) == pytest.approx((15 / 18,) * 3)


def test_unsure_images_widen_the_interval_and_leave_the_value() -> None:
    sure = estimate_strata([Counted(True, 1000, 80, 10, 0), Counted(False, 1000, 5, 95, 0)])
    unsure = estimate_strata([Counted(True, 1000, 80, 10, 10), Counted(False, 1000, 5, 95, 10)])
    for name in ("prior", "precision", "recall"):
        a, b = bounds(getattr(sure, name)), bounds(getattr(unsure, name))
        assert b[1] == a[1]
        assert b[0] < a[0] - 0.01
        assert b[2] > a[2] + 0.002
    assert unsure.unsure == 20


def test_what_nobody_looked_at_cannot_be_told() -> None:
    found = estimate_strata([Counted(True, 100, 9, 1, 0), Counted(False, 9000, 0, 0, 0), Counted(False, 10, 1, 9, 0)])
    assert found.precision.value == 0.9
    assert found.recall == Figure(None, None, None, "1 of the 3 strata of scored images have no label")
    assert found.prior.value is None
    only_unsure = estimate_strata([Counted(True, 100, 0, 0, 5)])
    assert only_unsure.precision.reason == "1 of the 1 strata of selected images have no label"
    no_hit = estimate_strata([Counted(True, 100, 0, 10, 0), Counted(False, 100, 0, 10, 0)])
    assert no_hit.recall.reason == "no labelled image is relevant"
    nothing = estimate_strata([Counted(False, 100, 2, 10, 0)])
    assert nothing.precision.reason == "there are no selected images"
    assert nothing.recall.value == 0


def bins_of(logits: np.ndarray, probability: np.ndarray) -> Bins:
    names, index, count = np.unique(
        (ordered_bits(logits) >> 16).astype(np.int64), return_inverse=True, return_counts=True
    )
    return Bins(names, count, np.bincount(index, probability) / count)


@pytest.mark.parametrize(
    ("prior", "lost"), [(0.002, 0.0), (0.02, 0.2), (0.25, 0.0), (0.6, 0.2)], ids=["rare", "few", "quarter", "most"]
)
def test_unbiased_and_intervals_hold_whatever_the_model_believes(
    monkeypatch: pytest.MonkeyPatch, prior: float, lost: float
) -> None:
    """300 of 50,000 images; a share `lost` of the relevant ones looks like the rest to the model."""
    monkeypatch.setattr(estimate, "DRAWS", 1000)
    rng, repeats = np.random.default_rng(0), 250
    relevant = rng.random(50_000) < prior
    seen = relevant & (rng.random(50_000) >= lost)
    z = np.where(seen, rng.normal(2, 2, 50_000), rng.normal(-5, 2, 50_000)).astype(np.float32)
    p, selected = expit(1.5 * z), z > 0
    strata = plan_strata(bins_of(z[selected], p[selected]), bins_of(z[~selected], p[~selected]), 300)
    bits = (ordered_bits(z) >> 16).astype(np.int64)
    members = [relevant[(selected == s.selected) & (bits >= s.first) & (bits <= s.last)] for s in strata]
    assert [len(m) for m in members] == [s.size for s in strata]
    truth = {
        "prior": relevant.mean(),
        "precision": relevant[selected].mean(),
        "recall": (relevant & selected).sum() / relevant.sum(),
    }
    found = []
    for i in range(repeats):
        hits = [
            int(rng.hypergeometric(m.sum(), len(m) - m.sum(), s.sampled)) for s, m in zip(strata, members, strict=True)
        ]
        labels = [Counted(s.selected, s.size, x, s.sampled - x, 0) for s, x in zip(strata, hits, strict=True)]
        found.append(estimate_strata(labels, seed=i))
    for name, true in truth.items():
        figures = np.array([bounds(getattr(f, name)) for f in found])
        inside = np.mean((figures[:, 0] <= true + 1e-12) & (true <= figures[:, 2] + 1e-12))
        assert inside >= 0.88, (name, inside)
        if name != "recall":  # a ratio of two totals
            error = figures[:, 1].std() / np.sqrt(repeats)
            assert abs(figures[:, 1].mean() - true) < 4 * error + 1e-12, name
