"""Several views of each positive: P is small, and its views teach the selector what does not matter."""

from __future__ import annotations

import numpy as np

MAX_SHIFT = 1 / 32  # of the side


def random_views(pixels: np.ndarray, kind: str, count: int, seeds: np.ndarray) -> np.ndarray:
    """Views uint8 [n, count, C, H, W] of pixels [n, C, H, W]; the first is the image itself.

    `kind` is `crop_flip` (small shifts and horizontal flips), `crop` or `none`. What a shift uncovers repeats the
    edge: a black border would mark P, and the selector would learn to look for it. `seeds` [n] make each image's
    views its own, whatever batch it comes in.
    """
    if kind == "none" or count == 1:
        return pixels[:, None]
    side = pixels.shape[-1]
    reach = max(1, round(side * MAX_SHIFT))
    views = np.empty((len(pixels), count, *pixels.shape[1:]), np.uint8)
    along = np.arange(side)
    for image, seed, out in zip(pixels, seeds, views, strict=True):
        rng = np.random.default_rng(int(seed) & (2**63 - 1))
        shifts = rng.integers(-reach, reach + 1, (count, 2))
        flips = rng.random(count) < 0.5
        out[0] = image
        for v in range(1, count):
            rows, columns = (np.clip(along + s, 0, side - 1) for s in shifts[v])
            if kind == "crop_flip" and flips[v]:
                columns = columns[::-1]
            out[v] = image[:, rows[:, None], columns]
    return views
