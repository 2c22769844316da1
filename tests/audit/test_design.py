"""Strata and how many images each gets."""

from __future__ import annotations

import numpy as np
import pytest

from pukd_ray.audit.design import BANDS, LEAST, Bins, allocate, plan_strata


def bins(count: list[int], probability: list[float], first: int = 0) -> Bins:
    return Bins(np.arange(first, first + len(count)), np.array(count), np.array(probability))


RARE = bins([120, 60, 20], [0.6, 0.9, 0.99], 10), bins([900_000, 90_000, 9_000, 800], [1e-6, 1e-4, 0.01, 0.3])


def test_every_row_is_in_one_stratum_and_may_be_drawn() -> None:
    strata = plan_strata(*RARE, 300)
    for side, selected in zip(RARE, (True, False), strict=True):
        mine = [s for s in strata if s.selected is selected]
        assert 1 < len(mine) <= BANDS
        held = [[b for b in side.bits.tolist() if s.first <= b <= s.last] for s in mine]
        assert [b for part in held for b in part] == side.bits.tolist()
        assert [s.size for s in mine] == [int(side.count[np.isin(side.bits, b)].sum()) for b in held]
    assert all(0 < s.inclusion_probability <= 1 for s in strata)


@pytest.mark.parametrize("images", [6, 50, 300, 1100, 999_999])
def test_inclusion_probabilities_sum_to_the_number_of_images(images: int) -> None:
    strata = plan_strata(*RARE, images)
    assert sum(s.sampled for s in strata) == images
    assert sum(s.size * s.inclusion_probability for s in strata) == pytest.approx(images)
    assert all(1 <= s.sampled <= s.size for s in strata)


def test_a_corpus_smaller_than_the_sample_is_drawn_whole() -> None:
    strata = plan_strata(bins([3, 4], [0.7, 0.9], 5), bins([10, 5], [0.1, 0.2]), 300)
    assert [s.sampled for s in strata] == [s.size for s in strata]
    assert sum(s.size for s in strata) == 22


def test_the_far_rest_gets_most_of_the_images_for_recall() -> None:
    """Of it the model is sure, and so the ideal allocation would leave it unseen; what it hides decides the recall."""
    strata = [s for s in plan_strata(*RARE, 300) if not s.selected]
    far = max(strata, key=lambda s: s.size)
    assert far.sampled > 0.6 * sum(s.sampled for s in strata)


def test_all_selected_and_none_selected() -> None:
    nothing = bins([], [])
    assert all(s.selected for s in plan_strata(RARE[0], nothing, 30))
    assert not any(s.selected for s in plan_strata(nothing, RARE[1], 30))


def test_fewer_images_than_strata_are_refused() -> None:
    with pytest.raises(ValueError, match="strata need at least as many images, not 2"):
        plan_strata(*RARE, 2)


def test_allocation_respects_bounds() -> None:
    given = allocate(np.array([0.7, 0.299, 0.001, 0.0]), np.array([50, 10_000, 10_000, 4]), 300)
    assert given.sum() == 300
    assert given[0] == 50
    assert given[3] == 4
    assert given[2] == LEAST
