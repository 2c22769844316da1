"""Global batches: which rows are in them, and how often."""

from __future__ import annotations

import numpy as np
import pytest

from pukd_ray.runtime.batches import EndlessOrder, SharedOrder, marked_rows


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


@pytest.mark.parametrize(("share", "rows"), [(0.01, 1), (0.99, 7)])
def test_a_share_leaves_no_kind_without_a_row(share: float, rows: int) -> None:
    marked = np.array([True] * 5 + [False] * 5)
    assert marked[SharedOrder(marked, share, 8, 1).batch(0)].sum() == rows
    assert [marked_rows(s, 1) for s in (0.1, 0.9)] == [0, 1]
