"""Units in outline: what a driver holds of a plan, and what of it is read for a unit."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_files import PNG, many_formats, units_of

from pukd_ray.config import SourceConfig
from pukd_ray.corpus import stored_units, tables, units
from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.corpus.listing import compare_listing, list_inputs, read_files
from pukd_ray.corpus.plan import plan_inputs
from pukd_ray.corpus.reading import read_rows
from pukd_ray.corpus.stored_units import PLAN, read_units, whole
from pukd_ray.corpus.units import Unit, units_from_table, units_to_table
from pukd_ray.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, SourceConfig]:
    """A corpus of 40 images in units of three, two of them in a group of rows of the plan."""
    monkeypatch.setattr(units, "UNIT_FILES", 3)
    monkeypatch.setattr(tables, "GROUP_BYTES", 500)
    (tmp_path / "u").mkdir()
    for i, png in enumerate(PNG):
        (tmp_path / f"u/{i:02d}.png").write_bytes(png)
    source = SourceConfig(uri=str(tmp_path / "u"))
    folder = RunFolder(str(tmp_path / "run"))
    plan_inputs(folder, {"corpus": (source,)}, list_inputs({"corpus": (source,)}).table, print)
    assert pq.ParquetFile(folder.path(PLAN)).num_row_groups > 3
    return folder, source


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Groups of rows of plans that are read."""
    read: list[int] = []
    stored_units._group.cache_clear()
    actual = pq.ParquetFile.read_row_group

    def spy(self: Any, group: int, *more: Any, **options: Any) -> pa.Table:
        if "unit_id" in self.schema_arrow.names and not (more and more[0]):
            read.append(group)
        return actual(self, group, *more, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    return read


def test_a_driver_reads_no_lists_and_a_reader_one_group(run: tuple[RunFolder, SourceConfig], groups: list[int]) -> None:
    folder, source = run
    planned = units_from_table(folder.read_table(PLAN))
    found = read_units(folder)
    assert groups == []
    assert [(u.unit_id, u.rows, len(u.files), len(u.ids)) for u in found] == [
        (u.unit_id, u.rows, len(u.files), len(u.ids)) for u in planned
    ]
    assert [(u.files[0], u.ids[0]) for u in found] == [(u.files[0], u.ids[0]) for u in planned]
    assert max(len(pickle.dumps(u)) for u in found) < 1500
    assert groups == []
    sent: Unit = pickle.loads(pickle.dumps(found[5]))
    assert [row.image for row in read_rows(sent, source)] == PNG[15:18]
    assert len(groups) == 1
    assert list(sent.files) == list(planned[5].files)
    assert sent.place(2) == (planned[5].files[2], 0)
    assert len(groups) == 1
    assert [whole(u) for u in found] == planned


def test_every_format_reads_the_same_in_outline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_ROWS", 6)
    (tmp_path / "data").mkdir()
    for name, source in many_formats(tmp_path / "data").items():
        planned, folder = units_of(source), RunFolder(str(tmp_path / f"run-{name}"))
        tables.write_groups(folder, PLAN, units_to_table(planned))
        rows = [list(read_rows(u, source)) for u in planned]
        assert [list(read_rows(u, source)) for u in read_units(folder)] == rows, name
        # As before there were outlines.
        old = folder.read_table(PLAN).drop_columns(["n_files", "first_file", "lowest_file", "highest_file"])
        folder.write_table(PLAN, old)
        assert read_units(folder) == planned


def test_one_image_is_fetched_by_one_group_of_the_plan(run: tuple[RunFolder, SourceConfig], groups: list[int]) -> None:
    folder, source = run
    config: Any = SimpleNamespace(corpus=(source,))
    files = [f"{source.uris[0]}/{i:02d}.png" for i in (31, 32)]
    table = pa.table({"source": files, "source_row": [0, 0], "image": pa.nulls(2, pa.binary())})
    assert fetch_images(folder, config, table).column("image").to_pylist() == PNG[31:33]
    assert len(groups) <= 2


def test_what_is_gone_is_marked_in_outline_too(run: tuple[RunFolder, SourceConfig]) -> None:
    folder, source = run
    Path(f"{source.uris[0]}/04.png").unlink()
    drift = compare_listing(read_files(folder), list_inputs({"corpus": (source,)}).table)
    assert (drift.added, drift.faults, len(drift.gone)) == (0, (), 1)
    rows = [row for u in read_units(folder, drift.gone) for row in read_rows(u, source)]
    assert [i for i, row in enumerate(rows) if row.error] == [4]


def test_plans_of_earlier_versions_grow(run: tuple[RunFolder, SourceConfig]) -> None:
    folder, source = run
    planned = units_from_table(folder.read_table(PLAN))
    folder.write_table(
        PLAN, folder.read_table(PLAN).drop_columns(["n_files", "first_file", "lowest_file", "highest_file"])
    )
    folder.write_table("files.parquet", folder.read_table("files.parquet").drop_columns(["key"]))
    Path(f"{source.uris[0]}/new.png").write_bytes(PNG[0])
    sources = {"corpus": (source,)}
    assert compare_listing(read_files(folder), list_inputs(sources).table).added == 1
    assert plan_inputs(folder, sources, list_inputs(sources).table, print) == {"corpus": 41}
    found = [whole(u) for u in read_units(folder)]
    assert found[: len(planned)] == planned
    assert found[-1].files == (f"{source.uris[0]}/new.png",)
