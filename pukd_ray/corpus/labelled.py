"""Labelled sources (P, test, train): which rows, and which teacher class each row is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import ray

from pukd_ray.config import SourceConfig, TeacherConfig
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.plan import measure_units
from pukd_ray.corpus.reading import ReadRequest, name_of, read_rows, with_default_label
from pukd_ray.corpus.units import Unit


class LabelError(ValueError):
    """Labels that cannot be those of the teacher's classes."""


@dataclass(frozen=True)
class Labelled:
    """Rows of one role with resolved labels, and how names became indices."""

    requests: tuple[ReadRequest, ...]
    classes: tuple[str, ...] | None
    """Class names in teacher order, where labels are names."""
    left_out: int
    """Rows whose label `label_map` does not list."""

    @property
    def count(self) -> int:
        """Labelled rows."""
        return sum(len(w.positions) for w in self.requests if w.positions is not None)

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Images per class, int64 [num_classes]."""
        labels = [w.labels for w in self.requests if w.labels is not None]
        return np.bincount(np.concatenate(labels) if labels else np.zeros(0, np.int64), minlength=num_classes)


_Names = tuple[str, ...] | None
_Labels = list[tuple[int | str | None, str | None]]


@ray.remote(num_cpus=0.25)
def _read_labels(units: list[Unit], source: SourceConfig) -> list[tuple[_Names, _Labels]]:
    """Of each unit: names that its file gives to integers, and (label, reason why there is none) of each row."""
    return [
        (
            FORMATS[unit.format].label_names(unit, source),
            [(row.label, row.error) for row in read_rows(unit, source, images=False)],
        )
        for unit in units
    ]


def index_labelled(
    role: str, units: Sequence[Unit], sources: tuple[SourceConfig, ...], teacher: TeacherConfig
) -> Labelled:
    """Read the labels of `role` (not its pixels), resolve them, apply `label_map`, `skip_per_class`, `per_class`.

    Integers are teacher indices, and so are strings of digits that `teacher.classes` does not have. Other strings are
    looked up there, else numbered in sorted order. Where a file names its integers (Hugging Face's ClassLabel) and
    `teacher.classes` has some of these names, the names count; without `teacher.classes` they are those of the classes.
    Raises LabelError naming the file and row of the first label that does not fit.
    """
    num_classes, classes = teacher.num_classes, teacher.class_names
    mine = [[u for u in units if u.role == role and u.source == i] for i in range(len(sources))]
    sources = tuple(with_default_label(s) for s in sources)
    raw = ray.get([_read_labels.remote(many, source) for many, source in zip(mine, sources, strict=True)])
    left_out = 0
    given: set[_Names] = set()
    chosen: list[tuple[Unit, int, int | str]] = []
    for many, source, labels_of_units in zip(mine, sources, raw, strict=True):
        mapping = source.label_map
        per_class: Counter[int | str] = Counter()
        for unit, (numbered, labels) in zip(many, labels_of_units, strict=True):
            given.add(None if mapping else numbered)
            counts = numbered is not None and not set(numbered).isdisjoint(classes or ())
            for position, (label, error) in enumerate(labels):
                name = name_of(label, numbered)
                if mapping is not None and label is not None:
                    key = next((key for key in (str(label), name) if key in mapping), None)
                    if key is None:
                        left_out += 1
                        continue
                    label = mapping[key]
                elif name is not None and counts:
                    label = name
                if label is None:
                    raise LabelError(
                        f"{_where(role, unit, position)} has no label"
                        + (f": {error}" if error else _label_hint(unit, source))
                    )
                if isinstance(label, bool) or not isinstance(label, int | str):
                    raise LabelError(
                        f"{_where(role, unit, position)}: label {label!r} is neither a teacher index nor a name"
                    )
                per_class[label] += 1
                rank = per_class[label] - source.skip_per_class
                if rank > 0 and (source.per_class is None or rank <= source.per_class):
                    chosen.append((unit, position, label))
    names = sorted({label for _, _, label in chosen if isinstance(label, str)})
    if all(name.isdecimal() and name.isascii() for name in names) and set(names).isdisjoint(classes or ()):
        # Numbers are numbers, in folders' names too: in the order of text, 10 would come before 2.
        chosen = [(unit, position, int(label)) for unit, position, label in chosen]
        names = []
    if names and classes is None:
        if len(names) != num_classes:
            raise LabelError(
                f"{role}: {len(names)} label names ({_first_few(names)}), but "
                f"teacher.num_classes is {num_classes}: list the names in teacher order in teacher.classes"
            )
        classes = tuple(names)
    if classes is None and len(given) == 1 and (only := given.pop()) is not None and len(only) == num_classes:
        classes = only
    number = {name: i for i, name in enumerate(classes or ())}
    resolved: dict[str, tuple[Unit, list[int], list[int]]] = {}
    for unit, position, label in chosen:
        index = number.get(label) if isinstance(label, str) else label
        where = _where(role, unit, position)
        if index is None:
            raise LabelError(f"{where}: label {label!r} is not in teacher.classes ({_first_few(classes or ())})")
        if not 0 <= index < num_classes:
            raise LabelError(
                f"{where}: label {index} is not a teacher index in [0, {num_classes}): "
                f"are the labels shifted, or is teacher.num_classes wrong? `label_map` translates labels"
            )
        entry = resolved.setdefault(unit.unit_id, (unit, [], []))
        entry[1].append(position)
        entry[2].append(index)
    requests = tuple(
        ReadRequest(unit, np.array(positions, np.int64), np.array(labels, np.int64))
        for unit, positions, labels in resolved.values()
    )
    return Labelled(requests, classes, left_out)


def check_same_names(positives: Labelled, test: Labelled) -> None:
    """LabelError where P and test number different names: the same number would stand for two classes."""
    if positives.classes and test.classes and positives.classes != test.classes:
        other = sorted(set(test.classes).symmetric_difference(positives.classes))
        raise LabelError(
            f"test: its label names are not those of positives ({_first_few(other)}): list the names in teacher order "
            "in teacher.classes"
        )


def index_sources(
    role: str, sources: tuple[SourceConfig, ...], teacher: TeacherConfig, tell: Callable[[str], None]
) -> Labelled:
    """`index_labelled` for sources that no run has planned; `tell` hears of files that cannot be read."""
    units = measure_units({role: sources}, list_inputs({role: sources}).table, tell)
    return index_labelled(role, units, sources, teacher)


def _where(role: str, unit: Unit, position: int) -> str:
    return f"{role}: {FORMATS[unit.format].where(unit, position)}"


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _label_hint(unit: Unit, source: SourceConfig) -> str:
    hint = FORMATS[unit.format].label_hint(unit, source)
    return f": {hint}" if hint else ""
