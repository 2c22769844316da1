"""Parquet: encoded images in a column, binary or Hugging Face's struct{bytes, path}.

A single row costs the pages of its row group up to it, in the columns that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pukd_ray.config import SourceConfig
from pukd_ray.corpus import units
from pukd_ray.corpus.faults import BROKEN, reason_of
from pukd_ray.corpus.files import FileFacts, SourceFile
from pukd_ray.corpus.formats.base import Format
from pukd_ray.corpus.rows import ImageRow, as_label, as_truth, failed_rows, users_id
from pukd_ray.corpus.units import Measured, Owner, Unit
from pukd_ray.storage import open_file

BATCH_ROWS = 256


def _claims(name: str) -> bool:
    return name.endswith((".parquet", ".pq"))


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    with open_file(file.uri) as handle:
        parquet = pq.ParquetFile(handle)
        metadata, names = parquet.metadata, parquet.schema_arrow.names
        wanted = [source.image_column, source.id_column, source.relevant_column]
        missing = [name for name in wanted if name is not None and name not in names]
        if missing:
            return FileFacts(
                ((metadata.num_rows, file.size),),
                error=f"unsupported: no column {', '.join(missing)} (columns: {', '.join(names)})",
            )
        if fault := _column_fault(parquet.schema_arrow, source):
            return FileFacts(((metadata.num_rows, file.size),), error=f"unsupported: {fault}")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return FileFacts(tuple((g.num_rows, g.total_byte_size) for g in groups))


def _column_fault(schema: pa.Schema, source: SourceConfig) -> str | None:
    """Why the columns cannot be what the config takes them for."""
    column = kind = schema.field(source.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        return f"column {source.image_column} is {column}, neither binary nor a struct with binary `bytes`"
    if source.relevant_column is not None:
        truth = schema.field(source.relevant_column).type
        if not (pa.types.is_boolean(truth) or pa.types.is_integer(truth) or pa.types.is_null(truth)):
            return f"column {source.relevant_column} is {truth}, not boolean"
    return None


def _cut(owner: Owner, files: Sequence[Measured]) -> Iterator[Unit]:
    """Runs of row groups."""
    for measured in files:
        start = rows = size = first = 0
        for number, (group_rows, group_bytes) in enumerate(measured[1].parts):
            if rows and (rows + group_rows > units.UNIT_ROWS or size + group_bytes > units.UNIT_BYTES):
                yield owner.unit([measured], start, rows, first_group=first, group_start=start)
                start, rows, size, first = start + rows, 0, 0, number
            rows += group_rows
            size += group_bytes
        if rows:
            yield owner.unit([measured], start, rows, first_group=first, group_start=start)


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Opens only row groups that hold wanted rows."""
    wanted, done, begin = unit.start + positions, 0, unit.group_start
    failure = None
    try:
        with open_file(unit.files[0]) as handle:
            parquet = pq.ParquetFile(handle)
            for group in range(unit.first_group, parquet.metadata.num_row_groups):
                end = begin + parquet.metadata.row_group(group).num_rows
                here = wanted[done : np.searchsorted(wanted, end)]
                if len(here):
                    yield from _read_group(unit, source, here, images, parquet, group, begin)
                done, begin = done + len(here), end
                if done == len(wanted):
                    break
    except BROKEN as error:
        failure = reason_of(error)
    if failure:
        yield from failed_rows(unit, wanted[done:].tolist(), failure)


def _read_group(
    unit: Unit,
    source: SourceConfig,
    wanted: np.ndarray,
    images: bool,
    parquet: pq.ParquetFile,
    group: int,
    begin: int,
) -> Iterator[ImageRow]:
    """Rows `wanted` of one row group, which begins at row `begin`; a damaged page costs the rest of the group."""
    repeated = set(unit.repeated)
    label_column = source.label_column if source.label_column in parquet.schema_arrow.names else None
    names = (source.image_column if images else None, label_column, source.id_column, source.relevant_column)
    columns = list(dict.fromkeys(name for name in names if name is not None))
    if not columns:
        yield from failed_rows(unit, wanted.tolist(), None)
        return
    failure, done = None, 0
    try:
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
            here = wanted[done : np.searchsorted(wanted, begin + len(batch))]
            values = (_values(batch, name, here - begin) for name in names)
            for row, image, label, given, truth in zip(here.tolist(), *values, strict=True):
                data = image["bytes"] if isinstance(image, dict) else image  # Hugging Face: struct{bytes, path}
                image_id, error = users_id(unit, row, given, repeated)
                yield ImageRow(image_id, unit.files[0], row, data, as_label(label), as_truth(truth), error)
            done, begin = done + len(here), begin + len(batch)
            if done == len(wanted):
                return
    except BROKEN as error:
        failure = reason_of(error)
    if failure:
        yield from failed_rows(unit, wanted[done:].tolist(), failure)


def _values(batch: pa.RecordBatch, name: str | None, places: np.ndarray) -> list[Any]:
    """A column's values at `places` of the batch; None of a column that there is not."""
    if name is None:
        return [None] * len(places)
    column = batch.column(name)
    values: list[Any] = [column[i].as_py() for i in places.tolist()]
    return values


PARQUET = Format(
    name="parquet",
    claims=_claims,
    measure=_measure,
    cut=_cut,
    read=_read,
    row_addressable=True,
    any_name=True,
    has_id_column=True,
    label_hint="is label_column {source.label_column!r} right?",
)
"""A row costs the pages of its row group up to it."""
