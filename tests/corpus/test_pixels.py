"""Decoding: exact pixels computed by hand or by numpy, and a reason for everything else."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, features
from torchvision.transforms import CenterCrop, Compose, Resize

from pukd_ray.corpus import pixels
from pukd_ray.corpus.pixels import REASONS, PixelSpec, Unreadable, decode, decode_batch, encode_png

RANDOM = np.random.default_rng(7)


def spec(size: int = 8, channels: int = 3, resize: str = "crop") -> PixelSpec:
    return PixelSpec(size, channels, resize)  # type: ignore[arg-type]


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Slow waves, different in each channel: what lossy formats and scaling keep."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(5 * x + 2 * y + phase) + np.cos(4 * y - x + phase) for phase in range(3)]
    return np.uint8(np.round(127.5 + 60 * np.stack(waves, axis=-1)))


def saved(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(rows: np.ndarray, width: int, depth: int, colour_type: int, *extra: bytes) -> bytes:
    """A PNG that Pillow cannot write: `rows` holds the bytes of each row, unfiltered."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def reason(data: bytes | None, wanted: PixelSpec | None = None) -> str:
    with pytest.raises(Unreadable) as caught:
        decode(data, wanted or spec())
    return caught.value.reason


def planes(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1)


def assert_equal(data: bytes, expected: np.ndarray, **options: object) -> None:
    found = decode(data, spec(expected.shape[-1], expected.shape[0], **options))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)


def assert_close(data: bytes, expected: np.ndarray, limit: int, **options: object) -> None:
    found = decode(data, spec(expected.shape[-1], expected.shape[0], **options))  # type: ignore[arg-type]
    assert np.abs(found.astype(int) - expected).max() <= limit


# ---- formats and colours


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG2000", {}),
    ],
)
def test_lossless_formats_exactly(form: str, options: dict[str, object]) -> None:
    colour, gray = noise(8, 8, 3), noise(8, 8)
    assert_equal(saved(colour, form, **options), planes(colour))
    assert_equal(saved(gray, form, **options), gray[None])
    assert_equal(saved(gray, form, **options), np.stack([gray] * 3))


@pytest.mark.parametrize(("form", "limit"), [("JPEG", 12), ("WEBP", 14), ("AVIF", 14)])
def test_lossy_formats_closely(form: str, limit: int) -> None:
    colour = smooth(32, 32)
    assert_close(saved(colour, form, quality=95), planes(colour), limit)


def test_result_is_writable_and_contiguous() -> None:
    for channels in (1, 3):
        for array in (noise(8, 8), noise(20, 30, 3)):
            found = decode(saved(array), spec(channels=channels))
            assert found.dtype == np.uint8
            assert found.shape == (channels, 8, 8)
            assert found.flags.c_contiguous
            assert found.flags.writeable


def test_colour_to_gray_is_itu_r_601_luma() -> None:
    colour = noise(8, 8, 3)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert_close(saved(colour), luma[None], 1)
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert_equal(saved(red), np.full((1, 8, 8), 76))


def test_bilevel() -> None:
    bits = noise(8, 8) > 127
    assert_equal(saved(Image.fromarray(bits)), np.uint8(255 * bits)[None])
    assert_equal(saved(Image.fromarray(bits)), np.uint8(255 * np.stack([bits] * 3)))


def test_palette() -> None:
    index, colours = noise(8, 8) % 50, noise(256, 3)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    for form in ("PNG", "GIF", "BMP", "TIFF"):
        assert_equal(saved(image, form), planes(colours[index]))


def test_cmyk() -> None:
    inks = noise(8, 8, 4)
    image = Image.frombytes("CMYK", (8, 8), inks.tobytes())
    without_black = 255 - inks[..., :3].astype(float)
    expected = planes(without_black * (255 - inks[..., 3:]) / 255)
    assert_close(saved(image, "TIFF"), expected, 1)
    assert_close(saved(image, "TIFF"), 0.299 * expected[:1] + 0.587 * expected[1:2] + 0.114 * expected[2:], 2)
    flat = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # Adobe's JPEGs store CMYK inverted
    assert_close(saved(flat, "JPEG", quality=95), planes(np.full((32, 32, 3), (255, 0, 0))), 3)


