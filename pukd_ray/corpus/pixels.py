"""Encoded bytes to uint8 pixels: the one decoder of positives, corpus, test set and distillation.

Every image goes through the same steps: recognise the signature, decode, reduce to 8 bits, lay
transparency over white, convert to gray or RGB, turn as EXIF says, resize. What cannot be read becomes an
`Unreadable` with one of `REASONS`; nothing else is ever raised because of an image's bytes.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from pukd_ray.config import TeacherConfig

REASONS: tuple[str, ...] = (
    "empty",
    "not_an_image",
    "truncated",
    "corrupt",
    "too_large",
    "unsupported",
    "nonfinite",
    "timeout",
    "duplicate_id",
    "io",
)
"""Why an image has no score; where several fit, the first. The last three are given by the readers."""

MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
"""Largest width * height that is decoded: 89 million pixels, a quarter GiB as RGB, Pillow's own limit."""

DECODING_BYTES = 512 << 20
"""Most memory that decoding an image may take, by what its header says: before any of it is taken."""
MAX_SCANNED = 2_000_000_000
"""Most scans * pixels of a progressive JPEG: each scan goes over all of them, and an empty one has eight bytes."""

IMAGE_EXTENSIONS: frozenset[str] = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"})
    | frozenset({".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs"})
    | frozenset({".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".heic", ".heif", ".hif", ".jxl", ".jxr"})
)
"""Files that folder and tar readers take for images; those no decoder is for end as `unsupported` rows."""

# Pillow's names. Only plain raster decoders: its EPS one, for example, runs Ghostscript.
_DECODED = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
    # Two letters are no signature: the size of the second header must follow, or the file end before it.
    "BMP": rb"BM(?:.{12}[\x0c-\x7c]\x00{3}|.{4}\x00{4}.{0,7}\Z)",
    "PPM": rb"P[1-6f]\s+(?:#[^\r\n]*[\r\n]\s*)*\d",
    "JPEG2000": rb"\xff\x4f\xff\x51|\x00{3}\x0cjP  ",
    "AVIF": rb".{4}ftyp(?:avi[fs]|m(?:if|sf)1.{4}(?:.{4}){0,16}avi[fs])",
}
_NOT_DECODED = {
    "HEIF": rb".{4}ftyp(?:he[iv][a-z]|m(?:if|sf)1)",
    "JXL": rb"\xff\x0a|\x00{3}\x0cJXL ",
    "JXR": rb"II\xbc",
    "SVG": rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][^>]*>\s*)*<svg[\s>]",
    "PSD": rb"8BPS",
    "XCF": rb"gimp xcf",
    "ICO": rb"\x00\x00\x01\x00",
    "ICNS": rb"icns",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "DDS": rb"DDS ",
    "EXR": rb"v/1\x01",
    "HDR": rb"#\?RADIANCE",
    "QOI": rb"qoif",
}
_SIGNATURE = re.compile(
    b"|".join(b"(?P<%s>%s)" % (name.encode(), form) for name, form in (_DECODED | _NOT_DECODED).items()),
    re.DOTALL,
)
_OPTIONAL_CODECS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}

_SAYS_TRUNCATED = re.compile(r"truncated|reached EOF|not enough", re.IGNORECASE)
_SAYS_TOO_LARGE = re.compile(r"decompressed data too large|too much memory", re.IGNORECASE)
_SAYS_UNSUPPORTED = re.compile(r"unsupported|unknown (?:pixel|data)|cannot handle|not yet", re.IGNORECASE)

# Pillow keeps the high byte of 16-bit colour. Read with the opposite byte order, it keeps the low one.
_LOW_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}

# Types 1 to 12 of TIFF: the sizes of all, and the numbers of those that offsets and lengths come in.
_TIFF_TYPES = dict(enumerate("BBHIQBBHIQIQ", 1))
_PHOTOMETRIC = 262
_STRIP_OFFSETS, _STRIP_LENGTHS, _TILE_OFFSETS, _TILE_LENGTHS = 273, 279, 324, 325

