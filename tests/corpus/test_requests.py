"""What reading costs on an object store: requests and bytes, counted at a local S3 server."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import serve_bucket
from small_files import b64, units_of, write_idx, write_jsonl, write_tar

from pukd_ray.config import SourceConfig
from pukd_ray.corpus import files
from pukd_ray.corpus import units as units_module
from pukd_ray.corpus.reading import read_rows
from pukd_ray.selection import sampling
from pukd_ray.storage import open_storage


@dataclass
class Meter:
    """Answers of the store since the last `take`."""

    bucket: str
    answers: list[tuple[str, int]] = field(default_factory=list)

    def take(self) -> tuple[int, int]:
        """(GETs and HEADs, bytes that GETs brought)."""
        answers, self.answers = self.answers, []
        return len(answers), sum(size for method, size in answers if method == "GET")


@pytest.fixture(scope="module")
def store() -> Iterator[Meter]:
    meter = Meter("s3://metered")
    with serve_bucket("metered") as server:
        running: Any = server._server
        serve = running.app

        def metered(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
                meter.answers.append((environ["REQUEST_METHOD"], int(dict(headers).get("Content-Length", 0))))
                return start_response(status, headers, *more)

            return serve(environ, start)

        running.app = metered
        yield meter


def put(store: Meter, name: str, data: bytes) -> SourceConfig:
    fs, path = open_storage(f"{store.bucket}/{name}")
    with fs.open_output_stream(path, compression=None) as sink:  # else `.gz` is zipped once more
        sink.write(data)
    return SourceConfig(uri=f"{store.bucket}/{name}")


BLOCK = 2 << 20
IMAGES = [np.random.default_rng(i).bytes(size) for i, size in enumerate([40_000, 90_000, 160_000] * 40)]  # 12 MB
WANTED = np.array([3, 50, 51, 52, 80, 100, 101, 119])


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "jsonl", "jsonl.gz"])
def test_requests_of_tars_and_lines(store: Meter, tmp_path: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", BLOCK)
    path = tmp_path / f"a.{kind}"
    if "tar" in kind:
        members = [m for i, x in enumerate(IMAGES) for m in ((f"{i:03}.jpg", x), (f"{i:03}.cls", b"1"))]
        write_tar(path, members, "w:gz" if kind.endswith("gz") else "w")
    else:
        write_jsonl(path, [{"image": b64(x), "label": 1} for x in IMAGES])
    source = put(store, path.name, path.read_bytes())
    size = path.stat().st_size
    store.take()
    units = units_of(source)
    listing = 2  # of the source: what it is, and its files
    requests, read = store.take()
    assert requests <= listing + 3 + size / BLOCK
    assert read <= 1.05 * size

    (unit,) = units
    rows = list(read_rows(unit, source))
    assert {row.error for row in rows} == {None}
    assert all(row.image == image for row, image in zip(rows, IMAGES, strict=True))
    assert {row.label for row in rows} == {1}
    requests, read = store.take()
    assert requests <= 3 + size / BLOCK
    assert read <= 1.05 * size

    assert all(a == rows[i] for a, i in zip(read_rows(unit, source, WANTED), WANTED, strict=True))
    requests, read = store.take()
    if kind.endswith("gz"):  # no places to go to: everything before the last
        assert requests <= 3 + size / BLOCK
    else:
        wanted = sum(len(IMAGES[i]) for i in WANTED) * (4 / 3 if kind == "jsonl" else 1)
        assert read <= 4 * wanted
        assert requests <= 2 + len(WANTED)
    # As far as it is read at all.
    list(read_rows(unit, source, WANTED[:1]))
    assert store.take()[1] < 4 * sum(map(len, IMAGES[:4]))


def test_requests_of_raw_images_and_parquet(store: Meter, tmp_path: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1500, 28, 28), np.uint8)
    data = write_idx(tmp_path, images, [i % 10 for i in range(1500)]).read_bytes()
    put(store, "idx/train-labels-idx1-ubyte", (tmp_path / "train-labels-idx1-ubyte").read_bytes())
    idx = put(store, "idx/train-images-idx3-ubyte", data)
    records = b"".join(bytes([i % 10]) + bytes([i % 256]) * 3072 for i in range(800))
    cifar = put(store, "a.bin", records)
    for source, row_bytes in ((idx, 784), (cifar, 3073)):
        (unit,) = units_of(source)
        store.take()
        rows = list(read_rows(unit, source))
        requests, read = store.take()
        assert requests <= 8
        assert read <= 1.1 * row_bytes * unit.rows
        wanted = np.arange(5, unit.rows, 97)
        assert list(read_rows(unit, source, wanted)) == [rows[i] for i in wanted]
        requests, read = store.take()
        assert read <= 4 * row_bytes * len(wanted) + 3000
        assert requests <= len(wanted) + 7
        close = np.arange(5, 80, 3)  # cheaper in one go
        list(read_rows(unit, source, close))
        requests, read = store.take()
        assert requests <= 8
        assert read <= 4 * row_bytes * len(close) + 3000

    sink = io.BytesIO()
    pq.write_table(pa.table({"image": IMAGES}), sink, row_group_size=20, compression=None)
    parquet = put(store, "a.parquet", sink.getvalue())
    store.take()
    (unit,) = units_of(parquet)
    assert store.take()[1] < 200_000
    rows = list(read_rows(unit, parquet))
    requests, read = store.take()
    assert requests <= 4 + 6 * 2
    assert read <= 1.1 * len(sink.getvalue())
    # Row groups that hold wanted rows, whole where pyarrow has put the images into a dictionary.
    list(read_rows(unit, parquet, WANTED))
    assert store.take()[1] <= 5 / 6 * 1.1 * len(sink.getvalue())


def test_a_sample_and_a_refetch_read_the_row_groups_that_they_need(
    store: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units_module, "UNIT_ROWS", 20)
    monkeypatch.setattr(sampling, "MIN_PER_UNIT", 3)
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": IMAGES, "other": IMAGES}), sink, row_group_size=20, compression=None)
    source = put(store, "sampled.parquet", sink.getvalue())
    planned = units_of(source)
    group = sum(map(len, IMAGES[:20]))  # of one column
    assert len(planned) == 6
    wanted = sampling.sample_corpus(planned, 6, seed=0)
    assert [len(request.positions) for request in wanted if request.positions is not None] == [3, 3]
    store.take()
    rows = [row for request in wanted for row in read_rows(request.unit, source, request.positions)]
    assert [row.image for row in rows] == [IMAGES[row.row] for row in rows]
    _, read = store.take()
    footers = 6 * 64 << 10
    assert len(rows) * 3 * group / 20 < read <= 2 * 1.1 * group + footers
    (row,) = read_rows(planned[4], source, np.array([7]))
    assert row.image == IMAGES[87]
    requests, read = store.take()
    assert read <= 1.1 * group + footers
    assert requests <= 6
