"""The benchmarks' corpora are what they say, and the hand-written loop writes the table that it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import ceiling, corpora
from benchmarks.corpus_pass import page, sample_of
from benchmarks.meter import measure
from benchmarks.task import prepare
from pukd_ray.corpus.pixels import PixelSpec, decode
from pukd_ray.run.folder import SCORES_SCHEMA

IMAGES = 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "TEXTURES", 1)
        patch.setattr(corpora, "ROWS_PER_FILE", {"png": 8, "jpeg": 8, "tar": 8})
        for kind in corpora.KINDS:
            corpora.make_corpus(folder, kind, IMAGES)
    return folder


def images(folder: Path) -> list[bytes]:
    return [image for file in sorted(folder.iterdir()) for batch in ceiling.batches(file) for image in batch]


def test_corpora_are_seeded_cached_and_the_same_in_every_form(cache: Path) -> None:
    jpeg, tar, files, png = (cache / f"{kind}-{IMAGES}-0" for kind in ("jpeg", "tar", "files", "png"))
    assert len(images(jpeg)) == len(images(png)) == IMAGES
    assert images(jpeg) == images(tar) == images(files)
    assert len(set(images(jpeg))) == IMAGES
    assert decode(images(png)[0], PixelSpec(32, 3, "crop")).std() > 10
    before = {path: path.stat().st_mtime_ns for path in jpeg.iterdir()}
    assert corpora.make_corpus(cache, "jpeg", IMAGES) == jpeg
    assert before == {path: path.stat().st_mtime_ns for path in jpeg.iterdir()}


def test_photos_weigh_what_photos_of_their_size_weigh(cache: Path) -> None:
    sizes = [len(image) for image in images(cache / f"jpeg-{IMAGES}-0")]
    assert 30_000 < np.mean(sizes) < 55_000


def test_the_hand_written_loop_writes_all_of_the_table(cache: Path, tmp_path: Path) -> None:
    corpus = cache / f"png-{IMAGES}-0"
    task = prepare(tmp_path, corpus, "lenet5", sample_of(corpus))
    (tmp_path / "out").mkdir()
    for rank in range(2):
        ceiling.work(rank, 2, task, str(tmp_path / "out"))
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet")), schema=SCORES_SCHEMA)
    assert table.num_rows == IMAGES
    assert table.column("pu_logit").null_count == 0
    assert 0 < IMAGES - table.column("image").null_count < IMAGES / 2
    assert sum(json.loads(p.read_text())[2] for p in (tmp_path / "out").glob("*.json")) == IMAGES


def test_the_page_compares_with_the_ceiling() -> None:
    def run(seconds: float, computing: float) -> dict[str, object]:
        return {
            "load_before": 2 / seconds,
            "seconds": seconds,
            "cpu": {"driver": 2 * seconds},
            "peak_mib": {"driver": 100.0, "workers": 200.0},
            "said": {"computing": computing},
        }

    entry = {"kind": "jpeg", "images": 1000, "bytes": 42_000_000, "network": "lenet5", "command": "x --images"}
    runs = {"ceiling": [run(2, 1), run(4, 2), run(2.5, 1.25)], "ours": [run(5, 2.5), run(5, 1), run(10, 2.5)]}
    about = {"date": "d", "cpus": 2, "cpu": "c", "python": "3", "versions": {"ray": "2"}, "note": ""}
    lines = page({**about, "comparisons": [{**entry, "runs": runs}]}).splitlines()
    assert "1,000 images, 42.0 kB each; `x --images`." in lines
    assert "Load average before the runs: 0.2 to 1.0." in lines
    assert "| ceiling | 400 (250 to 500) | 800 (500 to 1,000) | 1.00 | 1.00 | 5.00 | 100, 200, 0 |" in lines
    assert "| ours | 200 (100 to 200) | 400 (400 to 1,000) | 0.50 | 0.50 | 10.00 | 100, 200, 0 |" in lines


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3:\nso it is"):
        measure(["python", "-c", "import sys; sys.stderr.write('so it is'); sys.exit(3)"])
    assert measure(["python", "-c", "print('{\"images\": 1}')"]).said == {"images": 1}
