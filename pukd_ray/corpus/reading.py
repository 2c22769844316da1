"""Units -> rows: one reader for all formats, as a Ray Data `Datasource`.

Every row of a unit comes out exactly once, in order, readable or not: what cannot be read carries
its reason in `error`. Images stay encoded; raw arrays (IDX, CIFAR) become PNG.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.units import (
    BROKEN,
    Unit,
    cifar_record,
    is_image_member,
    one_line,
    open_raw,
    read_idx_header,
    reason_of,
)
from pukd_ray.storage import open_file, open_storage, patiently, read_bytes

BLOCK_ROWS = 1024
BLOCK_BYTES = 32 << 20
BATCH_ROWS = 256
READ_THREADS = 16  # small files: latency, not bandwidth

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
class Row:
    """One image as read; `row` counts within the file."""

    image_id: str
    source: str
    row: int
    image: bytes | None
    label: int | str | None = None
    relevant: bool | None = None
    error: str | None = None


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


def content_hash(data: bytes) -> int:
    """64-bit BLAKE2b of the encoded bytes as a signed integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def read_rows(unit: Unit, source: SourceConfig, *, images: bool = True) -> Iterator[Row]:
    """All rows of `unit` in order; `images=False` leaves the bytes out where that saves reading them."""
    if unit.error:
        for i in range(unit.start, unit.start + unit.rows):
            yield Row(_row_id(unit, i), unit.files[0], i, None, relevant=source.relevant, error=unit.error)
        return
    readers = {
        "parquet": _read_parquet,
        "images": _read_files,
        "webdataset": _read_tar,
        "idx": _read_idx,
        "cifar": _read_cifar,
    }
    known = set(map(str, source.relevant_labels)) if source.relevant_labels is not None else None
    seen = 0
    for row in readers[unit.format](unit, source, images):
        seen += 1
        relevant = row.relevant
        if source.relevant is not None:
            relevant = source.relevant
        elif known is not None:
            relevant = row.label is not None and str(row.label) in known
        if row.error and row.error.startswith("duplicate_id") and images and not row.image:
            row = replace(row, error="empty: no bytes")  # of several reasons the first of the list
        yield row if relevant == row.relevant else replace(row, relevant=relevant)
    if seen != unit.rows:
        raise RuntimeError(
            f"{unit.files[0]}: {seen} rows were read where the plan counted {unit.rows}: did the file change?"
        )


def _row_id(unit: Unit, row: int) -> str:
    return f"{unit.ids[0]}#{row}"


