"""Files -> units: the pieces of a source that one task reads, each with a known order and row count.

A unit is a group of small files, a run of rows of one Parquet, IDX or CIFAR file, or a whole tar.
Counting looks at footers and headers only, never at pixels.
"""

from __future__ import annotations

import gzip
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.sources import SourceFile
from pukd_ray.storage import open_file, split_uri

# A unit is what a crash costs and what one task holds in memory block by block: seconds of work, not minutes.
UNIT_ROWS = 4096
UNIT_BYTES = 64 << 20
UNIT_FILES = 512

IDX_IMAGES_MAGIC = 0x0803
CIFAR10_RECORD = 1 + 3072
CIFAR100_RECORD = 2 + 3072


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Rows [start, stop) of one file, or of a group of single-image files."""

    unit_id: str
    """Stable across runs: role, source, path and start."""
    role: str
    """positives | corpus | test | train."""
    source: int
    """Index in the role's list of sources."""
    format: str
    files: tuple[str, ...]
    """Paths or URIs: one, or many single images."""
    ids: tuple[str, ...]
    """What image ids of each file start with."""
    start: int
    """First row in the file (0 for single images)."""
    rows: int
    """Rows, readable or not."""
    first_group: int = -1
    """Parquet: first row group."""
    group_start: int = 0
    """Parquet: row in the file at which that group starts."""
    error: str | None = None
    """Why no row of this unit can be read."""
    repeated: tuple[int, ...] = ()
    """Rows of the file whose user id an earlier row has."""


UNIT_SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("role", pa.string()),
        ("source", pa.int32()),
        ("format", pa.string()),
        ("files", pa.list_(pa.string())),
        ("ids", pa.list_(pa.string())),
        ("start", pa.int64()),
        ("rows", pa.int64()),
        ("first_group", pa.int32()),
        ("group_start", pa.int64()),
        ("error", pa.string()),
        ("repeated", pa.list_(pa.int64())),
    ]
)


def units_to_table(units: list[Unit]) -> pa.Table:
    """Units as `plan.parquet` holds them."""
    return pa.Table.from_pylist([asdict(u) for u in units], schema=UNIT_SCHEMA)


def units_from_table(table: pa.Table) -> list[Unit]:
    """Inverse of `units_to_table`."""
    lists = {f.name for f in fields(Unit) if str(f.type).startswith("tuple")}
    rows: list[dict[str, Any]] = table.to_pylist()
    return [Unit(**{k: tuple(v) if k in lists else v for k, v in row.items()}) for row in rows]  # type: ignore[arg-type]


@dataclass(frozen=True)
class FileFacts:
    """What headers and footers say about one file."""

    parts: tuple[tuple[int, int], ...]
    """(rows, encoded bytes) of each row group; one part for other formats."""
    error: str | None = None
    """The file cannot be read at all: it counts as one row."""
    note: str | None = None
    """Something to tell the user, such as a tar that ends early."""


def measure(file: SourceFile, format_name: str, source: SourceConfig) -> FileFacts:
    """Count the rows of `file` without reading its pixels."""
    try:
        if format_name == "images":
            return FileFacts(((1, file.size),))
        if file.size == 0:
            return FileFacts(((1, 0),), error="empty: the file has no bytes")
        counter = {
            "parquet": _measure_parquet,
            "webdataset": _measure_tar,
            "idx": _measure_idx,
            "cifar": _measure_cifar,
        }
        return counter[format_name](file, source)
    except (pa.ArrowException, *BROKEN, struct.error, ValueError) as error:
        reason = reason_of(error).partition(":")[0] if isinstance(error, OSError) else "corrupt"
        return FileFacts(((1, file.size),), error=f"{reason}: not a readable {format_name} file: {one_line(error)}")


# What reading a damaged or unreachable file raises, whatever its format.
BROKEN = (pa.ArrowException, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError)

_SAYS_CORRUPT = re.compile(r"corrupt|decompress|deserializ|thrift|gzip|crc|unexpected end of stream", re.IGNORECASE)


def reason_of(error: BaseException) -> str:
    """`reason: detail` of one of `BROKEN`."""
    if isinstance(error, EOFError):
        reason = "truncated"
    elif isinstance(error, TimeoutError):
        reason = "timeout"
    elif isinstance(error, pa.ArrowNotImplementedError):
        reason = "unsupported"
    elif isinstance(error, OSError) and not _SAYS_CORRUPT.search(str(error)):
        reason = "io"  # Arrow raises OSError for damaged pages too
    else:
        reason = "corrupt"
    return f"{reason}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """First line of an exception's text, short enough for a table."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _measure_parquet(file: SourceFile, source: SourceConfig) -> FileFacts:
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


def is_image_member(member: tarfile.TarInfo) -> bool:
    """Whether a tar member is a row."""
    name = PurePosixPath(member.name)
    return member.isfile() and name.suffix.lower() in IMAGE_EXTENSIONS and not name.name.startswith(".")


