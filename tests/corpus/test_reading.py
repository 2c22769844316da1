"""Reading: every row of a unit once, in order, with its id, bytes, label, truth, or the reason why not."""

from dataclasses import replace
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky import Flaky
from small_files import MEMBERS, PNG, every_format, many_formats, on_flaky, units_of, write_idx, write_tar

from pukd_ray import storage
from pukd_ray.config import SourceConfig
from pukd_ray.corpus import reading, units
from pukd_ray.corpus.datasource import read_units
from pukd_ray.corpus.formats import images as images_module
from pukd_ray.corpus.formats import parquet
from pukd_ray.corpus.pixels import PixelSpec, decode
from pukd_ray.corpus.plan import measure
from pukd_ray.corpus.reading import (
    ROW_SCHEMA,
    ReadRequest,
    content_hash,
    read_blocks,
    read_rows,
    split_requests,
)
from pukd_ray.corpus.rows import ImageRow
from pukd_ray.corpus.sources import list_source
from pukd_ray.corpus.units import Unit, mark_gone
from pukd_ray.errors import MissingError, PlaceError, RunError
from pukd_ray.storage import read_bytes


def read(uri: Path | str, *, images: bool = True, **more: Any) -> list[ImageRow]:
    source = SourceConfig(uri=str(uri), **more)
    return [row for unit in units_of(source) for row in read_rows(unit, source, images=images)]


def ids(rows: list[ImageRow]) -> list[str]:
    return [row.image_id for row in rows]


# -- Parquet ----------------------------------------------------------------------------------------------------


def test_parquet_rows(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": pa.array([PNG[0], None, b"", PNG[3], PNG[4]], pa.binary()),
            "label": [3, None, 0, 1, 2],
            "truth": [True, False, None, True, False],
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2)
    rows = read(tmp_path, label_column="label", relevant_column="truth")
    assert rows == [
        ImageRow("a.parquet#0", str(path), 0, PNG[0], 3, True),
        ImageRow("a.parquet#1", str(path), 1, None, None, False),
        ImageRow("a.parquet#2", str(path), 2, b"", 0, None),
        ImageRow("a.parquet#3", str(path), 3, PNG[3], 1, True),
        ImageRow("a.parquet#4", str(path), 4, PNG[4], 2, False),
    ]
    light = read(tmp_path, label_column="label", relevant_column="truth", images=False)
    assert [(r.image_id, r.row, r.image, r.label, r.relevant, r.error) for r in light] == [
        (r.image_id, r.row, None, r.label, r.relevant, None) for r in rows
    ]
    # Without any column to read, the rows are still counted.
    assert ids(read(path, images=False)) == ids(rows)


def test_hugging_face_structs_and_other_column_names(tmp_path: Path) -> None:
    images = [{"bytes": PNG[1], "path": "one.png"}, {"bytes": None, "path": "two.png"}, None]
    table = pa.table({"picture": images, "name": ["cat", "dog", ""]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path, image_column="picture", label_column="name")
    assert [(r.image, r.label) for r in rows] == [(PNG[1], "cat"), (None, "dog"), (None, None)]


def test_labels_of_any_column_type(tmp_path: Path) -> None:
    def labels(column: pa.Array) -> list[Any]:
        pq.write_table(pa.table({"image": [PNG[0]] * len(column), "y": column}), tmp_path / "a.parquet")
        return [r.label for r in read(tmp_path, label_column="y")]

    assert labels(pa.array([3, None], pa.uint8())) == [3, None]
    assert labels(pa.array([3.0, float("nan"), 2.5])) == [3, None, 2.5]
    assert labels(pa.array(["3", "x"]).dictionary_encode()) == ["3", "x"]
    assert labels(pa.array([b"cat"])) == ["cat"]


def test_ids_of_the_user(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PNG[:3], "key": pa.array([7, None, 9])}), tmp_path / "a.parquet")
    assert ids(read(tmp_path, id_column="key")) == ["7", "a.parquet#1", "9"]


