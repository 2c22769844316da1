"""Global batches: which rows are in them, and how often."""

from __future__ import annotations

import numpy as np
import pytest

from pukd_ray.runtime.batches import EndlessOrder, SharedOrder, WeightedOrder


def test_marked_rows_have_their_share_of_every_batch_and_all_rows_their_turn() -> None:
    marked = np.arange(50) % 10 == 3  # 5 of them
    order = SharedOrder(marked, 0.25, 20, 7)
    batches = [order.batch(step) for step in range(9)]
    assert all(np.array_equal(marked[batch], np.arange(20) < 5) for batch in batches)
    counts = np.bincount(np.concatenate(batches), minlength=50)
    assert set(counts[marked]) == {9}
    assert set(counts[~marked]) == {3}
    assert not np.array_equal(np.sort(batches[0][5:]), np.sort(SharedOrder(marked, 0.25, 20, 8).batch(0)[5:]))


@pytest.mark.parametrize(("marked", "share"), [([True, False] * 5, None), ([True] * 10, 0.3), ([False] * 10, 0.3)])
def test_without_a_share_or_without_both_kinds_it_is_the_plain_order(marked: list[bool], share: float | None) -> None:
    shared, plain = SharedOrder(np.array(marked), share, 4, 7, 3), EndlessOrder(10, 4, 7, 3)
    assert all(np.array_equal(shared.batch(step), plain.batch(step)) for step in range(6))


@pytest.mark.parametrize(("share", "first"), [(0.01, False), (0.99, True)])
def test_a_share_of_less_than_one_row_is_none(share: float, first: bool) -> None:
    marked = np.array([True] * 5 + [False] * 5)
    assert (marked[SharedOrder(marked, share, 8, 1).batch(0)] == first).all()


def test_half_of_the_draws_are_by_weight_and_half_are_even() -> None:
    weights = np.array([0.0, 0.0, 0.1, 0.9])
    order = WeightedOrder(weights, 1000, 7)
    drawn = np.bincount(np.concatenate([order.batch(step) for step in range(40)]), minlength=4) / 40_000
    np.testing.assert_allclose(drawn, 0.5 * weights + 0.5 / 4, atol=0.01)
    assert np.array_equal(order.batch(3), WeightedOrder(weights, 1000, 7).batch(3))
    assert not np.array_equal(order.batch(3), order.batch(4))


def test_marked_rows_are_not_drawn_by_weight() -> None:
    marked, weights = np.arange(20) < 4, np.where(np.arange(20) == 19, 1.0, 0.0)
    order = SharedOrder(marked, 0.5, 8, 1, weights=weights)
    counts = np.bincount(np.concatenate([order.batch(step) for step in range(200)]), minlength=20)
    assert set(counts[:4]) == {200}
    assert counts[19] > 0.45 * 800 > 3 * counts[4:19].max()
