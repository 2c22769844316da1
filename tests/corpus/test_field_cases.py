"""What people brought to comparable tools: every image is read or has its reason, and nothing is taken for another."""

import base64
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_files import PNG, units_of, write_tar

from pukd_ray.config import ConfigError, SourceConfig, TeacherConfig
from pukd_ray.corpus import files, units
from pukd_ray.corpus.formats import parquet
from pukd_ray.corpus.labelled import LabelError, index_labelled
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.plan import measure, measure_units
from pukd_ray.corpus.reading import read_rows, to_table
from pukd_ray.corpus.rows import ImageRow, raw_text, safe_text
from pukd_ray.corpus.sources import expand_braces, list_source
from pukd_ray.storage import open_storage, read_bytes


def read(uri: Path | str, *, images: bool = True, **more: Any) -> list[ImageRow]:
    source = SourceConfig(uri=str(uri), **more)
    found = [row for unit in units_of(source) for row in read_rows(unit, source, images=images)]
    to_table(found)
    return found


def reasons(rows: list[ImageRow]) -> list[str | None]:
    return [row.error and row.error.partition(":")[0] for row in rows]


def tell_nothing(text: str) -> None:
    raise AssertionError(text)


# -- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        (b"caf\xe9.jpg", "caf\\xe9.jpg"),
        ("caf\\xe9.jpg", "caf\\x5cxe9.jpg"),
        ("caf\\x5cxe9.jpg", "caf\\x5cx5cxe9.jpg"),
        ("\ud800", "\\ud800"),
        ("a\0b", "a\\x00b"),
        ("é\\x", "é\\x"),
    ],
)
def test_text_is_made_safe_and_no_two_texts_the_same(given: str | bytes, safe: str) -> None:
    assert safe_text(given) == safe
    back = raw_text(safe)
    assert back == (given.decode(errors="surrogateescape") if isinstance(given, bytes) else given)


