"""Formats: nobody else knows their names, and each reads the rows that it is asked for, and not much more."""

import ast
import gzip
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky import Flaky
from small_files import MEMBERS, PNG, b64, many_formats, on_flaky, units_of, write_idx, write_jsonl, write_tar

import pukd_ray
from pukd_ray.config import SourceConfig
from pukd_ray.corpus import units
from pukd_ray.corpus.formats import FORMATS, parquet
from pukd_ray.corpus.reading import ReadRequest, read_blocks, read_rows
from pukd_ray.corpus.units import Unit
from pukd_ray.errors import MissingError

# -- the seam -----------------------------------------------------------------------------------------------------


def test_the_config_names_the_formats_that_there_are() -> None:
    assert set(get_args(get_type_hints(SourceConfig)["format"])) == {"auto", *FORMATS}
    assert all(name == each.name for name, each in FORMATS.items())


AUTO = repr("auto")  # no format


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of each comparison with a format's name or with something's `format`, and of tables by name."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            parts = [key for key in node.value.keys if key is not None]
        for part in parts:
            if isinstance(part, ast.Attribute) and part.attr == "format" and AUTO not in map(ast.unparse, parts):
                yield node.lineno, ".format"
            for inner in ast.walk(part):
                if isinstance(inner, ast.Constant) and inner.value in FORMATS:
                    yield node.lineno, str(inner.value)


def test_no_other_module_compares_format_names() -> None:
    root = Path(pukd_ray.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.parent != root / "corpus/formats":
            found += [f"{path.relative_to(root)}:{line} {what}" for line, what in compared(ast.parse(path.read_text()))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        'unit.format == "images"',
        'name in ("parquet", "idx")',
        '"cifar" != name',
        "unit.format != name",
        'match name:\n case "idx": pass',
        '{"parquet": 1}[name]',
    ],
)
def test_the_search_for_comparisons_finds_them(code: str) -> None:
    assert list(compared(ast.parse(code)))


def test_what_reads_one_row_alone_is_said() -> None:
    assert {name for name, each in FORMATS.items() if each.row_addressable} == set(FORMATS)
    assert {name for name, each in FORMATS.items() if each.single_images} == {"images"}
    assert {name for name, each in FORMATS.items() if each.any_name("0815")} == {
        *("parquet", "webdataset", "cifar", "images")
    }


def test_plans_of_older_runs_have_the_columns_that_units_have() -> None:
    assert units.UNIT_SCHEMA.names == [
        *("unit_id", "role", "source", "format", "files", "ids", "start", "rows", "first_group", "group_start"),
        *("error", "repeated", "index"),
        *(outline := ["n_files", "first_file", "lowest_file", "highest_file"]),
    ]
    old = units.units_to_table(
        [Unit(unit_id="a", role="corpus", source=0, format="idx", files=("x",), ids=("x",), start=0, rows=2)]
    )
    assert units.units_from_table(old.drop_columns(["index", *outline])) == units.units_from_table(old)


# -- asked for some rows ------------------------------------------------------------------------------------------


