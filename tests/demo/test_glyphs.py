"""Rendered glyphs and textures: reproducible, distinct, and what their names say."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pukd_ray.demo import glyphs
from pukd_ray.demo.glyphs import CHARACTERS, TEXTURES, render_glyphs, render_textures

pytestmark = pytest.mark.timeout(60)


def pixels(png: bytes) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


@pytest.mark.parametrize("distort", [0.0, 0.7])
def test_a_glyph_depends_on_seed_and_number_only(distort: float) -> None:
    images = render_glyphs(30, seed=3, distort=distort)
    assert render_glyphs(12, seed=3, distort=distort) == images[:12]
    assert len(set(images) | set(render_glyphs(30, seed=4, distort=distort))) == 60


def test_a_texture_depends_on_seed_and_number_only() -> None:
    images = render_textures(24, seed=3)
    assert render_textures(9, seed=3) == images[:9]
    assert len(set(images) | set(render_textures(24, seed=4))) == 48


@pytest.mark.parametrize("size", [12, 28, 32])
def test_size(size: int) -> None:
    images = render_glyphs(4, seed=0, size=size) + render_textures(4, seed=0, size=size)
    images += render_glyphs(4, seed=0, size=size, distort=1.0)
    assert {pixels(png).shape for png in images} == {(size, size)}


def test_glyphs_are_white_on_black_and_fill_a_good_part_of_the_image() -> None:
    for png in render_glyphs(200, seed=0):
        image = pixels(png)
        rows, columns = np.nonzero(image > 64)
        assert image.max() > 200
        assert (image == 0).mean() > 0.4
        assert 12 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 28  # 0.5 to 0.95 of 28, less the soft edge


def test_glyphs_vary_in_place() -> None:
    """Every border of the image is reached by some, so place says nothing about what is shown."""
    brightest = np.max([pixels(png) for png in render_glyphs(200, seed=0)], axis=0)
    assert min(brightest[edge].max() for edge in (0, -1)) > 128
    assert min(brightest[:, edge].max() for edge in (0, -1)) > 128


def test_pillows_font_has_every_character() -> None:
    missing = glyphs._font(40).getmask("\U0010ffff").getbbox(), bytes(glyphs._font(40).getmask("\U0010ffff"))
    drawn = {bytes(glyphs._font(40).getmask(character)) for character in CHARACTERS}
    assert missing[1] not in drawn
    assert len(drawn) == len(CHARACTERS)


def test_distortion_grows_with_its_strength() -> None:
    clean, slight, strong = (
        np.stack([pixels(png) for png in render_glyphs(50, seed=0, distort=distort)]).astype(float)
        for distort in (0.0, 0.2, 1.0)
    )
    changed = np.abs(slight - clean).mean(), np.abs(strong - clean).mean()
    assert 2 < changed[0] < changed[1] / 2


def test_textures_come_in_turn_and_fill_the_image() -> None:
    images = [pixels(png) for png in render_textures(40, seed=0)]
    levels = {kind: [len(np.unique(image)) for image in images[at::4]] for at, kind in enumerate(TEXTURES)}
    assert set(levels["checks"]) == {2}
    assert min(levels["noise"]) > 20
    assert all(np.ptp(image) > 15 for image in images)


def test_an_unknown_texture_is_named() -> None:
    with pytest.raises(ValueError, match="unknown texture 'plaid'; known: noise, stripes, checks, blobs"):
        glyphs._texture(np.random.default_rng(0), 28, "plaid")