def test_a_latin_1_name_in_a_gnu_tar(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("café.jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(PNG[0])
            tar.addfile(member, io.BytesIO(PNG[0]))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    rows = read(tmp_path / "a.tar")
    assert [(row.image_id, row.image, row.error) for row in rows] == [
        ("a.tar#caf\\xe9.jpg", PNG[0], None),
        ("a.tar#b.jpg", PNG[0], None),
    ]


def test_side_files_made_to_harm(tmp_path: Path) -> None:
    bad = {
        "a.json": b"[" * 5000,
        "b.cls": b"9" * 5000,
        "c.json": b'{"label": "\\ud800"}',
        "d.cls": b"caf\xe9",
        "e.json": b'{"label": ' + b"9" * 5000 + b"}",
        "f.json": b'{"label": {"x": [1]}}',
        "g.json": b"{" + b'"a":[[[[' * 300_000,
        "h.json": b"\xff\xfe\0\0",
        "i.cls": b"\0",
    }
    members = [m for name, data in bad.items() for m in ((f"{name[0]}.png", PNG[0]), (name, data))]
    write_tar(tmp_path / "a.tar", [*members, ("z.png", PNG[1]), ("z.cls", b"3")])
    for images in (True, False):
        rows = read(tmp_path / "a.tar", images=images)
        assert reasons(rows) == ["corrupt"] * len(bad) + [None]
        assert rows[-1].label == 3


def test_an_id_column_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    keys = pa.array([b"fine", b"caf\xe9", b"x" * 5000, None]).cast(pa.binary())
    text = pa.StringArray.from_buffers(4, keys.buffers()[1], keys.buffers()[2], keys.buffers()[0])
    for column in (text, keys, text.cast(pa.large_string(), safe=False)):
        pq.write_table(pa.table({"image": PNG[:4], "key": column, "label": column}), tmp_path / "a.parquet")
        rows = read(tmp_path / "a.parquet", id_column="key", label_column="label")
        assert [row.image_id for row in rows] == ["fine", "a.parquet#1", "a.parquet#2", "a.parquet#3"]
        assert reasons(rows) == [None, "corrupt", "corrupt", None]
        assert rows[0].label == "fine"


def test_a_file_name_that_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG[1])
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")).write_bytes(PNG[0])
    except OSError:
        pytest.skip("this disk has UTF-8 names only")
    rows = read(tmp_path)
    assert [(row.image_id, row.image, row.error) for row in rows] == [
        ("1.png", PNG[1], None),
        ("caf\\xe9.png", None, "io: a name that is no UTF-8, or no access"),
    ]


# -- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_member_larger_than_an_image_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("pukd_ray.corpus.formats.webdataset.IMAGE_BYTES", 1000)
    write_tar(tmp_path / f"a.tar{suffix}", [("1.jpg", bytes(1001)), ("2.jpg", PNG[2])], f"w:{suffix[1:]}")
    rows = read(tmp_path / f"a.tar{suffix}")
    assert reasons(rows) == ["too_large", None]
    assert rows[1].image == PNG[2]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.xz", "a.jsonl.gz", "a-images-idx3-ubyte.gz"])
def test_a_file_that_unpacks_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "UNPACKED_BYTES", 100_000)
    path = tmp_path / name
    if "tar" in name:
        write_tar(path, [("1.png", PNG[0]), *((f"{i}.jpg", bytes(90_000)) for i in range(20))], f"w:{name[6:]}")
    elif "idx" in name:
        path.write_bytes(gzip.compress(struct.pack(">IIII", 0x0803, 400, 100, 100) + bytes(4_000_000)))
    else:
        path.write_bytes(gzip.compress(b'{"image": ""}\n' * 100 + bytes(4_000_000)))
    rows = read(path)
    assert rows[0].error is None
    found = measure(
        files.SourceFile(str(path), name, path.stat().st_size, "1"),
        list_source(SourceConfig(uri=str(path)), "corpus")[0],
        SourceConfig(uri=str(path)),
    )
    assert "unpacks to more than" in str(found.note) or reasons(rows)[-1] == "too_large"


def test_headers_of_tars_made_to_harm(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", [("1.png", PNG[0]), ("2.png", PNG[1])])

    def header(kind: bytes, size: bytes) -> bytes:
        head = bytearray(512)
        head[:5], head[124:136], head[156:157] = b"a.png", size, kind
        head[257:265], head[148:156] = b"ustar\x0000", b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head)

    huge = b"%011o\0" % ((1 << 33) - 1)
    negative = b"\xff" * 10 + b"\xfe\x00"
    for bad in (header(b"L", huge), header(b"x", huge), header(b"0", negative), header(b"L", b"%011o\0" % 0) * 3000):
        (tmp_path / "a.tar").write_bytes(good[:1024] + bad + bytes(512))
        assert read(tmp_path / "a.tar")[0].image == PNG[0]
    (tmp_path / "a.tar").write_bytes(good[:1024] + b"damaged!" + good[1032:])  # in the second header
    source = SourceConfig(uri=str(tmp_path / "a.tar"))
    facts = measure(files.SourceFile(source.uris[0], "a.tar", 10_240, "1"), "webdataset", source)
    assert "ends early, after 1 images: " in str(facts.note)


def test_a_header_of_idx_that_promises_billions(tmp_path: Path) -> None:
    path = tmp_path / "a-images-idx3-ubyte"
    for shape in ((2**32 - 1, 28, 28), (10, 2**31, 2**31), (10, 0, 5)):
        path.write_bytes(struct.pack(">IIII", 0x0803, *shape) + bytes(1000))
        assert reasons(read(path)) == ["corrupt"]


