"""Which images the gallery shows, and where their bytes come from."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pukd_ray.config import RunConfig, SelectionConfig
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.pixels import PixelSpec, decode, encode_png
from pukd_ray.corpus.plan import plan_inputs
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.report import gallery
from pukd_ray.run.folder import SCORES_SCHEMA, SELECTED_SCHEMA, RunFolder

ALL = [0, 1]
CUTS = np.zeros(2)


def candidates(logits: list[float], selected: list[bool], labels: list[int] | None = None) -> pa.Table:
    n = len(logits)
    return pa.table(
        {
            "image_id": [f"i{k}" for k in range(n)],
            "pu_logit": pa.array(logits, pa.float32()),
            "teacher_label": pa.array(labels or [0] * n, pa.int32()),
            "selected": pa.array(selected, pa.bool_()),
            "key": pa.array(range(n), pa.int64()),
        }
    )


def shown(table: pa.Table, cut: float = 0.0, ranked: bool = True) -> dict[str, list[int]]:
    return {kind: rows.tolist() for kind, rows in gallery.pick(table, 0, cut, ranked).items()}


def test_pick_shows_top_both_sides_of_the_cut_and_the_rest() -> None:
    logits = [float(z) for z in range(30, -30, -1)]  # row k has logit 30 - k
    picked = shown(candidates(logits, [z > 0 for z in logits]))
    assert picked["top"] == list(range(8))
    assert picked["borderline"] == [26, 27, 28, 29, 30, 31, 32, 33]
    assert picked["rejected"] == [34, 35, 36, 37, 38, 39, 40, 41]  # the last four are those with the lowest keys


def test_no_image_is_shown_twice_and_small_classes_fill_up() -> None:
    logits = [3.0, 2.0, 1.0, -1.0, -2.0]
    assert shown(candidates(logits, [True] * 3 + [False] * 2)) == {
        "top": [0, 1, 2],
        "borderline": [3, 4],
        "rejected": [],
    }
    assert shown(candidates([1.0] * 20, [True] * 20)) == {
        "top": list(range(8)),
        "borderline": list(range(12, 20)),
        "rejected": [],
    }
    assert shown(candidates([], [])) == {"top": [], "borderline": [], "rejected": []}
    assert shown(candidates([1.0], [True], labels=[1])) == {"top": [], "borderline": [], "rejected": []}


def test_copies_above_the_cut_are_not_shown_as_left_out() -> None:
    picked = shown(candidates([3.0, 2.0, -1.0], [True, False, False]))
    assert picked == {"top": [0], "borderline": [2], "rejected": []}


def test_rules_without_a_cut_show_what_they_left_out() -> None:
    logits = [float(z) for z in range(40, -40, -1)]
    selected = [k % 2 == 0 for k in range(80)]
    picked = shown(candidates(logits, selected), ranked=False)
    assert picked["top"] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert picked["borderline"] == [36, 37, 38, 39, 40, 41, 42, 43]
    assert picked["rejected"] == [1, 3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize("ranked", [True, False])
def test_the_best_of_parts_are_the_best_of_the_whole(ranked: bool) -> None:
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=3000) * 2, 1)  # with ties
    selected = (logits > 0) & (rng.random(3000) < 0.9)
    whole = candidates(logits.tolist(), selected.tolist(), rng.integers(0, 2, 3000).tolist())
    best = pa.concat_tables([whole.slice(0, 0)])
    for start in range(0, 3000, 700):
        best = gallery.best_candidates(pa.concat_tables([whole.slice(start, 700), best]), ALL, CUTS, ranked)
        assert best.num_rows <= len(ALL) * (gallery.PER_KIND + 3 * gallery.NEAREST + gallery.DRAWN)
    for label in ALL:
        ids = [
            {k: t.column("image_id").take(rows).to_pylist() for k, rows in gallery.pick(t, label, 0.0, ranked).items()}
            for t in (whole, best)
        ]
        assert ids[0] == ids[1]
        assert [len(v) for v in ids[0].values()] == [8, 8, 8]
        assert len({i for v in ids[0].values() for i in v}) == 24


def test_cuts_of_rules() -> None:
    lowest = np.array([0.5, 0.25, np.inf])

    def cuts(**selection: Any) -> list[float]:
        return gallery.class_cuts(SelectionConfig(**selection), lowest).tolist()

    assert cuts(rule="positive") == [0, 0, 0]
    assert cuts(rule="threshold", threshold=0.6) == [0.25] * 3
    assert cuts(rule="budget", budget=9) == [0.25] * 3
    assert cuts(rule="budget", budget=9, order="random") == [0, 0, 0]
    assert cuts(rule="quota", budget=9) == [0.5, 0.25, 0]
    assert cuts(rule="random", budget=9) == [0, 0, 0]
    assert cuts(rule="teacher_confidence", budget=9) == [0, 0, 0]


def test_at_most_twelve_classes_those_with_most_images() -> None:
    assert gallery.shown_classes([0, 5, 2]) == [0, 1, 2]
    assert gallery.shown_classes([3] * 20) == list(range(12))
    assert gallery.shown_classes(list(range(20))) == list(range(8, 20))


def test_thumbnails_are_what_the_teacher_sees() -> None:
    pixels = np.arange(3 * 16 * 16, dtype=np.uint8).reshape(3, 16, 16)
    uri = gallery.thumbnail(encode_png(pixels), PixelSpec(16, 3, "crop"))
    assert uri is not None
    kind, _, body = uri.partition(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(decode(base64.b64decode(body), PixelSpec(16, 3, "crop")), pixels)
    assert gallery.thumbnail(b"no image", PixelSpec(16, 3, "crop")) is None
    assert gallery.thumbnail(None, PixelSpec(16, 3, "crop")) is None


def image_of(row: int) -> bytes:
    return encode_png(np.full((1, 8, 8), row, np.uint8))


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, RunConfig]:
    """60 images in three score files; class 0 has rows 0-39, class 1 has 40-49, class 2 none; 50-59 are unreadable.

    Logit of row k is 20 - k % 40, rows with a positive one are selected, only their bytes were kept.
    """
    pq.write_table(pa.table({"image": [image_of(k) for k in range(60)]}), tmp_path / "u.parquet")
    teacher = {"arch": "lenet5", "weights": "t.pt", "num_classes": 3, "channels": 1, "mean": [0.5], "std": [0.5]}
    config = RunConfig(
        output=str(tmp_path / "run"),
        teacher=teacher | {"input_size": 8},
        positives={"uri": str(tmp_path / "u.parquet")},
        corpus={"uri": str(tmp_path / "u.parquet")},
    )
    rows = []
    for k in range(60):
        logit = 20.0 - k % 40
        row: dict[str, Any] = dict.fromkeys(SCORES_SCHEMA.names)
        row |= {"image_id": f"u.parquet#{k}", "source": str(tmp_path / "u.parquet"), "source_row": k}
        if k < 50:
            row |= {"pu_logit": logit, "pu_probability": 1 / (1 + np.exp(-logit)), "teacher_label": int(k >= 40)}
            row |= {"relevant": k % 2 == 0, "image": image_of(k) if logit > 0 else None}
        else:
            row["error"] = "empty: no bytes"
        rows.append(row)
    folder = RunFolder(config.output)
    files = []
    for start in (0, 20, 40):
        files.append(f"scores/00000-{start}.parquet")
        folder.write_table(files[-1], pa.Table.from_pylist(rows[start : start + 20], schema=SCORES_SCHEMA))
    folder.write_json("markers/score/00000.json", {"files": files})
    taken = [r for r in rows if r["error"] is None and r["pu_logit"] > 0]
    folder.write_table("selected/part-00000.parquet", pa.Table.from_pylist(taken, schema=SELECTED_SCHEMA))
    folder.write_json("selection.json", {"class_counts": [20, 10, 0]})
    return folder, config


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("files_per_task", [1, 64])
def test_collect_gallery(
    run: tuple[RunFolder, RunConfig], files_per_task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = run
    sources = sources_by_role(config)
    plan_inputs(folder, sources, list_inputs(sources).table, print)
    monkeypatch.setattr(gallery, "FILES_PER_TASK", files_per_task)
    monkeypatch.setattr(gallery, "MERGE_WIDTH", 2)
    found = gallery.collect_gallery(folder, config)
    assert found.ranked
    assert [c.label for c in found.classes] == [0, 1, 2]
    first, second, third = found.classes

    def numbers(pictures: tuple[gallery.Picture, ...]) -> list[int]:
        return [int(p.image_id.partition("#")[2]) for p in pictures]

    assert numbers(first.top) == list(range(8))
    assert numbers(first.borderline) == list(range(16, 24))
    assert numbers(first.rejected)[:4] == [24, 25, 26, 27]
    assert set(numbers(first.rejected)[4:]) < set(range(28, 40))
    assert numbers(second.top) == list(range(40, 48))
    assert numbers(second.borderline) == [48, 49]
    assert second.rejected == third.top == third.borderline == third.rejected == ()
    assert found.count == 24 + 10
    for c in found.classes:
        for p in (*c.top, *c.borderline, *c.rejected):
            k = int(p.image_id.partition("#")[2])
            assert p.selected == (k < 20 or k >= 40)
            assert p.relevant == (k % 2 == 0)
            assert p.logit == 20 - k % 40
            assert p.uri == gallery.thumbnail(image_of(k), PixelSpec(8, 1, "crop"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_that_is_gone_costs_its_pictures_not_the_page(run: tuple[RunFolder, RunConfig]) -> None:
    folder, config = run
    sources = sources_by_role(config)
    plan_inputs(folder, sources, list_inputs(sources).table, print)
    Path(config.corpus[0].uris[0]).unlink()
    first, second, _ = gallery.collect_gallery(folder, config).classes
    assert all(p.uri for p in (*first.top, *second.top, *second.borderline))  # kept bytes need no corpus
    assert [p.uri is None for p in first.borderline] == [False] * 4 + [True] * 4
    assert all(p.uri is None for p in first.rejected)


@pytest.mark.parametrize(
    ("source", "link"),
    [
        ("/lake/a b/x#1.JPG", "file:///lake/a%20b/x%231.JPG"),
        ("https://lake/x.png", "https://lake/x.png"),
        ("/lake/part-0.parquet", None),
        ("s3://lake/x.png", None),
        ("javascript:alert(1)//x.png", None),
        ("", None),
    ],
)
def test_pictures_link_to_what_a_browser_can_open(source: str, link: str | None) -> None:
    assert gallery.Picture("i", 0.0, 0.5, None, False, None, source, 3).link == link
