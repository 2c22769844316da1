"""Folders of single images: each file is a row, its folder's name the label.

A single row costs its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.files import FileFacts, SourceFile, read_whole
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.rows import ImageRow
from pukd_ray.corpus.units import GONE, Unit, groups_of_files

READ_THREADS = 16  # small files: latency, not bandwidth


def _claims(name: str) -> bool:
    return PurePosixPath(name).suffix in IMAGE_EXTENSIONS


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    return FileFacts(((1, file.size),))


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Opens the wanted files only."""
    del source
    places = positions.tolist()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        load = partial(_load, unit.gone)
        loaded = pool.map(load, [unit.files[p] for p in places]) if images else [(None, None)] * len(places)
        for position, (image, error) in zip(places, loaded, strict=True):
            folders = PurePosixPath(unit.ids[position]).parts[:-1]
            label = folders[-1] if folders else None
            yield ImageRow(unit.ids[position], unit.files[position], 0, image, label, error=error)


def _load(gone: tuple[str, ...], uri: str) -> tuple[bytes | None, str | None]:
    return (None, GONE) if uri in gone else read_whole(uri)


IMAGES = Format(
    name="images",
    claims=_claims,
    measure=_measure,
    cut=groups_of_files,
    read=_read,
    row_addressable=True,
    single_images=True,
    label_hint="put it into a sub-folder named after its class",
)
"""A row costs its file."""
