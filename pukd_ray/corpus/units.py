"""Units: the pieces of a source that one task reads, each with a known order and row count.

A unit is a group of small files, a run of rows of one file, or a whole file; which of them, its format says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pukd_ray.corpus.files import FileFacts, SourceFile
from pukd_ray.run.folder import RunFolder

# A unit is what a crash costs and what one task holds in memory block by block: seconds of work, not minutes.
UNIT_ROWS = 4096
UNIT_BYTES = 64 << 20
UNIT_FILES = 512

Measured = tuple[SourceFile, FileFacts, str]
"""A file, what is known of it, and what its image ids start with."""


@dataclass(frozen=True)
class Stored:
    """Where `plan.parquet` holds a unit."""

    folder: RunFolder
    group: int
    """Of rows."""
    row: int
    """In the group."""


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
    files: Sequence[str]
    """Paths or URIs: one, or many single images."""
    ids: Sequence[str]
    """What image ids of each file start with."""
    start: int
    """First row in the file (0 for single images)."""
    rows: int
    """Rows, readable or not."""
    first_group: int = -1
    """Parquet: first row group."""
    group_start: int = 0
    """Row in the file at which that group, or `index`, starts."""
    error: str | None = None
    """Why no row of this unit can be read."""
    repeated: tuple[int, ...] = ()
    """Rows of the file whose user id, or name, an earlier row has."""
    index: bytes | None = None
    """Where the rows are in the file (`Spans.pack`), for a format that has no index of its own."""
    gone: tuple[str, ...] = ()
    """Those of `files` that are no longer listed; the plan does not hold it."""
    stored: Stored | None = None
    """Of a unit in outline: what it lacks (`index`, `repeated`) or has only when it is looked at (`files`, `ids`) is
    there (`stored_units.whole`)."""

    def place(self, position: int) -> tuple[str, int]:
        """(file, row in it) of the row at `position`."""
        return (self.files[position], 0) if len(self.files) > 1 else (self.files[0], self.start + position)


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
        ("index", pa.binary()),
        # For who has not read the lists: how many files, and the first by order, by name, and the last by name.
        ("n_files", pa.int32()),
        ("first_file", pa.string()),
        ("lowest_file", pa.string()),
        ("highest_file", pa.string()),
    ]
)
_FIELDS = [name for name in UNIT_SCHEMA.names if not name.endswith(("_file", "n_files"))]


def units_to_table(units: Iterable[Unit]) -> pa.Table:
    """Units, none of them in outline, as `plan.parquet` holds them."""
    rows = [
        {name: getattr(u, name) for name in _FIELDS}
        | {"n_files": len(u.files), "first_file": u.files[0], "lowest_file": min(u.files), "highest_file": max(u.files)}
        for u in units
    ]
    return pa.Table.from_pylist(rows, schema=UNIT_SCHEMA)


GONE = "io: no longer listed when its turn came"
"""Of images whose file has vanished since the plan was made."""


def mark_gone(units: Sequence[Unit], gone: Collection[str]) -> list[Unit]:
    """The units, with those of their files that are `gone`: their images are then rows, and nothing waits for them."""
    return [replace(u, gone=tuple(f for f in u.files if f in gone)) for u in units] if gone else list(units)


def units_from_table(table: pa.Table) -> list[Unit]:
    """Inverse of `units_to_table`."""
    lists = {"files", "ids", "repeated"}
    names = [name for name in _FIELDS if name in table.column_names]
    rows: list[dict[str, Any]] = table.select(names).to_pylist()
    return [Unit(**{k: tuple(v) if k in lists else v for k, v in row.items()}) for row in rows]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Owner:
    """Whose units are cut: the source `source` of a role, all of whose files have one format."""

    role: str
    source: int
    format: str

    def unit(self, files: Sequence[Measured], start: int, rows: int, **more: Any) -> Unit:
        """`rows` rows from `start` on of one file, or of a group of single images."""
        ids = tuple(prefix for *_, prefix in files)
        return Unit(
            unit_id=_unit_id(self.role, self.source, ids[0], start),
            role=self.role,
            source=self.source,
            format=self.format,
            files=tuple(file.uri for file, *_ in files),
            ids=ids,
            start=start,
            rows=rows,
            **more,
        )


def _unit_id(role: str, source: int, first: str, start: int) -> str:
    return f"{role}/{source}/{first}@{start}"


def indexed_parts(owner: Owner, files: Sequence[Measured]) -> Iterator[Unit]:
    """One unit per part: for formats whose files are cut, and indexed, where they are measured."""
    for measured in files:
        facts, start = measured[1], 0
        for part, (rows, _) in enumerate(facts.parts):
            index = facts.indices[part] if facts.indices else None
            repeated = tuple(row for row in facts.repeated if start <= row < start + rows)
            if rows:
                yield owner.unit([measured], start, rows, group_start=start, index=index, repeated=repeated)
            start += rows


def runs_of_rows(owner: Owner, files: Sequence[Measured]) -> Iterator[Unit]:
    """Up to `UNIT_ROWS` rows of a file each: for formats in which any row can be the first to be read."""
    for measured in files:
        total = measured[1].rows
        for start in range(0, total, UNIT_ROWS):
            yield owner.unit([measured], start, min(UNIT_ROWS, total - start))


def groups_of_files(owner: Owner, files: Sequence[Measured]) -> Iterator[Unit]:
    """Up to `UNIT_FILES` files of one row each, and no more than `UNIT_BYTES` if there are several."""
    group: list[Measured] = []
    size = 0
    for measured in files:
        if group and (len(group) >= UNIT_FILES or size + measured[0].size > UNIT_BYTES):
            yield owner.unit(group, 0, len(group))
            group, size = [], 0
        group.append(measured)
        size += measured[0].size
    if group:
        yield owner.unit(group, 0, len(group))


def clip(units: Iterable[Unit], start: int, stop: int) -> Iterator[Unit]:
    """Rows [start, stop), counted over all units, none of them in outline."""
    seen = 0
    for unit in units:
        if seen >= stop:
            return
        low, high = max(start - seen, 0), min(stop - seen, unit.rows)
        seen += unit.rows
        if low >= high:
            continue
        if low == 0 and high == unit.rows:
            yield unit
        elif len(unit.files) > 1:
            yield regroup([(unit, position) for position in range(low, high)])
        else:
            first = unit.start + low
            name = _unit_id(unit.role, unit.source, unit.ids[0], first)
            yield replace(unit, unit_id=name, start=first, rows=high - low)


def regroup(images: Sequence[tuple[Unit, int]]) -> Unit:
    """A group of the single images at (unit, position), which belong to one source; no unit is in outline."""
    files, ids = (tuple(getattr(u, name)[position] for u, position in images) for name in ("files", "ids"))
    first = images[0][0]
    name = _unit_id(first.role, first.source, ids[0], 0)
    return replace(first, unit_id=name, files=files, ids=ids, rows=len(images))