def damaged_formats(folder: Path) -> dict[str, SourceConfig]:
    """Files that can be planned, and break off or are damaged where they are read."""
    rng = np.random.default_rng(0)
    images = [rng.bytes(400) for _ in range(24)]
    options = {"compression": "gzip", "use_dictionary": False, "column_encoding": {"image": "PLAIN"}}
    path = folder / "damaged.parquet"
    pq.write_table(
        pa.table({"image": images}), path, row_group_size=8, data_page_size=1000, write_batch_size=2, **options
    )
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)
    members = [(f"{i}.png", rng.bytes(900)) for i in range(12)]
    tar = write_tar(folder / "cut.tar", members)
    (folder / "cut.tar").write_bytes(tar[: 512 * 3 * 7 + 700])
    zipped = write_tar(folder / "cut.tar.gz", members, "w:gz")
    (folder / "cut.tar.gz").write_bytes(zipped[: len(zipped) // 2])
    for suffix in ("", ".gz"):
        (folder / f"idx{suffix}").mkdir()
        many = rng.integers(0, 256, (30, 40, 40), np.uint8)
        file = write_idx(folder / f"idx{suffix}", many, list(range(25)), suffix)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (folder / "cut.bin").write_bytes(b"".join(bytes([i]) + bytes([i]) * 3072 for i in range(7))[:-100])
    lines = write_jsonl(folder / "cut.jsonl.gz", [{"image": b64(image)} for image in images])
    lines.write_bytes(lines.read_bytes()[: lines.stat().st_size // 2])
    names = ("damaged.parquet", "cut.tar", "cut.tar.gz", "idx", "idx.gz", "cut.bin", "cut.jsonl.gz")
    return {name: SourceConfig(uri=str(folder / name)) for name in names}


def check_positions(unit: Unit, source: SourceConfig, rng: np.random.Generator) -> None:
    for images in (True, False):
        whole = list(read_rows(unit, source, images=images))
        assert len(whole) == unit.rows
        chances = [np.arange(unit.rows) == at for at in (0, unit.rows // 2, unit.rows - 1)]
        chances += [rng.random(unit.rows) < share for share in (0.0, 0.1, 0.3, 0.7, 1.0)]
        for chance in chances:
            positions = np.flatnonzero(chance)
            assert list(read_rows(unit, source, positions, images=images)) == [whole[i] for i in positions]


@pytest.mark.parametrize("small", [False, True])
def test_some_rows_are_what_they_are_among_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    rng = np.random.default_rng(1)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 3)
    if small:
        monkeypatch.setattr(units, "UNIT_ROWS", 10)
        monkeypatch.setattr(units, "UNIT_FILES", 7)
    formats = set()
    for folder, make in ((tmp_path / "good", many_formats), (tmp_path / "bad", damaged_formats)):
        folder.mkdir()
        sources = list(make(folder).values())
        sources += [replace(source, rows=(3, 8), relevant_labels=(3, "cat")) for source in sources]
        for source in sources:
            for unit in units_of(source):
                check_positions(unit, source, rng)
                formats.add(unit.format)
    assert formats == set(FORMATS)


def test_files_that_broke_after_planning(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for source in many_formats(tmp_path).values():
        for unit in units_of(source):
            file = Path(unit.files[-1])
            if unit.format == "idx":
                file = file.with_name(file.name.replace("images-idx3", "labels-idx1"))
            kept = file.read_bytes()
            if unit.format not in ("cifar", "parquet", "jsonl"):
                file.write_bytes(kept[: len(kept) // 2 - 100])
            elif unit.format != "cifar":
                file.unlink()
                with pytest.raises(MissingError):
                    list(read_rows(unit, source))
                file.write_bytes(kept)
            check_positions(unit, source, rng)
            file.write_bytes(kept)


def test_repeated_ids_and_unreadable_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [*PNG[:5], b""], "key": list("aabcaa")}), tmp_path / "a.parquet")
    source = SourceConfig(uri=str(tmp_path), id_column="key", relevant=True)
    (unit,) = units_of(source)
    unit = replace(unit, repeated=(1, 4, 5))
    rows = list(read_rows(unit, source, np.array([0, 4, 5])))
    assert [(r.image_id, r.row, r.relevant) for r in rows] == [
        *(("a", 0, True), ("a.parquet#4", 4, True), ("a.parquet#5", 5, True))
    ]
    assert [r.error for r in rows] == [None, "duplicate_id: 'a' is the id of an earlier row", "empty: no bytes"]
    check_positions(unit, source, np.random.default_rng(3))
    check_positions(replace(unit, error="io: gone"), source, np.random.default_rng(3))


def test_fewer_rows_than_asked_for_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": PNG[:6]}), path)
    source = SourceConfig(uri=str(path))
    (unit,) = units_of(source)
    pq.write_table(pa.table({"image": PNG[:3]}), path)
    assert [r.row for r in read_rows(unit, source, np.array([0, 2]))] == [0, 2]
    with pytest.raises(RuntimeError, match="1 rows were read where 2 were asked for: did the file change"):
        list(read_rows(unit, source, np.array([2, 4])))


# -- what a row costs -----------------------------------------------------------------------------------------------


def cost(source: SourceConfig, positions: list[int]) -> int:
    """Bytes that are read for rows of the source's only unit."""
    source = on_flaky(source)
    (unit,) = units_of(source)
    Flaky.read = []
    list(read_rows(unit, source, np.array(positions)))
    return sum(stop - start for _, start, stop in Flaky.read)


def test_one_row_costs_little(tmp_path: Path, flaky: type[Flaky]) -> None:
    flaky.faults = repeat(None)
    rng = np.random.default_rng(0)
    pictures = [rng.bytes(10_000) for _ in range(64)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet", row_group_size=4, compression=None)
    (tmp_path / "images").mkdir()
    for i, data in enumerate(pictures):
        (tmp_path / f"images/{i:02d}.png").write_bytes(data)
    write_tar(tmp_path / "a.tar", [m for i, d in enumerate(pictures) for m in ((f"{i}.png", d), (f"{i}.cls", b"1"))])
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx", rng.integers(0, 256, (64, 100, 100), np.uint8), None)
    (tmp_path / "a.bin").write_bytes(b"".join(bytes([1]) + rng.bytes(3072) for _ in range(640)))
    size = 64 * 10_000
    most = {"a.parquet": 150_000, "images": 20_000, "idx": 21_000, "a.bin": 6_200}
    for name, limit in most.items():
        source = SourceConfig(uri=str(tmp_path / name))
        assert 2 * 3072 < cost(source, [20, 57]) <= limit < size / 2
        assert cost(source, list(range(64))) >= min(size, 64 * 3072)
    # Of tars and lines the plan knows where they are.
    write_jsonl(tmp_path / "a.jsonl", [{"image": b64(data)} for data in pictures])
    for name, length in (("a.tar", 12_000), ("a.jsonl", 13_400)):
        source = SourceConfig(uri=str(tmp_path / name))
        one, late, all_rows = cost(source, [0]), cost(source, [20, 57]), cost(source, list(range(64)))
        assert 10_000 < one < 1.2 * length < 20_000 < late < 2.4 * length < size < all_rows < 64 * 1.2 * length


def test_rows_beyond_the_last_are_not_looked_at(tmp_path: Path, flaky: type[Flaky]) -> None:
    (tmp_path / "z").mkdir()
    data = np.random.default_rng(0).integers(0, 256, (300, 100, 100), np.uint8)
    source = SourceConfig(uri=str(write_idx(tmp_path / "z", data, None, ".gz")))
    write_tar(tmp_path / "a.tar.gz", [(f"{i}.png", data[i].tobytes()) for i in range(300)], "w:gz")
    for each in (source, SourceConfig(uri=str(tmp_path / "a.tar.gz"))):
        flaky.faults = repeat(None)
        assert cost(each, [3]) < 300_000 < 1_400_000 < cost(each, [150]) < 1_900_000


def test_only_row_groups_and_batches_with_wanted_rows_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
    pq.write_table(pa.table({"image": PNG[:30]}), tmp_path / "a.parquet", row_group_size=10)
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    asked: list[tuple[list[int], int]] = []

    class Counting(pq.ParquetFile):
        def iter_batches(self, *args: object, row_groups: list[int], **more: object) -> Iterator[pa.RecordBatch]:
            asked.append((row_groups, 0))
            for batch in super().iter_batches(*args, row_groups=row_groups, **more):
                asked[-1] = (row_groups, asked[-1][1] + len(batch))
                yield batch

    monkeypatch.setattr(parquet.pq, "ParquetFile", Counting)
    (block,) = read_blocks(ReadRequest(unit, np.array([1, 23])), source)
    assert block.column("image").to_pylist() == [PNG[1], PNG[23]]
    assert asked == [([0], 2), ([2], 4)]


def test_labels_in_side_files_stay_with_their_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", MEMBERS)
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    rows = list(read_rows(unit, source, np.array([1, 5, 9])))
    assert [(r.image_id, r.label) for r in rows] == [
        ("a.tar#a/1.png", "cat"),
        ("a.tar#4.right.PNG", "bird"),
        ("a.tar#8.png", -1),
    ]
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (_, other) = units_of(source)
    assert [r.label for r in read_rows(other, source, np.array([0, 1, 2]))] == [3, "cat", None]