# Where Pillow finds the orientation; except a TIFF's, which it applies by itself.
_METADATA = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class PixelSpec:
    """What a network wants: `size` x `size` pixels in 1 (gray) or 3 (RGB) channels.

    `resize`: "crop" brings the short side to `size` and cuts out the centre, as torchvision's `Resize` and
    `CenterCrop` do; "squash" brings both sides to `size`; "pad" brings the long side to `size` and centres
    the image on black. All are bilinear and antialiased.
    """

    size: int
    channels: int
    resize: Literal["crop", "squash", "pad"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.size, self.size


def pixel_spec(teacher: TeacherConfig) -> PixelSpec:
    """The one way from bytes to the teacher's input."""
    return PixelSpec(teacher.input_size, teacher.channels, teacher.resize)


def stack_pixels(pixels: Iterable[bytes | None], spec: PixelSpec) -> np.ndarray:
    """Raw pixels without the nulls -> uint8 [N, C, H, W], writable."""
    joined = b"".join(p for p in pixels if p is not None)
    return np.frombuffer(bytearray(joined), np.uint8).reshape(-1, *spec.shape)


class Unreadable(Exception):  # noqa: N818 - it says what the image is
    """An image that has no pixels for us: `reason` is one of `REASONS`, `detail` one short line."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode(data: bytes | None, spec: PixelSpec) -> np.ndarray:
    """Return the uint8 pixels [channels, size, size] of one encoded image, or raise `Unreadable`."""
    if not data:
        raise Unreadable("empty", "no bytes")
    signature = _SIGNATURE.match(data)
    if signature is None:
        raise Unreadable("not_an_image", "no known image signature")
    kind = str(signature.lastgroup)
    if kind in _NOT_DECODED:
        raise Unreadable("unsupported", f"{kind} image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow: what matters becomes a reason
        try:
            return _pixels(data, kind, spec)
        except Unreadable:
            raise
        except Exception as error:
            raise _unreadable(error, data, kind) from error


def decode_batch(
    images: Sequence[bytes | None], spec: PixelSpec, alive: Callable[[], object] = lambda: None
) -> tuple[list[np.ndarray | None], list[str | None]]:
    """Decode each image: pixels and None, or None and "reason: detail", in the order of `images`.

    `alive()` is called before each.
    """
    pixels: list[np.ndarray | None] = []
    errors: list[str | None] = []
    for data in images:
        alive()
        try:
            pixels.append(decode(data, spec))
            errors.append(None)
        except Unreadable as error:
            pixels.append(None)
            errors.append(str(error))
    return pixels, errors


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels [channels, height, width], gray or RGB, as a PNG made to be written fast.

    Unfiltered rows at zlib's lowest level: for small images several times as fast as Pillow.
    """
    channels, height, width = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each begins with its filter: 0, none
    rows[:, 1:] = pixels.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
        for name, body in chunks
    )


def _pixels(data: bytes, kind: str, spec: PixelSpec) -> np.ndarray:
    opened = _open(data, kind)
    if opened.width * opened.height > MAX_PIXELS:
        raise Unreadable("too_large", f"{kind}: {opened.width} x {opened.height} pixels")
    if kind == "PNG":
        _check_png_data(data)
    whole = opened.width * opened.height
    # A JPEG decodes faster at 1/2, 1/4 or 1/8 of its size, which rounds up: the image may then end inside
    # the last row and column, so its box goes along. Other formats ignore the request.
    draft = opened.draft(None, (2 * spec.size, 2 * spec.size))
    _check_cost(opened, data, kind, whole)
    image = _flatten(_eight_bits(opened, data, kind))
    if spec.channels == 1 and image.mode == "RGB":
        image = image.convert("L")
    box: Box = draft[1] if draft else (0, 0, image.width, image.height)
    image, box = _upright(image, box, _orientation(opened))
    image = _resize(image, box, spec)
    pixels = np.empty(spec.shape, np.uint8)
    # Gray stays one channel up to here; the assignment repeats it where three are wanted.
    pixels[...] = np.frombuffer(image.tobytes(), np.uint8).reshape(spec.size, spec.size, -1).transpose(2, 0, 1)
    return pixels


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=(kind,))


def _check_cost(image: ImageFile.ImageFile, data: bytes, kind: str, whole: int) -> None:
    """Raise where decoding would take too much; `whole` are the pixels of a JPEG that is decoded at a smaller scale."""
    cost = image.width * image.height * _bytes_per_pixel(image, kind)
    if kind == "JPEG" and image.info.get("progressive"):
        cost += 6 * whole  # coefficients of all of it
        if (scans := data.count(b"\xff\xda")) * whole > MAX_SCANNED:
            raise Unreadable("too_large", f"JPEG: {scans:,} scans of {whole:,} pixels")
    if cost > DECODING_BYTES:
        size = f"{image.width} x {image.height} pixels ({image.mode})"
        raise Unreadable("too_large", f"{kind}: {size} take {cost >> 20:,} MiB, more than {DECODING_BYTES >> 20}")


def _bytes_per_pixel(image: ImageFile.ImageFile, kind: str) -> int:
    """Peak memory of decoding, flattening and resizing, measured: from 4 (RGB) to 32 (16-bit RGBA, JPEG 2000)."""
    raw_mode = _raw_mode(image.tile[0]) if image.tile else ""
    if kind in ("WEBP", "JPEG2000", "AVIF") or raw_mode[:-1] in ("RGB;16", "RGBA;16", "LA;16"):
        return 33
    if image.mode in ("RGBA", "RGBa", "LA", "La", "P", "PA", "I", "F", "CMYK", "LAB") or image.mode.startswith("I;"):
        return 12
    return 5


