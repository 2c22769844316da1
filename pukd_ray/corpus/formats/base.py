"""What a format says about itself: everything that the rest of the package asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.files import FileFacts, SourceFile
from pukd_ray.corpus.rows import ImageRow
from pukd_ray.corpus.units import Measured, Owner, Unit


def _none(name: str) -> bool:
    del name
    return False


def every_name(name: str) -> bool:
    """For formats whose files may be called anything."""
    del name
    return True


def _no_hint(unit: Unit, source: SourceConfig) -> str:
    del unit, source
    return ""


def _unnamed(unit: Unit, source: SourceConfig) -> tuple[str, ...] | None:
    del unit, source
    return None


def is_the_column_right(unit: Unit, source: SourceConfig) -> str:
    """Hint for formats whose labels are in a column."""
    del unit
    return f"is label_column {source.label_column!r} right?"


@dataclass(frozen=True, kw_only=True)
class Format:
    """An input format. Units carry its name only: workers look it up in `FORMATS`."""

    name: str
    """In the config and in `plan.parquet`."""
    claims: Callable[[str], bool]
    """Whether a file belongs to the format by its lower-case name without folders."""
    measure: Callable[[SourceFile, SourceConfig], FileFacts]
    """Counts the rows of a file that is not empty, if possible without reading its pixels. What it raises of `BROKEN`,
    struct.error and ValueError makes the file one unreadable row."""
    cut: Callable[[Owner, Sequence[Measured]], Iterable[Unit]]
    """Files of one source that can be read -> units, in order."""
    read: Callable[[Unit, SourceConfig, np.ndarray, bool], Iterator[ImageRow]]
    """The rows at `positions` (int64, strictly rising, at least one, within the unit), in that order, each once;
    without their bytes if the last argument is False. A row that cannot be read carries its reason. Fewer come only of
    a file that has fewer rows than were planned: it has changed since."""
    row_addressable: bool
    """Whether a row can be read without those before it, however many they are; the format's own text says what one
    row costs."""
    read_to_count: bool = False
    """Whether counting a file's rows takes as long as reading it."""
    any_name: Callable[[str], bool] = _none
    """Which files that no format claims, by name, belong to a source whose config names this format: where it claims
    none there, or where they are named one by one."""
    side_file: Callable[[str], bool] = _none
    """Whether a file that is not claimed, by its name as above, is of use to one that is: not reported as left out."""
    single_images: bool = False
    """Whether each file is one row, so that units are groups of files, and may be grouped anew."""
    has_id_column: bool = False
    """Whether `id_column` gives rows ids of the user's."""
    counts_links: bool = False
    """Whether links within its files are rows, as they were not to the first versions: their plans are made anew."""
    label_hint: Callable[[Unit, SourceConfig], str] = _no_hint
    """What to do about a row without a label."""
    label_names: Callable[[Unit, SourceConfig], tuple[str, ...] | None] = _unnamed
    """Names that a unit's file gives to its integer labels, if it does."""

    def where(self, unit: Unit, position: int) -> str:
        """The row at `position`, for a message."""
        file, row = unit.place(position)
        return file if self.single_images else f"{file} row {row}"
