"""The blend of the selector's logit with nearness to P: what is learnt, what is held out, what the pass needs."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from pukd_ray.selection.blend import EVIDENCE, LEAST, MOST_CHANNELS, Blend, Nearness, Tails, fit_nearness
from pukd_ray.selection.crossfit import fold_of


def task(n_p: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """P, U, truth of U, labels of P: two classes in six dimensions."""
    rng = np.random.default_rng(seed)
    truth = rng.random(2000) < 0.2
    centres = np.zeros((2, 6))
    centres[[0, 1], [0, 1]] = 3
    labels, of_u = np.arange(n_p) % 2, rng.integers(0, 2, 2000)
    p = rng.normal(size=(n_p, 6)) + centres[labels]
    u = rng.normal(size=(2000, 6)) + np.where(truth[:, None], centres[of_u], -0.5)
    return p.astype(np.float32), u.astype(np.float32), truth, labels


def evidence(seed: int = 0) -> tuple[Tails, np.ndarray]:
    p, u, truth, labels = task(seed=seed)
    return fit_nearness(p, u, labels, fold_of(len(p), 0), 0)[1], truth


def logits(truth: np.ndarray, strength: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Of 60 positives and of U, `strength` standard deviations apart."""
    rng = np.random.default_rng(seed)
    p, u = strength + rng.normal(size=60), strength * truth + rng.normal(size=len(truth))
    return (p - 1).astype(np.float32), (u - 1).astype(np.float32)


def test_weights_follow_what_tells_p_from_u() -> None:
    tails, truth = evidence()
    weak, strong = (Blend.learn(*logits(truth, strength), tails) for strength in (0.0, 6.0))
    assert strong.weights[0] > 3 * max(strong.weights[1] - LEAST * strong.weights[0], strong.weights[2])
    assert weak.weights[0] < 0.3 < weak.weights[1] + weak.weights[2]
    for blend in (weak, strong):
        assert blend.weights[1] >= LEAST * blend.weights[0] - 1e-9
        assert min(blend.weights) >= 0


@pytest.mark.parametrize("strength", [0.0, 1.5, 6.0])
def test_it_ranks_as_the_better_of_the_two_and_takes_as_many(strength: float) -> None:
    tails, truth = evidence()
    p, u = logits(truth, strength)
    blend = Blend.learn(p, u, tails)
    blended = blend(u, tails.u)
    assert blended.dtype == np.float32
    alone = [average_precision_score(truth, s) for s in (u, *tails.u.T)]
    assert average_precision_score(truth, blended) > max(alone) - 0.01
    assert (blended > 0).sum() == pytest.approx((u > 0).sum(), abs=1)
    other = blend.fitted_to(3 * u - 1, tails.u)  # another network's logits
    assert other.weights == blend.weights
    assert (other(3 * u - 1, tails.u) > 0).sum() == pytest.approx((3 * u - 1 > 0).sum(), abs=1)


def test_it_grows_with_each_of_its_parts_and_survives_what_never_varies() -> None:
    tails, truth = evidence()
    p, u = logits(truth, 1.5)
    blend = Blend.learn(p, u, tails)
    for part in range(3):
        columns = np.c_[u, tails.u][:50]
        columns[:, part] += 1
        assert (blend(columns[:, 0], columns[:, 1:]) >= blend(u[:50], tails.u[:50])).all()
    flat = Blend.learn(np.full(60, 2, np.float32), np.full(2000, 2, np.float32), tails)
    assert np.isfinite(flat(np.full(2000, 2, np.float32), tails.u)).all()


def test_p_is_held_out_and_u_is_ranked_among_itself() -> None:
    rng = np.random.default_rng(0)
    # P is like the rest of U: only an image that scorers were fitted to would look near.
    p, u = rng.normal(size=(40, 30)).astype(np.float32), rng.normal(size=(4000, 30)).astype(np.float32)
    nearness, tails = fit_nearness(p, u, np.arange(40) % 4, fold_of(40, 0), 0)
    fooled = nearness.tails(p)
    assert tails.p.shape == (40, len(EVIDENCE))
    assert (fooled.mean(0) > np.array([1.3, 3]) * tails.p.mean(0)).all()
    np.testing.assert_allclose(tails.p.mean(0), 1, atol=0.35)  # -log of a uniform share
    np.testing.assert_allclose(tails.u.mean(0), 1, atol=0.01)
    assert np.isfinite(tails.u).all()


@pytest.mark.parametrize("channels", [6, MOST_CHANNELS + 20])
def test_the_pass_gets_what_was_fitted(channels: int) -> None:
    p, u, truth, labels = task()
    rng = np.random.default_rng(5)
    more = [0.5 * rng.normal(size=(len(x), channels - 6)).astype(np.float32) for x in (p, u)]
    p, u = np.c_[p, more[0]], np.c_[u, more[1]]
    nearness, tails = fit_nearness(p, u, labels, fold_of(len(p), 0), 0)
    assert nearness.seen(u).shape[1] == min(channels, MOST_CHANNELS)
    assert average_precision_score(truth, tails.u.sum(1)) > 0.4  # of chance 0.2
    again = Nearness.load(nearness.dump())
    np.testing.assert_array_equal(again.tails(u), tails.u)
    assert again.tails(u[:0]).shape == (0, len(EVIDENCE))
