"""A perceptual hash: the signs of an image's lowest frequencies. Images that look alike differ in few of them.

What is hashed are decoded pixels as networks see them: images of all formats and sizes meet, and a hash costs far less
than decoding. As pHash (Zauner, 2010), but of the frequencies nearest to zero in the plane, and with their signs in
place of a comparison with their median.

Two hashes are compared only if they differ in at most one bit of one of their `BANDS` parts (multi-index hashing,
Norouzi et al. 2012): those that differ in fewer than two bits for each part have such a part.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa

BITS = 128
BANDS = 8
"""Parts of a hash by which it is looked up; the first has the lowest frequencies, of which copies keep most."""
RADIUS = 2 * BANDS - 1
"""Bits in which near-copies may differ (docs/method.md, "Near-copies", has what was measured)."""
MOST_IN_BUCKET = 20_000
"""Images with the same part of a hash that each is compared with, at most: a corpus of nearly one picture ends too."""
FLAT = 2.0
"""Standard deviation of gray values, 0 to 255, below which an image has nothing to tell it by, and no hash."""
SMALLEST = 12
"""Side, in pixels, below which there are fewer frequencies than bits, and no hash."""
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion to gray
_CHUNK = 1 << 16  # gray pixels at a time, about: they stay in the cache

ORDER, PLACE, HASH = 0, 1, slice(2, 2 + BITS // 64)
"""Columns of rows of hashes, int64 [n, 2 + BITS / 64]: which of near-copies stays, where the image is, its hash."""


def perceptual_hashes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, C, S, S] -> (hashes uint8 [n, BITS / 8], whether the image has one, bool [n])."""
    bits = np.zeros((len(pixels), BITS), bool)
    has = np.zeros(len(pixels), bool)
    if pixels.shape[-1] < SMALLEST:
        return np.packbits(bits, axis=1), has
    basis, rows, columns = _frequencies(pixels.shape[-1])
    step = max(1, _CHUNK // pixels.shape[-1] ** 2)
    weights = _LUMA if pixels.shape[1] == 3 else (1.0,)
    for start in range(0, len(pixels), step):
        part = pixels[start : start + step]
        gray = np.zeros((len(part), *part.shape[2:]), np.float32)
        for channel, weight in enumerate(weights):
            gray += np.multiply(part[:, channel], weight, dtype=np.float32)
        has[start : start + step] = gray.std(axis=(1, 2)) >= FLAT
        bits[start : start + step] = (basis @ gray @ basis.T)[:, rows, columns] > 0
    return np.packbits(bits, axis=1), has


@lru_cache(maxsize=8)
def _frequencies(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(DCT-II basis [K, size], rows and columns of the `BITS` lowest frequencies but the mean, nearest first)."""
    most = min(size, 16)
    basis = np.cos(np.pi * np.outer(np.arange(most), 2 * np.arange(size) + 1) / (2 * size)).astype(np.float32)
    u, v = np.divmod(np.arange(most * most), most)
    order = np.lexsort((v, u, u * u + v * v))[1 : BITS + 1]
    return basis, u[order], v[order]


def hash_column(hashes: np.ndarray, has: np.ndarray, readable: np.ndarray) -> pa.Array:
    """Column `perceptual_hash` of rows of which some are `readable` and of those some have a hash."""
    values: list[bytes | None] = [None] * len(readable)
    for row, value, there in zip(np.flatnonzero(readable).tolist(), hashes, has, strict=True):
        values[row] = value.tobytes() if there else None
    return pa.array(values, pa.binary(BITS // 8))


def pairs_within(rows: np.ndarray, band: int, radius: int = RADIUS, most: int = MOST_IN_BUCKET) -> np.ndarray:
    """Pairs of rows whose hashes differ in at most `radius` bits, and in at most one of part number `band`.

    int64 [m, 3]: the row that comes later in order, the other, the bits. Of rows with equal hashes only the first in
    order is compared with others; the rest are paired with it. A row is compared with `most` others for each bit.
    """
    if not len(rows):
        return np.zeros((0, 3), np.int64)
    hashes = rows[:, HASH].view(np.uint64)
    order = np.lexsort((rows[:, ORDER], *hashes.T))
    hashes = hashes[order]
    is_new = np.r_[True, (hashes[1:] != hashes[:-1]).any(1)]
    first, twins = order[is_new], np.flatnonzero(~is_new)
    found = [np.column_stack([order[twins], first[np.cumsum(is_new)[twins] - 1], np.zeros(len(twins), np.int64)])]
    hashes = hashes[is_new]
    parts = np.ascontiguousarray(hashes).view(np.uint16)[:, band]
    for bit in range(BITS // BANDS):
        # Those that agree in all bits of the part but this one lie together.
        mask = np.uint16(1 << bit)
        together = np.argsort(parts & ~mask, kind="stable")
        words, mine = hashes[together], parts[together]
        ends = np.searchsorted(mine & ~mask, mine & ~mask, side="right")
        left = np.arange(len(words))
        for offset in range(1, most + 1):
            left = left[left + offset < ends[left]]
            if not len(left):
                break
            apart = mine[left] ^ mine[left + offset]
            bits = np.bitwise_count(words[left] ^ words[left + offset]).sum(1)
            near = np.flatnonzero((bits <= radius) & ((apart == mask) | (bit == 0)))  # once, if the part is the same
            one, other = first[together[left[near]]], first[together[left[near] + offset]]
            found.append(np.column_stack([one, other, bits[near]]))
    pairs = np.concatenate(found).astype(np.int64)
    early = rows[pairs[:, 0], ORDER] < rows[pairs[:, 1], ORDER]
    pairs[early, :2] = pairs[early, 1::-1]
    return pairs


def hash_words(hashes: np.ndarray) -> np.ndarray:
    """uint8 [n, BITS / 8] as int64 [n, BITS / 64]."""
    return np.ascontiguousarray(hashes).view(np.int64).reshape(len(hashes), BITS // 64)