def _check_png_data(data: bytes) -> None:
    """Raise where the checksum of image data is wrong: Pillow checks every chunk but these.

    zlib's own checksum is not enough: damage may fill the rows before the stream has come to it.
    """
    at = 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if name == b"IDAT" and end + 4 <= len(data):
            if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise Unreadable("corrupt", "wrong checksum of PNG image data")
        elif name == b"IEND":
            break
        at = end + 4


def _eight_bits(image: ImageFile.ImageFile, data: bytes, kind: str) -> Image.Image:
    """Load the pixels, dividing 16-bit samples by 257, or raise where their range is not known.

    Colour deeper than 8 bits in JPEG 2000, AVIF, premultiplied or CMYK TIFF is left as Pillow reduces it.
    """
    raw_mode = _raw_mode(image.tile[0]) if image.tile else ""
    if raw_mode == "I;12":
        raise Unreadable("unsupported", "12-bit gray pixels")
    if kind in ("PNG", "TIFF") and raw_mode[:-1] in ("RGB;16", "RGBA;16", "LA;16"):
        return _divide_by_257(_deep_colour(image, data, kind, raw_mode), image.info.get("transparency"))
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):
        values = np.asarray(image).astype(np.uint16)[:, :, None]
        if kind == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
            values = 65535 - values  # 0 is white, which Pillow heeds up to 8 bits
        return _divide_by_257(values, image.info.get("transparency"))
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise Unreadable("nonfinite", "NaN or infinite pixels")
    if image.mode in ("I", "F"):
        raise Unreadable("unsupported", f"{'integer' if image.mode == 'I' else 'float'} pixels of unknown range")
    if kind == "PNG" and image.mode == "L" and data[24] in (2, 4) and "transparency" in image.info:
        # Pillow stretches 2- and 4-bit samples to 0..255, but not the one that stands for transparent.
        image.info["transparency"] *= 255 // (2 ** data[24] - 1)
    return image


def _raw_mode(tile: ImageFile._Tile) -> str:
    """How Pillow would read the samples, such as "RGB;16B"; "" where a decoder has no such choice."""
    name = tile.args[0] if isinstance(tile.args, tuple) else tile.args
    return name if isinstance(name, str) else ""


def _deep_colour(image: ImageFile.ImageFile, data: bytes, kind: str, raw_mode: str) -> np.ndarray:
    """Return the 16-bit samples [height, width, channels] that Pillow would cut to 8 bits."""
    if raw_mode == "LA;16B":  # as wide as four 8-bit samples, so nothing need be decoded twice
        _reread(image, "RGBA")
        return np.asarray(image).view(">u2").astype(np.uint16)
    image.load()
    low = _open(data, kind)
    _reread(low, raw_mode[:-1] + _LOW_BYTE[raw_mode[-1]])
    samples: np.ndarray = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    return samples


def _reread(image: ImageFile.ImageFile, raw_mode: str) -> None:
    """Load with samples taken as `raw_mode`."""
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]
    image.load()


