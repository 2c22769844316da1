"""The bundled files are what their manifest and the issue say, and their job makes exactly these."""

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pukd_ray.demo
from pukd_ray.corpus.pixels import PixelSpec, decode_batch
from pukd_ray.demo.build import build_demo, build_full_glyphs, made_with, read_split

DEMO = Path(pukd_ray.demo.__path__[0])
MANIFEST = json.loads((DEMO / "manifest.json").read_text(encoding="utf-8"))
CORPUS = [f"corpus/part-{number}.parquet" for number in range(4)]
CLASSES = ["T-shirt/top", "Pullover", "Coat", "Shirt", "Bag"]
OTHERS = ["Trouser", "Dress", "Sandal", "Sneaker", "Ankle boot"]
BROKEN = {"null": 4, "empty": 2, "text": 4, "truncated": 4, "flipped": 3, "bomb": 3}
REASONS = {
    "null": "empty",
    "empty": "empty",
    "text": "not_an_image",
    "truncated": "truncated",
    "flipped": "corrupt",
    "bomb": "too_large",
}
SPEC = PixelSpec(size=28, channels=1, resize="crop")
SOURCE = Path("/usr/share/datasets/fashion-mnist")

pytestmark = pytest.mark.timeout(120)
needs_source = pytest.mark.skipif(not SOURCE.is_dir(), reason="needs Debian's dataset-fashion-mnist")
same_makers = pytest.mark.skipif(
    made_with() != MANIFEST["made_with"], reason="other versions, other bytes: see made_with in the manifest"
)


def read(*names: str) -> pa.Table:
    return pa.concat_tables(pq.ParquetFile(DEMO / name).read() for name in names)


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, Any]]:
    return read(*CORPUS).to_pylist()


