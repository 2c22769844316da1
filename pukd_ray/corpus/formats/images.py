"""Folders of single images: each file is a row, the first folder on its path the label.

A single row costs its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from posixpath import splitext

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.files import IMAGE_BYTES, FileFacts, SourceFile, read_whole
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.huggingface import folders_below_split
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.rows import ImageRow
from pukd_ray.corpus.units import GONE, Unit, groups_of_files
from pukd_ray.storage import is_local, split_uri

READ_THREADS = 16  # small files: latency, not bandwidth


def _claims(name: str) -> bool:
    return splitext(name)[1] in IMAGE_EXTENSIONS


def _may_be_image(name: str) -> bool:
    """Whether a file may be an image for all that its name says, such as `0815` or `x.img`."""
    return not name.endswith(_NO_IMAGES) and name not in ("license", "readme", "makefile", "notice")


_NO_IMAGES = (
    *(".txt", ".md", ".rst", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".html", ".htm", ".log"),
    *(".pdf", ".py", ".sh", ".ipynb", ".pkl", ".npy", ".npz", ".pt", ".mat", ".h5", ".db", ".zip", ".gz", ".7z"),
    *(".zst", ".crc", ".md5", ".sha1", ".sha256", ".ini", ".cfg", ".idx", ".mp4", ".avi", ".mov", ".wav", ".mp3"),
)


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    error = None
    if not is_local(file.uri) and "//" in split_uri(file.uri)[1]:
        error = "io: an empty part (//) in the key: it cannot be asked for"
    elif file.size > IMAGE_BYTES:
        error = f"too_large: {file.size:,} bytes, more than {IMAGE_BYTES >> 20} MiB"
    return FileFacts(((1, file.size),), error=error)


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Opens the wanted files only."""
    places = positions.tolist()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        load = partial(_load, unit.gone)
        loaded = pool.map(load, [unit.files[p] for p in places]) if images else [(None, None)] * len(places)
        for position, (image, error) in zip(places, loaded, strict=True):
            folders = PurePosixPath(unit.ids[position]).parts[:-1]
            if source.split is not None:
                folders = folders_below_split(folders, source.split)
            label = folders[0] if folders else None
            yield ImageRow(unit.ids[position], unit.files[position], 0, image, label, error=error)


def _label_hint(unit: Unit, source: SourceConfig) -> str:
    del unit, source
    return "put it into a sub-folder named after its class"


def _load(gone: tuple[str, ...], uri: str) -> tuple[bytes | None, str | None]:
    return (None, GONE) if uri in gone else read_whole(uri)


IMAGES = Format(
    name="images",
    claims=_claims,
    measure=_measure,
    cut=groups_of_files,
    read=_read,
    row_addressable=True,
    any_name=_may_be_image,
    single_images=True,
    label_hint=_label_hint,
)
"""A row costs its file."""
