"""What a chunk writes, how it is counted, merged and cleaned up; without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pukd_ray.corpus.streaming import LedgerPart
from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import SCORES_SCHEMA, RunFolder, scores_schema
from pukd_ray.selection import committing
from pukd_ray.selection.committing import ATTEMPTS, ChunkLedger, WriteScores, delete_unfinished, merge_attempt

ATTEMPT = f"{ATTEMPTS}/00000-draw"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def units(*rows: int) -> list[Unit]:
    common = {"role": "corpus", "source": 0, "format": "parquet", "start": 0}
    return [
        Unit(unit_id=f"u{i}", files=(f"/lake/{i}",), ids=(f"{i}",), rows=count, **common)
        for i, count in enumerate(rows)
    ]


def block(unit: Unit, rows: range, image: bytes | None = None) -> pa.Table:
    """Scored rows of a unit; every fifth is unreadable."""
    readable = [row % 5 != 4 for row in rows]
    made = {
        "image_id": [f"{unit.ids[0]}#{row}" for row in rows],
        "source": [unit.files[0]] * len(rows),
        "source_row": list(rows),
        "error": [None if good else "corrupt: x" for good in readable],
        "pu_logit": [float(row) if good else None for row, good in zip(rows, readable, strict=True)],
        "pu_probability": [0.5 if good else None for good in readable],
        "image": [image] * len(rows),
        "knn": [1.0 if good else None for good in readable],
        "unit": [unit.unit_id] * len(rows),
    }
    return pa.table({name: made.get(name, [None] * len(rows)) for name in [*scores_schema(["knn"]).names, "unit"]})


def entered(run: RunFolder, blocks: list[pa.Table], edges: np.ndarray | None = None) -> ChunkLedger:
    write, ledger = WriteScores(run, ATTEMPT, ("knn",), edges), ChunkLedger()
    for table in blocks:
        assert ledger.add(LedgerPart(write(table).to_pylist(), [])) == len(table)
    return ledger


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process."""

    class Now:
        remote = staticmethod(committing._merge._function)

    monkeypatch.setattr(committing, "_merge", Now)
    monkeypatch.setattr(committing.ray, "get", lambda values: values)


@pytest.mark.usefixtures("here")
def test_files_are_merged_in_the_order_of_the_units(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "FILE_ROWS", 25)
    monkeypatch.setattr(committing, "GROUP_ROWS", 15)
    chunk = units(10, 10, 20, 3)
    late_first = [block(chunk[3], range(3)), block(chunk[2], range(20)), block(chunk[0], range(10))]
    ledger = entered(run, [*late_first, block(chunk[1], range(10))])
    assert ledger.rows == {"u0": 10, "u1": 10, "u2": 20, "u3": 3}
    assert ledger.reasons == {"corrupt": 8}
    files = merge_attempt(run, "00000", chunk, ledger, ("knn",))
    assert sorted(files) == run.files("scores")
    tables = [run.read_table(name) for name in files]
    assert [len(table) for table in tables] == [20, 23]
    assert all(table.schema == scores_schema(["knn"]) for table in tables)
    assert scores_schema(["knn"]).names[:-1] == SCORES_SCHEMA.names
    ids = pa.concat_tables(tables).column("image_id").to_pylist()
    assert ids == [f"{i}#{row}" for i, unit in enumerate(chunk) for row in range(unit.rows)]
    groups = pq.read_metadata(run.path(files[0])).num_row_groups
    assert groups == 1, "blocks of ten rows make no row groups of ten"


@pytest.mark.usefixtures("here")
def test_files_that_hold_images_are_smaller(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "FILE_BYTES", 25_000)
    chunk = units(10, 10, 10)
    ledger = entered(run, [block(unit, range(10), b"x" * 1000) for unit in chunk])
    files = merge_attempt(run, "00000", chunk, ledger, ("knn",))
    assert [len(run.read_table(name)) for name in files] == [20, 10]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("rows", [9, 11])
def test_rows_that_are_not_those_of_the_plan_end_the_chunk(run: RunFolder, rows: int) -> None:
    (unit,) = units(10)
    ledger = entered(run, [block(unit, range(rows))])
    with pytest.raises(RuntimeError, match=rf"/lake/0 has 10 images by the plan, {rows} were scored"):
        merge_attempt(run, "00000", [unit], ledger, ("knn",))
    assert run.files("scores") == []


def test_what_a_retried_task_wrote_first_is_never_looked_at(run: RunFolder) -> None:
    (unit,) = units(10)
    WriteScores(run, ATTEMPT, ("knn",))(block(unit, range(10)))
    ledger = entered(run, [block(unit, range(10))])
    assert len(run.files(ATTEMPT)) == 2
    assert [len(group) for group in ledger.groups([unit])] == [1]


def test_what_no_manifest_names_is_deleted(run: RunFolder) -> None:
    for name in ("scores/00000-a.parquet", "scores/00001-b.parquet", f"{ATTEMPT}/c.parquet"):
        run.write_text(name, "x")
    delete_unfinished(run, [{"files": ["scores/00000-a.parquet"]}])
    assert run.files("scores") == ["scores/00000-a.parquet"]
    assert not run.exists(ATTEMPTS)
