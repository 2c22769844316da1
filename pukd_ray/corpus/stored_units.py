"""Units of a run's plan in outline: a driver holds some hundred bytes of each, whatever it has in files and indices.

The rest stays in `plan.parquet`, in groups of rows, of which whoever reads a unit's images reads one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, overload

import pyarrow.parquet as pq

from pukd_ray.corpus.tables import read_groups
from pukd_ray.corpus.units import Stored, Unit, mark_gone, units_from_table
from pukd_ray.run.folder import RunFolder

PLAN = "plan.parquet"
_LISTS = ("files", "ids", "repeated", "index", "lowest_file", "highest_file")


@dataclass(frozen=True)
class StoredNames(Sequence[str]):
    """Files, or ids, of a unit of many: all but their number and the first are read when they are looked at."""

    at: Stored
    column: str
    length: int
    first: str

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if at == 0:
            return self.first
        names: Sequence[str] = getattr(_stored_unit(self.at), self.column)
        return names[at]

    def __iter__(self) -> Iterator[str]:
        return iter(getattr(_stored_unit(self.at), self.column))


@lru_cache(maxsize=4)
def _group(folder: RunFolder, group: int) -> list[Unit]:
    with folder.open(PLAN) as source:
        return units_from_table(pq.ParquetFile(source).read_row_group(group))


def _stored_unit(at: Stored) -> Unit:
    return _group(at.folder, at.group)[at.row]


def whole(unit: Unit) -> Unit:
    """The unit with all that the plan has of it."""
    if unit.stored is None:
        return unit
    found = _stored_unit(unit.stored)
    if found.unit_id != unit.unit_id:
        raise RuntimeError(f"{unit.stored.folder.display}/{PLAN} has changed while a run read it: start again")
    return replace(found, rows=unit.rows, gone=unit.gone)


def read_units(folder: RunFolder, gone: Collection[str] = ()) -> list[Unit]:
    """All units of the plan, those of the corpus in outline; `gone`: files that are no longer listed.

    A plan of an earlier version has no outlines: its units come whole.
    """
    with folder.open(PLAN) as source:
        schema = pq.read_schema(source)
    if "n_files" not in schema.names:
        return mark_gone(units_from_table(folder.read_table(PLAN)), gone)
    outlined = [name for name in schema.names if name not in _LISTS]
    units: list[Unit] = []
    for group, table in enumerate(read_groups(folder, PLAN, outlined)):
        rows: list[dict[str, Any]] = table.to_pylist()
        for row, values in enumerate(rows):
            units.append(_outline(values, Stored(folder, group, row)))
    units = [unit if unit.role == "corpus" else whole(unit) for unit in units]
    return mark_gone(units, gone)


def _outline(values: dict[str, Any], at: Stored) -> Unit:
    count, file = values.pop("n_files"), values.pop("first_file")
    identity = values["unit_id"]
    first_id = identity[len(f"{values['role']}/{values['source']}/") :].rpartition("@")[0]
    files: Sequence[str] = (file,)
    ids: Sequence[str] = (first_id,)
    if count > 1:
        files, ids = StoredNames(at, "files", count, file), StoredNames(at, "ids", count, first_id)
    return Unit(**values, files=files, ids=ids, stored=at)


def units_holding(folder: RunFolder, files: Collection[str]) -> Iterator[Unit]:
    """Units of the corpus that have one of the files; of the plan only groups of rows are read that may have any."""
    wanted = set(files)
    names = sorted(wanted)
    with folder.open(PLAN) as source:
        metadata = pq.read_metadata(source)
    columns = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    ends = [columns[name] for name in ("lowest_file", "highest_file") if name in columns]
    for group in range(metadata.num_row_groups):
        facts = [metadata.row_group(group).column(i).statistics for i in ends]
        known = len(facts) == 2 and all(each is not None and each.has_min_max for each in facts)
        if known and bisect_left(names, facts[0].min) == bisect_right(names, facts[1].max):
            continue
        for unit in _group(folder, group):
            if unit.role == "corpus" and not wanted.isdisjoint(unit.files):
                yield unit