def _label(value: Any) -> Any:
    """A label as an int or a str where it stands for one: 3.0 is what pandas makes of 3 next to a null."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value == "" else value


def _truth(value: Any) -> bool | None:
    return bool(value) if isinstance(value, bool | int) else None


def _read_parquet(unit: Unit, source: SourceConfig, images: bool) -> Iterator[Row]:
    uri, stop, position = unit.files[0], unit.start + unit.rows, unit.group_start
    failure = None
    try:
        with open_file(uri) as handle:
            parquet = pq.ParquetFile(handle)
            for group in range(unit.first_group, parquet.metadata.num_row_groups):
                end = position + parquet.metadata.row_group(group).num_rows
                if position < stop:
                    yield from _read_group(unit, source, images, parquet, group, position, min(end, stop))
                position = end
    except BROKEN as error:
        failure = reason_of(error)
    if failure:
        for i in range(max(position, unit.start), stop):
            yield Row(_row_id(unit, i), uri, i, None, error=failure)


def _read_group(
    unit: Unit, source: SourceConfig, images: bool, parquet: pq.ParquetFile, group: int, position: int, stop: int
) -> Iterator[Row]:
    """Rows of one row group, which begins at `position`, up to `stop`; a damaged page costs the rest of the group."""
    uri = unit.files[0]
    repeated = set(unit.repeated)
    label_column = source.label_column if source.label_column in parquet.schema_arrow.names else None
    names = (source.image_column if images else None, label_column, source.id_column, source.relevant_column)
    columns = list(dict.fromkeys(name for name in names if name is not None))
    failure = None
    try:
        if columns:
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
                data = _image_values(batch.column(source.image_column)) if images else [None] * len(batch)
                labels, ids, truths = (
                    batch.column(c).to_pylist() if c else [None] * len(batch)
                    for c in (label_column, source.id_column, source.relevant_column)
                )
                for image, label, user_id, truth in zip(data, labels, ids, truths, strict=True):
                    if unit.start <= position < stop:
                        name, error = _row_id(unit, position), None
                        if position in repeated:
                            error = f"duplicate_id: {user_id!r} is the id of an earlier row"
                        elif user_id is not None:
                            name = str(user_id)
                        yield Row(name, uri, position, image, _label(label), _truth(truth), error)
                    position += 1
                if position >= stop:
                    return
    except BROKEN as error:
        failure = reason_of(error)
    for i in range(max(position, unit.start), stop):  # after a failure, or with no column to read
        yield Row(_row_id(unit, i), uri, i, None, error=failure)


def _image_values(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = column.field("bytes")  # Hugging Face: struct{bytes, path}
    values: list[bytes | None] = column.to_pylist()
    return values


def _read_files(unit: Unit, source: SourceConfig, images: bool) -> Iterator[Row]:
    del source
    with ThreadPoolExecutor(READ_THREADS) as pool:
        loaded = pool.map(_read_or_reason, unit.files) if images else [(None, None)] * len(unit.files)
        for uri, image_id, (image, error) in zip(unit.files, unit.ids, loaded, strict=True):
            folders = PurePosixPath(image_id).parts[:-1]
            yield Row(image_id, uri, 0, image, folders[-1] if folders else None, error=error)


def _read_or_reason(uri: str) -> tuple[bytes | None, str | None]:
    try:
        return patiently(uri, lambda: read_bytes(*open_storage(uri))), None
    except OSError as error:
        return None, reason_of(error)


def _read_tar(unit: Unit, source: SourceConfig, images: bool) -> Iterator[Row]:
    """Each image member is a row; members of the same key right before or after it may carry its label."""
    last = unit.start + unit.rows
    rows = 0
    failure = None
    for row in _tar_rows(unit, source, images):
        if isinstance(row, str):
            failure = row
        elif rows < last:
            if rows >= unit.start:
                yield row
            rows += 1
    if failure:  # where the plan could read on; else it has told the user that this tar ends early
        for i in range(max(rows, unit.start), last):
            yield Row(_row_id(unit, i), unit.files[0], i, None, error=failure)


def _tar_rows(unit: Unit, source: SourceConfig, images: bool) -> Iterator[Row | str]:
    """All rows of the tar, from its start, and at its end the reason if it broke off."""
    row = 0
    seen: set[str] = set()
    group: list[Row] = []
    key = ""
    side: dict[str, bytes] = {}
    try:
        with open_file(unit.files[0]) as handle, tarfile.open(fileobj=handle, mode="r:*") as tar:
            for member in tar:
                member_key = member.name[: -len(_suffix(member.name)) or None]
                if member_key != key:
                    yield from _with_side_data(group, side, source)
                    group, side, key = [], {}, member_key
                    if row >= unit.start + unit.rows:
                        return
                if is_image_member(member):
                    fetch = images and unit.start <= row < unit.start + unit.rows
                    data, error = _member_bytes(tar, member) if fetch else (None, None)
                    name = f"{unit.ids[0]}#{member.name}"
                    if name in seen:
                        name, error = f"{name}#{row}", error or f"duplicate_id: {member.name} is in this tar twice"
                    seen.add(name)
                    group.append(Row(name, unit.files[0], row, data, error=error))
                    row += 1
                elif member.isfile() and member.name.lower().endswith((".cls", ".json")):
                    data, _ = _member_bytes(tar, member)
                    side[_suffix(member.name).lower()] = data or b""
    except BROKEN as error:
        yield from _with_side_data(group, side, source)
        yield reason_of(error)
    else:
        yield from _with_side_data(group, side, source)


def _suffix(name: str) -> str:
    """From the first dot of the base name on: webdataset's extension."""
    base = name.rpartition("/")[2]
    return base[base.index(".") :] if "." in base else ""


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[bytes | None, str | None]:
    try:
        source = tar.extractfile(member)
        data = source.read() if source else b""
    except (tarfile.ReadError, EOFError) as error:
        return None, f"truncated: the tar ends within this member: {one_line(error)}"
    except BROKEN as error:
        return None, reason_of(error)
    if len(data) < member.size:
        return None, "truncated: the tar ends within this member"
    return data, None


def _with_side_data(group: list[Row], side: dict[str, bytes], source: SourceConfig) -> Iterator[Row]:
    label: int | str | None = None
    truth = None
    if ".cls" in side:
        text = side[".cls"].decode(errors="replace").strip()
        label = int(text) if re.fullmatch("-?[0-9]+", text) else _label(text)
    if ".json" in side:
        try:
            values = json.loads(side[".json"])
        except ValueError:
            values = {}
        if isinstance(values, dict):
            label = _label(values.get(source.label_column or "label", label))
            truth = _truth(values.get(source.relevant_column)) if source.relevant_column else None
    for row in group:
        yield replace(row, label=label, relevant=truth)


def _read_idx(unit: Unit, source: SourceConfig, images: bool) -> Iterator[Row]:
    del source
    uri = unit.files[0]
    labels = _idx_labels(uri)
    failure = None
    with open_raw(uri) as handle:
        _, height, width = read_idx_header(handle)
        if images:
            failure = _skip(handle, unit.start * height * width)
        for i in range(unit.start, unit.start + unit.rows):
            label = int(labels[i]) if labels is not None and i < len(labels) else None
            png = None
            if images and not failure:
                data, failure = _read_up_to(handle, height * width)
                if len(data) == height * width:
                    png = encode_png(np.frombuffer(data, np.uint8).reshape(1, height, width))
                else:
                    failure = failure or "truncated: the IDX file ends early"
            yield Row(_row_id(unit, i), uri, i, png, label, error=None if png else failure)