def _measure_tar(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    rows, note = 0, None
    # Seeks from header to header where the file is not compressed: the count does not depend on the reader.
    with open_file(file.uri) as handle, tarfile.open(fileobj=handle, mode="r:*") as tar:
        try:
            for member in tar:
                rows += is_image_member(member)
        except BROKEN as error:
            note = f"{file.uri} ends early, after {rows} images: {one_line(error)}"
    return FileFacts(((rows, file.size),), note=note)


def open_raw(uri: str) -> IO[bytes]:
    """A binary file, unzipped where its name ends in .gz."""
    handle: Any = open_file(uri)
    opened: IO[bytes] = gzip.open(handle) if split_uri(uri)[1].endswith(".gz") else handle  # type: ignore[assignment] # noqa: SIM115
    return opened


def read_idx_header(handle: IO[bytes]) -> tuple[int, int, int]:
    """(images, height, width) of an IDX image file; ValueError if it is something else."""
    magic, count, height, width = struct.unpack(">IIII", handle.read(16))
    if magic != IDX_IMAGES_MAGIC:
        raise ValueError(f"magic number {magic:#x} is not that of IDX images ({IDX_IMAGES_MAGIC:#06x})")
    return count, height, width


def _measure_idx(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    with open_raw(file.uri) as handle:
        count, height, width = read_idx_header(handle)
    return FileFacts(((count, count * height * width),))


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


def _measure_cifar(file: SourceFile, source: SourceConfig) -> FileFacts:
    del source
    record, size = cifar_record(file.uri)
    return FileFacts(((-(-size // record), size),))


def make_units(
    role: str, index: int, source: SourceConfig, format_name: str, files: list[tuple[SourceFile, FileFacts, str]]
) -> list[Unit]:
    """Cut measured files (with the prefix of their image ids) into units, in order; applies `source.rows`."""
    units = []
    if format_name == "images":
        units += [
            _unit(role, index, format_name, [f for f, _, _ in group], [p for _, _, p in group], 0, len(group))
            for group in _groups(files)
        ]
    else:
        for file, facts, prefix in files:
            if facts.error or format_name != "parquet":
                total = sum(n for n, _ in facts.parts)
                step = total if facts.error or format_name == "webdataset" else UNIT_ROWS
                for start in range(0, total, max(step, 1)):
                    rows = min(step, total - start)
                    units.append(_unit(role, index, format_name, [file], [prefix], start, rows, error=facts.error))
            else:
                units += _parquet_units(role, index, file, facts, prefix)
    return units if source.rows is None else _clip(units, *source.rows)


def _unit_id(role: str, index: int, first: str, start: int) -> str:
    return f"{role}/{index}/{first}@{start}"


def _unit(
    role: str, index: int, format_name: str, files: list[SourceFile], ids: list[str], start: int, rows: int, **more: Any
) -> Unit:
    return Unit(
        unit_id=_unit_id(role, index, ids[0], start),
        role=role,
        source=index,
        format=format_name,
        files=tuple(f.uri for f in files),
        ids=tuple(ids),
        start=start,
        rows=rows,
        **more,
    )


def _groups(files: list[tuple[SourceFile, FileFacts, str]]) -> Iterator[list[tuple[SourceFile, FileFacts, str]]]:
    group: list[tuple[SourceFile, FileFacts, str]] = []
    size = 0
    for item in files:
        if group and (len(group) >= UNIT_FILES or size + item[0].size > UNIT_BYTES):
            yield group
            group, size = [], 0
        group.append(item)
        size += item[0].size
    if group:
        yield group


def _parquet_units(role: str, index: int, file: SourceFile, facts: FileFacts, prefix: str) -> Iterator[Unit]:
    start = rows = size = 0
    first = 0
    for number, (group_rows, group_bytes) in enumerate(facts.parts):
        if rows and (rows + group_rows > UNIT_ROWS or size + group_bytes > UNIT_BYTES):
            yield _unit(role, index, "parquet", [file], [prefix], start, rows, first_group=first, group_start=start)
            start, rows, size, first = start + rows, 0, 0, number
        rows += group_rows
        size += group_bytes
    if rows:
        yield _unit(role, index, "parquet", [file], [prefix], start, rows, first_group=first, group_start=start)


def _clip(units: list[Unit], start: int, stop: int) -> list[Unit]:
    kept, seen = [], 0
    for unit in units:
        low, high = max(start - seen, 0), min(stop - seen, unit.rows)
        seen += unit.rows
        if low >= high:
            continue
        if low == 0 and high == unit.rows:
            kept.append(unit)
            continue
        if unit.format == "images":
            kept.append(with_files(unit, range(low, high)))
            continue
        unit = replace(unit, start=unit.start + low, rows=high - low)
        kept.append(replace(unit, unit_id=_unit_id(unit.role, unit.source, unit.ids[0], unit.start)))
    return kept


def with_files(unit: Unit, positions: Sequence[int]) -> Unit:
    """The group of single images `unit` with those at `positions` only."""
    files, ids = (tuple(values[p] for p in positions) for values in (unit.files, unit.ids))
    return replace(unit, unit_id=_unit_id(unit.role, unit.source, ids[0], 0), files=files, ids=ids, rows=len(positions))
