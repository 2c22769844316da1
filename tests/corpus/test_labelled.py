"""Labels of P, test and train: which rows, and which teacher class each row is."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pukd_ray.config import SourceConfig, TeacherConfig
from pukd_ray.corpus.labelled import LabelError, Labelled, check_same_names, index_labelled
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.plan import measure_units

pytestmark = pytest.mark.usefixtures("ray_cluster")


def parquet(path: Path, labels: list[Any], name: str = "label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [b"x"] * len(labels), name: labels}), path, row_group_size=2)
    return path


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def index(
    *sources: SourceConfig, num_classes: int = 3, classes: tuple[str, ...] | None = None, role: str = "positives"
) -> Labelled:
    units = measure_units({role: sources}, list_inputs({role: sources}).table, print)
    teacher = TeacherConfig(
        arch="lenet5",
        weights="w",
        num_classes=num_classes,
        classes=classes,
        input_size=28,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
    return index_labelled(role, units, sources, teacher)


def found(labelled: Labelled) -> list[tuple[str, int, int]]:
    """(file name, row, class) of each row."""
    rows = []
    for w in labelled.requests:
        assert w.positions is not None
        assert w.labels is not None
        for position, label in zip(w.positions.tolist(), w.labels.tolist(), strict=True):
            file = w.unit.files[position if w.unit.format == "images" else 0]
            rows.append((Path(file).name, w.unit.start + position, label))
    return rows


def fault(*sources: SourceConfig, **more: Any) -> str:
    with pytest.raises(LabelError) as caught:
        index(*sources, **more)
    return str(caught.value)


def test_integers_are_teacher_indices(tmp_path: Path) -> None:
    parquet(tmp_path / "p/a.parquet", [2, 0, 2])
    other = parquet(tmp_path / "q/b.parquet", [1])
    labelled = index(SourceConfig(uri=str(tmp_path / "p")), SourceConfig(uri=str(other)))
    assert found(labelled) == [("a.parquet", 0, 2), ("a.parquet", 1, 0), ("a.parquet", 2, 2), ("b.parquet", 0, 1)]
    assert labelled.classes is None
    assert labelled.count == 4
    assert labelled.class_counts(3).tolist() == [1, 1, 2]
    assert labelled.left_out == 0


def test_names_are_numbered_by_the_teacher_or_sorted(tmp_path: Path) -> None:
    source = SourceConfig(uri=str(images(tmp_path, "dog/1.png", "cat/2.png", "emu/3.png", "cat/4.png")))
    labelled = index(source)
    assert labelled.classes == ("cat", "dog", "emu")
    assert [label for _, _, label in found(labelled)] == [0, 0, 1, 2]
    labelled = index(source, classes=("emu", "cat", "dog"))
    assert labelled.classes == ("emu", "cat", "dog")
    assert [label for _, _, label in found(labelled)] == [1, 1, 2, 0]


def test_the_column_can_be_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["b", "a"], name="class")
    labelled = index(SourceConfig(uri=str(path), label_column="class"), num_classes=2)
    assert [label for _, _, label in found(labelled)] == [1, 0]


def test_label_map_translates_and_leaves_out(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [0, 2, 4, 1, 4, 3])
    labelled = index(SourceConfig(uri=str(path), label_map={0: 0, 2: "b", "4": 2}), classes=("a", "b", "c"))
    assert found(labelled) == [("a.parquet", 0, 0), ("a.parquet", 1, 1), ("a.parquet", 2, 2), ("a.parquet", 4, 2)]
    assert labelled.left_out == 2
    names = SourceConfig(uri=str(images(tmp_path / "i", "cat/1.png", "dog/2.png")), label_map={"dog": 2})
    labelled = index(names)
    assert [(name, label) for name, _, label in found(labelled)] == [("2.png", 2)]
    assert labelled.left_out == 1


def test_per_class_takes_the_first_by_path_and_row(tmp_path: Path) -> None:
    parquet(tmp_path / "b.parquet", [0, 1, 1, 2])
    parquet(tmp_path / "a.parquet", [1, 0, 1, 0, 0])
    labelled = index(SourceConfig(uri=str(tmp_path), per_class=2))
    assert found(labelled) == [
        *(("a.parquet", 0, 1), ("a.parquet", 1, 0), ("a.parquet", 2, 1), ("a.parquet", 3, 0), ("b.parquet", 3, 2))
    ]
    mapped = index(SourceConfig(uri=str(tmp_path), per_class=3, label_map={0: 0, 1: 0, 2: 1}))
    assert found(mapped) == [
        *(("a.parquet", 0, 0), ("a.parquet", 1, 0), ("a.parquet", 2, 0), ("b.parquet", 3, 1)),
    ]


def test_skip_per_class_takes_the_next_ones(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [0, 0, 1, 0, 1, 0])
    labelled = index(SourceConfig(uri=str(tmp_path), per_class=2, skip_per_class=1))
    assert found(labelled) == [("a.parquet", 1, 0), ("a.parquet", 3, 0), ("a.parquet", 4, 1)]


def test_unreadable_images_with_a_label_stay(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.nulls(2, pa.binary()), "label": [1, 0]}), tmp_path / "a.parquet")
    assert found(index(SourceConfig(uri=str(tmp_path)))) == [("a.parquet", 0, 1), ("a.parquet", 1, 0)]


@pytest.mark.parametrize("label", [3, -1])
def test_an_index_out_of_range_names_file_and_row(tmp_path: Path, label: int) -> None:
    path = parquet(tmp_path / "a.parquet", [0, 1, 2, label])
    assert fault(SourceConfig(uri=str(path))) == (
        f"positives: {path} row 3: label {label} is not a teacher index in [0, 3): are the labels shifted, or is "
        "teacher.num_classes wrong? `label_map` translates labels"
    )


def test_a_missing_label_names_file_and_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [0, 1, None, 2])
    assert fault(SourceConfig(uri=str(path)), role="test") == (
        f"test: {path} row 2 has no label: is label_column 'label' right?"
    )
    assert fault(SourceConfig(uri=str(path), label_column="y")) == (
        f"positives: {path} row 0 has no label: is label_column 'y' right?"
    )
    folder = images(tmp_path / "i", "cat/1.png", "cat/2.png", "z.png")
    assert fault(SourceConfig(uri=str(folder))) == (
        f"positives: {folder / 'z.png'} has no label: put it into a sub-folder named after its class"
    )


def test_a_file_that_cannot_be_read_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    assert fault(SourceConfig(uri=str(tmp_path))) == (
        f"positives: {tmp_path / 'a.parquet'} row 0 has no label: empty: the file has no bytes"
    )


def test_too_many_names_or_unknown_ones(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", list("fedcba"))
    assert fault(SourceConfig(uri=str(path))) == (
        "positives: 6 label names (a, b, c, d, e, ...), but teacher.num_classes is 3: list the names in teacher "
        "order in teacher.classes"
    )
    assert fault(SourceConfig(uri=str(path)), num_classes=5, classes=("f", "e", "c", "b", "a")) == (
        f"positives: {path} row 2: label 'd' is not in teacher.classes (f, e, c, b, a)"
    )


@pytest.mark.parametrize(("labels", "shown"), [([1.0, 2.5], "2.5"), ([True], "True"), ([[1]], "[1]")])
def test_labels_of_other_kinds(tmp_path: Path, labels: list[Any], shown: str) -> None:
    path = parquet(tmp_path / "a.parquet", labels)
    assert fault(SourceConfig(uri=str(path))) == (
        f"positives: {path} row {len(labels) - 1}: label {shown} is neither a teacher index nor a name"
    )


def test_whole_numbers_stored_as_floats_are_indices(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [1.0, 2.0])
    labelled = index(SourceConfig(uri=str(path)))
    assert found(labelled) == [("a.parquet", 0, 1), ("a.parquet", 1, 2)]
    assert all(w.labels is not None and w.labels.dtype == np.int64 for w in labelled.requests)


def test_names_of_positives_and_test_are_the_same(tmp_path: Path) -> None:
    p, same, other = (
        index(SourceConfig(uri=str(parquet(tmp_path / f"{i}.parquet", list(names)))), role="test")
        for i, names in enumerate(("cab", "abc", "abd"))
    )
    check_same_names(p, same)
    check_same_names(p, index(SourceConfig(uri=str(parquet(tmp_path / "n.parquet", [0, 1, 2])))))
    with pytest.raises(LabelError, match=r"^test: its label names are not those of positives \(c, d\): list the names"):
        check_same_names(p, other)
