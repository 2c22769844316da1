"""IDX, the form of MNIST: raw gray images in one file, their labels in another; each image becomes a PNG.

The labels are beside the images under the same name with `labels` and `idx1`, gzip'd or not, or in a folder beside
theirs, named the same way, where each file has one of its own.

A single row costs its pixels and its label; in a gzip'd file, everything before it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.faults import BROKEN, reason_of
from pukd_ray.corpus.files import FileFacts, SourceFile, is_packed, open_blocks, open_raw, read_up_to, unpacked
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.pixels import MAX_PIXELS, encode_png
from pukd_ray.corpus.rows import ImageRow, row_id
from pukd_ray.corpus.units import Unit, runs_of_rows
from pukd_ray.errors import MissingError
from pukd_ray.storage import split_uri

IMAGES_MAGIC = 0x0803
LABELS_MAGIC = 0x0801
HEADER_BYTES = 16
LABELS_HEADER_BYTES = 8
PROMISED_TIMES = {False: 16, True: 1100}
"""A header may promise so many times the bytes that are there; by whether they are gzip'd, which gives 1032 at best."""


def _claims(name: str) -> bool:
    return "idx3-ubyte" in name


def _is_labels(name: str) -> bool:
    return "idx1-ubyte" in name


def _header(handle: IO[bytes]) -> tuple[int, int, int]:
    """(images, height, width) of an IDX image file; ValueError if it is something else."""
    magic, count, height, width = struct.unpack(">IIII", handle.read(HEADER_BYTES))
    if magic != IMAGES_MAGIC:
        raise ValueError(f"magic number {magic:#x} is not that of IDX images ({IMAGES_MAGIC:#06x})")
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"images of {width} x {height} pixels")
    return count, height, width


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    with _open(file.uri, np.zeros(1, np.int64), np.full(1, HEADER_BYTES)) as handle:
        count, height, width = _header(handle)
    size = count * height * width
    if size > PROMISED_TIMES[is_packed(file.uri)] * file.size + (1 << 20):
        raise ValueError(f"its header promises {count:,} images of {width} x {height}, its size is {file.size:,} bytes")
    return FileFacts(((count, size),))


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Seeks the wanted rows; behind a broken place there are none."""
    del source
    uri = unit.files[0]
    rows = unit.start + positions
    labels = _labels(uri, rows)
    failure = None
    handle: IO[bytes] | None = None
    size = height = width = 0
    try:
        with _open(uri, np.zeros(1, np.int64), np.full(1, HEADER_BYTES)) as start:
            _, height, width = _header(start)
        size = height * width
        starts = HEADER_BYTES + rows * size
        handle = _open(uri, starts, starts + size) if images else None
    except BROKEN as error:
        failure = reason_of(error)
    for row, label in zip(rows.tolist(), labels, strict=True):
        png = None
        if handle is not None and not failure:
            failure = _seek(handle, HEADER_BYTES + row * size)
            data, failure = (b"", failure) if failure else read_up_to(handle, size)
            if len(data) == size:
                png = encode_png(np.frombuffer(data, np.uint8).reshape(1, height, width))
            else:
                failure = failure or "truncated: the IDX file ends early"
        yield ImageRow(row_id(unit, row), uri, row, png, label, error=None if png else failure)
    if handle is not None:
        handle.close()


def _open(uri: str, starts: np.ndarray, stops: np.ndarray) -> IO[bytes]:
    """The file, to be read at some places; one that is gzip'd is read on from its start."""
    if is_packed(uri):
        return unpacked(open_blocks(uri, whole=False))
    return open_blocks(uri, starts, stops)


def _seek(handle: IO[bytes], place: int) -> str | None:
    """Reason why there is no such place; what is compressed is read up to it."""
    try:
        handle.seek(place)
    except BROKEN as error:
        return reason_of(error)
    return None


def label_files(uri: str) -> list[str]:
    """Where the labels of an image file may be."""
    scheme, path, query = split_uri(uri)
    *folders, name = path.split("/")

    def named(text: str) -> str:
        return text.replace("images", "labels").replace("idx3", "idx1")

    places = ["/".join([*folders, named(name)])]
    if folders and named(folders[-1]) != folders[-1] and "idx3" in folders[-1]:  # Kaggle: a folder per file
        places.append("/".join([*folders[:-1], named(folders[-1]), named(name)]))
    if folders:
        places.append("/".join([*folders[:-1], named(name)]))
    bare = [place.removesuffix(".gz") for place in places]
    every = [one for place in bare for one in ((f"{place}.gz", place) if is_packed(uri) else (place, f"{place}.gz"))]
    return [f"{scheme}{place}{query}" for place in dict.fromkeys(every) if f"{scheme}{place}{query}" != uri]


def _labels(uri: str, rows: np.ndarray) -> list[int | None]:
    """Labels of `rows`; None where there are none."""
    for place in label_files(uri):
        # Gzip'd ones are read whole, a byte an image: what is broken gives none, whichever are asked for.
        first, last = (0, 1 << 32) if is_packed(place) else (int(rows[0]), int(rows[-1]) + 1)
        try:
            with open_raw(place, whole=is_packed(place)) as handle:
                (magic,) = struct.unpack(">I", handle.read(4))
                if magic != LABELS_MAGIC:
                    continue
                handle.seek(LABELS_HEADER_BYTES + first)
                data, _ = read_up_to(handle, last - first)
        except (MissingError, *BROKEN):
            continue
        return [data[row - first] if row - first < len(data) else None for row in rows.tolist()]
    return [None] * len(rows)


def _label_hint(unit: Unit, source: SourceConfig) -> str:
    del source
    return f"looked for {', '.join(label_files(unit.files[0]))}"


IDX = Format(
    name="idx",
    claims=_claims,
    measure=_measure,
    cut=runs_of_rows,
    read=_read,
    row_addressable=True,
    side_file=_is_labels,
    label_hint=_label_hint,
)
"""A row costs its pixels and its label; in a gzip'd file, everything before it."""