def test_manifest_matches_the_files() -> None:
    on_disk = {path.relative_to(DEMO).as_posix() for path in DEMO.rglob("*.parquet")}
    assert set(MANIFEST["files"]) == on_disk | {"classes.txt"}
    for name, entry in MANIFEST["files"].items():
        content = (DEMO / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
        if name != "classes.txt":
            assert pq.read_metadata(DEMO / name).num_rows == entry["rows"] == sum(entry["by_kind"].values())


def test_size() -> None:
    assert sum(entry["bytes"] for entry in MANIFEST["files"].values()) <= 5_500_000


def test_row_groups() -> None:
    for name in ["positives.parquet", "test.parquet", *CORPUS]:
        metadata = pq.read_metadata(DEMO / name)
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        assert all(size == 800 for size in groups[:-1])
        assert groups[-1] <= 800


def test_classes_and_notice() -> None:
    assert (DEMO / "classes.txt").read_text(encoding="utf-8").splitlines() == CLASSES
    notice = (DEMO / "LICENSE-fashion-mnist").read_text(encoding="utf-8")
    assert "Copyright (c) 2017 Zalando SE" in notice
    assert "Permission is hereby granted, free of charge" in notice


@pytest.mark.parametrize(
    ("name", "split", "images", "per_class"),
    [("positives.parquet", "train", range(40_000), 100), ("test.parquet", "t10k", range(10_000), 500)],
)
def test_labelled_files(name: str, split: str, images: range, per_class: int) -> None:
    table = read(name)
    assert table.schema.equals(pa.schema({"image": pa.binary(), "label": pa.int64(), "origin": pa.string()}))
    assert Counter(table["label"].to_pylist()) == dict.fromkeys(range(5), per_class)
    assert MANIFEST["files"][name]["by_kind"] == dict.fromkeys(CLASSES, per_class)
    for origin in table["origin"].to_pylist():
        folder, number = origin.split("/")
        assert folder == split
        assert int(number) in images
    assert decode_batch(table["image"].to_pylist(), SPEC)[1] == [None] * table.num_rows


def test_corpus_counts(corpus: list[dict[str, Any]]) -> None:
    assert read(*CORPUS).schema.equals(
        pa.schema({"image": pa.binary(), "label": pa.int64(), "relevant": pa.bool_(), "origin": pa.string()})
    )
    assert len(corpus) == 6_400
    assert sum(row["relevant"] for row in corpus) == 1_600
    assert {row["label"] for row in corpus} == {None}
    kinds = sum((Counter(MANIFEST["files"][name]["by_kind"]) for name in CORPUS), Counter())
    assert kinds == (
        dict.fromkeys(CLASSES, 320)
        | dict.fromkeys(OTHERS, 876)
        | {"glyph": 400}
        | {f"broken/{kind}": count for kind, count in BROKEN.items()}
    )
    for row in corpus:
        kind, name = row["origin"].split("/")
        if kind == "train":
            assert 40_000 <= int(name) < 60_000
        else:
            assert kind in ("glyph", "broken")
            assert not row["relevant"]


def test_corpus_is_mixed() -> None:
    """No file, and no quarter of a file, is much richer in relevant images than the others."""
    relevant = np.concatenate([read(name)["relevant"].to_numpy().reshape(4, 400) for name in CORPUS])
    assert (np.abs(relevant.mean(axis=1) - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5).all()


def test_no_image_is_in_two_sets_or_twice_in_one() -> None:
    tables = [read("positives.parquet"), read("test.parquet"), read(*CORPUS)]
    origins = [origin for table in tables for origin in table["origin"].to_pylist()]
    assert len(set(origins)) == len(origins) == 9_400
    contents = Counter(image for table in tables for image in table["image"].to_pylist())
    assert {image: count for image, count in contents.items() if count > 1} == {None: 4, b"": 2}


def test_exactly_the_broken_images_are_unreadable(corpus: list[dict[str, Any]]) -> None:
    errors = decode_batch([row["image"] for row in corpus], SPEC)[1]
    found = {row["origin"]: error.split(":")[0] for row, error in zip(corpus, errors, strict=True) if error is not None}
    assert found == {
        f"broken/{kind}-{number}": REASONS[kind] for kind, count in BROKEN.items() for number in range(count)
    }


def test_bombs_are_small_files_of_huge_images(corpus: list[dict[str, Any]]) -> None:
    bombs = [row["image"] for row in corpus if row["origin"].startswith("broken/bomb")]
    assert len(bombs) == 3
    for bomb in bombs:
        assert len(bomb) < 1_000
        with pytest.raises(Image.DecompressionBombError, match=r"\(360\d{7} pixels\)"):
            Image.open(io.BytesIO(bomb))


@needs_source
def test_images_and_truth_are_those_of_the_source(corpus: list[dict[str, Any]]) -> None:
    splits = {name: read_split(SOURCE, name) for name in ("train", "t10k")}
    rows = read("positives.parquet").to_pylist() + read("test.parquet").to_pylist()
    rows += [row for row in corpus if row["origin"].startswith("train/")]
    pixels = decode_batch([row["image"] for row in rows], SPEC)[0]
    for row, shown in zip(rows, pixels, strict=True):
        split, number = row["origin"].split("/")
        label = int(splits[split].labels[int(number)])
        assert shown is not None
        assert np.array_equal(shown[0], splits[split].images[int(number)])
        if row["label"] is None:
            assert row["relevant"] == (label % 2 == 0)
        else:
            assert 2 * row["label"] == label


@needs_source
@same_makers
def test_the_job_makes_the_same_bytes_again(tmp_path: Path) -> None:
    assert build_demo(SOURCE, tmp_path) == MANIFEST
    for name in ["manifest.json", *MANIFEST["files"]]:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


@same_makers
def test_full_size_glyphs_begin_with_the_bundled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr("pukd_ray.demo.build.FULL_GLYPHS", 410)
    table = pq.read_table(build_full_glyphs(tmp_path / "new" / "folder"))
    assert table.schema == read(CORPUS[0]).schema
    assert table["origin"].to_pylist() == [f"glyph/{number}" for number in range(410)]
    bundled = [row for row in corpus if row["origin"].startswith("glyph/")]
    bundled.sort(key=lambda row: int(row["origin"].removeprefix("glyph/")))
    assert table.to_pylist()[:400] == bundled


def test_the_job_says_what_is_missing(tmp_path: Path) -> None:
    job = Path(__file__).parents[2] / "jobs" / "make_demo_data.py"
    command = [sys.executable, str(job), "--source", str(tmp_path), "--output", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    said = f"arguments: --source {tmp_path}: train-images-idx3-ubyte.gz is not there: install dataset-fashion-mnist, "
    assert ended.stderr == f"{said}or name the folder of its four files\n"
    assert not (tmp_path / "out").exists()
