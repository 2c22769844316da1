"""JSON Lines: images within the line or beside the file; every fault of a line is a row with its reason."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flaky import Flaky
from small_files import PNG, b64, on_flaky, units_of, write_jsonl

from pukd_ray.config import SourceConfig, TeacherConfig
from pukd_ray.corpus import files as files_module
from pukd_ray.corpus.files import beside
from pukd_ray.corpus.formats import jsonl
from pukd_ray.corpus.labelled import LabelError, index_labelled
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.plan import measure, plan_inputs
from pukd_ray.corpus.reading import read_rows, to_table
from pukd_ray.corpus.rows import ImageRow
from pukd_ray.corpus.sources import list_source
from pukd_ray.corpus.units import units_from_table
from pukd_ray.run.folder import RunFolder


def read(uri: Path | str, *, images: bool = True, **more: Any) -> list[ImageRow]:
    source = SourceConfig(uri=str(uri), **more)
    return [row for unit in units_of(source) for row in read_rows(unit, source, images=images)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
def test_images_in_the_line_and_beside_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/1.png").write_bytes(PNG[1])
    path = write_jsonl(
        tmp_path / name,
        [
            {"image": b64(PNG[0]), "label": 3, "ok": True},
            "  ",
            {"path": "cats/1.png", "label": "cat", "ok": 0},
            {"path": str(tmp_path / "cats/1.png"), "image": None, "label": 2.0, "ok": None},
            {"path": f"file://{tmp_path}/cats/1.png"},
            {"image": "", "label": ""},
            "",
        ],
    )
    rows = read(tmp_path, format="jsonl", relevant_column="ok")
    assert rows == [
        ImageRow(f"{name}#0", str(path), 0, PNG[0], 3, True),
        ImageRow(f"{name}#1", str(path), 1, PNG[1], "cat", False),
        ImageRow(f"{name}#2", str(path), 2, PNG[1], 2, None),
        ImageRow(f"{name}#3", str(path), 3, PNG[1], None, None),
        ImageRow(f"{name}#4", str(path), 4, b"", None, None),
    ]
    light = read(tmp_path, format="jsonl", relevant_column="ok", images=False)
    assert light == [replace(row, image=None) for row in rows]
    assert [r.label for r in read(path, label_column="ok")] == [True, 0, None, None, None]


def test_truth_is_true_false_or_told(tmp_path: Path) -> None:
    given = [True, 0, 1.0, 0.0, float("nan"), None, 0.5, float("inf"), 2, -1, 10**400, "true", [1]]
    write_jsonl(tmp_path / "a.jsonl", [{"image": b64(PNG[0]), "ok": ok} for ok in given])
    rows = read(tmp_path, relevant_column="ok")
    assert [r.relevant for r in rows] == [True, False, True, False, *[None] * 9]
    assert [r.error for r in rows] == [None] * 6 + [
        f"corrupt: relevant_column: {what} is neither true nor false"
        for what in ("0.5", "inf", "2", "-1", "a int", "a str", "a list")
    ]


def test_truth_by_label_is_unknown_of_a_broken_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"image": b64(PNG[0]), "label": "cat"}, "{", {"image": b64(PNG[0]), "label": 3}])
    rows = read(tmp_path, relevant_labels=["cat"])
    assert [r.relevant for r in rows] == [True, None, False]


def test_other_keys_and_ids(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"x": b64(PNG[i]), "key": key} for i, key in enumerate(["b", 7, None, "b"])]
    )
    source = SourceConfig(uri=str(path), image_column="x", id_column="key")
    (unit,) = units_of(source)
    rows = list(read_rows(replace(unit, repeated=(3,)), source))
    assert [r.image_id for r in rows] == ["b", "7", "a.jsonl#2", "a.jsonl#3"]
    assert [r.image for r in rows] == PNG[:4]
    assert [r.error for r in rows] == [None] * 3 + ["duplicate_id: 'b' is the id of an earlier row"]


BAD: list[tuple[object, str]] = [
    ("{no json", "corrupt: not a line of JSON: "),
    ("[" * 100_000, "corrupt: not a line of JSON: "),
    ('{"label": ' + "9" * 5000 + "}", "corrupt: not a line of JSON: "),
    ('{"label": "\\ud800"}', "corrupt: not a line of JSON: "),
    ("3", "corrupt: the line is JSON, but not an object"),
    ('["image"]', "corrupt: the line is JSON, but not an object"),
    ({"label": {"name": "cat"}, "image": "AAAA"}, "corrupt: an id or a label is an object or a list"),
    ({"key": [1], "image": "AAAA"}, "corrupt: an id or a label is an object or a list"),
    ({}, "empty: neither image nor path"),
    ({"image": {"bytes": "AAAA"}}, "corrupt: image is not text"),
    ({"image": "AAA"}, "corrupt: image is not base64: "),
    ({"image": "§"}, "corrupt: image is not base64: "),
    ({"image": "data:image/png;base64,AAAA"}, "corrupt: image is not base64: "),
    ({"path": "none.png"}, "io: "),
    ({"path": ""}, "io: "),
    ({"path": "a\0b.png"}, "corrupt: "),
    ({"path": "\ud800.png"}, "corrupt: "),
    ({"path": 7}, "unsupported: not a path in the folder of the file: 7"),
]


def test_faults_of_a_line_are_rows(tmp_path: Path) -> None:
    good = {"image": b64(PNG[0]), "label": 1, "key": "k"}
    write_jsonl(tmp_path / "a.jsonl", [line for bad, _ in BAD for line in (bad, good)])
    rows = read(tmp_path, id_column="key")
    assert [r.row for r in rows] == list(range(2 * len(BAD)))
    for row, (line, reason) in zip(rows[::2], BAD, strict=True):
        assert str(row.error).startswith(reason), (line, row.error)
        assert (row.image, row.image_id) == (None, f"a.jsonl#{row.row}")
    assert all((r.image_id, r.image, r.label, r.error) == ("k", PNG[0], 1, None) for r in rows[1::2])
    to_table(rows)


def test_paths_stay_in_the_folder_of_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "inside2").mkdir()
    for place in ("secret.png", "inside2/secret.png", "inside/fine.png"):
        (tmp_path / place).write_bytes(PNG[0])
    outside = [
        "../secret.png",
        "deep/../../secret.png",
        "deep/../fine.png",  # no `..` at all
        "%2e%2e/secret.png",
        str(tmp_path / "secret.png"),
        str(tmp_path / "inside2/secret.png"),
        f"{folder}/../secret.png",
        f"file://{tmp_path}/secret.png",
        f"local://{folder}/fine.png",
        "http://example.invalid/secret.png",
        "/etc/passwd",
    ]
    write_jsonl(folder / "a.jsonl", [{"path": path} for path in [*outside, "fine.png"]])
    rows = read(folder, format="jsonl")
    assert [r.error for r in rows[:-1]] == [
        f"unsupported: not a path in the folder of the file: {p!r}"[:200] for p in outside
    ]
    assert rows[-1].image == PNG[0]


def test_links_lead_out_of_the_folder_of_the_file_only_if_that_is_meant(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG[0])
    (folder / "fine.png").write_bytes(PNG[1])
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to("fine.png")
    write_jsonl(folder / "a.jsonl", [{"path": path} for path in ("out.png", "in.png")])
    out, inside = read(folder, format="jsonl")
    assert (out.image, out.error) == (None, "unsupported: a link that leads out of the folder of the file: 'out.png'")
    assert inside.image == PNG[1]
    assert [r.image for r in read(folder, format="jsonl", follow_links=True)] == PNG[:2]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("x/1.png", "s3://lake/a/x/1.png?endpoint_override=h"),
        ("s3://lake/a/1.png", "s3://lake/a/1.png?endpoint_override=h"),
        ("s3://lake/a/1.png?endpoint_override=h", "s3://lake/a/1.png?endpoint_override=h"),
        ("s3://lake/a/1.png?endpoint_override=evil", None),
        ("1.png?endpoint_override=evil", None),
        ("s3://lake/b/1.png", None),
        ("gs://lake/a/1.png", None),
        ("/lake/a/1.png", "s3://lake/a//lake/a/1.png?endpoint_override=h"),
        ("file:///lake/a/1.png", None),
    ],
)
def test_paths_beside_a_file_in_a_store(path: str, found: str | None) -> None:
    assert beside("s3://lake/a/x.jsonl?endpoint_override=h", path) == found


def test_lines_that_are_too_long_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(jsonl, "PIECE_BYTES", 1 << 16)
    limit = (1 << 20) - len(json.dumps({"image": ""}))
    lines = [{"image": "A" * (limit + extra)} for extra in (0, 1, 5 << 20)]
    write_jsonl(tmp_path / "a.jsonl", [*lines, {"image": b64(PNG[0])}])
    rows = read(tmp_path)
    too_long = "too_large: the line has more than 1 MiB"
    assert [r.error for r in rows] == ["corrupt: image is not base64: Incorrect padding", too_long, too_long, None]
    assert rows[3].image == PNG[0]


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_do_not_depend_on_how_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, name: str
) -> None:
    write_jsonl(tmp_path / name, ["", '{"label": 1}', "\r", '{"label": 2}\r', " ", '{"label": 3}'])
    monkeypatch.setattr(jsonl, "PIECE_BYTES", piece)
    assert [r.label for r in read(tmp_path)] == [1, 2, 3]


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(3000) for _ in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl.gz", [{"image": b64(image)} for image in images])
    whole = path.read_bytes()
    source = SourceConfig(uri=str(path))
    (planned,) = units_of(source)
    path.write_bytes(whole[: len(whole) // 2])
    name, (file,), _ = list_source(source, "corpus")
    facts = measure(file, name, source)
    count = facts.parts[0][0]
    assert 8 <= count <= 10
    assert str(facts.note).startswith(f"{path} ends early, after {count} lines: ")
    assert [(r.image, r.error) for r in read(path)] == [(image, None) for image in images[:count]]
    rows = list(read_rows(planned, source))
    assert [r.image for r in rows] == images[:count] + [None] * (20 - count)
    assert all(str(r.error).startswith("truncated: ") for r in rows[count:])


@pytest.mark.parametrize(("name", "walked"), [("a.jsonl", 0), ("a.jsonl.gz", 31)])
def test_only_wanted_lines_are_parsed_and_their_files_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, walked: int
) -> None:
    for i in range(50):
        (tmp_path / f"{i}.png").write_bytes(PNG[i % 40])
    source = SourceConfig(uri=str(write_jsonl(tmp_path / name, [{"path": f"{i}.png"} for i in range(50)])))
    (unit,) = units_of(source)
    opened: list[str] = []
    load: Callable[[str], Any] = files_module.read_whole
    monkeypatch.setattr(files_module, "read_whole", lambda uri: opened.append(uri) or load(uri))
    seen: list[int] = []
    lines = jsonl._lines

    def counted(handle: Any) -> Iterator[tuple[int, int, bytes | None]]:
        for number, line in enumerate(lines(handle)):
            seen.append(number)
            yield line

    monkeypatch.setattr(jsonl, "_lines", counted)
    rows = list(read_rows(unit, source, np.array([1, 20, 30])))
    assert [r.image for r in rows] == [PNG[1], PNG[20], PNG[30]]
    assert sorted(opened) == sorted(str(tmp_path / f"{i}.png") for i in (1, 20, 30))
    assert seen == list(range(walked))


def test_a_path_in_the_wrong_key_is_told_and_an_empty_image_leaves_the_path(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG[1])
    lines = [{"image": "1.PNG"}, {"image": "?"}, {"image": "", "path": "1.png"}, {"image": ""}]
    source = SourceConfig(uri=str(write_jsonl(tmp_path / "a.jsonl", lines)))
    rows = [row for unit in units_of(source) for row in read_rows(unit, source)]
    said = [str(row.error) for row in rows]
    assert said[0].startswith("corrupt: image is not base64: ")
    assert said[0].endswith("; the path of a file goes into path")
    assert said[1].startswith("corrupt: image is not base64: ")
    assert "goes into" not in said[1]
    assert [row.image for row in rows[2:]] == [PNG[1], b""]


def test_images_beside_the_file_are_not_reported_as_left_out(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG[1])
    (tmp_path / "notes.txt").write_text("x")
    write_jsonl(tmp_path / "a.jsonl", [{"path": "1.png"}])
    sources = {"corpus": (SourceConfig(uri=str(tmp_path), format="jsonl"),)}
    listing = list_inputs(sources)
    assert listing.table.column("relative").to_pylist() == ["a.jsonl"]
    assert listing.remarks == ("corpus: left out, not jsonl by name: 1 .txt",)


def test_files_on_storage_that_fails_in_passing(tmp_path: Path, flaky: type[Flaky]) -> None:
    flaky.faults = repeat(None)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(PNG[i])
    source = on_flaky(
        SourceConfig(uri=str(write_jsonl(tmp_path / "a.jsonl", [{"path": f"{i}.png"} for i in range(4)])))
    )
    (unit,) = units_of(source)
    reset = ConnectionResetError(104, "reset")
    flaky.faults = chain([None, reset, None, reset], repeat(None))
    assert [r.image for r in read_rows(unit, source)] == PNG[:4]


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_is_planned_over_jsonl(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "u/a.jsonl", [{"image": b64(PNG[0]), "key": "x"}, {"image": b64(PNG[1]), "key": "x"}, "{"])
    write_jsonl(tmp_path / "p.jsonl", [{"image": b64(PNG[i]), "label": i % 2} for i in range(4)])
    corpus = SourceConfig(uri=str(tmp_path / "u"), id_column="key")
    positives = SourceConfig(uri=str(tmp_path / "p.jsonl"), per_class=1)
    sources = {"positives": (positives,), "corpus": (corpus,)}
    folder = RunFolder(str(tmp_path / "run"))
    assert plan_inputs(folder, sources, list_inputs(sources).table, print) == {"positives": 4, "corpus": 3}
    units = units_from_table(folder.read_table("plan.parquet"))
    rows = [row for unit in units if unit.role == "corpus" for row in read_rows(unit, corpus)]
    assert [row.image_id for row in rows] == ["x", "a.jsonl#1", "a.jsonl#2"]
    assert [str(row.error).partition(":")[0] for row in rows] == ["None", "duplicate_id", "corrupt"]
    teacher = TeacherConfig(arch="lenet5", weights="w", num_classes=2, input_size=8, mean=[0.5] * 3, std=[0.5] * 3)
    (request,) = index_labelled("positives", units, (positives,), teacher).requests
    assert request.positions is not None
    assert request.positions.tolist() == [0, 1]
    write_jsonl(tmp_path / "p.jsonl", [{"image": b64(PNG[i]), "lapel": i % 2} for i in range(4)])
    with pytest.raises(LabelError, match=r"p\.jsonl row 0 has no label: is label_column 'label' right"):
        index_labelled("positives", units, (positives,), teacher)
