"""How well near-copies are told from other images, and how fast: by copies of given images, and all their pairs."""

import argparse
import io
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance, ImageOps

from pukd_ray.cli import at_least, parse_flags
from pukd_ray.config import ConfigError
from pukd_ray.corpus.perceptual import BANDS, BITS, RADIUS, hash_words, pairs_within, perceptual_hashes
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS, PixelSpec, Unreadable, decode


def _jpeg(image: Image.Image, quality: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((max(8, round(image.width * factor)), max(8, round(image.height * factor))))


def _cropped(image: Image.Image, share: float) -> Image.Image:
    return image.crop(
        (
            round(image.width * share),
            round(image.height * share),
            round(image.width * (1 - share)),
            round(image.height * (1 - share)),
        )
    )


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, quality 75": lambda i: _jpeg(i, 75),
    "JPEG, quality 40": lambda i: _jpeg(i, 40),
    "three quarters of the size": lambda i: _jpeg(_scaled(i, 0.75), 90),
    "half the size": lambda i: _jpeg(_scaled(i, 0.5), 90),
    "twice the size": lambda i: _jpeg(_scaled(i, 2), 90),
    "20 % brighter": lambda i: _jpeg(ImageEnhance.Brightness(i).enhance(1.2), 90),
    "30 % darker": lambda i: _jpeg(ImageEnhance.Brightness(i).enhance(0.7), 90),
    "less contrast": lambda i: _jpeg(ImageEnhance.Contrast(i).enhance(0.7), 90),
    "without colour": lambda i: _jpeg(ImageOps.grayscale(i), 90),
    "cropped by 1 % on each side": lambda i: _jpeg(_cropped(i, 0.01), 90),
    "cropped by 3 % on each side": lambda i: _jpeg(_cropped(i, 0.03), 90),
    "cropped by 10 % on each side": lambda i: _jpeg(_cropped(i, 0.1), 90),
    "mirrored": lambda i: _jpeg(ImageOps.mirror(i), 90),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This command's."""
    parser.add_argument("--images", required=True, help="folder of images, or a Parquet file with a column `image`")
    parser.add_argument("--size", type=at_least(8), default=32, help="pixels that the teacher sees [%(default)s]")
    parser.add_argument("--copied", type=at_least(1), default=1000, help="of the images, are copied [%(default)s]")
    parser.add_argument("--rows", type=at_least(0), default=0, help="of a table whose search is timed; 0: none")


def main(argv: Sequence[str]) -> None:
    """Measure, print."""
    arguments = parse_flags(argv, __doc__, "pukd measure-near", add_flags)
    spec = PixelSpec(arguments.size, 3, "crop")
    encoded = _read(Path(arguments.images))
    pixels, kept = _decoded(encoded, spec)
    if not kept:
        raise ConfigError(
            [
                f"arguments: --images {arguments.images}: no image can be read there: name a folder of images, or a "
                "Parquet file with a column `image`"
            ]
        )
    perceptual_hashes(pixels[:64])
    start = time.process_time()
    hashes, has = perceptual_hashes(pixels)
    each = (time.process_time() - start) / len(pixels)
    hashes = hashes[has]
    print(
        f"{platform.platform()}: {len(pixels):,} images at {spec.size} pixels, {len(hashes):,} of them with a hash of "
        f"{BITS} bits, in {1e6 * each:.0f} microseconds of a core each\n"
    )
    print(f"| copy | median of the bits that differ | found (at most {RADIUS}) |\n|---|---|---|")
    some = np.flatnonzero(has)[: arguments.copied]
    originals = [Image.open(io.BytesIO(encoded[kept[i]])).convert("RGB") for i in some]
    for name, copy in COPIES.items():
        theirs, _ = perceptual_hashes(_decoded([copy(image) for image in originals], spec)[0])
        bits = np.bitwise_count(theirs ^ hashes[: len(theirs)]).sum(1)
        print(f"| {name} | {np.median(bits):.0f} | {(bits <= RADIUS).mean():.1%} |")
    rows = _rows(hashes)
    pairs = _search(rows)
    number = len(hashes) * (len(hashes) - 1) / 2
    print(
        f"\nOf {number:,.0f} pairs of different files {len(pairs):,} differ in at most {RADIUS} bits: "
        f"{1e6 * len(pairs) / number:.3f} in a million. By their bits: "
        f"{np.bincount([bits for *_, bits in pairs], minlength=RADIUS + 1).tolist()}"
    )
    if arguments.rows:
        rng = np.random.default_rng(0)
        table = hashes[rng.integers(0, len(hashes), arguments.rows)]
        # As different as other images are, and as unlike chance: each has half of one image's bits, half of another's.
        mask = np.packbits(rng.random((arguments.rows, BITS)) < 0.5, axis=1)
        table = (table & mask) | (hashes[rng.integers(0, len(hashes), arguments.rows)] & ~mask)
        start = time.process_time()
        found_pairs = _search(_rows(table))
        seconds = time.process_time() - start
        print(f"\n{arguments.rows:,} rows: {seconds:.0f} s of a core, {len(found_pairs):,} pairs")


def _read(place: Path) -> list[bytes]:
    if place.is_file():
        try:
            images: list[bytes] = pq.read_table(place, columns=["image"]).column("image").to_pylist()
        except (pa.ArrowException, KeyError):  # no Parquet file; no such column
            return []
        return images
    return [f.read_bytes() for f in sorted(place.rglob("*")) if f.suffix.lower() in IMAGE_EXTENSIONS]


def _decoded(images: Sequence[bytes], spec: PixelSpec) -> tuple[np.ndarray, list[int]]:
    """(pixels of the readable images, which they are)."""
    found, kept = [], []
    for i, data in enumerate(images):
        try:
            found.append(decode(data, spec))
        except Unreadable:
            continue
        kept.append(i)
    return np.stack(found) if found else np.zeros((0, *spec.shape), np.uint8), kept


def _rows(hashes: np.ndarray) -> np.ndarray:
    number = np.arange(len(hashes))
    return np.column_stack([number, number, hash_words(hashes)])


def _search(rows: np.ndarray) -> list[tuple[int, int, int]]:
    found = [pairs_within(rows, band) for band in range(BANDS)]
    return sorted(set(map(tuple, np.concatenate(found).tolist())))
