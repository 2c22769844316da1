"""Rivals that rank by the teacher's logits or by its last tap: values by hand, and what a slip would change."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import helmert
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from pukd_ray.selection.rules import RULES

LOGITS = np.log(np.array([[8, 1, 1], [6, 6, 6], [1, 2, 9], [0.5, 0.25, 0.25]], np.float32))


def score(rule: str, features: np.ndarray, logits: np.ndarray, *fitted_to: np.ndarray) -> np.ndarray:
    """What the pass does with the scorer of a rule."""
    scorer = RULES[rule].scorer
    assert scorer is not None
    scores = scorer.score(scorer.fit(*fitted_to), features, logits)
    assert scores.dtype == np.float32
    assert scores.shape == (len(features),)
    assert np.isfinite(scores).all()
    return scores


def by_logits(rule: str, logits: np.ndarray) -> np.ndarray:
    nothing = np.zeros((len(logits), 2), np.float32)
    return score(rule, nothing, logits, nothing, nothing, np.zeros(len(logits), np.int64))


def test_energy_is_the_log_of_the_sum_of_exponentials() -> None:
    found = by_logits("energy", LOGITS)
    np.testing.assert_allclose(found, np.log([10, 18, 12, 1]), atol=1e-6)
    assert np.argsort(-found).tolist() == [1, 2, 0, 3]  # the largest logit says 2 first, the softmax 0
    np.testing.assert_allclose(by_logits("energy", LOGITS + 500), np.log([10, 18, 12, 1]) + 500, rtol=1e-6)
    np.testing.assert_allclose(by_logits("energy", LOGITS - 500), np.log([10, 18, 12, 1]) - 500, rtol=1e-6)


def test_the_largest_logit_is_no_softmax() -> None:
    found = by_logits("max_logit", LOGITS)
    np.testing.assert_allclose(found, np.log([8, 6, 9, 0.5]), atol=1e-6)
    assert np.argsort(-found).tolist() == [2, 0, 1, 3]
    softmax = np.exp(LOGITS).max(1) / np.exp(LOGITS).sum(1)
    assert np.argsort(-softmax).tolist() == [0, 2, 3, 1]
    assert by_logits("max_logit", -LOGITS)[0] == 0  # not the one furthest from 0


CORNERS = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)


def rmds(p: np.ndarray, u: np.ndarray, labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    kind = np.float32
    return score("rmds", images.astype(kind), np.zeros((len(images), 3)), p.astype(kind), u.astype(kind), labels)


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (3, 10)])
def test_rmds_by_hand(scale: float, offset: float) -> None:
    # U: mean 0, covariance I. P: means (2, 0) and (0, 2), within classes I / 4, so that M_k is four times the square.
    p = np.array([[2.5, 0], [1.5, 0], [0, 2.5], [0, 1.5]])
    images = np.array([[2, 0], [1, 1], [0, 0], [0, 4], [2, 2]])
    expected = [0 - 4, 8 - 2, 16 - 0, 16 - 16, 16 - 8]
    found = rmds(*(scale * x + offset for x in (p, CORNERS)), np.array([0, 0, 3, 3]), scale * images + offset)
    np.testing.assert_allclose(found, -np.array(expected), atol=1e-4)
    # The total covariance of P (that of its means too) or no background would order them otherwise.
    assert np.argsort(-found).tolist() == [0, 3, 1, 4, 2]


def reference(p: np.ndarray, u: np.ndarray, labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    """By inverses and differences, in float64."""
    mean, std = (m(u, 0, dtype=np.float64).astype(np.float32) for m in (np.mean, np.std))
    p, u, images = ((x.astype(np.float64) - mean) / std for x in (p, u, images))
    within = np.concatenate([helmert(m.sum()) @ p[m] for m in (labels == k for k in np.unique(labels)) if m.sum() > 1])
    inverse_u = np.linalg.inv(LedoitWolf().fit(u).covariance_)
    inverse_p = np.linalg.inv(LedoitWolf(assume_centered=True).fit(within).covariance_)

    def squares(mean: np.ndarray, inverse: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.einsum("nc,cd,nd->n", images - mean, inverse, images - mean)
        return found

    nearest = np.min([squares(p[labels == k].mean(0), inverse_p) for k in np.unique(labels)], axis=0)
    result: np.ndarray = squares(u.mean(0), inverse_u) - nearest
    return result


def taps(per_class: list[int], channels: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """P, U, labels of P and which of U are relevant: correlated features, far from 0 for their spread."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(channels, channels)) @ np.diag(np.geomspace(1, 1e-2, channels))
    means = rng.normal(size=(len(per_class), channels)) * 3
    labels = np.repeat(np.arange(len(per_class)), per_class)
    relevant = rng.random(2000) < 0.2
    kinds = rng.integers(0, len(per_class), 2000)
    u = rng.normal(size=(2000, channels)) + np.where(relevant[:, None], means[kinds], 0)
    p = rng.normal(size=(len(labels), channels)) + means[labels]
    return (p @ mix + 30).astype(np.float32), (u @ mix + 30).astype(np.float32), labels, relevant


@pytest.mark.parametrize(
    ("per_class", "channels"), [([40, 40, 40], 8), ([30, 1, 5, 2], 16), ([5] * 4, 64), ([2] * 6, 32)]
)
def test_rmds_against_inverses(per_class: list[int], channels: int) -> None:
    p, u, labels, relevant = taps(per_class, channels)
    found = rmds(p, u, labels, u)
    expected = reference(p, u, labels, u)
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=1e-6, atol=1e-6)  # distances in float32 miss it
    assert roc_auc_score(relevant, found) > 0.9


def test_the_covariance_within_classes_has_its_degrees_of_freedom() -> None:
    # Two of each class: residuals over n would halve it, and all distances to P would double.
    rng = np.random.default_rng(0)
    u = rng.normal(size=(4000, 3))
    labels = np.repeat(np.arange(3000), 2)
    means = rng.normal(size=(3000, 3)) * 0.01
    p = rng.normal(size=(6000, 3)) + means[labels]
    scorer = RULES["rmds"].scorer
    assert scorer is not None
    fitted = scorer.fit(p.astype(np.float32), u.astype(np.float32), labels)
    precision = fitted["whiten_p"] @ fitted["whiten_p"].T
    np.testing.assert_allclose(precision, np.eye(3), atol=0.1)


def test_rmds_of_a_few_positives_ranks_all_the_same() -> None:
    p, u, labels, relevant = taps([1] * 6, 32)
    assert roc_auc_score(relevant, rmds(p, u, labels, u)) > 0.9  # nothing is known within classes
    twice, of_twice = np.concatenate([p[:1], p]), np.concatenate([labels[:1], labels])
    np.testing.assert_array_equal(rmds(twice, u, of_twice, u), rmds(p, u, labels, u))  # one contrast: neither
    two_pairs = taps([2, 2, 1, 1, 1, 1], 32)
    assert roc_auc_score(two_pairs[3], rmds(two_pairs[0], two_pairs[1], two_pairs[2], two_pairs[1])) > 0.9
    same = np.repeat(p, 3, 0)
    assert roc_auc_score(relevant, rmds(same, u, np.repeat(labels, 3), u)) > 0.9  # copies vary in nothing
    u[:, 5] = 4
    p[:, 5] = 4
    rmds(p, u, labels, np.concatenate([u, u[:3] + 65000]))  # a dead channel, images far from all