def _idx_labels(uri: str) -> np.ndarray | None:
    """Labels of the sibling `...labels-idx1-ubyte` file, if there is one."""
    folder, slash, name = uri.rpartition("/")
    sibling = f"{folder}{slash}{name.replace('images', 'labels').replace('idx3', 'idx1')}"
    if sibling == uri:
        return None
    try:
        with open_raw(sibling) as handle:
            data, _ = _read_up_to(handle, 1 << 40)
    except FileNotFoundError:
        return None
    return np.frombuffer(data[8:], np.uint8)


def _read_up_to(handle: IO[bytes], count: int) -> tuple[bytes, str | None]:
    """`count` bytes, or those before the file's end or a broken place, with the reason."""
    pieces = []
    try:
        while count > 0 and (piece := handle.read(min(count, 1 << 22))):
            pieces.append(piece)
            count -= len(piece)
    except BROKEN as error:
        return b"".join(pieces), reason_of(error)
    return b"".join(pieces), None


def _skip(handle: IO[bytes], count: int) -> str | None:
    failure = None
    while count > 0 and not failure:
        data, failure = _read_up_to(handle, min(count, 1 << 22))
        count -= len(data)
        if not data:
            break
    return failure


def _read_cifar(unit: Unit, source: SourceConfig, images: bool) -> Iterator[Row]:
    del source
    uri = unit.files[0]
    record, _ = cifar_record(uri)
    at = record - 3073  # CIFAR-100 has a coarse label, then the fine one
    with open_file(uri) as handle:
        handle.seek(unit.start * record)
        for i in range(unit.start, unit.start + unit.rows):
            data, failure = _read_up_to(handle, record)
            label = data[at] if len(data) > at else None
            if len(data) < record:
                failure = failure or "truncated: the file ends within this record"
                yield Row(_row_id(unit, i), uri, i, None, label, error=failure)
                continue
            pixels = np.frombuffer(data, np.uint8, offset=record - 3072).reshape(3, 32, 32)
            yield Row(_row_id(unit, i), uri, i, encode_png(pixels) if images else None, label)


def to_table(rows: Sequence[Row]) -> pa.Table:
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


def read_blocks(wanted: ReadRequest, source: SourceConfig) -> Iterator[pa.Table]:
    """Rows of a unit as tables of bounded size, with `unit` and `role` columns."""
    keep = None if wanted.positions is None else set(wanted.positions.tolist())
    labels = (
        dict(zip(wanted.positions.tolist(), wanted.labels.tolist(), strict=True))
        if wanted.positions is not None and wanted.labels is not None
        else None
    )
    unit, positions = wanted.unit, list(range(wanted.unit.rows))
    if keep is not None and unit.format == "images":  # files that nobody asked for are not opened
        positions = sorted(keep)
        unit = replace(
            unit,
            files=tuple(unit.files[p] for p in positions),
            ids=tuple(unit.ids[p] for p in positions),
            rows=len(positions),
        )
    block: list[Row] = []
    size = 0
    for position, row in zip(positions, read_rows(unit, source), strict=True):
        if keep is not None and position not in keep:
            continue
        block.append(row if labels is None else replace(row, label=labels[position]))
        size += len(row.image or b"")
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield _tagged(block, wanted.unit)
            block, size = [], 0
    if block:
        yield _tagged(block, wanted.unit)


def _tagged(rows: list[Row], unit: Unit) -> pa.Table:
    table = to_table(rows)
    for name, value in (("unit", unit.unit_id), ("role", unit.role)):
        table = table.append_column(name, pa.array([value] * len(rows), pa.string()))
    return table


class UnitDatasource(Datasource):
    """Ray Data source over units: one read task each, ids and offsets exact."""

    def __init__(self, wanted: Sequence[ReadRequest], sources: dict[str, tuple[SourceConfig, ...]]) -> None:
        super().__init__()
        self._wanted = list(wanted)
        self._sources = sources

    def get_name(self) -> str:
        """Name of the operator on the dashboard."""
        return "ReadUnits"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: encoded images vary too much."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per unit whatever `parallelism` says: units are the grain of the plan."""
        del parallelism, data_context
        tasks = []
        for wanted in self._wanted:
            metadata = BlockMetadata(num_rows=wanted.count, size_bytes=None, input_files=None, exec_stats=None)
            source = self._sources[wanted.unit.role][wanted.unit.source]
            tasks.append(ReadTask(partial(_read_task, wanted, source), metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _read_task(wanted: ReadRequest, source: SourceConfig) -> Iterable[pa.Table]:
    return read_blocks(wanted, source)


def read_units(
    wanted: Sequence[ReadRequest],
    sources: dict[str, tuple[SourceConfig, ...]],
    *,
    num_cpus: float,
    concurrency: int | None = None,
) -> ray.data.Dataset:
    """Lazy dataset of the wanted rows, read by at most `concurrency` tasks at a time."""
    return ray.data.read_datasource(
        UnitDatasource(wanted, sources),
        override_num_blocks=max(1, len(wanted)),
        num_cpus=num_cpus,
        compute=ray.data.TaskPoolStrategy(concurrency),
    )
