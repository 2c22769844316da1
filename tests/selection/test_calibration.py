"""Calibration and the refined prior, on logits whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from pukd_ray.selection.calibration import Binned, Calibration, from_json, match_prior, resample_weights, to_json


def logistic_sample(prior: float, slope: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [count] whose truth given z is Bernoulli(sigmoid(slope z + b)), as many P of the same kind, and U's truth."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=4 * count) * 3
    low, high = -50.0, 50.0
    for _ in range(80):
        b = (low + high) / 2
        low, high = (b, high) if expit(slope * z + b).mean() < prior else (low, b)
    truth = rng.random(len(z)) < expit(slope * z + b)
    positives = np.flatnonzero(truth[2 * count :]) + 2 * count
    return z[positives][:count], z[:count], truth[:count]


@pytest.mark.parametrize("prior", [0.02, 0.25, 0.6])
def test_the_prior_is_found_where_the_model_holds(prior: float) -> None:
    p, u, truth = logistic_sample(prior, 3.0, 20_000, seed=1)
    calibration, estimate = Binned.of(p, u).fit()
    assert estimate == pytest.approx(truth.mean(), rel=0.12)
    assert calibration.slope == pytest.approx(3.0, rel=0.15)
    assert not calibration.at_bound


@pytest.mark.parametrize("prior", [0.05, 0.25])
def test_probabilities_are_shares_of_relevant(prior: float) -> None:
    p, u, truth = logistic_sample(prior, 2.0, 20_000, seed=2)
    calibration, _ = Binned.of(p, u).fit(prior)
    probability = calibration(u)
    for low, high in ((0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
        here = (probability >= low) & (probability < high)
        assert truth[here].mean() == pytest.approx(probability[here].mean(), abs=0.06)


def test_a_given_prior_is_the_mean_over_u() -> None:
    p, u, _ = logistic_sample(0.25, 2.0, 5_000, seed=3)
    binned = Binned.of(p, u)
    for prior in (0.1, 0.25, 0.4):
        calibration, estimate = binned.fit(prior)
        assert estimate == pytest.approx(prior, abs=1e-6)
        assert calibration(u).mean() == pytest.approx(prior, abs=2e-3)  # bins against images


def test_a_known_prior_maximises_the_same_likelihood() -> None:
    """At the refined prior both ways of fitting agree."""
    p, u, _ = logistic_sample(0.25, 2.0, 5_000, seed=4)
    binned = Binned.of(p, u)
    free, estimate = binned.fit()
    tied, _ = binned.fit(estimate)
    assert tied.slope == pytest.approx(free.slope, rel=0.02)
    assert tied.offset == pytest.approx(free.offset, abs=0.05)


def test_the_slope_is_bounded_where_p_is_above_all_of_u() -> None:
    rng = np.random.default_rng(0)
    calibration, _ = Binned.of(rng.normal(20, 1, 200), rng.normal(0, 1, 2000)).fit(0.1)
    assert calibration.at_bound
    assert np.isfinite([calibration.slope, calibration.offset]).all()


def test_weights_count_like_copies() -> None:
    p, u, _ = logistic_sample(0.25, 2.0, 400, seed=5)
    p = p[:50]
    rng = np.random.default_rng(0)
    w_p, w_u = rng.integers(0, 4, len(p)).astype(float), rng.integers(0, 4, len(u)).astype(float)
    weighted, prior = Binned.of(p, u).fit(None, w_p, w_u)
    copies, prior_of_copies = Binned.of(np.repeat(p, w_p.astype(int)), np.repeat(u, w_u.astype(int))).fit()
    assert prior == pytest.approx(prior_of_copies, rel=0.02)
    assert weighted.slope == pytest.approx(copies.slope, rel=0.03)


def test_match_prior_moves_the_offset_only() -> None:
    u = np.random.default_rng(0).normal(size=3000) * 4 - 3
    moved = match_prior(Calibration(1.5, 0.3, at_bound=True), u, 0.07)
    assert (moved.slope, moved.at_bound) == (1.5, True)
    assert moved(u).mean() == pytest.approx(0.07, abs=1e-9)


def test_units_are_drawn_whole_if_there_are_enough() -> None:
    rng = np.random.default_rng(0)
    weights = resample_weights(rng, 300, np.arange(300) // 10)
    assert (weights.reshape(30, 10) == weights.reshape(30, 10)[:, :1]).all()
    assert weights.sum() == 300
    few = resample_weights(rng, 300, np.arange(300) // 100)
    assert (few.reshape(3, 100) != few.reshape(3, 100)[:, :1]).any()


def test_shifted_logits_keep_their_probabilities() -> None:
    z, calibration = np.linspace(-5, 5, 11), Calibration(1.5, 0.3)
    np.testing.assert_allclose(calibration.shifted(2.0)(z - 2.0), calibration(z))


def test_json_keeps_everything() -> None:
    calibration, refits = Calibration(1.5, -0.25, True), [Calibration(1.0, 0.5), Calibration(2.0, 0.0)]
    assert from_json(to_json(calibration, refits)) == (calibration, refits)
