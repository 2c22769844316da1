"""A run's folder: markers, seconds, what a stage leaves and what retiring it moves."""

import pickle
import shutil
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import write_config, write_task

from pukd_ray import ConfigError, load_config
from pukd_ray.config import StudentConfig
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.errors import PlaceError
from pukd_ray.resume import LINKS, check_progress, fingerprints
from pukd_ray.run.folder import (
    SCORES_SCHEMA,
    SELECTED_SCHEMA,
    RunFolder,
    absolute,
    changed_inputs,
    scores_schema,
)
from pukd_ray.run.stages import STAGE_NAMES, STAGES, stages_from
from pukd_ray.storage import move_tree


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def tree(run: RunFolder) -> set[str]:
    root = Path(run.root)
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def fill(run: RunFolder) -> None:
    """Everything that a finished run has."""
    for stage in STAGES:
        for name in stage.outputs:
            run.write_text(name if "." in name else f"{name}/part", stage.name)
        run.finish(stage.name, {}, 1.0, {})
    run.write_text("config.yaml", "x")
    run.write_json("markers/score/00000.json", {})
    run.write_json("markers/score.inputs.json", {})


@pytest.mark.parametrize("stage", ["score", "distill"])
def test_what_is_half_done_is_not_gone_on_with_under_other_settings(tmp_path: Path, stage: str) -> None:
    file = write_config(tmp_path, write_task(tmp_path, images=20))
    config = load_config(file)
    folder = RunFolder(config.output)
    inputs = fingerprints(config, (tmp_path / "teacher.pt").read_bytes())
    folder.write_json(f"markers/{stage}.inputs.json", inputs[stage])
    folder.write_text(f"{stages_from(stage)[0].outputs[0]}/half", "")
    assert stage in [s.name for s in check_progress(folder, config, None, STAGES).pending]
    key = {"score": "selector.steps", "distill": "distill.lr"}[stage]
    other = load_config(file, {key: 3})
    with pytest.raises(ConfigError, match=rf"{key}: has changed since stage {stage} "):
        check_progress(folder, other, None, STAGES)
    assert stage in [s.name for s in check_progress(folder, other, stage, STAGES).pending]
    assert not folder.exists(f"markers/{stage}.inputs.json")


def test_a_student_that_began_with_other_weights_is_told_by_their_content(tmp_path: Path) -> None:
    file = write_config(tmp_path, write_task(tmp_path, images=20))
    config = load_config(file)
    folder = RunFolder(config.output)
    weights = (tmp_path / "teacher.pt").read_bytes()
    old = fingerprints(config, weights)["distill"]
    del old["student.start"]  # as earlier versions wrote it
    folder.write_json("markers/distill.inputs.json", old)
    check_progress(folder, config, None, STAGES)
    (tmp_path / "start.pt").write_bytes(weights)
    begun = load_config(file, {"student.arch": "lenet5", "student.start": "start.pt"})
    folder.write_json("markers/distill.inputs.json", fingerprints(begun, weights)["distill"])
    shutil.copy(tmp_path / "start.pt", tmp_path / "copy.pt")
    check_progress(
        folder, replace(begun, student=StudentConfig(arch="lenet5", start=f"{tmp_path}/copy.pt")), None, STAGES
    )
    (tmp_path / "start.pt").write_bytes(weights + b" ")
    with pytest.raises(ConfigError, match=r"student\.start: has changed since stage distill "):
        check_progress(folder, begun, None, STAGES)


def test_the_schemas_are_those_of_the_contract() -> None:
    assert [(f.name, str(f.type)) for f in SCORES_SCHEMA] == [
        ("image_id", "string"),
        ("source", "string"),
        ("source_row", "int64"),
        ("content_hash", "int64"),
        ("error", "string"),
        ("pu_logit", "float"),
        ("pu_probability", "float"),
        ("teacher_label", "int32"),
        ("teacher_confidence", "float"),
        ("teacher_entropy", "float"),
        ("relevant", "bool"),
        ("image", "binary"),
        ("perceptual_hash", "fixed_size_binary[16]"),
    ]
    assert scores_schema([]) == SCORES_SCHEMA
    more = scores_schema(["some_rule"])  # nullable, and at the end
    assert (more.names, str(more.types[-1]), more.field(-1).nullable) == (
        [*SCORES_SCHEMA.names, "some_rule"],
        "float",
        True,
    )
    assert SELECTED_SCHEMA.names == [
        *("image_id", "source", "source_row", "pu_logit", "pu_probability", "teacher_label", "teacher_confidence"),
        "image",
    ]


