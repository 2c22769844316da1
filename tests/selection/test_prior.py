"""Prior estimators against golden.json, a brute-force loop, and mixtures whose prior is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pukd_ray.selection.prior import bbe_prior

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


@pytest.mark.parametrize("bad", [[], [0.5, math.nan], [0.5, math.inf], [[0.5]], 0.5])
def test_empty_and_non_finite_scores_are_refused(bad):
    with pytest.raises(ValueError, match="p_"):
        bbe_prior(bad, [0.5])
    with pytest.raises(ValueError, match="u_"):
        bbe_prior([0.5], bad)


def test_bad_arguments_are_refused():
    for bad in ({"gamma": -1}, {"gamma": math.nan}, {"delta": 0}, {"delta": 1}):
        with pytest.raises(ValueError, match="gamma must be"):
            bbe_prior([1.0], [1.0], **bad)