def test_lab_tiff() -> None:
    image = Image.new("LAB", (8, 8), (255, 128, 128))
    assert_close(saved(image, "TIFF"), np.full((3, 8, 8), 255), 3)


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    red = np.zeros((3, 8, 8), np.uint8)
    red[0] = 255
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        extra = {"lossless": True} if form == "WEBP" else {}
        assert_equal(saved(frames[0], form, save_all=True, append_images=frames[1:], **extra), red)


def test_multi_picture_jpeg() -> None:
    frames = [Image.new("L", (8, 8), level) for level in (200, 10)]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert_close(data, np.full((1, 8, 8), 200), 1)


# ---- transparency


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None].astype(int)
    return planes(np.uint8(np.floor((colour * weight + 255 * (255 - weight)) / 255 + 0.5)))


def test_alpha_is_laid_over_white() -> None:
    colour, alpha = noise(16, 16, 3), noise(16, 16)
    alpha[0], alpha[1] = 0, 255
    rgba = np.dstack([colour, alpha])
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert_equal(saved(rgba, form, **options), over_white(colour, alpha))
    gray_alpha = np.dstack([colour[..., 0], alpha])
    expected = over_white(colour[..., :1], alpha)
    assert_equal(saved(gray_alpha), expected)
    assert_equal(saved(gray_alpha), np.concatenate([expected] * 3))


def test_alpha_one_pixel_by_hand() -> None:
    data = saved(Image.new("RGBA", (1, 1), (10, 200, 0, 51)))  # a fifth of the colour, four of white
    assert decode(data, spec(1)).ravel().tolist() == [206, 244, 204]
    assert decode(saved(Image.new("LA", (1, 1), (0, 0))), spec(1, 1)).item() == 255


def test_colours_of_transparent_pixels_do_not_bleed_when_resized() -> None:
    rgba = np.full((16, 16, 4), 255, np.uint8)
    rgba[:, ::2] = (255, 0, 0, 0)  # invisible red
    assert_equal(saved(rgba), np.full((3, 8, 8), 255))


