"""Seeded corpora for the benchmarks, made once and cached: small PNGs, and photo-like JPEGs in three forms."""

from __future__ import annotations

import io
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pukd_ray.corpus.pixels import encode_png

KINDS = ("png", "jpeg", "tar", "files")
DISTINCT = 8192
"""Images that differ; larger corpora repeat them, as links to the same files, so that they fit disk and memory."""
ROWS_PER_FILE = {"png": 4096, "jpeg": 1024, "tar": 1024}
SHAPE = (375, 500)
QUALITY = 70
TEXTURES, TEXTURE_SIZE = 12, 768


@cache
def textures(seed: int) -> np.ndarray:
    """1 / f noise in three correlated channels, float32 [TEXTURES, S, S, 3], mean 0, standard deviation 1."""
    rng = np.random.default_rng(seed)
    f = np.fft.fftfreq(TEXTURE_SIZE)
    falloff = 1 / np.maximum(np.hypot(f[:, None], f[None, : TEXTURE_SIZE // 2 + 1 or None]), 1 / TEXTURE_SIZE) ** 1.15
    found = []
    for _ in range(TEXTURES):
        noise = rng.normal(size=(4, TEXTURE_SIZE, TEXTURE_SIZE))
        planes = np.fft.irfft2(np.fft.rfft2(noise) * falloff, s=(TEXTURE_SIZE, TEXTURE_SIZE))
        planes = (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
        rgb = planes[0, ..., None] + 0.35 * planes[1:].transpose(1, 2, 0)  # brightness varies more than colour
        found.append(rgb / rgb.std())
    return np.stack(found).astype(np.float32)


def photo(bank: np.ndarray, rng: np.random.Generator) -> bytes:
    """A JPEG of 500 x 375: two textures that meet at a soft edge, as a thing before a background."""
    height, width = SHAPE
    parts = []
    for _ in range(2):
        top, left = rng.integers(0, TEXTURE_SIZE - height), rng.integers(0, TEXTURE_SIZE - width)
        part = bank[rng.integers(len(bank)), top : top + height, left : left + width]
        parts.append(part * rng.uniform(25, 60) + rng.uniform(70, 180, 3).astype(np.float32))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    radius = np.hypot((y - rng.uniform(100, 275)) / rng.uniform(60, 160), (x - rng.uniform(125, 375)) / 130)
    inside = np.clip((1.05 - radius) * 12, 0, 1)[..., None]
    pixels = np.clip(parts[0] * inside + parts[1] * (1 - inside), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()


def _make(kind: str, seed: int, first: int, count: int) -> list[bytes]:
    bank = textures(seed)
    images = []
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number])
        if kind == "png":
            top, left = rng.integers(0, TEXTURE_SIZE - 32, 2)
            patch = bank[rng.integers(TEXTURES), top : top + 32, left : left + 32] * 45 + 128
            images.append(encode_png(np.clip(patch, 0, 255).astype(np.uint8).transpose(2, 0, 1)))
        else:
            images.append(photo(bank, rng))
    return images


def _all(kind: str, seed: int, count: int) -> list[bytes]:
    chunk = 512
    starts = range(0, min(count, DISTINCT), chunk)
    with ProcessPoolExecutor() as pool:
        made = [pool.submit(_make, kind, seed, s, min(chunk, min(count, DISTINCT) - s)) for s in starts]
        return [image for part in made for image in part.result()]


def make_corpus(cache: Path, kind: str, count: int, seed: int = 0) -> Path:
    """The folder of a corpus of `count` images, made if it is not in `cache`; `tar` and `files` hold the JPEGs."""
    folder = cache / f"{kind}-{count}-{seed}"
    if folder.exists():
        return folder
    half = cache / f"{folder.name}.unfinished"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    if kind == "files":
        for table in sorted(make_corpus(cache, "jpeg", count, seed).iterdir()):
            (half / table.stem).mkdir()
            for number, image in enumerate(pq.read_table(table)["image"].to_pylist()):
                (half / table.stem / f"{number:05d}.jpg").write_bytes(image)
    elif kind == "tar":
        for table in sorted(make_corpus(cache, "jpeg", count, seed).iterdir()):
            with tarfile.open(half / f"{table.stem}.tar", "w") as tar:
                for number, image in enumerate(pq.read_table(table)["image"].to_pylist()):
                    member = tarfile.TarInfo(f"{number:05d}.jpg")
                    member.size = len(image)
                    tar.addfile(member, io.BytesIO(image))
    else:
        rows = ROWS_PER_FILE[kind]
        images = _all(kind, seed, count)
        for start in range(0, count, rows):
            end, target = min(start + rows, count), half / f"part-{start // rows:05d}.parquet"
            if start >= DISTINCT and end - start == rows:
                target.hardlink_to(half / f"part-{start % DISTINCT // rows:05d}.parquet")
                continue
            table = pa.table({"image": pa.array([images[n % len(images)] for n in range(start, end)], pa.binary())})
            # Encoded images do not compress; row groups as datasets on the Hub have them.
            pq.write_table(table, target, row_group_size=1024, compression="none")
    half.rename(folder)
    return folder


def size_of(folder: Path) -> int:
    """Bytes of all files of a corpus."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
