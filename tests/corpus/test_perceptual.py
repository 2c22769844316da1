"""The perceptual hash: what it is made of, and what it does not see."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from pukd_ray.corpus.perceptual import BITS, hash_column, perceptual_hashes


def smooth(rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8 [3, size, size]: noise whose amplitude falls with the frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, size, size))) / frequency).real
    return np.clip(128 + 50 * field / field.std(), 0, 255).astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.bitwise_count(one ^ other).sum())


@pytest.mark.parametrize(("size", "channels"), [(32, 3), (28, 1), (96, 3)])
def test_bits_are_the_signs_of_the_lowest_frequencies(size: int, channels: int) -> None:
    pixels = np.stack([smooth(np.random.default_rng(i), size)[:channels] for i in range(70)])
    hashes, has = perceptual_hashes(pixels)
    assert hashes.shape == (70, BITS // 8)
    assert has.all()
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1.0]
    gray = sum(w * pixels[:, c].astype(float) for c, w in enumerate(weights))
    spectrum = dctn(gray, type=2, axes=(1, 2))
    radius = np.hypot(*np.indices((size, size)))
    lowest = np.argsort(radius.ravel(), kind="stable")[1 : BITS + 1]
    ones = (spectrum.reshape(70, -1)[:, lowest] > 0).sum(1)
    assert (np.bitwise_count(hashes).sum(1) == ones).all()
    # Each eighth of the hash has frequencies from low to high: it tells images apart.
    parts = hashes.view(np.uint16)
    assert all(len(np.unique(parts[:, b])) > 60 for b in range(8))


def test_it_sees_neither_brightness_nor_size_and_tells_images_apart() -> None:
    rng = np.random.default_rng(0)
    one, other = smooth(rng, 96), smooth(rng, 96)
    darker = (one * 0.6 + 20).astype(np.uint8)
    small = np.asarray(Image.fromarray(one.transpose(1, 2, 0)).resize((48, 48), Image.Resampling.BOX)).transpose(
        2, 0, 1
    )
    hashes, _ = perceptual_hashes(np.stack([one, other, darker]))
    assert distance(hashes[0], hashes[2]) <= 2
    assert distance(hashes[0], perceptual_hashes(small[None])[0][0]) <= 6
    assert distance(hashes[0], hashes[1]) > 40


def test_flat_images_and_unreadable_rows_have_none() -> None:
    rng = np.random.default_rng(0)
    pixels = np.stack([smooth(rng, 32), np.full((3, 32, 32), 7, np.uint8)])
    hashes, has = perceptual_hashes(pixels)
    assert has.tolist() == [True, False]
    column = hash_column(hashes, has, np.array([False, True, True, False]))
    assert column.to_pylist() == [None, hashes[0].tobytes(), None, None]
    assert perceptual_hashes(np.zeros((0, 3, 32, 32), np.uint8))[0].shape == (0, BITS // 8)


def test_images_of_too_few_pixels_have_none() -> None:
    for size in (8, 11, 12):
        hashes, has = perceptual_hashes(np.stack([smooth(np.random.default_rng(i), size) for i in range(4)]))
        assert hashes.shape == (4, BITS // 8)
        assert has.all() == (size == 12)
