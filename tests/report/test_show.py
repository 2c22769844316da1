"""`pukd show`: rows and pictures of single images, without Ray."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import write_config, write_task

from pukd_ray import load_config
from pukd_ray.commands import main
from pukd_ray.corpus.units import Unit, units_to_table
from pukd_ray.preflight import to_yaml
from pukd_ray.report.show import find_images, write_picture
from pukd_ray.run.folder import RunFolder, scores_schema


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """30 images in three files; every third was kept by the pass, the others are in the corpus alone."""
    tmp = tmp_path_factory.mktemp("tiny")
    config = load_config(write_config(tmp, write_task(tmp, images=30, files=3)), {"corpus.relevant_column": None})
    folder = RunFolder(config.output)
    folder.write_text("config.yaml", to_yaml(config))
    units = []
    for number in range(3):
        name = f"part-{number}.parquet"
        file = str(tmp / "lake" / name)
        units.append(
            Unit(
                unit_id=f"corpus/0/{name}@0", role="corpus", source=0, format="parquet", files=(file,), ids=(name,),
                start=0, rows=10, first_group=0,
            )
        )  # fmt: skip
        images = pq.read_table(file).column("image").to_pylist()
        rows = [
            {
                "image_id": f"{name}#{row}", "source": file, "source_row": row, "content_hash": row, "error": None,
                "pu_logit": 1.5, "pu_probability": 0.75, "teacher_label": 2, "teacher_confidence": 0.5,
                "teacher_entropy": 0.25, "relevant": row % 2 == 0, "image": None if row % 3 else images[row],
                "knn": 0.125,
            }
            for row in range(10)
        ]  # fmt: skip
        rows[9] |= dict.fromkeys(("pu_logit", "pu_probability", "teacher_label", "teacher_confidence"))
        rows[9] |= {"teacher_entropy": None, "knn": None, "error": "truncated: ends early", "image": None}
        table = pa.Table.from_pylist(rows, schema=scores_schema(["knn"]))
        folder.write(f"scores/{number}.parquet", lambda sink, t=table: pq.write_table(t, sink, row_group_size=4))
        folder.write_json(f"markers/score/{number:05d}.json", {"files": [f"scores/{number}.parquet"], "units": []})
    folder.write_table("plan.parquet", units_to_table(units))
    folder.write_table("selected/00000.parquet", pa.table({"image_id": ["part-1.parquet#4", "part-2.parquet#0"]}))
    return folder


def test_rows_come_in_the_order_that_was_asked_for(run: RunFolder) -> None:
    ids = ["part-2.parquet#8", "part-0.parquet#0", "part-1.parquet#4", "part-0.parquet#5"]
    rows = find_images(run, ids)
    assert [row["image_id"] for row in rows] == ids
    assert [row["source_row"] for row in rows] == [8, 0, 4, 5]
    assert [row["selected"] for row in rows] == [False, False, True, False]
    assert [row["image"] is None for row in rows] == [True, False, True, True]


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_is_what_is_in_the_corpus(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: bool
) -> None:
    row = 3 if kept else 4
    assert main(["show", run.uri, f"part-1.parquet#{row}", "--pictures", str(tmp_path / "p")]) == 0
    lake = pq.read_table(Path(run.uri).parent / "lake" / "part-1.parquet")
    file = tmp_path / "p" / f"001-part-1.parquet_{row}.png"
    data = lake.column("image")[row].as_py()
    assert file.read_bytes() == data
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"part-1.parquet#{row}",
        f"  source        {Path(run.uri).parent}/lake/part-1.parquet row {row}",
        "  P(relevant)   0.7500, logit 1.5000",
        f"  selected      {'no' if kept else 'yes'}",
        "  teacher       class 2, confidence 0.5000, entropy 0.2500 nats",
        f"  truth         {'not relevant' if kept else 'relevant'}",
        "  knn           0.1250",
        f"  picture       {file} ({len(data):,} bytes)",
    ]


def test_an_unreadable_image_has_its_reason(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", run.uri, "part-0.parquet#9", "--pictures", str(tmp_path)]) == 0
    assert "  unreadable    truncated: ends early\n" in capsys.readouterr().out


def test_a_corpus_that_is_gone_costs_the_picture_alone(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = Path(run.uri).parent / "lake"
    lake.rename(lake.with_name("gone"))
    try:
        assert main(["show", run.uri, "part-1.parquet#4", "--pictures", str(tmp_path)]) == 0
    finally:
        lake.with_name("gone").rename(lake)
    assert "  picture       " in (said := capsys.readouterr().out)
    assert "is not there" in said
    assert list(tmp_path.iterdir()) == []


def test_names_of_strangers_stay_in_the_folder(tmp_path: Path) -> None:
    file = write_picture(tmp_path, 7, {"image_id": "../../etc/ü\x00passwd" + "x" * 300, "image": b"no image"})
    assert file.parent == tmp_path
    assert file.suffix == ".bin"
    assert len(file.name) < 100


@pytest.mark.parametrize("below", ["", "/pictures"])
def test_a_file_is_no_folder_for_pictures(
    run: RunFolder, tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["show", run.uri, "part-1.parquet#4", "--pictures", f"{tmp_path}/file{below}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"arguments: --pictures {tmp_path}/file{below} cannot be written into, ")


def test_unknown_ids_are_named(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", run.uri, "part-0.parquet#0", "part-9#1", "x"]) == 1
    assert "no image 'part-9#1' (and 1 more) is scored" in capsys.readouterr().err
    assert main(["show", str(tmp_path), "x"]) == 2
    assert "holds no run (no config.yaml)" in capsys.readouterr().err
