"""Units: the pieces of a source that one task reads, each with a known order and row count.

A unit is a group of small files, a run of rows of one file, or a whole file; which of them, its format says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow as pa

from pukd_ray.corpus.files import FileFacts, SourceFile

# A unit is what a crash costs and what one task holds in memory block by block: seconds of work, not minutes.
UNIT_ROWS = 4096
UNIT_BYTES = 64 << 20
UNIT_FILES = 512

Measured = tuple[SourceFile, FileFacts, str]
"""A file, what is known of it, and what its image ids start with."""


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
    """Row in the file at which that group, or `index`, starts."""
    error: str | None = None
    """Why no row of this unit can be read."""
    repeated: tuple[int, ...] = ()
    """Rows of the file whose user id, or name, an earlier row has."""
    index: bytes | None = None
    """Where the rows are in the file (`Spans.pack`), for a format that has no index of its own."""
    gone: tuple[str, ...] = ()
    """Those of `files` that are no longer listed; the plan does not hold it."""

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
    ]
)


def units_to_table(units: list[Unit]) -> pa.Table:
    """Units as `plan.parquet` holds them."""
    return pa.Table.from_pylist([asdict(u) for u in units], schema=UNIT_SCHEMA)


GONE = "io: no longer listed when its turn came"
"""Of images whose file has vanished since the plan was made."""


def mark_gone(units: Sequence[Unit], gone: Collection[str]) -> list[Unit]:
    """The units, with those of their files that are `gone`: their images are then rows, and nothing waits for them."""
    return [replace(u, gone=tuple(f for f in u.files if f in gone)) for u in units] if gone else list(units)


def units_from_table(table: pa.Table) -> list[Unit]:
    """Inverse of `units_to_table`."""
    lists = {f.name for f in fields(Unit) if str(f.type).startswith("tuple")}
    rows: list[dict[str, Any]] = table.to_pylist()
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


def clip(units: Sequence[Unit], start: int, stop: int) -> list[Unit]:
    """Rows [start, stop), counted over all units."""
    kept, seen = [], 0
    for unit in units:
        low, high = max(start - seen, 0), min(stop - seen, unit.rows)
        seen += unit.rows
        if low >= high:
            continue
        if low == 0 and high == unit.rows:
            kept.append(unit)
        elif len(unit.files) > 1:
            kept.append(regroup([(unit, position) for position in range(low, high)]))
        else:
            first = unit.start + low
            name = _unit_id(unit.role, unit.source, unit.ids[0], first)
            kept.append(replace(unit, unit_id=name, start=first, rows=high - low))
    return kept


def regroup(images: Sequence[tuple[Unit, int]]) -> Unit:
    """A group of the single images at (unit, position), which belong to one source."""
    files, ids = (tuple(getattr(u, name)[position] for u, position in images) for name in ("files", "ids"))
    first = images[0][0]
    name = _unit_id(first.role, first.source, ids[0], 0)
    return replace(first, unit_id=name, files=files, ids=ids, rows=len(images))
