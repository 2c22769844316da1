"""CIFAR's binary version: records of one or two label bytes and 3072 of pixels; each image becomes a PNG.

A single row costs its record.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.files import FileFacts, SourceFile, read_up_to
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.rows import ImageRow, row_id
from pukd_ray.corpus.units import Unit, runs_of_rows
from pukd_ray.storage import open_file

PIXEL_BYTES = 3 * 32 * 32
CIFAR10_RECORD = 1 + PIXEL_BYTES
CIFAR100_RECORD = 2 + PIXEL_BYTES


def _claims(name: str) -> bool:
    return name.endswith(".bin")


def cifar_record(uri: str) -> tuple[int, int]:
    """(bytes per record, file size) of a CIFAR binary file: 10 classes (one label byte) or 100 (coarse and fine).

    The size tells them apart; where it does not, as in a file cut short, the first records do: a pixel in the
    place of a label is soon above 9.
    """
    with open_file(uri) as handle:
        size = handle.seek(0, 2)
        fits = [record for record in (CIFAR10_RECORD, CIFAR100_RECORD) if size % record == 0]
        if len(fits) == 1:
            return fits[0], size
        handle.seek(0)
        labels = handle.read(64 * CIFAR10_RECORD)[::CIFAR10_RECORD]
    return (CIFAR10_RECORD if max(labels, default=0) < 10 else CIFAR100_RECORD), size


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    record, size = cifar_record(file.uri)
    return FileFacts(((-(-size // record), size),))


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Seeks the wanted records."""
    del source
    uri = unit.files[0]
    record, _ = cifar_record(uri)
    at = record - PIXEL_BYTES - 1  # CIFAR-100 has a coarse label, then the fine one
    with open_file(uri) as handle:
        for row in (unit.start + positions).tolist():
            handle.seek(row * record)
            data, failure = read_up_to(handle, record)
            label = data[at] if len(data) > at else None
            if len(data) < record:
                failure = failure or "truncated: the file ends within this record"
                yield ImageRow(row_id(unit, row), uri, row, None, label, error=failure)
                continue
            pixels = np.frombuffer(data, np.uint8, offset=at + 1).reshape(3, 32, 32)
            yield ImageRow(row_id(unit, row), uri, row, encode_png(pixels) if images else None, label)


CIFAR = Format(
    name="cifar",
    claims=_claims,
    measure=_measure,
    cut=runs_of_rows,
    read=_read,
    row_addressable=True,
    any_name=True,
)
"""A row costs its record."""
