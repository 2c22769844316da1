"""Readers against files that are damaged or made up: nothing but rows comes out of them, each with its reason."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_files import PNG, many_formats, units_of, write_tar

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.pixels import PixelSpec, decode_batch
from pukd_ray.corpus.reading import read_rows, to_table
from pukd_ray.corpus.rows import raw_text, safe_text

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

# The same examples in every run: what is found by chance once must not be lost by chance.
bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(source: SourceConfig) -> None:
    """All that is asked of a reader, of a file of any content."""
    for unit in units_of(source):
        for images in (True, False):
            rows = list(read_rows(unit, source, images=images))
            assert len(rows) == unit.rows
            table = to_table(rows)
            table.validate(full=True)
            assert all(len(row.error or "") < 400 for row in rows)
            some_rows = np.arange(unit.rows)[1::3]
            assert list(read_rows(unit, source, some_rows, images=images)) == [rows[i] for i in some_rows]
            if images:
                decode_batch([row.image for row in rows], PixelSpec(8, 3, "crop"))


damage = some.lists(
    some.tuples(
        some.floats(0, 1), some.sampled_from(["flip", "cut", "insert", "zero", "repeat"]), some.binary(max_size=9)
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, steps: list[tuple[float, str, bytes]]) -> bytes:
    for place, what, piece in steps:
        at = int(place * len(data))
        match what:
            case "flip":
                data = data[:at] + bytes(b ^ 0x55 for b in data[at : at + 1]) + data[at + 1 :]
            case "cut":
                data = data[: max(at, 1)]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "zero":
                data = data[:at] + bytes(len(piece)) + data[at + len(piece) :]
            case "repeat":
                data = data[:at] + data[max(0, at - 600) : at] + data[at:]
    return data or b"\0"


@pytest.mark.parametrize("kind", ["parquet", "tar", "idx", "cifar", "jsonl", "zipped", "zipped.tar.gz", "lines", "ids"])
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    source = many_formats(tmp_path)[kind]
    folder = Path(str(source.uri))
    files = {f: f.read_bytes() for f in ([folder] if folder.is_file() else sorted(folder.iterdir()))}

    @bounded
    @given(damage, some.integers(0, 1))
    def run(steps: list[tuple[float, str, bytes]], number: int) -> None:
        path, data = list(files.items())[number % len(files)]
        path.write_bytes(damaged(data, steps))
        try:
            check(source)
        finally:
            path.write_bytes(data)

    run()


names = some.text(max_size=20) | some.text(some.characters(codec=None), max_size=20)  # halves of surrogate pairs too
values = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | names,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
side = (
    some.binary(max_size=40)
    | values.map(lambda v: json.dumps(v).encode())
    | some.dictionaries(some.sampled_from(["label", "key", "ok", "image", "path"]), values, max_size=4).map(
        lambda v: json.dumps(v).encode()
    )
)


@bounded
@given(some.lists(some.tuples(names, some.sampled_from([".cls", ".json", ".txt"]), side), max_size=5))
def test_names_and_side_files(tmp_path: Path, samples: list[tuple[str, str, bytes]]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogatepass") as tar:
        for name, extension, data in samples:
            for member, body in ((f"{name}.png", PNG[0]), (f"{name}{extension}", data)):
                info = tarfile.TarInfo(member.replace("\0", "0"))
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    check(SourceConfig(uri=str(tmp_path / "a.tar"), relevant_column="ok"))


@bounded
@given(some.lists(side, max_size=8), some.booleans())
def test_lines(tmp_path: Path, lines: list[bytes], packed: bool) -> None:
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    data = b"\n".join(lines) + b"\n{}"
    path.write_bytes(gzip.compress(data) if packed else data)
    check(SourceConfig(uri=str(path), id_column="key", relevant_column="ok"))


column = (
    some.lists(some.none() | some.binary(max_size=30), min_size=4, max_size=4).map(lambda v: pa.array(v, pa.binary()))
    | some.lists(some.none() | some.text(max_size=9), min_size=4, max_size=4).map(lambda v: pa.array(v, pa.string()))
    | some.lists(some.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4).map(lambda v: pa.array(v, pa.int64()))
    | some.lists(some.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4).map(
        lambda v: pa.array(v, pa.int64()).cast(pa.timestamp("us"))
    )
    | some.lists(some.floats(), min_size=4, max_size=4).map(lambda v: pa.array(v, pa.float64()))
    | some.just(pa.nulls(4))
)


def untrue_text(array: pa.Array) -> pa.Array:
    """Bytes passed off as text, as careless writers do."""
    if not pa.types.is_binary(array.type):
        return array
    return pa.StringArray.from_buffers(len(array), array.buffers()[1], array.buffers()[2], array.buffers()[0])


@bounded
@given(column, column, column, some.none() | some.lists(some.text(max_size=9), min_size=4, max_size=4))
def test_columns(tmp_path: Path, image: pa.Array, key: pa.Array, label: pa.Array, paths: list[str] | None) -> None:
    images: Any = image
    if paths is not None:
        structs = [{"bytes": None, "path": path} for path in paths]
        images = pa.array(structs, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": images, "key": untrue_text(key), "label": untrue_text(label)})
    pq.write_table(table, tmp_path / "a.parquet")
    check(SourceConfig(uri=str(tmp_path / "a.parquet"), id_column="key", label_column="label"))


@bounded
@given(some.binary(max_size=20) | names)
def test_no_text_is_lost(given_text: bytes | str) -> None:
    safe = safe_text(given_text)
    safe.encode()
    raw = given_text.decode(errors="surrogateescape") if isinstance(given_text, bytes) else given_text
    assert raw_text(safe) == raw


def test_a_tar_of_tars_of_nothing(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "b.tar", [("1.png", PNG[0])])
    write_tar(tmp_path / "a.tar", [("1.png", inner), ("1.json", inner)])
    check(SourceConfig(uri=str(tmp_path / "a.tar")))