def test_palette_transparency() -> None:
    index, colours, alpha = noise(8, 8) % 4, noise(4, 3), np.array([0, 100, 255, 200], np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    expected = over_white(colours[index], alpha[index])
    assert_equal(saved(image, transparency=alpha.tobytes()), expected)
    hole = np.where(index == 2, 0, 255)
    assert_equal(saved(image, transparency=2), over_white(colours[index], hole))
    assert_equal(saved(image, "GIF", transparency=2), over_white(colours[index], hole))


def test_transparent_colour_of_png() -> None:
    gray, colour = noise(8, 8), noise(8, 8, 3)
    gray[2, 3], colour[4, 5] = 77, (1, 2, 3)
    assert_equal(saved(gray, transparency=77), np.where(gray == 77, 255, gray)[None])
    colour_hole = np.where((colour == (1, 2, 3)).all(-1), 0, 255)
    assert_equal(saved(colour, transparency=(1, 2, 3)), over_white(colour, colour_hole))
    # and through the mode Pillow gives the rest:
    bits = noise(8, 8) > 127
    assert_equal(saved(Image.fromarray(bits), transparency=0), np.full((1, 8, 8), 255))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_transparent_gray_of_less_than_8_bits(depth: int) -> None:
    samples = noise(8, 8) % 2**depth
    bits = np.unpackbits(samples[..., None], axis=2)[:, :, 8 - depth :].reshape(8, -1)
    data = png(np.packbits(bits, axis=1), 8, depth, 0, chunk(b"tRNS", struct.pack(">H", 1)))
    expected = np.where(samples == 1, 255, samples * (255 // (2**depth - 1)))
    assert_equal(data, expected[None])


# ---- 16 bits

DEEP = np.concatenate([RANDOM.integers(0, 65536, 248), [0, 0x00FF, 128, 129, 0x0100, 65406, 65407, 65535]])
DEEP = DEEP.astype(np.uint16)
SHALLOW = np.uint8(np.round(DEEP / 257))


def test_deep_values_by_hand() -> None:
    assert SHALLOW[-8:].tolist() == [0, 1, 0, 1, 1, 254, 255, 255]


def test_deep_gray() -> None:
    values, expected = DEEP.reshape(16, 16), SHALLOW.reshape(1, 16, 16)
    little, big = Image.fromarray(values), Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes())
    assert big.mode == "I;16B"
    for data in (
        saved(little),
        saved(little, "TIFF"),
        saved(big, "TIFF"),
        saved(little, "TIFF", compression="tiff_lzw"),
        saved(big, "TIFF", compression="tiff_lzw"),
        saved(little, "PPM"),
        saved(little, "JPEG2000"),
    ):
        assert_equal(data, expected)
        assert_equal(data, np.concatenate([expected] * 3))


def test_gray_tiff_whose_0_is_white() -> None:
    black, white = (struct.pack("<HHIHH", 262, 3, 1, is_black, 0) for is_black in (1, 0))
    for samples in (DEEP, SHALLOW):
        data = saved(Image.fromarray(samples.reshape(16, 16)), "TIFF")
        assert data.count(black) == 1
        assert_equal(data.replace(black, white), 255 - SHALLOW.reshape(1, 16, 16))


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_deep_colour_and_alpha_png(colour_type: int, channels: int) -> None:
    values = RANDOM.permuted(np.tile(DEEP[:, None], channels), axis=0).reshape(16, 16, channels)
    eight = np.uint8(np.round(values / 257))
    data = png(values.astype(">u2").reshape(16, -1), 16, 16, colour_type)
    if colour_type == 2:
        assert_equal(data, planes(eight))
    else:
        expected = over_white(eight[..., :-1], eight[..., -1])
        assert_equal(data, np.broadcast_to(expected, (3, 16, 16)))


def test_deep_filtered_and_interlaced_png() -> None:
    """Row filters work on whole samples, so reading them as bytes must not upset these."""
    values = DEEP.reshape(16, 16)[..., None] + np.arange(3, dtype=np.uint16)
    width = 6  # bytes of one pixel
    rows = values.astype(">u2").view(np.uint8).reshape(16, -1).astype(int)
    left = np.pad(rows, ((0, 0), (width, 0)))[:, :-width]
    sub = np.uint8((rows - left) % 256)
    body = zlib.compress(b"".join(b"\1" + row.tobytes() for row in sub))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert_equal(data, planes(np.uint8(np.round(values / 257))))


def test_deep_transparent_colour_png() -> None:
    gray = DEEP.reshape(16, 16)
    key = chunk(b"tRNS", struct.pack(">H", 0x00FF))
    expected = np.where(gray == 0x00FF, 255, SHALLOW.reshape(16, 16))  # not 0x0100, also 1
    assert_equal(png(gray.astype(">u2"), 16, 16, 0, key), expected[None])
    colour = np.dstack([gray] * 3)
    colour[:, 0, 1] = 0x00FF  # the same in one channel is not the same colour
    hole = np.where((colour == 0x00FF).all(axis=2), 0, 255)
    key = chunk(b"tRNS", struct.pack(">HHH", 0x00FF, 0x00FF, 0x00FF))
    data = png(colour.astype(">u2").reshape(16, -1), 16, 16, 2, key)
    assert_equal(data, over_white(np.uint8(np.round(colour / 257)), hole))


@pytest.mark.parametrize("order", ["<", ">"])
def test_deep_colour_tiff(order: str) -> None:
    values = np.dstack([DEEP.reshape(16, 16)] * 3).astype(order + "u2")
    expected = planes(np.uint8(np.round(values / 257)))
    assert_equal(tiff(values, order), expected)
    deflated = zlib.compress(values.tobytes())
    assert_equal(tiff(values, order, compression=8, strip=deflated), expected)


def tiff(
    values: np.ndarray,
    order: str,
    bits: int = 16,
    photometric: int = 2,
    compression: int = 1,
    strip: bytes | None = None,
) -> bytes:
    """A TIFF of one strip, which follows its directory."""
    height, width, channels = values.shape
    strip = values.tobytes() if strip is None else strip
    start = 8 + 2 + 12 * 8 + 4
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, bits if channels == 1 else start),
        (259, 3, 1, compression),
        (262, 3, 1, photometric),
        (273, 4, 1, start + 2 * channels),
        (277, 3, 1, channels),
        (279, 4, 1, len(strip)),
    ]
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(entries))
    for tag, kind, count, value in entries:
        form = "HH" if kind == 3 and count == 1 else "I"
        head += struct.pack(f"{order}HHI{form}", tag, kind, count, value, *[0] * (len(form) - 1))
    return head + bytes(4) + struct.pack(f"{order}{channels}H", *[bits] * channels) + strip


