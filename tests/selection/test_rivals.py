"""Rivals that rank by the teacher's logits or by its last tap: values by hand, and what a slip would change."""

from __future__ import annotations

import numpy as np

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
