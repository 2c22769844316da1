"""Units -> rows: one way to read all formats.

Every row that is asked for comes out exactly once, in order, readable or not: what cannot be read carries
its reason in `error`. Images stay encoded; raw arrays become PNG.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pyarrow as pa

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.rows import ImageRow, failed_rows
from pukd_ray.corpus.stored_units import whole
from pukd_ray.corpus.units import GONE, Unit
from pukd_ray.errors import RunError
from pukd_ray.runtime.engine import task_attempt

BLOCK_ROWS = 1024
BLOCK_BYTES = 32 << 20
SPLIT_ROWS = 256
MOST_ATTEMPTS = 10
"""At one unit. Nodes that are taken away count too; images that hang or kill their decoder end at the second."""

ROW_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("image", pa.binary()),
        pa.field("content_hash", pa.int64()),
        pa.field("label", pa.string()),
        pa.field("label_is_name", pa.bool_()),
        pa.field("relevant", pa.bool_()),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class ReadRequest:
    """Which rows of a unit to read, and whether to fetch their bytes."""

    unit: Unit
    positions: np.ndarray | None = None
    """Sorted positions within the unit; None: all."""
    labels: np.ndarray | None = None
    """Resolved label of each position: teacher index (int64), replaces what the file says."""

    @property
    def count(self) -> int:
        """Rows that are asked for."""
        return self.unit.rows if self.positions is None else len(self.positions)


def split_requests(requests: Sequence[ReadRequest], count: int) -> list[ReadRequest]:
    """The same rows in about `count` requests, if they are fewer now; cut at multiples of `SPLIT_ROWS`, so that a
    network sees the same batches whatever `count` is."""
    asked = [request for request in requests if request.count]
    if len(asked) >= count:
        return asked
    size = max(1, round(sum(request.count for request in asked) / count / SPLIT_ROWS)) * SPLIT_ROWS
    return [part for request in asked for part in _split(request, size)]


def _split(request: ReadRequest, size: int) -> list[ReadRequest]:
    if request.count <= size:
        return [request]
    positions = np.arange(request.count) if request.positions is None else request.positions
    parts = [slice(start, start + size) for start in range(0, request.count, size)]
    return [
        ReadRequest(request.unit, positions[part], None if request.labels is None else request.labels[part])
        for part in parts
    ]


def content_hash(data: bytes) -> int:
    """64-bit BLAKE2b of the encoded bytes as a signed integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def with_default_label(source: SourceConfig) -> SourceConfig:
    """`source` with the column of labels that it has where it names none."""
    return source if source.label_column else replace(source, label_column="label")


def with_truth_label(source: SourceConfig) -> SourceConfig:
    """The same where its labels are wanted as truth."""
    return source if source.relevant_labels is None else with_default_label(source)


def name_of(label: int | str | None, names: tuple[str, ...] | None) -> str | None:
    """What the file calls an integer label."""
    is_index = isinstance(label, int) and not isinstance(label, bool) and names is not None and 0 <= label < len(names)
    return names[label] if is_index else None  # type: ignore[index]


def read_rows(
    unit: Unit, source: SourceConfig, positions: np.ndarray | None = None, *, images: bool = True
) -> Iterator[ImageRow]:
    """The rows of `unit` at `positions` (int64, strictly rising; None: all), in order, each once or with a reason.

    What the other rows cost, the format says. `images=False` leaves the bytes out where that saves reading them.
    RuntimeError if the file has fewer rows than were planned.
    """
    asked = np.arange(unit.rows) if positions is None else positions
    if not len(asked):
        return
    unit = whole(unit)
    error = unit.error or (GONE if unit.gone and not FORMATS[unit.format].single_images else None)
    if error:
        single = FORMATS[unit.format].single_images
        for position, row in zip(asked, failed_rows(unit, (unit.start + asked).tolist(), error), strict=True):
            name = unit.ids[position] if single else row.image_id
            yield replace(row, image_id=name, relevant=source.relevant)
        return
    known = set(map(str, source.relevant_labels)) if source.relevant_labels is not None else None
    by_name = {label for label in source.relevant_labels or () if isinstance(label, str)}
    source = with_truth_label(source)
    names = cache(partial(FORMATS[unit.format].label_names, unit, source))  # one more look at the file, if it is needed
    seen = 0
    for row in FORMATS[unit.format].read(unit, source, asked, images):
        seen += 1
        relevant = row.relevant
        if source.relevant is not None:
            relevant = source.relevant
        elif known is not None:
            relevant = None if row.label is None else str(row.label) in known
            if by_name and relevant is False and isinstance(row.label, int):
                relevant = name_of(row.label, names()) in by_name
        yield row if relevant == row.relevant else replace(row, relevant=relevant)
    if seen != len(asked):
        planned = f"the plan counted {len(asked)}" if positions is None else f"{len(asked)} were asked for"
        raise RuntimeError(
            f"{unit.files[0]}: {seen} rows were read where {planned}: did the file change? --redo plan counts it again"
        )


def to_table(rows: Sequence[ImageRow]) -> pa.Table:
    """Rows as `ROW_SCHEMA`."""
    return pa.table(
        {
            "image_id": [r.image_id for r in rows],
            "source": [r.source for r in rows],
            "source_row": [r.row for r in rows],
            "image": pa.array([r.image for r in rows], pa.binary()),
            "content_hash": [content_hash(r.image) if r.image else None for r in rows],
            "label": [None if r.label is None else str(r.label) for r in rows],
            "label_is_name": [None if r.label is None else isinstance(r.label, str) for r in rows],
            "relevant": [r.relevant for r in rows],
            "error": [r.error for r in rows],
        },
        schema=ROW_SCHEMA,
    )


def read_blocks(request: ReadRequest, source: SourceConfig) -> Iterator[pa.Table]:
    """The requested rows as tables of bounded size, with `unit` and `role` columns.

    RunError if the process that reads this unit has died too often.
    """
    if (attempt := task_attempt()) >= MOST_ATTEMPTS:
        raise RunError(
            f"{request.unit.files[0]}: {attempt} processes have died while they read or scored its rows from "
            f"{request.unit.start} on: see Ray's logs for why, mend or remove the file, and run the same command again"
        )
    rows = read_rows(request.unit, source, request.positions)
    if request.labels is not None:
        rows = (replace(row, label=label) for row, label in zip(rows, request.labels.tolist(), strict=True))
    block: list[ImageRow] = []
    size = 0
    for row in rows:
        block.append(row)
        size += len(row.image or b"")
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield _tagged(block, request.unit)
            block, size = [], 0
    if block:
        yield _tagged(block, request.unit)


def _tagged(rows: list[ImageRow], unit: Unit) -> pa.Table:
    table = to_table(rows)
    for name, value in (("unit", unit.unit_id), ("role", unit.role)):
        table = table.append_column(name, pa.array([value] * len(rows), pa.string()))
    return table