# ---- orientation

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_orientation(orientation: int, form: str, options: dict[str, object]) -> None:
    stored = noise(8, 8, 3)
    data = saved(stored, form, exif=exif(orientation), **options)
    assert_equal(data, planes(TURNS[orientation](stored)))
    # Turned first: a resized image is that of the upright file, to the bit.
    stored = noise(21, 50, 3)
    data = saved(stored, form, exif=exif(orientation), **options)
    upright = saved(np.ascontiguousarray(TURNS[orientation](stored)))
    for resize in ("crop", "squash", "pad"):
        assert_equal(data, decode(upright, spec(8, 3, resize)), resize=resize)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(("form", "limit"), [("JPEG", 12), ("AVIF", 12)])
def test_orientation_of_lossy_formats(orientation: int, form: str, limit: int) -> None:
    stored = smooth(24, 24)
    data = saved(stored, form, quality=95, exif=exif(orientation))
    assert_close(data, planes(TURNS[orientation](stored)), limit)


def test_orientation_from_xmp() -> None:
    stored = smooth(24, 24)
    data = saved(stored, "JPEG", quality=95, xmp=b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>')
    assert_close(data, planes(np.rot90(stored, -1)), 12)


def test_orientation_of_deep_png() -> None:
    stored = np.dstack([DEEP.reshape(16, 16)] * 3)
    extra = chunk(b"eXIf", exif(6).tobytes()[6:])
    data = png(stored.astype(">u2").reshape(16, -1), 16, 16, 2, extra)
    assert_equal(data, planes(np.rot90(np.uint8(np.round(stored / 257)), -1)))


def test_damaged_exif_leaves_the_image_as_stored() -> None:
    stored = noise(8, 8, 3)
    for tags in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", exif(9).tobytes()):
        assert_equal(saved(stored, exif=tags), planes(stored))
        assert_equal(saved(stored, "WEBP", lossless=True, exif=tags), planes(stored))


# ---- geometry


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (33, 32), (32, 35), (100, 77), (77, 101), (20, 300), (9, 11)])
def test_crop_is_torchvisions_to_the_bit(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape, 3))
    expected = np.asarray(Compose([Resize(32), CenterCrop(32)])(image))
    assert_equal(saved(image), planes(expected))


def test_crop_cuts_the_centre() -> None:
    columns = np.tile(np.arange(13, dtype=np.uint8), (8, 1))
    assert decode(saved(columns), spec(8, 1))[0, 0].tolist() == list(range(2, 10))  # (13 - 8) / 2 to even
    assert decode(saved(columns.T.copy()), spec(8, 1))[0, :, 0].tolist() == list(range(2, 10))


