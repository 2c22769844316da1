"""What the prior is concluded from: U's emptiest boundary, P's density ratio, P against what is taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pukd_ray.config import SelectorConfig
from pukd_ray.selection.by_class import ClassBins
from pukd_ray.selection.calibration import Binned
from pukd_ray.selection.crossfit import Groups
from pukd_ray.selection.evidence import (
    DensityRatio,
    TwoSample,
    class_weights,
    emptiness,
    find_boundary,
    two_sample,
    weighted_auc,
)
from pukd_ray.selection.recipe import InProcess, fit_and_calibrate
from pukd_ray.selection.training import Examples
from pukd_ray.selection.verdict import Evidence, Verdict, examine, given, judge

# -- the boundary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [5.0, 50.0])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_emptiness_is_one_of_flat_logits_and_zero_of_a_gap(scale: float, share: float) -> None:
    rng = np.random.default_rng(0)
    flat = rng.uniform(-scale, scale, 20_000)
    assert emptiness(flat)[0] == pytest.approx(1, abs=0.1)
    n = round(share * 20_000)
    gap = np.r_[rng.uniform(2, scale, n), rng.uniform(-scale, -2, 20_000 - n)]
    assert emptiness(gap)[0] == 0.0
    assert emptiness(np.full(100, -1.0)) == (np.inf, np.inf)


def boundary_logits(truth: float, priors: np.ndarray, overlap: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of selectors that cut scores of U where each prior says; a gap parts a share `truth` from the rest."""
    rng = np.random.default_rng(1)
    n = 20_000
    relevant = rng.random(n) < truth
    scores = np.where(relevant, rng.normal(8, 2, n), rng.normal(-8, 2, n) if not overlap else rng.normal(5, 3, n))
    cuts = np.quantile(scores, 1 - priors)
    p = rng.normal(8, 2, 400)
    return (p - cuts[:, None]).astype(np.float32), (scores - cuts[:, None]).astype(np.float32)


def test_the_emptiest_boundary_is_at_the_truth_and_asks_u_alone() -> None:
    priors = np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6])
    p, u = boundary_logits(0.25, priors)
    found = find_boundary(priors, p, u)
    assert found.inner
    assert found.value == pytest.approx(0.25, abs=0.051)
    assert found.lower_bound <= 0.25 <= found.upper_bound
    biased = find_boundary(priors, np.full_like(p, 5.0), u)
    assert biased.value == found.value


def test_without_a_gap_there_is_no_inner_minimum() -> None:
    priors = np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6])
    assert not find_boundary(priors, *boundary_logits(0.25, priors, overlap=1.0)).inner


def test_a_gap_inside_p_does_not_count() -> None:
    priors = np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6])
    p, u = boundary_logits(0.25, priors)
    mostly_below = np.where(np.arange(p.shape[1]) % 2, -20.0, 20.0) * np.ones_like(p)
    assert not find_boundary(priors, mostly_below, u).inner


# -- P against what is taken ------------------------------------------------------------------------------------


def test_two_samples_of_one_distribution_and_of_two() -> None:
    rng = np.random.default_rng(0)
    p, u = rng.normal(size=(300, 12)), rng.normal(size=(1200, 12))
    same = two_sample(p, u, np.ones(300), 0)
    assert same.lower < 0.5 < same.upper
    other = two_sample(p + 0.5, u, np.ones(300), 0)
    assert other.lower > 0.6
    few = two_sample(p[:10], u, np.ones(10), 0)
    assert (few.auc, few.error) == (0.5, 0.5)  # nothing can be said


def test_weighted_auc_counts_pairs_and_ties() -> None:
    p, weights, u = np.array([1.0, 3.0]), np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0])
    assert weighted_auc(p, weights, u) == pytest.approx((3 * (1 + 0.5) + 3) / (4 * 3))


