"""Parquet: images in a column: encoded bytes, base64 text, or Hugging Face's struct{bytes, path}.

A path, in a struct without bytes or in place of base64, stays within the folder of its Parquet file, as in JSON Lines.
Labels and truth that are no columns are looked for in the file's path: `label=cat/x.parquet`.

A single row costs the pages of its row group up to it, in the columns that are read.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pukd_ray.config import SourceConfig
from pukd_ray.corpus import units
from pukd_ray.corpus.faults import BROKEN, UnpackingError, one_line, reason_of
from pukd_ray.corpus.files import BLOCK_BYTES, UNPACKED_TIMES, FileFacts, SourceFile, read_beside
from pukd_ray.corpus.formats.base import Format, every_name, is_the_column_right
from pukd_ray.corpus.huggingface import label_names, named_columns
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.rows import BadValueError, ImageRow, failed_rows, make_row
from pukd_ray.corpus.units import Measured, Owner, Unit
from pukd_ray.storage import open_file, split_uri

BATCH_ROWS = 256
BATCH_BYTES = 64 << 20
"""A batch has fewer rows if their mean size in the row group makes it larger than this."""
DICTIONARY_BYTES = 512 << 20
"""The same for rows that come from a dictionary, where each could be as large as all of it."""

COLUMN_BYTES = 16 << 30
"""A column of a row group may unpack to so much, or to `UNPACKED_TIMES` its size: it passes page by page."""


_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": None}
"""By the name of a folder."""


def _claims(name: str) -> bool:
    return name.endswith((".parquet", ".pq"))


def _partitions(uri: str) -> dict[str | None, str | None]:
    """What folders of the path say of columns: `column=value`."""
    folders = (folder.partition("=") for folder in split_uri(uri)[1].split("/")[:-1])
    return {
        unquote(name): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
        for name, equals, value in folders
        if equals
    }


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    with open_file(file.uri) as handle:
        parquet = pq.ParquetFile(handle)
        metadata, names = parquet.metadata, parquet.schema_arrow.names
        source = named_columns(parquet.schema_arrow, source)
        wanted = [source.image_column, source.id_column]
        in_path = _partitions(file.uri)
        if source.relevant_column not in in_path:
            wanted.append(source.relevant_column)
        truth = source.label_column if source.relevant_labels is not None else None
        if truth not in in_path:
            wanted.append(truth)
        missing = [name for name in wanted if name is not None and name not in names]
        if missing:
            why = " for relevant_labels: set label_column" if missing[-1] == truth else ""
            return FileFacts(
                ((metadata.num_rows, file.size),),
                error=f"unsupported: no column {', '.join(missing)}{why} (columns: {', '.join(names)})",
            )
        if fault := _column_fault(parquet.schema_arrow, source):
            return FileFacts(((metadata.num_rows, file.size),), error=f"unsupported: {fault}")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return FileFacts(tuple((g.num_rows, g.total_byte_size) for g in groups))


def _column_fault(schema: pa.Schema, source: SourceConfig) -> str | None:
    """Why the columns cannot be what the config takes them for."""
    if (times := schema.names.count(source.image_column)) > 1:
        return f"column {source.image_column} is there {times} times"
    column = kind = schema.field(source.image_column).type
    if pa.types.is_struct(kind):
        data, path = (kind.field(i).type if (i := kind.get_field_index(n)) >= 0 else None for n in ("bytes", "path"))
        fits = (data is not None and _is_binary(data)) or (data is None and path is not None and _is_text(path))
    else:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        fits = _is_binary(kind) or _is_text(kind)
    if not fits:
        return (
            f"column {source.image_column} is {column}, neither binary, nor base64 text, nor a struct with binary "
            "`bytes` or a `path`"
        )
    if source.relevant_column is not None and source.relevant_column in schema.names:
        truth = schema.field(source.relevant_column).type
        of_truth = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
        if not any(is_kind(truth) for is_kind in of_truth):
            return f"column {source.relevant_column} is {truth}, not boolean"
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


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
            parquet = pq.ParquetFile(handle, buffer_size=BLOCK_BYTES)  # else a group's whole column at once
            source = named_columns(parquet.schema_arrow, source)
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


def _label_names(unit: Unit, source: SourceConfig) -> tuple[str, ...] | None:
    if unit.error:
        return None
    with open_file(unit.files[0]) as handle:
        schema = pq.read_schema(handle)
    return label_names(schema, named_columns(schema, source).label_column)


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
    uri, repeated = unit.files[0], set(unit.repeated)
    there = set(parquet.schema_arrow.names)
    names = [source.image_column if images else None, source.label_column, source.id_column, source.relevant_column]
    # What is no column may be in the path.
    in_path = _partitions(uri)
    others: list[Any] = [None if name in there else in_path.get(name) for name in names]
    others[3] = _TRUTH.get(str(others[3]).lower(), others[3])
    columns = [name if name in there else None for name in names]
    read = list(dict.fromkeys(name for name in columns if name is not None))
    failure, done = None, 0
    try:
        for batch in _batches(parquet, group, read):
            here = wanted[done : np.searchsorted(wanted, begin + len(batch))]
            for row in here.tolist():
                values = (_value(batch, name, row - begin) for name in columns)
                image, label, given, truth = (v if o is None else o for v, o in zip(values, others, strict=True))
                data, reason = _image(uri, image, source.follow_links) if images else (None, None)
                duplicate = f"{given!r} is the id of an earlier row" if row in repeated else None
                more = {"given": given, "label": label, "truth": truth, "duplicate": duplicate}
                yield make_row(unit, row, data, images=images, error=reason, **more)
                done += 1
            begin += len(batch)
            if done == len(wanted):
                return
    except BROKEN as error:
        failure = reason_of(error)
    if failure:
        yield from failed_rows(unit, wanted[done:].tolist(), failure)


def _batches(parquet: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The row group in batches bounded by bytes; UnpackingError if its pages unpack to far more than they are."""
    facts = parquet.metadata.row_group(group)
    if not columns:
        yield pa.record_batch({"": pa.nulls(facts.num_rows)})
        return
    rows = BATCH_ROWS
    for column in map(facts.column, range(facts.num_columns)):
        if column.path_in_schema.partition(".")[0] not in columns:
            continue
        size = column.total_uncompressed_size
        if size > max(COLUMN_BYTES, UNPACKED_TIMES * column.total_compressed_size):
            raise UnpackingError(f"column {column.path_in_schema} unpacks to {size:,} bytes")
        rows = min(rows, BATCH_BYTES * facts.num_rows // max(size, 1))
        if column.has_dictionary_page:
            rows = min(rows, DICTIONARY_BYTES // max(size, 1))
    yield from parquet.iter_batches(batch_size=max(rows, 1), row_groups=[group], columns=columns)


def _value(batch: pa.RecordBatch, name: str | None, place: int) -> Any:
    """A column's value; BadValueError in its place if it is none."""
    if name is None:
        return None
    try:
        return _plain(batch.column(name)[place])
    except (*BROKEN, TypeError) as error:
        return BadValueError(f"corrupt: column {name}: {one_line(error)}")


def _plain(scalar: pa.Scalar) -> Any:
    """The value of a scalar; text that is none as bytes."""
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: _plain(scalar[name]) for name in ("bytes", "path") if name in scalar}
    if _is_text(scalar.type):
        raw = bytes(scalar.as_buffer() or b"")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw
    return scalar.as_py()


def _image(uri: str, value: Any, follow_links: bool) -> tuple[bytes | None, str | None]:
    """(encoded bytes, None) or (None, reason) of what is in the image column."""
    if isinstance(value, BadValueError):
        return None, str(value)
    if isinstance(value, dict):  # Hugging Face: struct{bytes, path}
        data, path = value.get("bytes"), value.get("path")
        if data is not None or not path:
            return data, None
        data, reason = _beside(uri, path, follow_links)
        # Where the bytes should have been in the file itself, `path` is often but the name they once had.
        return data, f"empty: no bytes, and {reason.partition(': ')[2]}" if reason and "bytes" in value else reason
    if not isinstance(value, str):
        return value, None
    try:
        return base64.b64decode("".join(value.split()), validate=True), None  # MIME breaks it into lines
    except ValueError as error:
        if PurePosixPath(value).suffix.lower() in IMAGE_EXTENSIONS:
            return _beside(uri, value, follow_links)
        return None, f"corrupt: the text of the image column is not base64: {one_line(error)}"


def _beside(uri: str, path: Any, follow_links: bool) -> tuple[bytes | None, str | None]:
    if not isinstance(path, str):
        return None, "corrupt: the path is no text"
    return read_beside(uri, path, follow_links)


PARQUET = Format(
    name="parquet",
    claims=_claims,
    measure=_measure,
    cut=_cut,
    read=_read,
    row_addressable=True,
    any_name=every_name,
    has_id_column=True,
    label_hint=is_the_column_right,
    label_names=_label_names,
)
"""A row costs the pages of its row group up to it."""