def test_squash_is_antialiased() -> None:
    stripes = np.zeros((8, 64), np.uint8)
    stripes[:, 1::2] = 255
    assert np.abs(decode(saved(stripes), spec(8, 1, "squash")).astype(int) - 127.5).max() < 5
    halves = np.zeros((4, 64), np.uint8)
    halves[:, 32:] = 200
    found = decode(saved(halves), spec(8, 1, "squash"))[0]
    assert (found[:, :3] == 0).all()
    assert (found[:, 5:] == 200).all()


def test_pad_centres_on_black() -> None:
    found = decode(saved(np.full((16, 32), 200, np.uint8)), spec(8, 1, "pad"))[0]
    np.testing.assert_array_equal(found, np.repeat([0, 0, 200, 200, 200, 200, 0, 0], 8).reshape(8, 8))
    tall = noise(8, 5, 3)
    assert_equal(saved(tall), planes(np.pad(tall, ((0, 0), (1, 2), (0, 0)))), resize="pad")


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_image_of_the_right_size_is_untouched(resize: str) -> None:
    array = noise(8, 8, 3)
    assert_equal(saved(array), planes(array), resize=resize)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (2, 999), (1, 60000)])
def test_extreme_shapes(shape: tuple[int, int], resize: str) -> None:
    found = decode(saved(np.full(shape, 90, np.uint8)), spec(8, 1, resize))
    values = set(found.ravel().tolist())
    assert values == ({0, 90} if resize == "pad" and shape != (1, 1) else {90})


def test_crop_of_a_long_strip_is_its_centre() -> None:
    strip = np.repeat(np.arange(200, dtype=np.uint8), 5)[None]
    for array in (strip, strip.T.copy()):
        assert set(decode(saved(array), spec(4, 1)).ravel().tolist()) <= {99, 100}
    taller = np.repeat(noise(8, 200), 1, axis=0)  # at its size already: exactly the middle
    np.testing.assert_array_equal(decode(saved(taller), spec(8, 1))[0], taller[:, 96:104])


# ---- JPEG at reduced scale


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    sizes: list[tuple[int, int]] = []
    flatten = pixels._flatten

    def spy(image: Image.Image) -> Image.Image:
        sizes.append(image.size)
        return flatten(image)

    monkeypatch.setattr(pixels, "_flatten", spy)
    return sizes


@pytest.mark.parametrize(
    ("width", "height", "decoded"),
    [
        (63, 64, (63, 64)),
        (64, 64, (32, 32)),
        (65, 90, (33, 45)),
        (64, 1000, (32, 500)),
        (250, 255, (63, 64)),
        (515, 513, (65, 65)),
        (5000, 250, (1250, 63)),
    ],
)
def test_jpeg_is_decoded_at_no_less_than_twice_the_target(
    width: int, height: int, decoded: tuple[int, int], decoded_sizes: list[tuple[int, int]]
) -> None:
    decode(saved(smooth(height, width), "JPEG"), spec(16))
    assert decoded_sizes == [decoded]
    assert width < 32 or height < 32 or min(decoded) >= 32


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(("height", "width"), [(129, 257), (1000, 513), (515, 516)])
def test_reduced_jpeg_keeps_the_geometry(height: int, width: int, orientation: int, resize: str) -> None:
    """A steep ramp tells a shift of a tenth of a pixel: one target pixel is 16 levels."""
    y, x = np.mgrid[:height, :width]
    ramp = np.uint8(np.round(16 * (x * 8 / width + y * 8 / height)))
    data = saved(np.dstack([ramp] * 3), "JPEG", quality=100, subsampling=0, exif=exif(orientation))
    full = saved(np.ascontiguousarray(TURNS[orientation](np.dstack([ramp] * 3))))
    inside = (slice(None), slice(1, -1), slice(1, -1))  # edges see the last, partly filled block
    found, expected = (decode(d, spec(8, 3, resize)).astype(int) for d in (data, full))
    assert np.abs(found - expected)[inside].max() <= 2


# ---- reasons


def test_reasons() -> None:
    in_order = "empty not_an_image truncated corrupt too_large unsupported nonfinite timeout duplicate_id io"
    assert " ".join(REASONS) == in_order


