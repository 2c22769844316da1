"""Tables that may be larger than memory: on disk while they are made, and in the run folder in groups of rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pukd_ray.run.folder import RunFolder

PIECE_ROWS = 32_768
"""Of files that are looked at at once."""
GROUP_BYTES = 4 << 20
"""Of a group of rows in the run folder: what is read for one of them."""


def spool(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """All rows of `tables` as one table in a temporary file of this machine, which goes when the table does.

    It takes memory only where it is looked at.
    """
    with tempfile.NamedTemporaryFile(prefix="pukd-") as file:
        with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            some: list[pa.Table] = []
            for table in tables:
                some.append(table)
                if sum(map(len, some)) >= PIECE_ROWS or sum(each.nbytes for each in some) >= GROUP_BYTES:
                    writer.write_table(pa.concat_tables(some).combine_chunks())
                    some = []
            writer.write_table(pa.concat_tables([schema.empty_table(), *some]).combine_chunks())
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def spool_rows(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """The same of rows as tuples."""

    def tables() -> Iterator[pa.Table]:
        some: list[tuple[Any, ...]] = []
        for row in rows:
            some.append(row)
            if len(some) == PIECE_ROWS:
                yield _of_rows(some, schema)
                some = []
        if some:
            yield _of_rows(some, schema)

    return spool(tables(), schema)


def _of_rows(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)], schema=schema)


def pieces(table: pa.Table) -> Iterator[pa.Table]:
    """Its rows, `PIECE_ROWS` at most at a time."""
    return (pa.Table.from_batches([batch]) for batch in table.to_batches(max_chunksize=PIECE_ROWS) if batch.num_rows)


def write_groups(folder: RunFolder, name: str, table: pa.Table) -> None:
    """Write a Parquet file whose groups of rows have about `GROUP_BYTES` each."""

    def write(sink: Any) -> None:
        with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
            for piece in pieces(table):
                rows = max(1, int(piece.num_rows * GROUP_BYTES / max(piece.nbytes, 1)))
                writer.write_table(piece, row_group_size=rows)

    folder.write(name, write)


def read_groups(folder: RunFolder, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The groups of rows of a Parquet file; of `columns` those that are there."""
    with folder.open(name) as source:
        parquet = pq.ParquetFile(source)
        there = None if columns is None else [c for c in columns if c in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, there)


def conform(schema: pa.Schema, derive: dict[str, Callable[[pa.Table], pa.Array]]) -> Callable[[pa.Table], pa.Table]:
    """What gives a table of an earlier version the columns of `schema`: derived from its others, else null."""

    def conformed(table: pa.Table) -> pa.Table:
        for field in schema:
            if field.name not in table.column_names:
                column = derive[field.name](table) if field.name in derive else pa.nulls(len(table), field.type)
                table = table.append_column(field, column)
        return table.select(schema.names).cast(schema)

    return conformed