def test_a_damaged_page_costs_the_rest_of_its_row_group_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    images = [rng.bytes(400) for _ in range(9)]
    options = {"compression": "gzip", "use_dictionary": False, "column_encoding": {"image": "PLAIN"}}
    pq.write_table(pa.table({"image": images}), path, row_group_size=3, **options)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = read(path)
    assert ids(rows) == [f"a.parquet#{i}" for i in range(9)]
    assert [r.image for r in rows[:3] + rows[6:]] == images[:3] + images[6:]
    assert [r.error for r in rows[:3] + rows[6:]] == [None] * 6
    assert all(r.error is not None and r.error.startswith("corrupt: ") and r.image is None for r in rows[3:6])


def test_a_file_that_changed_or_vanished_after_planning(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": PNG[:4]}), path)
    source = SourceConfig(uri=str(path))
    (unit,) = units_of(source)
    pq.write_table(pa.table({"image": PNG[:3]}), path)
    with pytest.raises(RuntimeError, match="3 rows were read where the plan counted 4: did the file change"):
        list(read_rows(unit, source))
    path.unlink()
    with pytest.raises(MissingError, match=rf"^{path}: is not there \(.*\): bring it back, and run the same command"):
        list(read_rows(unit, source))


def test_repeated_ids_are_error_rows_unless_there_is_a_worse_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [PNG[0], PNG[1], b""], "key": ["a", "a", "a"]}), path)
    source = SourceConfig(uri=str(path), id_column="key")
    (unit,) = units_of(source)
    unit = Unit(**{**vars(unit), "repeated": (1, 2)})
    assert [(r.image_id, r.error) for r in read_rows(unit, source)] == [
        ("a", None),
        ("a.parquet#1", "duplicate_id: 'a' is the id of an earlier row"),
        ("a.parquet#2", "empty: no bytes"),
    ]


# -- folders of images ------------------------------------------------------------------------------------------


def image_folder(folder: Path) -> None:
    for name, data in {
        "cat/1.png": PNG[1],
        "cat/deep/2.png": PNG[2],
        "dog/3.png": b"",
        "dog/4.jpg": b"this is no picture",
        "5.png": PNG[5],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_a_folder_of_images(tmp_path: Path) -> None:
    image_folder(tmp_path)
    rows = read(tmp_path)
    assert rows == [
        ImageRow("5.png", str(tmp_path / "5.png"), 0, PNG[5], None),
        ImageRow("cat/1.png", str(tmp_path / "cat/1.png"), 0, PNG[1], "cat"),
        ImageRow("cat/deep/2.png", str(tmp_path / "cat/deep/2.png"), 0, PNG[2], "cat"),
        ImageRow("dog/3.png", str(tmp_path / "dog/3.png"), 0, b"", "dog"),
        ImageRow("dog/4.jpg", str(tmp_path / "dog/4.jpg"), 0, b"this is no picture", "dog"),
    ]
    assert [(r.image_id, r.label) for r in read(tmp_path, images=False)] == [(r.image_id, r.label) for r in rows]


def test_an_image_that_vanished_is_no_row_but_a_link_to_nothing_is(tmp_path: Path) -> None:
    image_folder(tmp_path)
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    gone = tmp_path / "cat/1.png"
    gone.unlink()
    with pytest.raises(MissingError, match=rf"^{gone}: is not there"):
        list(read_rows(unit, source))
    gone.symlink_to(tmp_path / "nowhere.png")
    rows = list(read_rows(unit, source))
    assert [r.error for r in rows] == [None, "io: a link to nothing", None, None, None]


def test_labels_are_no_truth(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array(PNG[:3], pa.binary()), "label": [0, 1, 7]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path, label_column="label", relevant_column="label")
    assert [(r.relevant, r.error) for r in rows] == [
        (False, None),
        (True, None),
        (None, "corrupt: relevant_column: 7 is neither true nor false"),
    ]


def test_constant_truth_and_truth_by_label(tmp_path: Path) -> None:
    image_folder(tmp_path)
    assert [r.relevant for r in read(tmp_path, relevant=False)] == [False] * 5
    assert [r.relevant for r in read(tmp_path, relevant_labels=["cat", "deep"])] == [None, True, True, False, False]
    assert [r.relevant for r in read(tmp_path)] == [None] * 5


def test_truth_by_label_is_unknown_where_there_is_no_label(tmp_path: Path) -> None:
    table = pa.table({"image": PNG[:3], "label": ["cat", None, "dog"], "kind": [1, None, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [r.relevant for r in read(tmp_path, relevant_labels=["cat"])] == [True, None, False]
    assert [r.relevant for r in read(tmp_path, relevant_labels=[2], label_column="kind")] == [False, None, True]


def test_a_file_that_breaks_after_planning_has_no_names_of_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PNG[:3], "label": ["cat"] * 3}), tmp_path / "a.parquet")
    source = SourceConfig(uri=str(tmp_path), relevant_labels=["cat"])
    (unit,) = units_of(source)
    (tmp_path / "a.parquet").write_bytes(b"no Parquet" * 9)
    rows = list(read_rows(unit, source))
    assert [(r.relevant, str(r.error).partition(":")[0]) for r in rows] == [(None, "corrupt")] * 3


def test_labels_as_truth_need_their_column(tmp_path: Path) -> None:
    for folder, columns in (("label=cat", {}), ("label=__HIVE_DEFAULT_PARTITION__", {}), ("x", {"kind": ["cat"] * 2})):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"image": PNG[:2], **columns}), tmp_path / folder / "a.parquet")
    rows = read(tmp_path, relevant_labels=["cat"])
    assert [r.relevant for r in rows] == [None, None, True, True, None, None]
    assert [r.error for r in rows] == [None] * 4 + [
        "unsupported: no column label for relevant_labels: set label_column (columns: image, kind)"
    ] * 2
    assert [r.relevant for r in read(tmp_path / "x", relevant_labels=["cat"], label_column="kind")] == [True, True]