@pytest.mark.parametrize("data", [None, b""])
def test_empty(data: bytes | None) -> None:
    assert reason(data) == "empty"


@pytest.mark.parametrize(
    "data",
    [
        *(b"hello", b"\0", b"\0" * 100, b"<html><body>404</body></html>", b"%PDF-1.7", b'{"error": 1}'),
        *(
            b"BMW and Audi are cars.",
            b"P2 is a PlayStation",
            b"RIFF\x10\0\0\0WAVEfmt ",
            b"II am a text",
            b"GIF",
        ),
    ],
)
def test_not_an_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"


@pytest.mark.parametrize(
    "data",
    [
        *(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", b"\xff\x0a\xfa\x7f"),
        *(b"\0\0\0\x0cJXL \r\n\x87\n", b"<svg xmlns='x'/>", b"8BPS\0\1", b"%!PS-Adobe-3.0 EPSF-3.0"),
        b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="8"></svg>',
        saved(Image.new("RGB", (8, 8)), "ICO"),
        saved(Image.new("RGB", (8, 8)), "EPS"),
        saved(Image.new("RGB", (8, 8)), "DDS"),
        saved(Image.new("RGB", (8, 8)), "QOI"),
        saved(Image.fromarray(noise(8, 8).astype(np.int32)), "TIFF"),
        saved(Image.fromarray(noise(8, 8).astype(np.float32)), "TIFF"),
        saved(Image.fromarray(noise(8, 8).astype(np.float32)), "PPM"),
        saved(noise(8, 8), "BMP")[:30] + b"\7" + saved(noise(8, 8), "BMP")[31:],  # an unheard-of compression
        tiff(noise(8, 8, 1), "<", bits=12, photometric=1, strip=bytes(96)),
        tiff(noise(8, 8, 1), "<", bits=8, photometric=9999),
        tiff(noise(8, 8, 1), "<", bits=8, photometric=1, compression=34712),  # JPEG 2000 within
    ],
)
def test_unsupported(data: bytes) -> None:
    assert reason(data) == "unsupported"


def test_a_format_this_pillow_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(noise(8, 8, 3), "WEBP")
    monkeypatch.setattr("PIL.WebPImagePlugin.SUPPORTED", False)
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    assert decode_batch([data], spec())[1] == ["unsupported: this Pillow has no WEBP decoder"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite(bad: float) -> None:
    values = noise(8, 8).astype(np.float32)
    values[3, 4] = bad
    assert reason(saved(Image.fromarray(values), "TIFF")) == "nonfinite"


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(png(np.zeros((1, 1), np.uint8), 2**31 - 1, 8, 0)) == "too_large"  # Pillow's own limit
    assert reason(png(np.zeros((1, 1), np.uint8), pixels.MAX_PIXELS + 1, 8, 0)) == "too_large"
    monkeypatch.setattr(pixels, "MAX_PIXELS", 8 * 9)
    assert decode(saved(noise(8, 9)), spec()).shape == (3, 8, 8)
    assert reason(saved(noise(8, 10))) == "too_large"
    assert reason(saved(noise(73, 1))) == "too_large"


def test_what_decoding_would_take_is_known_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """536 kB of PNG may be 89 megapixels; at 16 bits of RGBA they take 2.8 GB."""

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for depth, color, side in ((16, 6, 4100), (16, 2, 4100), (8, 6, 6700), (8, 3, 6700)):
        assert reason(png(np.zeros((side, 1), np.uint8), side, depth, color)) == "too_large"
    for image, kind in ((Image.new("RGBA", (4200, 4200)), "WEBP"), (Image.new("RGB", (4200, 4200)), "JPEG2000")):
        assert reason(saved(image, kind)) == "too_large"
    monkeypatch.undo()
    jpeg = saved(Image.new("RGB", (4200, 4200)), "JPEG")  # decoded at an eighth
    assert decode(jpeg, spec()).shape == (3, 8, 8)


def test_a_jpeg_of_a_thousand_scans() -> None:
    good = saved(Image.new("L", (1600, 1600)), "JPEG", progressive=True)
    assert decode(good, spec()).shape == (3, 8, 8)
    last = good.rindex(b"\xff\xda")
    scan = good[last:-2]
    assert reason(good[:-2] + scan * 1000 + good[-2:]) == "too_large"


def test_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", fail)
    assert reason(saved(noise(9, 9))) == "too_large"


def test_text_that_unpacks_to_gigabytes() -> None:
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10_000_000)))
    assert reason(png(noise(8, 8), 8, 8, 0, bomb)) == "too_large"


