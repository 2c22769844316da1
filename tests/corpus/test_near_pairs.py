"""Near-copies: what is found without comparing all pairs is what comparing all of them finds."""

from __future__ import annotations

import numpy as np
import pytest

from pukd_ray.corpus.perceptual import BANDS, BITS, RADIUS, hash_words, pairs_within


def hashes_with_copies(rng: np.random.Generator, images: int, copies: int, most: int) -> np.ndarray:
    """bool [images + copies, BITS]: random ones, and copies of some in which up to `most` bits differ."""
    bits = rng.random((images, BITS)) < 0.5
    of = bits[rng.integers(0, images, copies)].copy()
    for row in of:
        row[rng.choice(BITS, rng.integers(0, most + 1), replace=False)] ^= True
    return np.concatenate([bits, of])


def rows_of(bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(len(bits)) - len(bits) // 2
    return np.column_stack([order, np.arange(len(bits)), hash_words(np.packbits(bits, axis=1))])


def found_by_bands(rows: np.ndarray, radius: int) -> set[tuple[int, int, int]]:
    found: set[tuple[int, int, int]] = set()
    for band in range(BANDS):
        found |= set(map(tuple, pairs_within(rows, band, radius).tolist()))
    return found


def all_pairs(rows: np.ndarray, radius: int) -> set[tuple[int, int, int]]:
    words = np.ascontiguousarray(rows[:, 2:]).view(np.uint64)
    bits = np.bitwise_count(words[:, None] ^ words[None]).sum(2)
    one, other = np.nonzero(np.triu(bits <= radius, 1))
    late = rows[one, 0] > rows[other, 0]
    return {
        (int(i), int(j), int(bits[i, j])) if first else (int(j), int(i), int(bits[i, j]))
        for i, j, first in zip(one, other, late, strict=True)
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_comparing_all_pairs_finds_is_found_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rows_of(np.unique(hashes_with_copies(rng, 400, 800, RADIUS + 3), axis=0), rng)
    found, expected = found_by_bands(rows, RADIUS), all_pairs(rows, RADIUS)
    assert found == expected
    assert len(expected) > 500
    assert max(bits for *_, bits in expected) == RADIUS


def test_equal_hashes_cost_no_pairs_and_all_but_the_first_are_told() -> None:
    rng = np.random.default_rng(4)
    bits = np.repeat(rng.random((3, BITS)) < 0.5, [2000, 500, 1], axis=0)
    rows = rows_of(bits, rng)
    pairs = pairs_within(rows, 0)
    assert len(pairs) == 1999 + 499
    assert set(pairs[:, 2].tolist()) == {0}
    kept = set(range(len(rows))) - set(pairs[:, 0].tolist())
    assert len(kept) == 3
    for start, stop in ((0, 2000), (2000, 2500), (2500, 2501)):
        assert start + int(rows[start:stop, 0].argmin()) in kept


def test_a_bucket_without_end_is_searched_in_part() -> None:
    rng = np.random.default_rng(5)
    bits = rng.random((3000, BITS)) < 0.5
    bits[:, :16] = True
    rows = rows_of(bits, rng)
    assert len(pairs_within(rows, 0, BITS, most=3)) == 3 * 3000 - 6


def test_no_rows() -> None:
    assert pairs_within(np.zeros((0, 2 + BITS // 64), np.int64), 0).shape == (0, 3)