# -- tars -------------------------------------------------------------------------------------------------------


TAR_IDS = ["a/0.png", "a/1.png", "2.png", "3.png", "4.left.png", "4.right.PNG", "5.png", "6.png", "3.png#8", "8.png"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_tars(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.tar{suffix}"
    write_tar(path, MEMBERS, f"w:{suffix[1:]}")
    rows = read(tmp_path)
    assert ids(rows) == [f"{path.name}#{name}" for name in TAR_IDS]
    assert [r.row for r in rows] == list(range(10))
    assert [r.image for r in rows] == [*PNG[:6], b"", PNG[6], PNG[7], PNG[8]]
    assert [r.label for r in rows] == [3, "cat", None, None, "bird", "bird", None, "²", None, -1]
    assert [r.error for r in rows] == [None] * 8 + ["duplicate_id: 3.png is in this tar twice", None]
    other = read(tmp_path, label_column="kind", relevant_column="ok")
    assert [(r.label, r.relevant) for r in other][:2] == [(3, None), (4, True)]
    light = read(tmp_path, images=False)
    assert [(r.image_id, r.label, r.image) for r in light] == [(r.image_id, r.label, None) for r in rows]


def test_a_null_in_the_json_of_a_sample_leaves_its_cls(tmp_path: Path) -> None:
    members = [("1.png", PNG[0]), ("1.cls", b"7"), ("1.json", b'{"label": null}')]
    members += [("2.png", PNG[1]), ("2.cls", b"7"), ("2.json", b'{"label": 0}')]
    write_tar(tmp_path / "x.tar", members)
    assert [r.label for r in read(tmp_path)] == [7, 0]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_that_were_joined_are_told(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tar" if mode == "w" else "x.tar.gz")
    one, two = (write_tar(path, [(f"{i}.png", PNG[i])], mode) for i in range(2))
    for data, told in (
        (one, None),
        (one + two, f"{path} goes on behind its end of archive, after 1 images"),
    ):
        path.write_bytes(data)
        (file,) = list_source(SourceConfig(uri=str(path)), "corpus")[1]
        note = measure(file, "webdataset", SourceConfig(uri=str(path))).note
        assert (note and note[: len(told or "")]) == told
        assert ids(read(path)) == [f"{path.name}#0.png"]
    path.write_bytes(write_tar(path, [("0.png", PNG[0])], "w") + bytes(3 << 20) + b"x")
    (file,) = list_source(SourceConfig(uri=str(path)), "corpus")[1]
    assert "goes on behind" in str(measure(file, "webdataset", SourceConfig(uri=str(path))).note)


@pytest.mark.parametrize("cut", [700, 1300, 1024, 5000, 1])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_tars_have_as_many_rows_as_the_plan(tmp_path: Path, cut: int, mode: str) -> None:
    rng = np.random.default_rng(1)
    members = [(f"{i}.png", rng.bytes(900)) for i in range(12)]
    path = tmp_path / ("x.tar" if mode == "w" else "x.tar.gz")
    data = write_tar(path, members, mode)
    path.write_bytes(data[: len(data) - 2048 - cut])
    source = SourceConfig(uri=str(path))
    found = units_of(source)
    rows = [row for unit in found for row in read_rows(unit, source)]
    assert len(rows) == sum(u.rows for u in found) > 0
    assert ids(rows) == [f"{path.name}#{i}.png" for i in range(len(rows))]
    for row, (_, image) in zip(rows, members, strict=False):
        assert (row.image == image) is (row.error is None)
    assert [r.error is None for r in rows[:-1]] == [True] * (len(rows) - 1)
    if cut == 700 and mode == "w":  # in the data of the one before the last end-of-archive padding
        assert str(rows[-1].error).startswith("truncated: the tar ends within this member")


def test_a_tar_that_breaks_after_planning_gives_error_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    rng = np.random.default_rng(1)
    data = write_tar(path, [(f"{i}.png", rng.bytes(5000)) for i in range(6)], "w:gz")
    source = SourceConfig(uri=str(path))
    (unit,) = units_of(source)
    path.write_bytes(data[:13_000])
    rows = list(read_rows(unit, source))
    assert len(rows) == 6
    assert ids(rows)[:3] + ids(rows)[-1:] == ["x.tar.gz#0.png", "x.tar.gz#1.png", "x.tar.gz#2.png", "x.tar.gz#5"]
    assert [r.error is None for r in rows] == [True, True, False, False, False, False]
    assert all(str(r.error).startswith("truncated: ") for r in rows[2:])


def test_rows_within_a_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", MEMBERS)
    write_tar(tmp_path / "2.tar", MEMBERS[:4])
    whole = read(tmp_path)
    assert len(whole) == 12
    for rows in ([0, 3], [2, 5], [8, 9], [9, 11], [11, 12]):
        assert read(tmp_path, rows=rows) == whole[slice(*rows)]


# -- IDX and CIFAR ----------------------------------------------------------------------------------------------


def pixels_of(row: ImageRow, size: int, channels: int) -> np.ndarray:
    return decode(row.image, PixelSpec(size, channels, "squash"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"  # in the folder's name, the word is left alone
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8), np.uint8)
    path = write_idx(folder, images, [1, 2, 3, 4, 5, 6], suffix)
    monkeypatch.setattr(units, "UNIT_ROWS", 3)
    rows = read(folder)
    assert ids(rows) == [f"{path.name}#{i}" for i in range(7)]
    assert [r.label for r in rows] == [1, 2, 3, 4, 5, 6, None]
    assert np.array_equal(np.stack([pixels_of(r, 8, 1)[0] for r in rows]), images)
    assert [(r.label, r.image) for r in read(folder, images=False)] == [(r.label, None) for r in rows]
    assert [r.label for r in read(folder, rows=[2, 4])] == [3, 4]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_truncated_idx(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 40, 40), np.uint8)
    path = write_idx(tmp_path, images, list(range(30)), suffix)
    data = path.read_bytes()
    path.write_bytes(data[: 16 + 1600 * 12 + 100] if not suffix else data[: len(data) // 2])
    monkeypatch.setattr(units, "UNIT_ROWS", 4)
    rows = read(tmp_path)
    assert [r.label for r in rows] == list(range(30))
    good = [r.error is None for r in rows]
    assert good == sorted(good, reverse=True)
    assert sum(good) == 12 if not suffix else 10 < sum(good) < 16
    assert all(str(r.error).startswith("truncated: ") and r.image is None for r in rows[sum(good) :])
    assert np.array_equal(pixels_of(rows[sum(good) - 1], 40, 1)[0], images[sum(good) - 1])


@pytest.mark.parametrize("fine", [False, True])
def test_cifar_and_a_partial_record(tmp_path: Path, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
    labels = [60, 71, 82, 93, 14] if fine else [6, 7, 8, 9, 1]
    coarse = [bytes([i + 12]) if fine else b"" for i in range(5)]
    records = [c + bytes([y]) + x.tobytes() for c, y, x in zip(coarse, labels, images, strict=True)]
    path = tmp_path / "train.bin"
    path.write_bytes(b"".join(records))
    monkeypatch.setattr(units, "UNIT_ROWS", 2)
    rows = read(tmp_path)
    assert ids(rows) == [f"train.bin#{i}" for i in range(5)]
    assert [r.label for r in rows] == labels
    assert np.array_equal(np.stack([pixels_of(r, 32, 3) for r in rows]), images)
    path.write_bytes(b"".join(records)[:-100])
    cut = read(tmp_path)
    assert cut[:4] == rows[:4]
    error = "truncated: the file ends within this record"
    assert cut[4:] == [ImageRow("train.bin#4", str(path), 4, None, labels[4], error=error)]


# -- the same rows, however they are cut --------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"parquet": 40, "images": 40, "tar": 15, "idx": 30, "cifar": 9, "jsonl": 25, "ids": 40}
    for name, source in every_format(tmp_path).items():
        results = []
        for rows, files, batch in ((1, 1, 2), (6, 7, 3), (10**6, 10**6, 1000)):
            monkeypatch.setattr(units, "UNIT_ROWS", rows)
            monkeypatch.setattr(units, "UNIT_FILES", files)
            monkeypatch.setattr(parquet, "BATCH_ROWS", batch)
            found = units_of(source)
            results.append([row for unit in found for row in read_rows(unit, source)])
            assert sum(u.rows for u in found) == len(results[-1])
        assert results[0] == results[1] == results[2]
        assert len(results[0]) == len(set(ids(results[0]))) == counts[name]


# -- remote storage that fails ------------------------------------------------------------------------------------

DROPPED = ConnectionResetError(104, "Connection reset by peer")


def test_faults_that_pass_leave_no_trace(tmp_path: Path, flaky: type[Flaky]) -> None:
    slow = OSError("AWS Error SLOW_DOWN during GetObject operation: reduce your rate")
    for source in many_formats(tmp_path).values():
        expected = [
            replace(row, source=f"flaky://{row.source}") for u in units_of(source) for row in read_rows(u, source)
        ]
        source = on_flaky(source)
        logs = []
        for faults in (repeat(None), cycle([None] * 5 + [slow]), cycle([DROPPED, TimeoutError()] + [None] * 6)):
            flaky.faults, flaky.read = faults, []
            found = units_of(source)
            assert [row for unit in found for row in read_rows(unit, source)] == expected
            logs.append(flaky.read)
        if found[0].format != "images":  # files that are read whole begin again
            assert logs[0] == logs[1] == logs[2]


def test_storage_that_stays_away_stops_the_run(
    tmp_path: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.02)
    told = (
        rf"^flaky://{tmp_path}/\S+: the storage does not answer \(ConnectionResetError: .*: .* the same command again"
    )
    for source in map(on_flaky, many_formats(tmp_path).values()):
        flaky.faults = repeat(None)
        format_name, files, _ = list_source(source, "corpus")
        found = units_of(source)
        for good in (0, 1):  # it opens, then fails while it is read
            flaky.faults = chain(repeat(None, good), repeat(DROPPED))
            with pytest.raises(RunError, match=told):
                list(chain.from_iterable(read_rows(unit, source) for unit in found))
        if format_name != "images":
            with pytest.raises(RunError, match=told):
                measure(next(iter(files)), format_name, source)


@pytest.mark.parametrize("fault", [FileNotFoundError(2, "gone"), PermissionError(13, "not yours")])
def test_faults_that_last_stop_the_run_at_once_and_make_no_rows(
    tmp_path: Path, flaky: type[Flaky], fault: Exception
) -> None:
    for name, given in many_formats(tmp_path).items():
        source = on_flaky(given)
        flaky.faults = repeat(None)
        found = units_of(source)
        format_name, files, _ = list_source(source, "corpus")
        if format_name == "idx" and isinstance(fault, FileNotFoundError):
            continue  # its labels, which are opened first, may well be missing
        flaky.faults = chain([fault], repeat(None))
        with pytest.raises(PlaceError, match=rf"^flaky://{tmp_path}/\S+: .* run the same command again"):
            list(read_rows(found[0], source))
        assert next(flaky.faults) is None, name
        flaky.faults = chain([fault], repeat(None))
        if format_name != "images":
            with pytest.raises(PlaceError, match=rf"^flaky://{tmp_path}/\S+: .* run the same command again"):
                measure(next(iter(files)), format_name, source)


def test_a_bad_spot_of_a_local_disk_is_waited_for_and_makes_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    image_folder(tmp_path)
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    bad = chain([True] * 3, repeat(False))

    def fail(fs: object, path: str) -> bytes:
        if path.endswith("1.png") and next(bad):
            raise OSError(5, "Input/output error")
        return read_bytes(fs, path)

    monkeypatch.setattr(storage, "read_bytes", fail)
    assert [r.error for r in read_rows(unit, source)] == [None] * 5
    bad = repeat(True)
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(
        PlaceError, match=rf"^{tmp_path}/cat/1.png: the storage does not answer \(OSError: .*output error"
    ):
        list(read_rows(unit, source))


def test_wanted_positions_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_ROWS", 2)
    for source in every_format(tmp_path).values():
        for unit in units_of(source):
            rows = list(read_rows(unit, source))
            chosen = np.arange(unit.rows)[1::3]
            labels = chosen * 10
            blocks = list(read_blocks(ReadRequest(unit, chosen, labels), source))
            assert [b.num_rows for b in blocks] == [2] * (len(chosen) // 2) + [1] * (len(chosen) % 2)
            if not len(chosen):
                continue
            table = pa.concat_tables(blocks)
            assert table.column("image_id").to_pylist() == [rows[i].image_id for i in chosen]
            assert table.column("image").to_pylist() == [rows[i].image for i in chosen]
            assert table.column("label").to_pylist() == [str(y) for y in labels]
            assert table.column("label_is_name").to_pylist() == [False] * len(chosen)
            assert set(table.column("unit").to_pylist()) == {unit.unit_id}
            whole = pa.concat_tables(read_blocks(ReadRequest(unit), source))
            assert whole.column("image_id").to_pylist() == ids(rows)


def test_a_sample_of_a_folder_opens_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path)
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    opened: list[str] = []
    load = images_module.read_whole
    monkeypatch.setattr(images_module, "read_whole", lambda uri: opened.append(uri) or load(uri))
    (block,) = read_blocks(ReadRequest(unit, np.array([1, 3])), source)
    assert sorted(opened) == [str(tmp_path / "cat/1.png"), str(tmp_path / "dog/3.png")]
    assert block.column("image_id").to_pylist() == ["cat/1.png", "dog/3.png"]
    assert block.column("label").to_pylist() == ["cat", "dog"]


def test_blocks_have_one_schema(tmp_path: Path) -> None:
    image_folder(tmp_path)
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    (block,) = read_blocks(ReadRequest(unit), source)
    assert block.schema == ROW_SCHEMA.append(pa.field("unit", pa.string())).append(pa.field("role", pa.string()))
    assert block.column("content_hash").to_pylist() == [
        content_hash(PNG[5]),
        content_hash(PNG[1]),
        content_hash(PNG[2]),
        None,
        content_hash(b"this is no picture"),
    ]
    assert block.column("label_is_name").to_pylist() == [None, True, True, True, True]
    assert block.column("role").to_pylist() == ["corpus"] * 5


def test_the_content_hash_is_blake2b_big_endian_signed() -> None:
    # hashlib.blake2b(b"abc", digest_size=8).hexdigest()
    assert content_hash(b"abc") == int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "big", signed=True)


@pytest.mark.usefixtures("ray_cluster")
def test_units_read_by_ray_data_give_every_row_once(tmp_path: Path) -> None:
    sources = list(every_format(tmp_path).values())[:2]
    wanted, expected = [], []
    for index, source in enumerate(sources):
        for unit in units_of(source):
            unit = Unit(**{**vars(unit), "source": index})
            wanted.append(ReadRequest(unit))
            expected += [(r.image_id, r.image) for r in read_rows(unit, source)]
    dataset = read_units(wanted, {"corpus": tuple(sources)}, num_cpus=0.25)
    rows = [(r["image_id"], r["image"]) for r in dataset.take_all()]
    assert sorted(rows) == sorted(expected)
    assert len(expected) == 80


def test_few_requests_are_split_at_whole_batches_and_many_stay(tmp_path: Path) -> None:
    write_idx(tmp_path, np.zeros((2000, 2, 2), np.uint8), None)
    (unit,) = units_of(SourceConfig(uri=str(tmp_path)))
    chosen = np.arange(1, 1800, 3)
    wanted = [ReadRequest(unit), ReadRequest(unit, chosen, chosen % 7), ReadRequest(unit, chosen[:0])]
    parts = split_requests(wanted, 5)
    assert [p.count for p in parts] == [512, 512, 512, 464, 512, 88]
    for request, own in zip(wanted, (parts[:4], parts[4:]), strict=False):
        asked = np.arange(2000) if request.positions is None else request.positions
        assert np.concatenate([p.positions for p in own]).tolist() == asked.tolist()
    assert np.concatenate([p.labels for p in parts[4:] if p.labels is not None]).tolist() == (chosen % 7).tolist()
    assert [p.count for p in split_requests(wanted, 100)] == [256] * 7 + [208, 256, 256, 88]
    assert split_requests(wanted, 2) == wanted[:2]
    assert split_requests([], 5) == []


def test_images_of_files_that_are_no_longer_listed(tmp_path: Path) -> None:
    for name, source in every_format(tmp_path).items():
        if name == "ids":  # of the same files
            continue
        found = units_of(source)
        gone = {found[0].files[0]}
        Path(found[0].files[0]).unlink()
        for before, unit in zip(found, mark_gone(found, gone), strict=True):
            rows = list(read_rows(unit, source))
            assert len(rows) == before.rows
            lost = [r for r in rows if r.source in gone]
            assert all(r.error == "io: no longer listed when its turn came" and r.image is None for r in lost), name
            assert len(lost) == (0 if unit.files[0] not in gone else 1 if len(unit.files) > 1 else unit.rows), name
            assert len({r.image_id for r in rows}) == len(rows)


def test_a_unit_that_keeps_killing_its_process_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path)
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    monkeypatch.setattr(reading, "task_attempt", lambda: reading.MOST_ATTEMPTS - 1)
    assert len(list(read_blocks(ReadRequest(unit), source))) == 1
    monkeypatch.setattr(reading, "task_attempt", lambda: reading.MOST_ATTEMPTS)
    with pytest.raises(RunError, match=rf"^{unit.files[0]}: 10 processes have died while they read or scored its rows"):
        list(read_blocks(ReadRequest(unit), source))
