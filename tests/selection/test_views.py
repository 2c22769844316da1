"""Views of positives."""

import numpy as np
import pytest

from pukd_ray.selection.views import random_views

PIXELS = np.random.default_rng(0).integers(1, 255, (3, 2, 32, 32), dtype=np.uint8)
SEEDS = np.array([5, -6, 2**62])


def test_the_first_view_is_the_image_and_others_differ() -> None:
    views = random_views(PIXELS, "crop_flip", 6, SEEDS)
    assert views.shape == (3, 6, 2, 32, 32)
    np.testing.assert_array_equal(views[:, 0], PIXELS)
    assert len({view.tobytes() for view in views[0]}) > 3


def test_an_image_has_the_same_views_in_any_batch() -> None:
    together = random_views(PIXELS, "crop_flip", 4, SEEDS)
    alone = random_views(PIXELS[1:2], "crop_flip", 4, SEEDS[1:2])
    np.testing.assert_array_equal(together[1:2], alone)


def test_shifts_repeat_the_edge_and_crop_does_not_flip() -> None:
    ramp = np.broadcast_to(np.arange(10, 42, dtype=np.uint8), (1, 1, 32, 32)).copy()
    views = random_views(ramp, "crop", 20, np.array([1]))
    assert views.min() == 10  # no black border
    assert (np.diff(views.astype(int), axis=-1) >= 0).all()
    assert any(view[0, 0, 0] != 10 or view[0, 0, -1] != 41 for view in views[0])


@pytest.mark.parametrize(("kind", "count"), [("none", 5), ("crop_flip", 1)])
def test_one_view_only(kind: str, count: int) -> None:
    np.testing.assert_array_equal(random_views(PIXELS, kind, count, SEEDS), PIXELS[:, None])