def test_files_of_all_kinds(run: RunFolder) -> None:
    assert run.read_json("a.json") is None
    assert not run.exists("a.json")
    run.write_json("deep/er/a.json", {"x": [1, None]})
    assert run.read_json("deep/er/a.json") == {"x": [1, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        run.write_json("deep/er/a.json", {"x": float("nan")})
    assert run.read_json("deep/er/a.json") == {"x": [1, None]}
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    run.write_table("t/b.parquet", table)
    run.write_text("t/a.txt", "ä")
    assert run.read_table("t/b.parquet") == table
    assert run.read_table("t/b.parquet", ["b"]).column_names == ["b"]
    assert run.files("t") == ["t/a.txt", "t/b.parquet"]
    assert run.files("deep") == []
    assert run.files("none") == []
    run.delete("t/a.txt")
    run.delete_folder("deep")
    run.delete_folder("none")
    assert tree(run) == {"t/b.parquet"}


def test_a_folder_travels_by_its_uri(run: RunFolder) -> None:
    run.write_text("a.txt", "x")
    copy = pickle.loads(pickle.dumps(run))
    assert copy == run
    assert copy.exists("a.txt")


def test_what_lies_in_a_folder_is_named_before_the_query_of_its_uri() -> None:
    folder = RunFolder("gs://anonymous@bucket/run/?project_id=p")
    assert folder.uri_of("estimate") == "gs://anonymous@bucket/run/estimate?project_id=p"
    assert RunFolder(folder.uri_of("estimate")).root == "bucket/run/estimate"


def test_the_seconds_of_all_attempts_add_up(run: RunFolder) -> None:
    assert run.marker("score") is None
    assert run.spent("score") == 0
    run.record_attempt("score", 1.25)
    run.record_attempt("score", 2.0)
    run.record_attempt("select", 50)
    assert run.marker("score") is None
    run.finish("score", {"seed": 0}, 4.5, {"n": 3})
    marker = run.marker("score")
    assert marker is not None
    assert marker.pop("finished").endswith("+00:00")
    assert marker == {"stage": "score", "seconds": 7.75, "counts": {"n": 3}, "inputs": {"seed": 0}}
    run.finish("score", {"seed": 0}, 1.0, {"n": 4})  # new files came
    assert run.marker("score") | {"finished": ""} == {
        **marker,
        "finished": "",
        "seconds": 8.75,
        "counts": {"n": 4},
    }
    run.retire(stages_from("score")[:1])
    run.finish("score", {}, 2.0, {})
    assert run.marker("score")["seconds"] == 2.0


@pytest.mark.parametrize("first", STAGE_NAMES)
def test_retiring_moves_what_the_stages_left_and_nothing_else(run: RunFolder, first: str) -> None:
    fill(run)
    before = tree(run)
    stages = stages_from(first)
    names = [s.name for s in stages]
    old = run.retire(stages)
    mine = {p for p in before if any(p == o or p.startswith(f"{o}/") for s in stages for o in s.outputs)}
    mine |= {
        p for p in before if p.startswith("markers/") and p.split("/")[1].partition(".")[0] in [s.name for s in stages]
    }
    assert {"config.yaml"} <= before - mine
    assert tree(run) == (before - mine) | {f"{old}/{p}" for p in mine}
    assert [run.has_outputs(s) for s in STAGES] == [s.name not in names for s in STAGES]
    assert [run.marker(s.name) is None for s in STAGES] == [s.name in names for s in STAGES]


def test_two_retirements_in_one_second_have_two_names(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-120000")
    names = []
    for i in range(3):
        run.write_text("scores/a", str(i))
        names.append(run.retire(stages_from("score")[:1]))
    assert names == ["old/20260101-120000", "old/20260101-120000-2", "old/20260101-120000-3"]
    assert [Path(run.path(f"{name}/scores/a")).read_text() for name in names] == ["0", "1", "2"]


def test_a_retirement_cut_short_leaves_no_stage_that_seems_done(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(run)
    moved: list[str] = []

    def move(fs: object, source: str, target: str) -> None:
        del target
        if not source.startswith(run.path("markers")):
            raise OSError("the power is gone")
        moved.append(source)
        fs.delete_file(source) if Path(source).is_file() else fs.delete_dir(source)

    monkeypatch.setattr("pukd_ray.run.folder.move_tree", move)
    monkeypatch.setattr("pukd_ray.storage.PATIENCE_SECONDS", 0.0)
    with pytest.raises(PlaceError, match=r"the power is gone.* the same command again"):
        run.retire([s for s in STAGES if s.name in ("select", "distill", "report")])
    assert [run.marker(s) is None for s in ("select", "distill", "report")] == [True] * 3
    assert moved[0] == run.path("markers/report.json")
    assert run.marker("score") is not None


def test_a_retirement_cut_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of another corpus that was left behind would be taken for this one's."""
    config = load_config(write_config(tmp_path, write_task(tmp_path, images=20)))
    run = RunFolder(config.output)
    fill(run)
    before = tree(run)

    def move(*where: Any) -> None:
        if where[1].endswith("plan.parquet"):
            raise KeyboardInterrupt
        move_tree(*where)

    with monkeypatch.context() as broken:
        broken.setattr("pukd_ray.run.folder.move_tree", move)
        with pytest.raises(KeyboardInterrupt):
            run.retire(STAGES)
    assert run.exists("plan.parquet")
    progress = check_progress(run, config, None, STAGES)
    assert "plan" in [stage.name for stage in progress.pending]
    assert not any(run.has_outputs(stage) or run.marker(stage.name) for stage in STAGES)
    assert {
        path.partition("/")[2].partition("/")[2] if path.startswith("old/") else path for path in tree(run)
    } == before


def test_names_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder(absolute("runs/x")).display == f"{tmp_path}/runs/x"
    assert RunFolder(absolute(f"file://{tmp_path}/y")).display == f"{tmp_path}/y"
    assert absolute("s3://bucket/x/") == "s3://bucket/x/"
    assert changed_inputs({"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 4, "d": 5}) == ["a", "c", "d"]


def test_encoded_images_are_not_compressed_again(tmp_path: Path) -> None:
    table = pa.table({"image_id": ["a"] * 50, "image": [b"\xff\xd8" * 500] * 50})
    RunFolder(str(tmp_path)).write_table("x.parquet", table)
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    assert [group.column(i).compression for i in range(2)] == ["ZSTD", "UNCOMPRESSED"]
    assert not {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} & set(group.column(1).encodings)
    assert pq.read_table(tmp_path / "x.parquet").equals(table)


def test_tars_planned_before_their_links_were_counted_are_planned_anew(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, write_task(tmp_path, images=20)))
    folder, inputs = RunFolder(config.output), fingerprints(config, (tmp_path / "teacher.pt").read_bytes())
    folder.write_table("files.parquet", list_inputs(sources_by_role(config)).table)
    older = {stage: {k: v for k, v in mine.items() if k not in LINKS} for stage, mine in inputs.items()}
    for stage in ("plan", "selector"):
        folder.finish(stage, older[stage], 1.0, {"corpus": 20})
    assert "plan" not in [stage.name for stage in check_progress(folder, config, None, STAGES).pending]  # Parquet
    with tarfile.open(tmp_path / "lake" / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    tars = load_config(tmp_path / "config.yaml", {"corpus.uri": "lake/*.tar", "corpus.relevant_column": None})
    folder.finish("plan", {k: v for k, v in fingerprints(tars, b"")["plan"].items() if k not in LINKS}, 1.0, {})
    with pytest.raises(ConfigError, match="did not count links in tars"):
        check_progress(folder, tars, None, STAGES)