def test_classes_that_u_has_more_of_than_p_do_not_lower_the_prior() -> None:
    rng = np.random.default_rng(0)
    counts, n_u = np.array([1600, 400, 200, 100, 100]), 12_000
    relevant, u_classes = np.arange(n_u) < counts.sum(), rng.integers(0, 5, n_u)
    u_classes[relevant] = np.repeat(np.arange(5), counts)
    p_classes = np.repeat(np.arange(5), 40)
    low = np.array([-1.5, 0, 0, 0, 0])  # what is frequent in U and not in P gets low logits
    u = np.where(relevant, rng.normal(4, 1.5, n_u), rng.normal(-4, 1.5, n_u)) + low[u_classes]
    p = rng.normal(4, 1.5, 200) + low[p_classes]
    fitted = ClassBins.of(p, u, p_classes, u_classes).fit()
    assert fitted.prior == pytest.approx(0.2, rel=0.08)
    np.testing.assert_allclose(fitted.p_weights[::40] / 5, counts / counts.sum(), atol=0.06)
    assert fitted.probability.mean() == pytest.approx(fitted.prior)
    together = ClassBins.of(p, u, np.zeros(200, int), np.zeros(n_u, int)).fit()
    assert together.prior == pytest.approx(Binned.of(p, u).fit()[1], rel=0.02)
    few = ClassBins.of(p, u[::80], p_classes, u_classes[::80])  # 30 relevant images tell no class mix
    assert set(few.p_class) == {0}


def test_classes_that_u_has_not_leave_the_prior_alone() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(5):
        truth = rng.random(20_000) < 0.1
        u, u_classes = rng.normal(3 * truth, 1), rng.integers(0, 10, len(truth))
        p, p_classes = rng.normal(3, 1, 1000), np.repeat(np.arange(100), 10)
        fitted = ClassBins.of(p, u, p_classes, u_classes).fit()
        found.append(fitted.prior / truth.mean())
        assert fitted.p_weights[p_classes >= 10].max() < 1e-6
    assert np.mean(found) == pytest.approx(1, abs=0.15)  # nine tenths of P's classes made it a third too high


def test_weights_give_p_the_classes_of_what_is_taken() -> None:
    weights = class_weights(np.repeat([0, 1], 50), np.repeat([0, 1, 7], [900, 90, 500]))
    assert weights.mean() == pytest.approx(1)
    assert weights[0] / weights[-1] == pytest.approx(901 / 91)
    assert len(class_weights(np.zeros(0, int), np.zeros(0, int))) == 0


# -- the verdict ------------------------------------------------------------------------------------------------


def evidence(**changes: object) -> Evidence:
    priors = np.array([0.1, 0.2, 0.25, 0.3, 0.5])
    p, u = boundary_logits(0.25, priors)
    boundary = find_boundary(priors, p, u)
    ratio = DensityRatio(0.24, np.linspace(0.22, 0.26, 40))
    plain = Evidence(boundary, ratio, 0.26, 0.05, TwoSample(0.5, 0.02, 400, 1600), 0.0, ())
    return replace(plain, **changes)


def test_a_gap_and_a_p_that_fits_are_trusted() -> None:
    verdict = judge(evidence())
    assert (verdict.trust, verdict.reasons) == ("high", ())
    assert verdict.lower <= 0.24 <= verdict.upper
    assert verdict.train >= verdict.prior


def test_a_biased_p_leaves_the_boundary_alone() -> None:
    e = evidence(test=TwoSample(0.65, 0.02, 400, 1600), ratio=DensityRatio(0.1, np.full(40, 0.1)))
    verdict = judge(e)
    assert verdict.trust == "low"
    assert verdict.prior == e.boundary.value
    assert any("P differs" in reason for reason in verdict.reasons)
    assert any("emptiest boundary" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test": TwoSample(0.65, 0.02, 400, 1600)}, "P differs"),
        ({"test": TwoSample(0.5, 0.5, 10, 10)}, "few images"),
        ({"ratio": DensityRatio(0.02, np.linspace(0, 0.04, 40))}, "anything from 0.00"),
    ],
)
def test_without_a_gap_what_cannot_be_told_is_not_told(changes: dict[str, object], reason: str) -> None:
    plain = evidence()
    e = replace(plain, boundary=replace(plain.boundary, inner=False), **changes)
    verdict = judge(e)
    assert verdict.trust == "none"
    assert (verdict.lower, verdict.upper) == (0.0, 1.0)
    assert any(reason in r for r in verdict.reasons)
    assert verdict.train == pytest.approx(2 * e.bbe)  # a generous prior ranks better
    assert judge(replace(plain, boundary=e.boundary)).trust == "low"


