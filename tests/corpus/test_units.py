"""Units: counting files by their headers, cutting them, clipping them to `rows`."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pukd_ray.config import SourceConfig
from pukd_ray.corpus import units as module
from pukd_ray.corpus.files import FileFacts, SourceFile
from pukd_ray.corpus.formats.cifar import cifar_record
from pukd_ray.corpus.plan import make_units, measure
from pukd_ray.corpus.units import Unit, units_from_table, units_to_table
from pukd_ray.errors import MissingError


def on_disk(path: Path) -> SourceFile:
    return SourceFile(str(path), path.name, path.stat().st_size, "0")


def facts_of(path: Path, format_name: str, **source: object) -> FileFacts:
    return measure(on_disk(path), format_name, SourceConfig(uri="x", **source))


def parquet(path: Path, columns: dict[str, object], group: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_parquet_counts_come_from_the_footer(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": [b"x"] * 7}, group=3)
    facts = facts_of(path, "parquet")
    assert [rows for rows, _ in facts.parts] == [3, 3, 1]
    assert (facts.error, facts.note) == (None, None)


@pytest.mark.parametrize(
    ("columns", "source", "error"),
    [
        ({"bytes": [b"x"]}, {}, "unsupported: no column image (columns: bytes)"),
        (
            {"image": [b"x"]},
            {"id_column": "key", "relevant_column": "truth"},
            "unsupported: no column key, truth (columns: image)",
        ),
        (
            {"image": [1]},
            {},
            "unsupported: column image is int64, neither binary, nor base64 text, nor a struct with binary `bytes` or "
            "a `path`",
        ),
        (
            {"image": [{"bytes": "text"}]},
            {},
            "unsupported: column image is struct<bytes: string>, neither binary, nor base64 text, nor a struct with "
            "binary `bytes` or a `path`",
        ),
        (
            {"image": [b"x"], "r": ["false"]},
            {"relevant_column": "r"},
            "unsupported: column r is string, not boolean",
        ),
    ],
)
def test_a_parquet_file_without_the_columns_is_all_errors(
    tmp_path: Path, columns: dict[str, object], source: dict[str, str], error: str
) -> None:
    facts = facts_of(parquet(tmp_path / "a.parquet", columns), "parquet", **source)
    assert facts.error == error
    assert [rows for rows, _ in facts.parts] == [1]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})]
)
def test_image_columns_that_are_fine(tmp_path: Path, kind: pa.DataType) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": pa.nulls(2, kind), "r": pa.array([1, 0])})
    assert facts_of(path, "parquet", relevant_column="r").error is None


@pytest.mark.parametrize("format_name", ["parquet", "webdataset", "idx"])
def test_files_that_are_something_else_count_as_one_unreadable_row(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"certainly none of these formats, but some text that goes on for a while")
    facts = facts_of(path, format_name)
    assert facts.error is not None
    assert facts.error.startswith(f"corrupt: not a readable {format_name} file: ")
    assert [rows for rows, _ in facts.parts] == [1]
    path.write_bytes(b"")
    assert facts_of(path, format_name) == FileFacts(((1, 0),), error="empty: the file has no bytes")


def test_a_file_that_vanished_stops_the_plan(tmp_path: Path) -> None:
    file = SourceFile(str(tmp_path / "gone.parquet"), "gone.parquet", 10, "0")
    with pytest.raises(MissingError, match=r"gone\.parquet: is not there"):
        measure(file, "parquet", SourceConfig(uri="x"))


def write_tar(path: Path, names: list[str], mode: str = "w", size: int = 2000) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["", ":gz", ":xz"])
def test_a_tar_counts_its_image_members(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, ["a.jpg", "a.cls", "b/c.seg.PNG", "b/._c.png", "b/x.txt", "a.jpg"], "w" + suffix)
    assert facts_of(path, "webdataset") == FileFacts(((3, path.stat().st_size),))


@pytest.mark.parametrize("suffix", ["", ":gz"])
def test_a_tar_that_ends_early_counts_what_has_a_header(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a.tar"
    data = write_tar(path, [f"{i}.jpg" for i in range(5)], "w" + suffix)
    # Header and data take 512 + 2048 bytes: the cut is in the data of the third member.
    path.write_bytes(data[: 2 * 2560 + 700] if not suffix else data[: len(data) // 2])
    facts = facts_of(path, "webdataset")
    assert facts.error is None
    assert facts.note is not None
    assert facts.note.startswith(f"{path} ends early, after {facts.parts[0][0]} images: ")
    if not suffix:
        assert facts.parts[0][0] == 3


@pytest.mark.parametrize("name", ["a-images-idx3-ubyte", "a-images-idx3-ubyte.gz"])
def test_idx_counts_come_from_the_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = struct.pack(">IIII", 0x0803, 5, 2, 3)
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert facts_of(path, "idx") == FileFacts(((5, 30),))
    data = struct.pack(">IIII", 0x0801, 5, 2, 3)
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert facts_of(path, "idx").error == (
        "corrupt: not a readable idx file: magic number 0x801 is not that of IDX images (0x0803)"
    )


@pytest.mark.parametrize(("prefix", "record"), [(b"\x03", 3073), (b"\x13\x51", 3074)])
@pytest.mark.parametrize("records", [1, 2, 7, 70])
def test_cifar_records_are_told_apart_even_if_the_last_is_cut(
    tmp_path: Path, prefix: bytes, record: int, records: int
) -> None:
    path = tmp_path / "a.bin"
    one = prefix + bytes(range(100, 228)) * 24
    path.write_bytes(one * records)
    assert cifar_record(str(path)) == (record, record * records)
    assert facts_of(path, "cifar").parts[0][0] == records
    path.write_bytes((one * records)[:-5])
    assert cifar_record(str(path)) == (record, record * records - 5)
    assert facts_of(path, "cifar").parts[0][0] == records


# -- cutting ----------------------------------------------------------------------------------------------------


def plan(
    format_name: str, parts: list[tuple[tuple[int, int], ...]], rows: tuple[int, int] | None = None, **facts: object
) -> list[Unit]:
    files = [SourceFile(f"/d/{i}", f"{i}", sum(b for _, b in p), "0") for i, p in enumerate(parts)]
    measured = [(f, FileFacts(p, **facts), f.relative) for f, p in zip(files, parts, strict=True)]
    return make_units("corpus", 3, SourceConfig(uri="x", rows=rows), format_name, measured)


def cuts(units: list[Unit]) -> list[tuple[str, int, int]]:
    return [(u.files[0], u.start, u.rows) for u in units]


def test_parquet_units_are_runs_of_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_ROWS", 10)
    monkeypatch.setattr(module, "UNIT_BYTES", 100)
    units = plan("parquet", [((4, 1), (6, 1), (1, 1), (20, 1), (0, 0), (2, 99), (2, 2)), ((3, 1),)])
    assert cuts(units) == [
        ("/d/0", 0, 10),
        ("/d/0", 10, 1),
        ("/d/0", 11, 20),
        ("/d/0", 31, 2),
        ("/d/0", 33, 2),
        ("/d/1", 0, 3),
    ]
    assert [(u.first_group, u.group_start) for u in units] == [(0, 0), (2, 10), (3, 11), (4, 31), (6, 33), (0, 0)]
    assert [u.unit_id for u in units][:2] == ["corpus/3/0@0", "corpus/3/0@10"]
    assert len({u.unit_id for u in units}) == len(units)


def test_idx_and_cifar_are_cut_by_rows_and_tars_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_ROWS", 10)
    for name in ("idx", "cifar"):
        assert cuts(plan(name, [((25, 1),), ((1, 1),)])) == [
            ("/d/0", 0, 10),
            ("/d/0", 10, 10),
            ("/d/0", 20, 5),
            ("/d/1", 0, 1),
        ]
    assert cuts(plan("webdataset", [((25, 1),), ((0, 1),), ((1, 1),)])) == [("/d/0", 0, 25), ("/d/2", 0, 1)]


def test_small_files_share_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_FILES", 3)
    monkeypatch.setattr(module, "UNIT_BYTES", 100)
    units = plan("images", [((1, size),) for size in (10, 10, 10, 10, 95, 200, 1)])
    assert [u.files for u in units] == [("/d/0", "/d/1", "/d/2"), ("/d/3",), ("/d/4",), ("/d/5",), ("/d/6",)]
    assert [u.ids for u in units][:2] == [("0", "1", "2"), ("3",)]
    assert [u.rows for u in units] == [3, 1, 1, 1, 1]


def test_an_unreadable_file_is_one_unit_with_its_reason() -> None:
    units = plan("parquet", [((10_000, 1),)], error="unsupported: no column image")
    assert [(u.rows, u.error) for u in units] == [(10_000, "unsupported: no column image")]


@pytest.mark.parametrize("format_name", ["parquet", "webdataset", "idx", "cifar", "images"])
@pytest.mark.parametrize("rows", [(0, 1), (3, 9), (4, 8), (11, 13), (5, 100)])
def test_rows_count_over_all_files(monkeypatch: pytest.MonkeyPatch, format_name: str, rows: tuple[int, int]) -> None:
    monkeypatch.setattr(module, "UNIT_ROWS", 2)
    monkeypatch.setattr(module, "UNIT_FILES", 5)
    parts = [((1, 1),)] * 13 if format_name == "images" else [((4, 1),), ((4, 1),), ((5, 1),)]
    if format_name == "parquet":
        parts = [((2, 1), (2, 1)), ((4, 1),), ((3, 1), (2, 1))]

    def places(units: list[Unit]) -> list[tuple[str, int]]:
        if format_name == "images":
            return [(file, 0) for u in units for file in u.files]
        return [(u.files[0], row) for u in units for row in range(u.start, u.start + u.rows)]

    whole, clipped = plan(format_name, parts), plan(format_name, parts, rows)
    assert places(clipped) == places(whole)[slice(*rows)]
    assert sum(u.rows for u in clipped) == len(places(clipped))
    assert all(len(u.ids) == len(u.files) for u in clipped)
    assert len({u.unit_id for u in clipped}) == len(clipped)
    first = clipped[0]
    assert first.unit_id == f"corpus/3/{first.ids[0]}@{first.start}"


def test_units_survive_the_plan_file() -> None:
    units = [
        Unit(unit_id="a", role="corpus", source=0, format="images", files=("x", "y"), ids=("1", "2"), start=0, rows=2),
        Unit(
            unit_id="b",
            role="test",
            source=1,
            format="parquet",
            files=("z",),
            ids=("z",),
            start=5,
            rows=9,
            first_group=2,
            group_start=4,
            error="io: no",
            repeated=(6, 7),
        ),
    ]
    assert units_from_table(units_to_table(units)) == units