def test_corrupt_png() -> None:
    good = saved(noise(8, 8, 3))
    for at in (good.index(b"IDAT") + 4, good.index(b"IEND") - 9, good.index(b"IHDR") + 15, len(good) - 40):
        assert reason(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]) == "corrupt"
    assert reason(b"\x89PNG\n" + good[6:]) == "corrupt"  # through a text-mode transfer
    assert reason(png(np.zeros((1, 0), np.uint8), 0, 8, 0)) == "corrupt"  # no pixels at all
    broken_stream = (
        good.replace(good[good.index(b"IDAT") :], b"")[:-4] + chunk(b"IDAT", b"nonsense") + chunk(b"IEND", b"")
    )
    assert reason(broken_stream) == "corrupt"


def test_wrong_bits_anywhere_in_png_data_is_seen() -> None:
    """Some make the data look longer than the image, and Pillow then never gets to zlib's checksum."""
    good = saved(smooth(16, 16))
    start, end = good.index(b"IDAT") + 4, good.index(b"IEND") - 8
    damaged = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(start, end)]
    _, errors = decode_batch(damaged, spec())
    assert {str(error).split(":")[0] for error in errors} == {"corrupt"}


def test_corrupt_others() -> None:
    jpeg = saved(smooth(16, 16), "JPEG")
    start = jpeg.index(b"\xff\xc0")
    assert reason(jpeg[:start] + b"\xff\xc0\0\4" + jpeg[start + 4 :]) == "corrupt"
    webp = saved(noise(8, 8, 3), "WEBP")
    assert reason(webp[:16] + bytes(len(webp) - 16)) == "corrupt"
    gif = saved(noise(8, 8), "GIF")
    start = gif.index(b",\0\0\0\0\x08\0\x08\0") + 10
    assert reason(gif[:start] + b"\x63" + gif[start + 1 :]) == "corrupt"  # codes of 99 bits
    big_tiff = b"II+\0\x08\0\0\0" + struct.pack("<Q", 40_000) + bytes(50_000)  # an empty directory
    assert reason(big_tiff) == "corrupt"
    avif = saved(smooth(16, 16), "AVIF")
    at = avif.index(b"mdat") + 4
    assert reason(avif[:at] + bytes(len(avif) - at)) == "corrupt"