@pytest.mark.parametrize(
    ("prior", "changes", "reason"),
    [
        (0.25, {}, None),
        (0.25, {"test": TwoSample(0.65, 0.02, 400, 1600)}, "P differs"),
        (0.25, {"test": TwoSample(0.5, 0.2, 10, 40)}, "too few images"),
        (0.6, {}, "the density ratio says 0.24, the prior that is given 0.6"),
        (0.1, {}, "the density ratio says 0.24, the prior that is given 0.1"),
    ],
)
def test_a_prior_that_is_given_is_looked_at(prior: float, changes: dict[str, object], reason: str | None) -> None:
    before = given(prior)
    assert (before.trust, before.evidence) == ("low", None)
    after = examine(before, evidence(**changes))
    assert (after.prior, after.lower, after.upper, after.train) == (prior,) * 4
    assert after.has_gap  # the selector's own boundary is kept
    if reason is None:
        assert (after.trust, after.reasons) == ("high", ())
    else:
        assert after.trust == "low"
        assert any(reason in r for r in after.reasons)


def test_a_bias_that_few_images_cannot_show_widens_the_interval() -> None:
    plain = evidence()
    many, few = (judge(replace(plain, test=TwoSample(0.5, error, 400, 1600))) for error in (0.01, 0.05))
    assert (many.trust, few.trust) == ("high", "low")
    assert few.lower <= plain.boundary.lower_bound < many.lower
    assert few.upper >= plain.boundary.upper_bound > many.upper
    assert TwoSample(0.4, 0.05, 400, 1600).upper == TwoSample(0.5, 0.05, 400, 1600).upper  # below 1/2 is chance


def test_what_looks_like_both_widens_the_interval() -> None:
    clear, mixed = judge(evidence(alike=0.0)), judge(evidence(alike=0.4))
    assert mixed.lower < clear.lower < clear.upper < mixed.upper


def test_drawn_priors_have_the_verdicts_interval() -> None:
    verdict = Verdict(0.2, 0.1, 0.3, 0.2, "low", (), None, "density_ratio")
    rng = np.random.default_rng(0)
    low, high = np.quantile([verdict.drawn_prior(rng) for _ in range(4000)], [0.05, 0.95])
    assert (low, high) == (pytest.approx(0.1, rel=0.05), pytest.approx(0.3, rel=0.05))


def test_a_corpus_without_anything_like_p_has_a_prior_to_draw_from() -> None:
    plain = evidence()
    nothing = replace(plain, boundary=replace(plain.boundary, inner=False), bbe=0.0, test=TwoSample(0.9, 0.02, 400, 9))
    verdict = judge(nothing)
    assert (verdict.trust, verdict.estimator) == ("none", "bbe")
    assert 0 < verdict.prior < 1e-3
    rng = np.random.default_rng(0)
    assert all(0 < verdict.drawn_prior(rng) < 1 for _ in range(100))


def gaussian_task(k: float) -> tuple[Examples, Groups, np.ndarray]:
    """Two clouds with a gap; P prefers one side of an innocent feature as strongly as `k` says."""
    rng = np.random.default_rng(3)
    n_u, share = 4000, 0.25
    truth = rng.random(n_u) < share
    u = rng.normal(size=(n_u, 8))
    u[:, 0] += np.where(truth, 4.0, -4.0)
    pool = rng.normal(size=(8000, 8))
    pool[:, 0] += 4.0
    chosen = np.argsort(-(k * pool[:, 1] + rng.gumbel(size=8000)))[:400]
    features = Examples(pool[chosen, None].astype(np.float16), u.astype(np.float16))
    return features, Groups(np.arange(n_u) // 100, np.zeros(400, np.int64), np.zeros(n_u, np.int64)), truth


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("k", "trust"), [(0.0, "high"), (1.2, "low")])
def test_a_biased_p_shows_beside_a_prior_that_is_given(k: float, trust: str) -> None:
    features, groups, _ = gaussian_task(k)
    selector = SelectorConfig(steps=200, batch_size=256, lr=0.01, prior=0.25)
    verdict = fit_and_calibrate(InProcess(features, groups), selector, 0).verdict
    assert (verdict.prior, verdict.trust, verdict.estimator) == (0.25, trust, "given")
    assert verdict.evidence is not None
    assert (verdict.evidence.test.lower > 0.53) == (k > 0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.timeout(600)
def test_a_biased_p_does_not_hide_relevant_images() -> None:
    """The issue's own case in small: P is a biased sample, U has a gap; the prior used to come out far too low."""
    features, groups, truth = gaussian_task(1.2)
    fitted = fit_and_calibrate(InProcess(features, groups), SelectorConfig(steps=200, batch_size=256, lr=0.01), 0)
    verdict = fitted.verdict
    assert verdict.lower <= truth.mean() <= verdict.upper
    assert verdict.trust == "low"
    taken = fitted.final.u_logits > 0
    assert (taken & truth).sum() / truth.sum() > 0.9
    assert (taken & truth).sum() / taken.sum() > 0.9
