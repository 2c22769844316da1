"""IDX, the form of MNIST: raw gray images in one file, their labels in the one beside it; each image becomes a PNG.

A single row costs its pixels and the file of labels (a byte per image); in a gzip'd file, everything before it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.faults import BROKEN, reason_of
from pukd_ray.corpus.files import FileFacts, SourceFile, open_raw, read_up_to
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.rows import ImageRow, row_id
from pukd_ray.corpus.units import Unit, runs_of_rows
from pukd_ray.errors import MissingError

IMAGES_MAGIC = 0x0803
HEADER_BYTES = 16


def _claims(name: str) -> bool:
    return "idx3-ubyte" in name


def _is_labels(name: str) -> bool:
    return "idx1-ubyte" in name


def _header(handle: IO[bytes]) -> tuple[int, int, int]:
    """(images, height, width) of an IDX image file; ValueError if it is something else."""
    magic, count, height, width = struct.unpack(">IIII", handle.read(HEADER_BYTES))
    if magic != IMAGES_MAGIC:
        raise ValueError(f"magic number {magic:#x} is not that of IDX images ({IMAGES_MAGIC:#06x})")
    return count, height, width


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    with open_raw(file.uri) as handle:
        count, height, width = _header(handle)
    return FileFacts(((count, count * height * width),))


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Seeks the wanted rows; behind a broken place there are none."""
    del source
    uri = unit.files[0]
    labels = _labels(uri)
    failure = None
    with open_raw(uri) as handle:
        _, height, width = _header(handle)
        size = height * width
        for row in (unit.start + positions).tolist():
            label = int(labels[row]) if labels is not None and row < len(labels) else None
            png = None
            if images and not failure:
                failure = _seek(handle, HEADER_BYTES + row * size)
                data, failure = (b"", failure) if failure else read_up_to(handle, size)
                if len(data) == size:
                    png = encode_png(np.frombuffer(data, np.uint8).reshape(1, height, width))
                else:
                    failure = failure or "truncated: the IDX file ends early"
            yield ImageRow(row_id(unit, row), uri, row, png, label, error=None if png else failure)


def _seek(handle: IO[bytes], place: int) -> str | None:
    """Reason why there is no such place; what is compressed is read up to it."""
    try:
        handle.seek(place)
    except BROKEN as error:
        return reason_of(error)
    return None


def _labels(uri: str) -> np.ndarray | None:
    """Labels of the sibling `...labels-idx1-ubyte` file, if there is one."""
    folder, slash, name = uri.rpartition("/")
    sibling = f"{folder}{slash}{name.replace('images', 'labels').replace('idx3', 'idx1')}"
    if sibling == uri:
        return None
    try:
        with open_raw(sibling) as handle:
            data, _ = read_up_to(handle, 1 << 40)
    except MissingError:
        return None
    return np.frombuffer(data[8:], np.uint8)


IDX = Format(
    name="idx",
    claims=_claims,
    measure=_measure,
    cut=runs_of_rows,
    read=_read,
    row_addressable=True,
    side_file=_is_labels,
)
"""A row costs its pixels and the labels' file; in a gzip'd file, everything before it."""