WHOLE = {
    "PNG": saved(smooth(9, 10)),
    "deep PNG": png(np.dstack([DEEP.reshape(16, 16)] * 3).astype(">u2").reshape(16, -1), 16, 16, 2),
    "JPEG": saved(smooth(20, 23), "JPEG"),
    "progressive JPEG": saved(smooth(20, 23), "JPEG", progressive=True),
    "GIF": saved(smooth(9, 10), "GIF"),
    "WEBP": saved(smooth(20, 23), "WEBP"),
    "lossless WEBP": saved(smooth(9, 10), "WEBP", lossless=True),
    "BMP": saved(smooth(9, 10), "BMP"),
    "TIFF": saved(smooth(9, 10), "TIFF"),
    "LZW TIFF": saved(smooth(9, 10), "TIFF", compression="tiff_lzw"),
    "deep TIFF": tiff(np.dstack([DEEP.reshape(16, 16)] * 3), "<"),
    "deep deflated TIFF": tiff(DEEP.reshape(16, 16, 1), "<", photometric=1, compression=8, strip=zlib.compress(DEEP)),
    "PPM": saved(smooth(9, 10), "PPM"),
    "JPEG2000": saved(smooth(20, 23), "JPEG2000"),
    "AVIF": saved(smooth(20, 23), "AVIF"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_truncated_at_every_length(name: str) -> None:
    data = WHOLE[name]
    shortest = 26 if name == "BMP" else 16  # a shorter beginning of some formats is no signature yet
    reasons = {}
    for length in range(len(data)):
        _, (error,) = decode_batch([data[:length]], spec(8))
        if error:
            reasons[length] = error.split(":")[0]
    assert reasons[0] == "empty"
    assert set(reasons.values()) <= {"empty", "not_an_image", "truncated"}
    first = 9 if "PNG" in name or "JPEG" in name else shortest
    assert {reasons[length] for length in reasons if length >= first} == {"truncated"}
    if name != "JPEG2000":  # whose parts are whole images of less detail
        whole = decode(data, spec(8))
        for length in set(range(len(data))) - set(reasons):
            np.testing.assert_array_equal(decode(data[:length], spec(8)), whole)


@pytest.mark.parametrize("name", WHOLE)
def test_random_damage_gives_pixels_or_a_reason(name: str) -> None:
    random = np.random.default_rng(len(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            data = bytearray(WHOLE[name])
            for at in random.integers(0, len(data), random.integers(1, 4)):
                data[at] = random.integers(0, 256)
            (found,), (error,) = decode_batch([bytes(data)], spec(8))
            assert (found is None) != (error is None)
            if error:
                assert error.split(":")[0] in REASONS[1:7]
                assert "\n" not in error
                assert " at 0x" not in error
                assert len(error) <= 120


def test_unreadable_is_plain_text_and_pickles() -> None:
    error = pickle.loads(pickle.dumps(Unreadable("corrupt", "broken")))
    assert str(error) == "corrupt: broken"
    assert (error.reason, error.detail) == ("corrupt", "broken")


def test_warnings_do_not_leak(recwarn: pytest.WarningsRecorder) -> None:
    good = png(noise(8, 8), 8, 8, 0, chunk(b"tRNS", struct.pack(">H", 3)))
    decode_batch([good, WHOLE["TIFF"][:130], b"\x89PNG"], spec())
    large = png(np.zeros((1, 1), np.uint8), pixels.MAX_PIXELS + 1, 8, 0)
    decode_batch([large], spec())
    assert not recwarn.list


def test_batch() -> None:
    first, last = noise(8, 8, 3), noise(8, 8, 3)
    images, errors = decode_batch([saved(first), None, b"text", saved(last)], spec())
    assert errors == [None, "empty: no bytes", "not_an_image: no known image signature", None]
    assert images[1] is images[2] is None
    np.testing.assert_array_equal(images[0], planes(first))
    np.testing.assert_array_equal(images[3], planes(last))
    assert decode_batch([], spec()) == ([], [])


# ---- the rest


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 3, 5), (3, 7, 2), (1, 1, 1)])
def test_encode_png(shape: tuple[int, int, int]) -> None:
    array = noise(*shape)
    image = Image.open(io.BytesIO(encode_png(array)))
    image.verify()
    image = Image.open(io.BytesIO(encode_png(array)))
    assert image.mode == ("L" if shape[0] == 1 else "RGB")
    np.testing.assert_array_equal(np.asarray(image).reshape(*shape[1:], -1), array.transpose(1, 2, 0))
    if shape[1] == shape[2]:
        assert_equal(encode_png(array), array)


def test_extensions_are_lower_case_with_a_dot() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".heic"} <= pixels.IMAGE_EXTENSIONS
    assert all(extension == "." + extension.strip(".").lower() for extension in pixels.IMAGE_EXTENSIONS)


def test_import_needs_no_torch() -> None:
    code = "import sys, pukd_ray.corpus.pixels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
