"""Prior estimators against golden.json, a brute-force loop, and mixtures whose prior is known."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from pukd_ray.selection.prior import (
    PriorEstimate,
    bbe_prior,
    dedpul_prior,
    elkan_noto_ratio,
    positive_weights,
    prior_warnings,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden.json").read_text())


def mixture(rng, prior, n_p=1000, n_u=20_000, gap=3.5):
    """Scores of P and U: positives N(gap, 1), negatives N(0, 1)."""
    positive = rng.random(n_u) < prior
    return rng.normal(gap, 1, n_p), rng.normal(0, 1, n_u) + gap * positive


@pytest.mark.parametrize("case", GOLDEN["bbe"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_bbe_golden(case, dtype, rtol):
    p, u = np.array(case["p_scores"], dtype), np.array(case["u_scores"], dtype)
    estimate = bbe_prior(p, u, gamma=case["gamma"], delta=case["delta"])
    expected = case["expected"]
    assert estimate.threshold == pytest.approx(expected["threshold"], rel=rtol)
    assert estimate.value == pytest.approx(expected["estimate"], rel=rtol)
    # Golden bounds are not clipped.
    assert estimate.lower == pytest.approx(max(0, expected["lower_bound"]), rel=rtol)
    assert estimate.upper == pytest.approx(min(1, expected["upper_bound"]), rel=rtol)


def brute_force_bbe(p, u, gamma, delta):
    """Tries every score, of U as well, in Python numbers."""
    k = (1 + gamma) * sum(math.sqrt(math.log(4 / delta) / (2 * len(s))) for s in (u, p))
    best = None
    for c in sorted({*p, *u}):
        q_p, q_u = (sum(x >= c for x in s) / len(s) for s in (p, u))
        if q_p > 0 and (best is None or (q_u + k) / q_p < best[0]):
            best = ((q_u + k) / q_p, q_u / q_p, (q_u - k) / q_p)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_bbe_matches_brute_force(seed):
    rng = np.random.default_rng(seed)
    p, u = mixture(rng, rng.random(), n_p=int(rng.integers(1, 60)), n_u=int(rng.integers(1, 90)), gap=2)
    if seed % 2:
        p, u = p.round(), u.round()  # ties within and between the samples
    gamma, delta = rng.random(), rng.uniform(0.01, 0.99)
    estimate = bbe_prior(p, u, gamma=gamma, delta=delta)
    upper, value, lower = brute_force_bbe(p.tolist(), u.tolist(), gamma, delta)
    clipped = [min(1, max(0, x)) for x in (value, lower, upper)]
    assert [estimate.value, estimate.lower, estimate.upper] == pytest.approx(clipped, rel=1e-12)


def test_bbe_depends_on_the_order_of_scores_only():
    p, u = mixture(np.random.default_rng(0), 0.2)
    expected, got = bbe_prior(p, u), bbe_prior(np.exp(p[::-1]), np.exp(u[::-1]).tolist())
    assert (got.value, got.lower, got.upper) == (expected.value, expected.lower, expected.upper)
    assert got.threshold == np.exp(expected.threshold)


@pytest.mark.parametrize("prior", [0.005, 0.02, 0.1, 0.21, 0.5, 0.8])
def test_estimates_of_a_known_prior(prior):
    rng = np.random.default_rng(7)
    for _ in range(5):
        p, u = mixture(rng, prior)
        estimate = bbe_prior(p, u)
        assert estimate.value == pytest.approx(prior, abs=0.05)
        assert estimate.lower <= prior <= estimate.upper
        # Below 5 % the 0.95 quantile over U of the original lies among the negatives and says 1.
        assert dedpul_prior(p, u) == pytest.approx(prior, abs=0.01 + 0.15 * prior)


@pytest.mark.parametrize("shares", [(0.1, 0.1, 0.1), (0.2, 0.08, 0.02), (0.02, 0.08, 0.2)])
@pytest.mark.parametrize("n_p", [60, 300])
def test_a_balanced_p_stands_for_an_imbalanced_corpus(shares, n_p):
    """Classes differ in how well they are told apart from the rest, and the teacher names the rest at random."""
    rng = np.random.default_rng(5)
    n_u, gaps = 20_000, np.array([4.0, 3.5, 3.0])
    kind = rng.choice(4, n_u, p=[*shares, 1 - sum(shares)])
    u = rng.normal(np.r_[gaps, 0.0][kind], 1)
    u_classes = np.where(kind == 3, rng.integers(0, 3, n_u), kind)
    p_classes = np.repeat([0, 1, 2], n_p // 3)
    p = rng.normal(gaps[p_classes], 1)
    weights = positive_weights(p, u, p_classes, u_classes)
    assert weights.mean() == pytest.approx(1)
    found = np.bincount(p_classes, weights) / n_p
    np.testing.assert_allclose(found, np.array(shares) / sum(shares), atol=0.12 if n_p == 60 else 0.06)
    with_weights = [bbe_prior(p, u, p_weights=weights).value, dedpul_prior(p, u, weights)]
    np.testing.assert_allclose(with_weights, sum(shares), atol=0.06)
    assert with_weights[0] <= elkan_noto_ratio(expit(p - 2), expit(u - 2), weights)
    if shares[2] > shares[0] and n_p == 300:  # the hardest class is the most frequent
        assert bbe_prior(p, u).value < sum(shares) - 0.03


def test_weights_of_p_without_anything_to_weigh():
    p, u = mixture(np.random.default_rng(0), 0.2)
    alike = positive_weights(p, u, np.zeros(1000, int), np.zeros(20_000, int))
    np.testing.assert_array_equal(alike, np.ones(1000))
    same = bbe_prior(p, u, p_weights=np.full(1000, 3.0))
    assert dataclasses.astuple(same) == pytest.approx(dataclasses.astuple(bbe_prior(p, u)))
    # Nothing of U has the teacher's label of P, or looks like it.
    for scores, label in ((u, 7), (u - 99, 1)):
        np.testing.assert_allclose(positive_weights(p, scores, np.arange(1000) % 3, np.full(20_000, label)), 1)
    # A class that the corpus does not have keeps a little weight.
    weights = positive_weights(p, u, np.arange(1000) % 2, np.zeros(20_000, int))
    assert weights.mean() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(10 / 4_000, rel=0.1)
    # Two positives of U say nothing about classes.
    few = np.r_[np.zeros(5_000), [9.0, 9.0]]
    weights = positive_weights(np.full(100, 9.0), few, np.arange(100) % 2, np.r_[np.arange(5_000) % 2, 0, 0])
    assert weights[0] / weights[1] == pytest.approx(12 / 10)


def test_dedpul_extremes():
    low, high = np.linspace(0, 1, 50), np.linspace(2, 3, 500)
    assert dedpul_prior(high, low) == 0  # no corpus image looks like P
    assert dedpul_prior(low, high) == 1  # all of them look more so
    assert dedpul_prior(low, low) == pytest.approx(1)
    assert dedpul_prior([1.0], [1.0, 1.0]) == 1  # a single tie
    # One tied score of P, shared by a fifth of U.
    assert dedpul_prior(np.ones(30), np.repeat([0.0, 1.0], [80, 20])) == pytest.approx(0.2)


def test_elkan_noto_golden_and_bound():
    (case,) = (case for case in GOLDEN["bbe"] if "elkan_noto" in case)
    ratio = elkan_noto_ratio(case["p_scores"], case["u_scores"])
    assert ratio == pytest.approx(case["elkan_noto"]["mean_ratio"], rel=1e-9)
    assert ratio > case["true_share_in_sample"]


@pytest.mark.parametrize("estimator", [bbe_prior, dedpul_prior, elkan_noto_ratio])
@pytest.mark.parametrize("bad", [[], [0.5, math.nan], [0.5, math.inf], [[0.5]], 0.5])
def test_empty_and_non_finite_scores_are_refused(estimator, bad):
    with pytest.raises(ValueError, match="p_"):
        estimator(bad, [0.5])
    with pytest.raises(ValueError, match="u_"):
        estimator([0.5], bad)


def test_bad_arguments_are_refused():
    for bad in ({"gamma": -1}, {"gamma": math.nan}, {"delta": 0}, {"delta": 1}):
        with pytest.raises(ValueError, match="gamma must be"):
            bbe_prior([1.0], [1.0], **bad)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        elkan_noto_ratio([0.5], [1.5])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        elkan_noto_ratio([-0.5], [0.5])
    with pytest.raises(ValueError, match="all 0"):
        elkan_noto_ratio([0.0, 0.0], [0.5])


@pytest.mark.parametrize(
    ("value", "dedpul", "elkan_noto", "mentions"),
    [
        (0.20, 0.22, 0.28, []),
        (0.20, 0.26, 0.28, ["selector.prior"]),
        (0.20, 0.14, 0.28, ["selector.prior"]),
        (0.20, 0.22, 0.19, ["selector.steps"]),
        (0.009, 0.01, 0.05, ["selection.rule"]),
        (0.001, 0.5, 0.0, ["300", "selector.steps", "selection.rule"]),
    ],
)
def test_warnings_say_what_to_do(value, dedpul, elkan_noto, mentions):
    estimate = PriorEstimate(value=value, lower=0.0, upper=1.0, threshold=0.0)
    warnings = prior_warnings(estimate, dedpul=dedpul, elkan_noto=elkan_noto)
    assert len(warnings) == len(mentions)
    for warning, key in zip(warnings, mentions, strict=True):
        assert key in warning
        assert "selector.prior" in warning