def _divide_by_257(values: np.ndarray, transparent: int | tuple[int, ...] | None) -> Image.Image:
    """Return uint16 [height, width, channels] as 8 bits, 65535 as 255, with alpha 0 where `transparent`."""
    pixels = (values // 257 + (values % 257 > 128)).astype(np.uint8)
    if transparent is not None:
        opaque = (values != np.array(transparent)).any(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, opaque.astype(np.uint8) * 255], axis=2)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image as gray or RGB, transparency over white.

    Before any resizing, which would otherwise mix the hidden colours of transparent pixels into others.
    """
    gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA" if gray else "RGBA")
        white = Image.new("L" if gray else "RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode in ("L", "RGB") else image.convert("L" if gray else "RGB")


def _orientation(image: Image.Image) -> int:
    if _METADATA.isdisjoint(image.info):  # spares looking for it, half as long as decoding a small image
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1  # damaged metadata must not cost the image


def _upright(image: Image.Image, box: Box, orientation: int) -> tuple[Image.Image, Box]:
    """Turn an image and the box of it, which begins at the corner 0, 0, as EXIF says."""
    if orientation not in _TRANSPOSE:
        return image, box
    image = image.transpose(_TRANSPOSE[orientation])
    width, height = (box[3], box[2]) if orientation >= 5 else box[2:]
    left = image.width - width if orientation in (2, 3, 6, 7) else 0
    top = image.height - height if orientation in (3, 4, 7, 8) else 0
    return image, (left, top, left + width, top + height)


def _resize(image: Image.Image, box: Box, spec: PixelSpec) -> Image.Image:
    size, bilinear = spec.size, Image.Resampling.BILINEAR
    if image.size == (size, size):
        return image
    if spec.resize == "squash":
        return image.resize((size, size), bilinear, box)
    width, height = box[2] - box[0], box[3] - box[1]
    if spec.resize == "pad":
        inner_width = max(1, round(size * width / max(width, height)))
        inner_height = max(1, round(size * height / max(width, height)))
        padded = Image.new(image.mode, (size, size))
        inner = image.resize((inner_width, inner_height), bilinear, box)
        padded.paste(inner, ((size - inner_width) // 2, (size - inner_height) // 2))
        return padded
    # To the bit what torchvision's Resize and CenterCrop make of it, half-to-even rounding included.
    whole_width, whole_height = (int(size * side / min(width, height)) for side in (width, height))
    left, top = round((whole_width - size) / 2), round((whole_height - size) / 2)
    if max(whole_width, whole_height) <= 16 * size:
        whole = image.resize((whole_width, whole_height), bilinear, box)
        return whole.crop((left, top, left + size, top + size))
    # The whole of a long strip could take gigabytes, so only its centre is made. Not always, as Pillow
    # rounds between its two passes, and which comes first depends on what is asked for.
    x_step, y_step = width / whole_width, height / whole_height
    x, y = box[0] + left * x_step, box[1] + top * y_step
    return image.resize((size, size), bilinear, (x, y, x + size * x_step, y + size * y_step))


def _unreadable(error: Exception, data: bytes, kind: str) -> Unreadable:
    """Give the reason for what Pillow raised on an image of this kind."""
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return Unreadable("too_large", f"{kind} image larger than memory or {MAX_PIXELS} pixels")
    if kind in _OPTIONAL_CODECS and not features.check(_OPTIONAL_CODECS[kind]):
        return Unreadable("unsupported", f"this Pillow has no {kind} decoder")
    if isinstance(error, UnidentifiedImageError):
        # Image.open keeps the decoder's own words to itself, so ask the decoder.
        try:
            Image.OPEN[kind][0](io.BytesIO(data), "")
        except Exception as own:
            error = own
    detail = f"{kind}: {' '.join(str(error).split()) or type(error).__name__}"[:100]
    if _SAYS_TOO_LARGE.search(detail):
        return Unreadable("too_large", detail)
    if _SAYS_TRUNCATED.search(detail) or _ends_early(data, kind):
        return Unreadable("truncated", detail)
    # Pillow looks a TIFF's compression up in a table of those it knows.
    no_such_compression = kind == "TIFF" and isinstance(error.__cause__, KeyError)
    is_unsupported = no_such_compression or _SAYS_UNSUPPORTED.search(detail)
    return Unreadable("unsupported" if is_unsupported else "corrupt", detail)


def _ends_early(data: bytes, kind: str) -> bool:
    """Whether an undecodable file lacks its end: what a format closes with, or the length it announces."""
    match kind:
        case "JPEG":  # an end-of-image marker after the last scan began; a thumbnail has one of its own
            return data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda")
        case "PNG":
            return b"IEND\xae\x42\x60\x82" not in data
        case "GIF":
            return not data.endswith(b";")
        case "WEBP":
            return len(data) < 8 + int.from_bytes(data[4:8], "little")
        case "BMP":
            return len(data) < int.from_bytes(data[2:6], "little")
        case "TIFF":
            return _tiff_ends_early(data)
        case "JPEG2000":
            return not data.endswith(b"\xff\xd9")
        case "AVIF":
            return _boxes_end_early(data)
    return False


def _tiff_ends_early(data: bytes) -> bool:
    """Whether the first directory, a value it points at, or a strip or tile, lies beyond the end."""
    if b"+" in data[2:4]:  # BigTIFF has another layout
        return False
    order = "<" if data.startswith(b"II") else ">"
    values: dict[int, tuple[int, ...]] = {}
    try:
        (directory,) = struct.unpack_from(order + "I", data, 4)
        (entries,) = struct.unpack_from(order + "H", data, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", data, entry)
            form = f"{order}{count}{_TIFF_TYPES.get(kind, 'x')}"
            is_inline = struct.calcsize(form) <= 4
            place = entry + 8 if is_inline else struct.unpack_from(order + "I", data, entry + 8)[0]
            values[tag] = struct.unpack_from(form, data, place)
    except struct.error:  # reading beyond the end
        return True
    offsets = values.get(_STRIP_OFFSETS) or values.get(_TILE_OFFSETS, ())
    lengths = values.get(_STRIP_LENGTHS) or values.get(_TILE_LENGTHS, ())
    return any(offset + length > len(data) for offset, length in zip(offsets, lengths, strict=False))


def _boxes_end_early(data: bytes) -> bool:
    """Whether a box of an ISO media file is longer than what is there, or the one with the data missing."""
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if length < 8:  # 0: up to the end of the file; 1: a 64-bit length, of use from 4 GiB on
            return False
        at += length
    return at != len(data) or b"mdat" not in data
