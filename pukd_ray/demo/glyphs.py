"""Synthetic images that belong to no class: rendered glyphs and textures, as PNG bytes.

Every image has its own random stream, keyed by (seed, number): image 17 is the same whatever the count.
"""

import functools
import io
import math
import string

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.ascii_letters + string.digits + "!#$%&*+/<=>?@[]{}~"
TEXTURES = ("noise", "stripes", "checks", "blobs")
OVERSAMPLING = 4  # drawn this much larger, then averaged down: smooth edges, offsets of a fraction of a pixel

_GLYPH_STREAM, _TEXTURE_STREAM = 0, 1  # so that both use a seed independently
_BLACK, _WHITE = 0, 255


def render_glyphs(count: int, *, seed: int, size: int = 28, distort: float = 0.0) -> list[bytes]:
    """`count` random letters, digits and symbols, white on black, varied in size, place and rotation.

    `distort` from 0 (clean) to 1 (barely legible) adds shear, waves and noise.
    """
    streams = (np.random.default_rng((seed, _GLYPH_STREAM, number)) for number in range(count))
    return [encode_small_png(_glyph(rng, size, distort)) for rng in streams]


def render_textures(count: int, *, seed: int, size: int = 28) -> list[bytes]:
    """`count` random gray textures, the four kinds in turn: noise, stripes, checks, blobs."""
    images = []
    for number in range(count):
        rng = np.random.default_rng((seed, _TEXTURE_STREAM, number))
        images.append(encode_small_png(_texture(rng, size, TEXTURES[number % len(TEXTURES)])))
    return images


def encode_small_png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels, gray [height, width] or RGB [3, height, width], as the smallest PNG that Pillow makes of them."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _glyph(rng: np.random.Generator, size: int, distort: float) -> NDArray[np.uint8]:
    character = CHARACTERS[rng.integers(len(CHARACTERS))]
    angle = math.radians(rng.uniform(-15, 15))
    fill = rng.uniform(0.5, 0.95)  # the glyph's longer side, as a share of the image's
    place = rng.uniform(size=2)  # 0: at the left or upper edge, 1: at the right or lower one
    shear = distort * rng.uniform(-0.8, 0.8)

    side = size * OVERSAMPLING
    tile = _tile(character, side, angle, shear)
    ratio = fill * side / max(tile.size)
    tile = tile.resize((max(1, round(tile.width * ratio)), max(1, round(tile.height * ratio))))
    canvas = Image.new("L", (side, side), _BLACK)
    canvas.paste(tile, (round(place[0] * (side - tile.width)), round(place[1] * (side - tile.height))))

    pixels = np.asarray(canvas)
    if distort > 0:
        pixels = _waves(pixels, rng, amplitude=0.1 * distort * side)
    averaged = pixels.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(1, 3))
    return _to_uint8(averaged + rng.normal(scale=60 * distort, size=averaged.shape))


def _tile(character: str, side: int, angle: float, shear: float) -> Image.Image:
    """The sheared, then rotated character, about `side` high, cropped to its ink."""
    image = Image.new("L", (2 * side, 2 * side), _BLACK)  # room for every rotation and shear
    ImageDraw.Draw(image).text((side, side), character, fill=_WHITE, font=_font(side), anchor="mm")
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, c, d = cos - shear * sin, sin + shear * cos, -sin, cos  # from output to input, around the middle
    matrix = (a, b, side * (1 - a - b), c, d, side * (1 - c - d))
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return image.crop(image.getbbox())


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own TrueType font, the same on every machine."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("glyphs need a Pillow with FreeType; the wheels from PyPI have it")
    return font


def _waves(pixels: NDArray[np.uint8], rng: np.random.Generator, amplitude: float) -> NDArray[np.uint8]:
    """Shift rows, then columns, along sine waves of one to two periods; what leaves the image is lost."""
    side = len(pixels)
    along = np.arange(side)
    for _ in range(2):
        periods, phase = rng.uniform(1, 2), rng.uniform(0, 2 * math.pi)
        shift = np.rint(amplitude * np.sin(2 * math.pi * periods * along / side + phase)).astype(np.int64)
        source = along[None, :] + shift[:, None]
        inside = (source >= 0) & (source < side)
        shifted = np.take_along_axis(pixels, source.clip(0, side - 1), axis=1)
        pixels = np.where(inside, shifted, np.uint8(_BLACK)).T
    return pixels


def _texture(rng: np.random.Generator, size: int, kind: str) -> NDArray[np.uint8]:
    low, high = rng.uniform(0, 100), rng.uniform(120, 255)
    y, x = np.mgrid[0:size, 0:size] / size
    angle = rng.uniform(0, math.pi)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    frequency, phase = rng.uniform(2, 7), rng.uniform(0, 2 * math.pi, size=2)
    waves = np.sin(2 * math.pi * frequency * np.stack([u, v]) + phase[:, None, None])
    if kind == "noise":
        grain = int(rng.integers(1, 5))
        cells = rng.uniform(size=(-(-size // grain),) * 2)
        level = np.kron(cells, np.ones((grain, grain)))[:size, :size]
    elif kind == "stripes":
        level = np.clip(0.5 + rng.uniform(0.5, 3) * waves[0], 0, 1)  # from soft to hard edges
    elif kind == "checks":
        level = (np.sign(waves).prod(axis=0) + 1) / 2
    elif kind == "blobs":
        centres, radii = rng.uniform(size=(2, 6)), rng.uniform(0.05, 0.2, size=6)
        squared = (x[..., None] - centres[0]) ** 2 + (y[..., None] - centres[1]) ** 2
        level = np.exp(-squared / (2 * radii**2)).max(axis=-1)
    else:
        raise ValueError(f"unknown texture {kind!r}; known: {', '.join(TEXTURES)}")
    return _to_uint8(low + (high - low) * level)


def _to_uint8(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    rounded: NDArray[np.floating] = np.rint(values)
    return rounded.clip(_BLACK, _WHITE).astype(np.uint8)
