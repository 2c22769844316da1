"""The plan of a run: what is listed, measured, kept apart and marked; what a second look finds changed."""

import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import listing as byname
from pukd_ray.config import ConfigError, SourceConfig, TeacherConfig
from pukd_ray.corpus import plan, tables
from pukd_ray.corpus import units as units_module
from pukd_ray.corpus.labelled import index_sources
from pukd_ray.corpus.listing import Drift, compare_listing, list_inputs
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.plan import measure_units, plan_inputs
from pukd_ray.corpus.reading import read_blocks, read_rows
from pukd_ray.corpus.rows import ImageRow
from pukd_ray.corpus.units import Unit, units_from_table
from pukd_ray.run.folder import RunFolder

PNG = [encode_png(np.full((1, 4, 4), i, np.uint8)) for i in range(40)]
Sources = dict[str, tuple[SourceConfig, ...]]


def parquet(path: Path, start: int, stop: int, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": PNG[start:stop], **columns}), path, row_group_size=2)


def images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def source(uri: Path | str, **more: Any) -> SourceConfig:
    return SourceConfig(uri=str(uri), **more)


def no_news(text: str) -> None:
    raise AssertionError(text)


def planned(folder: RunFolder, sources: Sources) -> list[Unit]:
    plan_inputs(folder, sources, list_inputs(sources).table, no_news)
    return units_from_table(folder.read_table("plan.parquet"))


def rows_of(units: list[Unit], sources: Sources, role: str = "corpus") -> list[ImageRow]:
    return [r for u in units if u.role == role for r in read_rows(u, sources[role][u.source])]


def teacher(num_classes: int) -> TeacherConfig:
    return TeacherConfig(
        arch="lenet5", weights="w", num_classes=num_classes, input_size=28, mean=[0.5] * 3, std=[0.5] * 3
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


# -- listing ----------------------------------------------------------------------------------------------------


def test_all_sources_are_listed_and_all_faults_told(tmp_path: Path) -> None:
    images(tmp_path / "a", "1.png", "2.png", "x.txt", "y.txt", "z.csv")
    parquet(tmp_path / "p.parquet", 0, 1)
    sources = {"positives": (source(tmp_path / "p.parquet"),), "corpus": (source(tmp_path / "a"),)}
    listing = list_inputs(sources)
    assert listing.remarks == ("corpus: left out, not images by name: 1 .csv, 2 .txt",)
    assert [(r["role"], r["source"], r["format"], r["relative"]) for r in listing.table.to_pylist()] == [
        ("positives", 0, "parquet", "p.parquet"),
        ("corpus", 0, "images", "1.png"),
        ("corpus", 0, "images", "2.png"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        list_inputs(
            {"positives": (source(tmp_path / "empty"),), "corpus": (source(tmp_path / "a"), source("nope://x"))}
        )
    assert caught.value.faults == [
        f"positives.uri: no files under {tmp_path / 'empty'}",
        "corpus.1.uri: cannot be listed: nope://x: Protocol not known: nope; name a path or a scheme that an "
        "installed library serves, such as s3://",
    ]


def test_new_changed_and_vanished_files(tmp_path: Path) -> None:
    images(tmp_path / "u", "1.png", "2.png", "3.png")
    images(tmp_path / "p", "1.png")
    sources = {"positives": (source(tmp_path / "p"),), "corpus": (source(tmp_path / "u"),)}
    before = list_inputs(sources).table
    assert compare_listing(before, before) == compare_listing(before, list_inputs(sources).table)
    assert compare_listing(before, before).added == 0
    assert compare_listing(before, before).faults == ()
    images(tmp_path / "u", "4.png", "0.png")
    drift = compare_listing(before, list_inputs(sources).table)
    assert (drift.added, drift.faults) == (2, ())
    (tmp_path / "u/1.png").unlink()
    (tmp_path / "u/2.png").write_bytes(b"longer than before")
    os.utime(tmp_path / "u/3.png", ns=(0, 0))
    images(tmp_path / "p", "2.png")
    drift = compare_listing(before, list_inputs(sources).table)
    (tmp_path / "p/1.png").unlink()
    drift = compare_listing(before, list_inputs(sources).table)
    assert drift.added == 3
    assert drift.gone == {f"{tmp_path}/u/1.png"}
    assert drift.faults == (
        f"positives: {tmp_path}/p/1.png was planned and is gone",
        f"corpus: {tmp_path}/u/2.png has changed since it was planned",
        f"corpus: {tmp_path}/u/3.png has changed since it was planned",
        f"positives: {tmp_path}/p/2.png is new",
    )


def test_a_listing_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("byname", byname.ByName, clobber=True)
    monkeypatch.setattr(byname, "PER_FOLDER", 100)
    monkeypatch.setattr(tables, "PIECE_ROWS", 500)
    sources: Sources = {"corpus": (source("byname:///lake"),)}
    monkeypatch.setattr(byname.ByName, "files", 1)
    list_inputs(sources)  # what is imported for the first time
    monkeypatch.setattr(byname.ByName, "files", 8_000)
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    listing = list_inputs(sources).table
    drift = compare_listing(listing, list_inputs(sources).table)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(listing), drift) == (8_000, Drift(0, ()))
    names = listing.column("uri").to_pylist()
    assert names == sorted(names)
    assert len(set(listing.column("key").to_pylist())) == 8_000
    assert left < 1 << 20
    assert peak < 6 << 20  # an object a file would be 2 kB each
    assert pa.total_allocated_bytes() - arrow < 1 << 20


# -- measuring --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_counts_news_and_empty_roles(tmp_path: Path, run: RunFolder) -> None:
    parquet(tmp_path / "u/a.parquet", 0, 5)
    (tmp_path / "u/b.parquet").write_bytes(b"no parquet, but long enough to look for a footer")
    images(tmp_path / "p", "1.png", "2.png")
    sources: Sources = {"positives": (source(tmp_path / "p"),), "corpus": (source(tmp_path / "u"),)}
    news: list[str] = []
    counts = plan_inputs(run, sources, list_inputs(sources).table, news.append)
    assert counts == {"positives": 2, "corpus": 6}
    assert len(news) == 1
    assert news[0].startswith(f"{tmp_path}/u/b.parquet: corrupt: not a readable parquet file: ")
    units = units_from_table(run.read_table("plan.parquet"))
    assert [(r.image_id, r.error is None) for r in rows_of(units, sources)] == [
        *((f"a.parquet#{i}", True) for i in range(5)),
        ("b.parquet#0", False),
    ]
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    sources = {"positives": sources["positives"], "corpus": (source(tmp_path / "empty.tar"),)}
    with pytest.raises(ConfigError) as caught:
        plan_inputs(RunFolder(str(tmp_path / "other")), sources, list_inputs(sources).table, no_news)
    assert caught.value.faults == ["corpus: its files hold no images: check corpus.uri"]


@pytest.mark.usefixtures("ray_cluster")
def test_rows_over_several_files(tmp_path: Path, run: RunFolder) -> None:
    for i, (start, stop) in enumerate([(0, 5), (5, 6), (6, 12)]):
        parquet(tmp_path / f"u/{i}.parquet", start, stop)
    sources: Sources = {"corpus": (source(tmp_path / "u", rows=[3, 9]),)}
    rows = rows_of(planned(run, sources), sources)
    assert [r.image for r in rows] == PNG[3:9]
    assert [r.image_id for r in rows] == [
        *("0.parquet#3", "0.parquet#4", "1.parquet#0", "2.parquet#0", "2.parquet#1", "2.parquet#2")
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_a_grown_corpus_keeps_its_units_and_rows_go_on_counting(tmp_path: Path, run: RunFolder) -> None:
    parquet(tmp_path / "u/b.parquet", 0, 4)
    parquet(tmp_path / "v/x.parquet", 20, 22)
    sources: Sources = {"corpus": (source(tmp_path / "u", rows=[1, 7]), source(tmp_path / "v"))}
    before = planned(run, sources)
    parquet(tmp_path / "u/a.parquet", 4, 9)
    parquet(tmp_path / "v/y.parquet", 22, 23)
    after = planned(run, sources)
    assert after[: len(before)] == before
    new = [r.image_id for r in rows_of(after[len(before) :], sources)]
    # Row 4 of what is planned first is row 0 of the new file; row 7 is no longer part of the source.
    assert new == ["a.parquet#0", "a.parquet#1", "a.parquet#2", "y.parquet#0"]
    assert planned(run, sources) == after


@pytest.mark.parametrize("rows", [None, (0, 8), (1, 8), (5, 40)])
def test_a_group_of_images_that_grows_gains_its_new_files(
    tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(units_module, "UNIT_FILES", 4)
    sources: Sources = {"corpus": (source(tmp_path / "u", rows=rows),)}
    names: list[str] = []
    known: list[Unit] = []
    for more in (["b6", "b7"] + [f"b{i}" for i in range(4)], ["b4", "b5", "a"], ["c", "d"]):
        new = sorted(f"{name}.png" for name in more)
        images(tmp_path / "u", *new)
        names += new  # what is planned counts first
        units = planned(run, sources)
        assert units[: len(known)] == known
        assert [r.image_id for r in rows_of(units, sources)] == names[slice(*rows or (None,))]
        assert len({u.unit_id for u in units}) == len(units)
        known = units
    assert planned(run, sources) == known


def test_a_run_that_stopped_between_plan_and_files_loses_and_repeats_nothing(tmp_path: Path, run: RunFolder) -> None:
    images(tmp_path / "u", "a.png")
    sources: Sources = {"corpus": (source(tmp_path / "u"),)}
    planned(run, sources)
    files = run.read_table("files.parquet")
    images(tmp_path / "u", "c.png")
    known = planned(run, sources)
    run.write_table("files.parquet", files)
    images(tmp_path / "u", "b.png", "d.png")
    units = planned(run, sources)
    assert units[: len(known)] == known
    assert [r.image_id for r in rows_of(units, sources)] == ["a.png", "c.png", "b.png", "d.png"]


# -- identity ---------------------------------------------------------------------------------------------------


def test_the_same_relative_path_in_two_sources_gives_two_ids(tmp_path: Path) -> None:
    images(tmp_path / "a", "cat/1.png", "2.png")
    images(tmp_path / "b", "cat/1.png", "2.png", "3.png")
    sources: Sources = {"corpus": (source(tmp_path / "a"), SourceConfig(uri=[str(tmp_path / "b")]))}
    rows = rows_of(measure_units(sources, list_inputs(sources).table, no_news), sources)
    names = [r.image_id for r in rows]
    assert len(set(names)) == 5
    assert names[:2] == ["2.png", "cat/1.png"]
    assert [n.partition("~")[0] for n in names[2:]] == ["2.png", "3.png", "cat/1.png"]
    assert ["~" in n for n in names[2:]] == [True, False, True]
    assert [r.label for r in rows] == [None, "cat", None, None, "cat"]
    one = {"corpus": (SourceConfig(uri=[str(tmp_path / "a"), str(tmp_path / "b")]),)}
    assert [r.image_id for r in rows_of(measure_units(one, list_inputs(one).table, no_news), one)] == names


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_the_same_relative_path_in_two_folders_of_one_uri_gives_two_ids(
    tmp_path: Path, run: RunFolder, kind: str
) -> None:
    end = "png" if kind == "images" else "parquet"
    for folder in (tmp_path / "a", tmp_path / "b"):
        if kind == "images":
            images(folder, "cat/1.png", f"{folder.name}.png")
        else:
            parquet(folder / "cat/1.parquet", 0, 2)
            parquet(folder / f"{folder.name}.parquet", 9, 10)
    sources: Sources = {"corpus": (source(tmp_path / "{a,b}"),)}
    units = planned(run, sources)
    names = [r.image_id for r in rows_of(units, sources)]
    assert len({u.unit_id for u in units}) == len(units)
    assert len(set(names)) == len(names)
    listed = {"corpus": (SourceConfig(uri=[str(tmp_path / "a"), str(tmp_path / "b")]),)}
    assert names == [r.image_id for r in rows_of(measure_units(listed, list_inputs(listed).table, no_news), listed)]
    files = list(dict.fromkeys(name.partition("#")[0] for name in names))
    assert [name for name in files if "~" not in name] == [f"a.{end}", f"cat/1.{end}", f"b.{end}"]
    assert [name.partition("~")[0] for name in files if "~" in name] == [f"cat/1.{end}"]


@pytest.mark.usefixtures("ray_cluster")
def test_labels_of_one_uri_stay_with_their_folder(tmp_path: Path) -> None:
    for at, folder in enumerate("ab"):
        parquet(tmp_path / folder / "p.parquet", 2 * at, 2 * at + 2, label=[2 * at, 2 * at + 1])
    sources: Sources = {"positives": (source(tmp_path / "{a,b}/p.parquet"),)}
    found = index_sources("positives", sources["positives"], teacher(4), no_news)
    blocks = [block for r in found.requests for block in read_blocks(r, sources["positives"][0])]
    rows = [row for block in blocks for row in block.to_pylist()]
    assert [(row["image"], row["label"]) for row in rows] == [(PNG[i], str(i)) for i in range(4)]


@pytest.mark.usefixtures("ray_cluster")
def test_units_with_one_id_stop_the_plan(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in "ab":
        parquet(tmp_path / folder / "p.parquet", 0, 2)
    sources: Sources = {"corpus": (source(tmp_path / "{a,b}"),)}
    monkeypatch.setattr(plan, "_same_names", lambda *_: np.zeros(0, np.int64))
    with pytest.raises(RuntimeError, match="the plan has 1 unit ids twice"):
        planned(run, sources)
    assert not run.exists("plan.parquet")
    with pytest.raises(RuntimeError, match="unit ids twice"):
        measure_units(sources, list_inputs(sources).table, no_news)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (["cat"], []),
        (["Cat"], ["corpus: of 6 images looked at none has a label of relevant_labels: theirs are such as cat, dog"]),
    ],
)
def test_relevant_labels_that_are_nowhere_are_told(
    tmp_path: Path, run: RunFolder, wanted: list[str], told: list[str]
) -> None:
    images(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)))
    sources: Sources = {"corpus": (source(tmp_path, relevant_labels=wanted),)}
    said: list[str] = []
    plan_inputs(run, sources, list_inputs(sources).table, said.append)
    assert said == told


@pytest.mark.usefixtures("ray_cluster")
def test_relevant_labels_are_looked_for_in_new_files_only(tmp_path: Path, run: RunFolder) -> None:
    parquet(tmp_path / "u/a.parquet", 0, 2, label=["cat", "dog"])
    sources: Sources = {"corpus": (source(tmp_path / "u", relevant_labels=["cat"]),)}
    planned(run, sources)
    (tmp_path / "u/a.parquet").unlink()  # files of the corpus may go
    parquet(tmp_path / "u/b.parquet", 2, 4, label=["cat", "dog"])
    assert [unit.rows for unit in planned(run, sources)] == [2, 2]


@pytest.mark.usefixtures("ray_cluster")
def test_user_ids_of_files_that_are_gone_bind_nobody(tmp_path: Path, run: RunFolder) -> None:
    parquet(tmp_path / "u/a.parquet", 0, 2, key=["x", "y"])
    sources: Sources = {"corpus": (source(tmp_path / "u", id_column="key"),)}
    planned(run, sources)
    (tmp_path / "u/a.parquet").unlink()
    parquet(tmp_path / "u/b.parquet", 2, 4, key=["y", "z"])
    after = planned(run, sources)
    assert [(row.image_id, row.error) for row in rows_of(after[1:], sources)] == [("y", None), ("z", None)]


@pytest.mark.usefixtures("ray_cluster")
def test_relevant_labels_of_images_without_labels_are_told(tmp_path: Path, run: RunFolder) -> None:
    images(tmp_path / "cat", "1.png")
    images(tmp_path / "dog", "2.png")
    sources: Sources = {"corpus": (source(tmp_path / "{cat,dog}", relevant_labels=["cat"]),)}
    said: list[str] = []
    plan_inputs(run, sources, list_inputs(sources).table, said.append)
    assert said == ["corpus: of 2 images looked at none has a label of relevant_labels: they have no label"]
    assert [r.relevant for r in rows_of(units_from_table(run.read_table("plan.parquet")), sources)] == [None, None]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_the_same_rows_in_two_sources_are_a_fault(tmp_path: Path, run: RunFolder, kind: str) -> None:
    if kind == "images":
        images(tmp_path / "u", "a.png", "b.png")
        file = tmp_path / "u/a.png"
    else:
        parquet(tmp_path / "u/a.parquet", 0, 6)
        file = tmp_path / "u/a.parquet"
    sources: Sources = {"corpus": (source(tmp_path / "u"), source(file))}
    with pytest.raises(ConfigError) as caught:
        planned(run, sources)
    assert caught.value.faults == [f"corpus.1: {file} is in corpus.0 too; use `rows` to keep them apart"]
    if kind == "parquet":
        sources = {"corpus": (source(file, rows=[0, 3]), source(file, rows=[3, 5]))}
        assert [r.image for r in rows_of(planned(run, sources), sources)] == PNG[:5]
        sources = {"corpus": (source(file, rows=[0, 3]), source(file, rows=[2, 5]))}
        with pytest.raises(ConfigError, match=r"corpus\.1: .*a\.parquet is in corpus\.0 too"):
            planned(RunFolder(f"{run.uri}2"), sources)


@pytest.mark.usefixtures("ray_cluster")
def test_repeated_user_ids_become_error_rows(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "UNIT_ROWS", 2)
    parquet(tmp_path / "u/a.parquet", 0, 5, key=["x", None, "y", "x", None])
    parquet(tmp_path / "u/b.parquet", 5, 9, key=["z", "y", None, "3.png"])
    parquet(tmp_path / "v/c.parquet", 9, 12, key=[7, 7, None])
    images(tmp_path / "w", "3.png")
    sources: Sources = {
        "corpus": (
            source(tmp_path / "u", id_column="key"),
            source(tmp_path / "v", id_column="key"),
            source(tmp_path / "w"),
        )
    }
    units = planned(run, sources)
    rows = rows_of(units, sources)
    assert [(r.image_id, r.error) for r in rows] == [
        ("x", None),
        ("a.parquet#1", None),
        ("y", None),
        ("a.parquet#3", "duplicate_id: 'x' is the id of an earlier row"),
        ("a.parquet#4", None),
        ("z", None),
        ("b.parquet#1", "duplicate_id: 'y' is the id of an earlier row"),
        ("b.parquet#2", None),
        ("b.parquet#3", "duplicate_id: '3.png' is the id of an earlier row"),  # the picture's made-up id
        ("7", None),
        ("c.parquet#1", "duplicate_id: 7 is the id of an earlier row"),
        ("c.parquet#2", None),
        ("3.png", None),
    ]
    # A later file gives way to the earlier ones, whatever their order by name or source.
    parquet(tmp_path / "u/0.parquet", 12, 15, key=["7", "new", "z"])
    grown = planned(run, sources)
    assert grown[: len(units)] == units
    assert [(r.image_id, r.error is None) for r in rows_of(grown[len(units) :], sources)] == [
        ("0.parquet#0", False),
        ("new", True),
        ("0.parquet#2", False),
    ]
