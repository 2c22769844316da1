"""CIFAR's binary version: records of one or two label bytes and 3072 of pixels; each image becomes a PNG.

A single row costs its record.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.faults import BROKEN, reason_of
from pukd_ray.corpus.files import FileFacts, SourceFile, open_blocks, read_up_to
from pukd_ray.corpus.formats.base import Format, every_name
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.rows import ImageRow, failed_rows, row_id
from pukd_ray.corpus.units import Unit, runs_of_rows
from pukd_ray.storage import open_file

PIXEL_BYTES = 3 * 32 * 32
CIFAR10_RECORD = 1 + PIXEL_BYTES
CIFAR100_RECORD = 2 + PIXEL_BYTES
LOOKED_AT = 64
"""Records whose labels tell whether a file is CIFAR's."""


def _claims(name: str) -> bool:
    return name.endswith(".bin")


def cifar_record(uri: str, *, check: bool = False) -> tuple[int, int]:
    """(bytes per record, file size) of a CIFAR binary file: 10 classes (one label byte) or 100 (coarse and fine).

    The size tells them apart; where it does not, as in a file cut short, the first records do: a pixel in the
    place of a label is soon above 9. ValueError if their labels, where they are looked at, as `check` asks for, can be
    neither.
    """
    with open_file(uri) as handle:
        size = handle.seek(0, 2)
        fits = [record for record in (CIFAR10_RECORD, CIFAR100_RECORD) if size % record == 0]
        if len(fits) == 1 and not check:
            return fits[0], size
        handle.seek(0)
        head = handle.read(LOOKED_AT * CIFAR100_RECORD)
    ten, coarse, fine = head[::CIFAR10_RECORD], head[::CIFAR100_RECORD], head[1::CIFAR100_RECORD]
    could_be = {
        CIFAR10_RECORD: max(ten[:LOOKED_AT], default=0) < 10,
        CIFAR100_RECORD: max(coarse, default=0) < 20 and max(fine, default=0) < 100,
    }
    possible = [record for record in fits or could_be if could_be[record]]
    if not possible:
        is_pickle = head[:1] == b"\x80"  # the protocol's number follows
        what = (
            "a Python pickle: take CIFAR's binary version" if is_pickle else f"but {', '.join(map(str, ten[:3]))}, ..."
        )
        raise ValueError(f"its records have no labels of CIFAR-10 or CIFAR-100, {what}")
    return possible[0], size


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    record, size = cifar_record(file.uri, check=True)
    return FileFacts(((-(-size // record), size),))


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Seeks the wanted records."""
    del source
    uri, rows = unit.files[0], unit.start + positions
    done, failure = 0, None
    try:
        record, _ = cifar_record(uri)
        at = record - PIXEL_BYTES - 1  # CIFAR-100 has a coarse label, then the fine one
        with open_blocks(uri, rows * record, (rows + 1) * record) as handle:
            for row in rows.tolist():
                handle.seek(row * record)
                data, fault = read_up_to(handle, record)
                label = data[at] if len(data) > at else None
                if len(data) < record:
                    fault = fault or "truncated: the file ends within this record"
                    yield ImageRow(row_id(unit, row), uri, row, None, label, error=fault)
                else:
                    pixels = np.frombuffer(data, np.uint8, offset=at + 1).reshape(3, 32, 32)
                    yield ImageRow(row_id(unit, row), uri, row, encode_png(pixels) if images else None, label)
                done += 1
    except BROKEN as error:
        failure = reason_of(error)
    if failure:
        yield from failed_rows(unit, rows[done:].tolist(), failure)


CIFAR = Format(
    name="cifar",
    claims=_claims,
    measure=_measure,
    cut=runs_of_rows,
    read=_read,
    row_addressable=True,
    any_name=every_name,
)
"""A row costs its record."""