def test_rows_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows of 9 MB in one row group, at a thousandth of the size."""
    asked: list[int] = []

    class Counting(pq.ParquetFile):
        def iter_batches(self, batch_size: int, **more: Any) -> Any:
            asked.append(batch_size)
            return super().iter_batches(batch_size=batch_size, **more)

    monkeypatch.setattr(parquet.pq, "ParquetFile", Counting)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 100_000)
    images = [np.random.default_rng(i).bytes(9000) for i in range(300)]
    rows = [{"bytes": image, "path": "x.png"} for image in images]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", row_group_size=300, use_dictionary=False)
    assert [row.image for row in read(tmp_path / "a.parquet")] == images
    monkeypatch.setattr(parquet, "DICTIONARY_BYTES", 100_000)
    pq.write_table(pa.table({"image": [images[0]] * 300}), tmp_path / "a.parquet")  # one value, 300 times 9 kB
    assert [row.image for row in read(tmp_path / "a.parquet")] == [images[0]] * 300
    assert asked == [11, 11]
    monkeypatch.setattr(parquet, "COLUMN_BYTES", 100_000)
    pq.write_table(
        pa.table({"image": [bytes(9000)] * 300}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False
    )
    assert set(reasons(read(tmp_path / "a.parquet"))) == {"too_large"}


# -- lost without a word --------------------------------------------------------------------------------------------


def test_links_to_nothing_are_rows(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(PNG[i])
    for i in range(10, 100):
        (tmp_path / f"{i}.png").symlink_to("/nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "above").symlink_to(tmp_path)
    rows = read(tmp_path)
    assert reasons(rows).count("io") == 91
    assert sum(row.image is not None for row in rows) == 10


def test_a_tar_without_images_says_what_it_holds(tmp_path: Path) -> None:
    for name, members in (("a", [("1.tar", b"x"), ("2.tar", b"x")]), ("b", [("1.img", PNG[0])])):
        write_tar(tmp_path / f"{name}.tar", members)
    source = SourceConfig(uri=str(tmp_path))
    facts = [measure(file, "webdataset", source) for file in list_source(source, "corpus")[1]]
    assert [str(fact.note).partition("holds")[2] for fact in facts] == [
        " no images by the names of its members (2 .tar, ...)",
        " no images by the names of its members (1 .img, ...)",
    ]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_links_in_a_tar_are_rows_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(units, "UNIT_ROWS", 2)
    with tarfile.open(tmp_path / f"a.tar{suffix}", f"w:{suffix[1:]}") as tar:
        for i, name in enumerate(("0.png", "1.png", "1.cls", "2.png", "3.png", "4.txt", "5.png")):
            member = tarfile.TarInfo(name)
            data = b"7" if name == "1.cls" else PNG[i]
            member.type = {"1.png": tarfile.LNKTYPE, "3.png": tarfile.SYMTYPE, "4.txt": tarfile.LNKTYPE}.get(
                name, tarfile.REGTYPE
            )
            member.linkname = "" if member.isreg() else "0.png"
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    said = "unsupported: a link in a tar: make it with tar "
    for images in (True, False):
        rows = read(tmp_path / f"a.tar{suffix}", images=images)
        assert [(row.image_id[len(f"a.tar{suffix}#") :], row.row, row.label, row.error) for row in rows] == [
            ("0.png", 0, None, None),
            ("1.png", 1, 7, f"{said}--hard-dereference"),
            ("2.png", 2, None, None),
            ("3.png", 3, None, f"{said}-h"),
            ("5.png", 4, None, None),
        ]
    assert [row.image for row in read(tmp_path / f"a.tar{suffix}")] == [PNG[0], None, PNG[3], None, PNG[6]]
    source = SourceConfig(uri=str(tmp_path / f"a.tar{suffix}"))
    assert [unit.rows for unit in units_of(source)] == ([5] if suffix else [2, 2, 1])
    last = units_of(source)[-1]
    assert [row.image for row in read_rows(last, source, np.array([last.rows - 1]))] == [PNG[6]]


def test_files_without_a_usual_extension(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i:04}-{'x' * 60}").write_bytes(PNG[i % 40])
    (tmp_path / "1.img").write_bytes(PNG[0])
    (tmp_path / "notes.txt").write_text("x")
    assert reasons(read(tmp_path, format="images")) == [None] * 301
    pq.write_table(pa.table({"image": PNG[:2]}), tmp_path / "a.parquet")
    remark = list_inputs({"corpus": (SourceConfig(uri=str(tmp_path)),)}).remarks[0]
    assert len(remark) < 400
    assert remark.endswith("and 297 of other names")


@pytest.mark.usefixtures("ray_cluster")
def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": PNG[:2], "label": [0, 1]}), tmp_path / "a.parquet")
    sources = {"corpus": (SourceConfig(uri=str(tmp_path)),)}
    told: list[str] = []
    with pytest.raises(
        ConfigError, match=r"^corpus: .*a\.parquet: unsupported: no column image \(columns: picture, label"
    ):
        measure_units(sources, list_inputs(sources).table, told.append)


# -- taken for something else ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_numbers_are_numbers(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"u/{i}").mkdir(parents=True)
        (tmp_path / f"u/{i}/x.png").write_bytes(PNG[i])
    sources = (SourceConfig(uri=str(tmp_path / "u")),)
    planned = measure_units({"test": sources}, list_inputs({"test": sources}).table, tell_nothing)

    def labels(**more: Any) -> dict[str, int]:
        teacher = TeacherConfig(
            arch="lenet5", weights="w", num_classes=12, input_size=28, mean=[0.5] * 3, std=[0.5] * 3, **more
        )
        requests = index_labelled("test", planned, sources, teacher).requests
        return {r.unit.ids[p]: y for r in requests for p, y in zip(r.positions, r.labels, strict=True)}  # type: ignore[arg-type]

    assert labels() == {f"{i}/x.png": i for i in range(12)}
    assert labels(classes=[*"abcdefghijkl"]) == labels()
    assert labels(classes=[str(11 - i) for i in range(12)])["10/x.png"] == 1
    (tmp_path / "u/12").mkdir()
    (tmp_path / "u/12/x.png").write_bytes(PNG[0])
    planned = measure_units({"test": sources}, list_inputs({"test": sources}).table, tell_nothing)
    with pytest.raises(LabelError, match="label 12 is not a teacher index"):
        labels()


def test_pickles_are_no_cifar(tmp_path: Path) -> None:
    data = {"data": np.random.default_rng(0).integers(0, 256, (100, 3072), np.uint8), "labels": [0] * 100}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(data))
    rows = read(tmp_path, format="cifar")
    assert [row.error for row in rows] == [
        "corrupt: not a readable cifar file: its records have no labels of CIFAR-10 or CIFAR-100, a Python pickle: "
        "take CIFAR's binary version"
    ]
    (tmp_path / "data_batch_1").write_bytes(np.random.default_rng(0).bytes(3073 * 50))
    assert reasons(read(tmp_path, format="cifar")) == ["corrupt"]


def test_the_first_folder_is_the_class(tmp_path: Path) -> None:
    for place in ("cat/2020/1.png", "dog/2021/2.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(PNG[0])
    assert [row.label for row in read(tmp_path)] == ["cat", "dog"]


def test_keys_with_dots_and_a_key_that_chooses(tmp_path: Path) -> None:
    members = [("v1.0.jpg", PNG[0]), ("v1.0.cls", b"3"), ("v1.1.jpg", PNG[1]), ("v1.1.json", b'{"label": 4}')]
    members += [("1.jpg", PNG[2]), ("1.mask.png", PNG[3]), ("1.cls", b"5")]
    write_tar(tmp_path / "a.tar", members)
    assert [row.label for row in read(tmp_path / "a.tar")] == [3, 4, 5, 5]
    for extension in ("jpg", ".JPG", "jpg;webp"):
        rows = read(tmp_path / "a.tar", image_column=extension)
        assert [(row.image_id[6:], row.label) for row in rows] == [("v1.0.jpg", 3), ("v1.1.jpg", 4), ("1.jpg", 5)]
    assert [row.image_id[6:] for row in read(tmp_path / "a.tar", image_column="mask.png")] == ["1.mask.png"]


def test_a_tar_of_keys_with_dots_is_cut_between_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_ROWS", 4)
    members = [m for i in range(11) for m in ((f"v1.{i}.png", PNG[i]), (f"v1.{i}.cls", b"%d" % i))]
    write_tar(tmp_path / "a.tar", members)
    source = SourceConfig(uri=str(tmp_path / "a.tar"))
    assert [unit.rows for unit in units_of(source)] == [4, 4, 3]
    assert [(row.label, row.image) for row in read(tmp_path / "a.tar")] == [(i, PNG[i]) for i in range(11)]


def test_hive_partitions(tmp_path: Path) -> None:
    for place in ("label=cat/truth=true", "label=big%20dog/truth=0", "label=__HIVE_DEFAULT_PARTITION__/truth=1"):
        (tmp_path / place).mkdir(parents=True)
        pq.write_table(pa.table({"image": PNG[:1]}), tmp_path / place / "x.parquet")
    for images in (True, False):
        rows = read(tmp_path, images=images, label_column="label", relevant_column="truth")
        assert [(row.label, row.relevant) for row in rows] == [(None, True), ("big dog", False), ("cat", True)]


@pytest.mark.parametrize(("name", "truth"), [("1.0", True), ("0.0", False), ("False", False), ("", None)])
def test_hive_partitions_of_truth(tmp_path: Path, name: str, truth: bool | None) -> None:
    for place in (f"rel={name}", "rel=yes"):
        (tmp_path / place).mkdir()
        pq.write_table(pa.table({"image": PNG[:1]}), tmp_path / place / "x.parquet")
    rows = read(tmp_path, relevant_column="rel")
    assert [(row.relevant, row.error) for row in rows] == [
        (truth, None),
        (None, "corrupt: relevant_column: a str is neither true nor false"),
    ]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_truth_that_pandas_made_floats_beside_a_null(tmp_path: Path, kind: pa.DataType) -> None:
    truth = pa.array([1.0, 0.0, None, float("nan"), 0.5, 2.0]).cast(kind)
    pq.write_table(pa.table({"image": PNG[:6], "r": truth}), tmp_path / "a.parquet")
    rows = read(tmp_path, relevant_column="r")
    assert [row.relevant for row in rows] == [True, False, None, None, None, None]
    assert reasons(rows) == [None] * 4 + ["corrupt"] * 2


def test_kaggles_idx(tmp_path: Path) -> None:
    images = np.zeros((4, 2, 2), np.uint8)
    folder = tmp_path / "train-images-idx3-ubyte"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x0803, 4, 2, 2) + images.tobytes())
    labels = struct.pack(">II", 0x0801, 4) + bytes([3, 1, 2, 0])
    source = SourceConfig(uri=str(tmp_path))
    (unit,) = units_of(source)
    from pukd_ray.corpus.formats import FORMATS

    hint = FORMATS["idx"].label_hint(unit, source)
    places = [
        ("train-labels-idx1-ubyte/train-labels-idx1-ubyte", bytes),
        ("train-images-idx3-ubyte/train-labels-idx1-ubyte.gz", gzip.compress),
        ("train-labels-idx1-ubyte.gz", gzip.compress),
    ]
    for place, pack in places:
        assert str(tmp_path / place) in hint
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(pack(labels))
        assert [row.label for row in read(tmp_path)] == [3, 1, 2, 0]
        (tmp_path / place).unlink()
    assert [row.label for row in read(tmp_path)] == [None] * 4


def test_two_columns_of_images_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(PNG[:1])] * 2, names=["image"] * 2), tmp_path / "a.parquet")
    assert [row.error for row in read(tmp_path)] == ["unsupported: column image is there 2 times"]


def test_base64_in_lines_as_mime_has_it(tmp_path: Path) -> None:
    text = base64.encodebytes(PNG[0])
    assert text.count(b"\n") > 1
    pq.write_table(pa.table({"image": [text.decode(), text.replace(b"\n", b"\r\n").decode()]}), tmp_path / "a.parquet")
    assert [row.image for row in read(tmp_path)] == [PNG[0]] * 2


def test_parquet_with_paths_and_base64(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img/1.png").write_bytes(PNG[1])
    text = [base64.b64encode(PNG[0]).decode(), "img/1.png", "not base64!", None, "../x.png"]
    pq.write_table(pa.table({"image": text}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row.image for row in rows] == [PNG[0], PNG[1], None, None, None]
    assert reasons(rows) == [None, None, "corrupt", None, "unsupported"]
    structs = [{"path": "img/1.png"}, {"path": "none.png"}, {"path": "/etc/passwd"}, {"path": None}, None]
    pq.write_table(pa.table({"image": structs}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert rows[0].image == PNG[1]
    assert reasons(rows) == [None, "io", "unsupported", None, None]
    whole = [{"bytes": None, **struct} for struct in structs if struct] + [{"bytes": PNG[2], "path": "/etc/passwd"}]
    pq.write_table(pa.table({"image": whole}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row.image for row in rows] == [PNG[1], None, None, None, PNG[2]]
    assert reasons(rows) == [None, "empty", "empty", None, None]


# -- addresses ------------------------------------------------------------------------------------------------------


def test_braces_are_expanded(tmp_path: Path) -> None:
    assert expand_braces(["s3://b/{08..11}.tar", "x"]) == [*(f"s3://b/{n}.tar" for n in ("08", "09", "10", "11")), "x"]
    assert expand_braces(["{a,b}/{0..1}"]) == ["a/0", "a/1", "b/0", "b/1"]
    for i in range(20):
        write_tar(tmp_path / f"shard-{i:06}.tar", [(f"{i}.png", PNG[i])])
    (tmp_path / "{0..1}.tar").write_bytes(b"a file of this very name")
    rows = read(f"{tmp_path}/shard-{{000003..000014}}.tar")
    assert [row.image for row in rows] == PNG[3:15]
    assert [file.relative for file in list_source(SourceConfig(uri=f"{tmp_path}/{{0..1}}.tar"), "c")[1]] == [
        "{0..1}.tar"
    ]
    with pytest.raises(ConfigError) as caught:
        list_source(SourceConfig(uri=f"{tmp_path}/shard-{{000003..000024}}.tar"), "corpus")
    assert caught.value.faults == [f"corpus.uri: no such file or folder: {tmp_path}/shard-000020.tar (and 4 more)"]


def test_file_uris_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/1.png").write_bytes(PNG[1])
    (tmp_path / "50%20.png").write_bytes(PNG[2])
    assert [row.image for row in read(f"file://{tmp_path}/a%20b")] == [PNG[1]]
    assert [row.image for row in read(f"file://{tmp_path}/a%20b/*.png")] == [PNG[1]]
    assert read_bytes(*open_storage(f"file://{tmp_path}/50%20.png")) == PNG[2]


def test_hadoops_names_of_s3() -> None:
    for scheme in ("s3", "s3a", "s3n"):
        fs, path = open_storage(f"{scheme}://bucket/a b?region=us-east-1&endpoint_override=localhost:1&scheme=http")
        assert (fs.type_name, path) == ("s3", "bucket/a b")


def test_json_of_many_values_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" + "[]," * 1_000_001 + "[]]\n" + json.dumps({"image": "AAAA"}))
    rows = read(tmp_path / "a.jsonl")
    assert [row.error for row in rows] == ["corrupt: not a line of JSON: more than 1,000,000 values", None]
