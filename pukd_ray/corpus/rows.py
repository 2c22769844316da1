"""Rows as readers give them: ids, labels and truth in one form, whatever the format."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pukd_ray.corpus.units import Unit


@dataclass(frozen=True)
class ImageRow:
    """One image as read; `row` counts within the file."""

    image_id: str
    source: str
    row: int
    image: bytes | None
    label: int | str | None = None
    relevant: bool | None = None
    error: str | None = None


def row_id(unit: Unit, row: int) -> str:
    """Id of a row of the unit's file that the user gave none."""
    return f"{unit.ids[0]}#{row}"


def users_id(unit: Unit, row: int, given: Any, repeated: Collection[int]) -> tuple[str, str | None]:
    """(id, fault) of a row whose `id_column` says `given`; `repeated` are the rows whose id an earlier row has."""
    if row in repeated:
        return row_id(unit, row), f"duplicate_id: {given!r} is the id of an earlier row"
    return row_id(unit, row) if given is None else str(given), None


def failed_rows(unit: Unit, rows: Iterable[int], reason: str | None) -> Iterator[ImageRow]:
    """Rows of the unit's file of which nothing is known but, perhaps, a reason."""
    for row in rows:
        yield ImageRow(row_id(unit, row), unit.files[0], row, None, error=reason)


def as_label(value: Any) -> Any:
    """A label as an int or a str where it stands for one: 3.0 is what pandas makes of 3 next to a null."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value == "" else value


def as_truth(value: Any) -> bool | None:
    """A truth column's value; None if it is neither boolean nor a number."""
    return bool(value) if isinstance(value, bool | int) else None
