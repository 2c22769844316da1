"""Precision and recall without truth, on logits whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pukd_ray.selection.calibration import Binned, Calibration, resample_weights
from pukd_ray.selection.crossfit import Groups, HeldOut, assess_fit
from pukd_ray.selection.quality import estimate_quality
from pukd_ray.selection.training import Training
from pukd_ray.selection.verdict import Verdict

TRAINING = Training("nnpu", 0.2, 100, 64, 0.01, 0)


def sample(gap: float, n_p: int, n_u: int, prior: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of P and U from two normals `gap` apart, for which sigmoid(gap z + b) is exact, and U's truth."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n_u) < prior
    return rng.normal(gap / 2, 1, n_p), rng.normal(np.where(truth, gap / 2, -gap / 2), 1), truth


def refits(p: np.ndarray, u: np.ndarray) -> tuple[Calibration, list[Calibration]]:
    rng = np.random.default_rng(0)
    logits = Binned.of(p, u)
    return logits.fit()[0], [
        logits.fit(None, resample_weights(rng, len(p)), resample_weights(rng, len(u)))[0] for _ in range(60)
    ]


def quality(p: np.ndarray, u: np.ndarray, selected: np.ndarray) -> dict[str, Any]:
    return estimate_quality(np.ones(len(u)), selected.astype(float), u, p, np.ones(len(p)), *refits(p, u))


@pytest.mark.parametrize("prior", [0.05, 0.3])
def test_both_are_right_where_the_model_holds(prior: float) -> None:
    p, u, truth = sample(3.0, 1_000, 20_000, prior)
    for threshold in (0.0, 1.0):
        taken = u > threshold
        found = quality(p, u, taken)
        for name, true in (("precision", truth[taken].mean()), ("recall", truth[taken].sum() / truth.sum())):
            lower, upper = found[f"{name}_interval"]
            assert lower <= true <= upper
            assert found[name] == pytest.approx(true, abs=0.04)
            assert upper - lower < 0.2


def test_bins_say_the_same_as_images() -> None:
    p, u, _ = sample(3.0, 500, 8_000, 0.3)
    by_image = quality(p, u, u > 0)
    edges = np.unique(np.r_[0.0, np.quantile(u, np.linspace(0, 1, 512)[1:-1])])
    index = np.searchsorted(edges, u, side="right")
    everything, selected = np.bincount(index), np.bincount(index, u > 0)
    means = np.bincount(index, u) / np.maximum(everything, 1)
    by_bin = estimate_quality(everything, selected, means, p, np.ones(len(p)), *refits(p, u))
    for name in ("precision", "recall"):
        assert by_bin[name] == pytest.approx(by_image[name], abs=0.01)
        np.testing.assert_allclose(by_bin[f"{name}_interval"], by_image[f"{name}_interval"], atol=0.02)


def test_a_random_part_has_the_precision_of_the_whole() -> None:
    p, u, _ = sample(3.0, 500, 8_000, 0.3)
    half = np.zeros(len(u))
    half[np.random.default_rng(0).permutation(len(u))[: len(u) // 2]] = 1
    everything, index = np.bincount(np.digitize(u, np.linspace(-4, 4, 40))), np.digitize(u, np.linspace(-4, 4, 40))
    means = np.bincount(index, u) / np.maximum(everything, 1)
    found = estimate_quality(everything, np.bincount(index, half), means, p, np.ones(len(p)), *refits(p, u))
    assert found["recall"] == pytest.approx(0.5, abs=0.03)
    assert found["precision"] == pytest.approx(0.3, abs=0.04)


def test_recall_counts_held_out_positives_too() -> None:
    """A model that takes all of U's top for relevant is held against P's own recall."""
    p, u, _ = sample(3.0, 500, 8_000, 0.3)
    certain = Calibration(50.0, 0.0)
    one = estimate_quality(np.ones(len(u)), (u > 0).astype(float), u, p, np.ones(len(p)), certain, [certain] * 40)
    modelled, counted = 1.0, (p > 0).mean()
    assert one["recall"] == pytest.approx((modelled + counted) / 2, abs=0.005)
    assert one["precision"] == pytest.approx((1 + counted) / 2, abs=0.005)
    assert one["recall_interval"][0] < counted < one["recall_interval"][1]


def test_few_images_spread_around_their_probability() -> None:
    half = Calibration(0.0, 0.0)
    widths = {}
    for count in (10, 10_000):
        images, taken, logits = np.full(2, count), np.array([0, count]), np.array([-1.0, 1.0])
        found = estimate_quality(images, taken, logits, np.ones(5_000), np.ones(5_000), half, [half] * 100)
        widths[count] = np.diff(found["recall_interval"])[0]
        assert found["precision"] == pytest.approx(0.75)  # half modelled, 1 counted
    assert widths[10] > widths[10_000]


def test_nothing_selected_is_zero_of_both() -> None:
    p, u, _ = sample(3.0, 50, 500, 0.3)
    found = quality(p, u, np.zeros(len(u)))
    assert (found["precision"], found["recall"]) == (0.0, 0.0)


def test_what_is_not_known_of_the_prior_widens_precision_and_recall() -> None:
    p, u, truth = sample(2.5, 500, 8_000, 0.2, seed=3)
    held_out = HeldOut(
        (100,), np.arange(len(p)), np.arange(len(u)), p[None].astype(np.float32), u[None].astype(np.float32), (0, 0)
    )
    groups = Groups(np.arange(len(u)) // 100, np.zeros(len(p), np.int64), np.zeros(len(u), np.int64))
    widths = []
    for lower, upper in ((0.2, 0.2), (0.15, 0.3)):
        verdict = Verdict(0.2, lower, upper, 0.2, "high", (), None, "density_ratio")
        fit = assess_fit([held_out], groups, verdict, TRAINING)
        found = estimate_quality(
            np.ones(len(u)), (u > 0).astype(float), u, p, fit.p_weights, fit.calibration, list(fit.bootstrap)
        )
        low, high = found["precision_interval"]
        assert low < truth[u > 0].mean() < high
        assert fit.calibration(u).mean() == pytest.approx(0.2, abs=0.005)
        assert fit.calibration(np.array(1e3)) > 0.999  # nothing caps a probability
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]
