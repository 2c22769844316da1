"""Stage `select` on score files made by hand: who is taken, and what each task is handed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow.dataset import dataset
from ray.remote_function import RemoteFunction
from sklearn.metrics import average_precision_score

from pukd_ray.config import RunConfig, SelectionConfig
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.plan import plan_inputs
from pukd_ray.corpus.reading import content_hash
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.units import Unit, units_from_table
from pukd_ray.errors import RunError
from pukd_ray.run.folder import SCORES_SCHEMA, SELECTED_SCHEMA, RunFolder
from pukd_ray.run.records import selection_in
from pukd_ray.selection import average_precision, copies, find_cuts, moving, select
from pukd_ray.selection.calibration import Calibration, to_json
from pukd_ray.selection.cuts import digits, ordered_bits, share_quota, unit_interval
from pukd_ray.selection.scoring import keep_key, sort_key

CLASSES = 3
FILES, PER_FILE = 8, 30
ROWS = FILES * PER_FILE
Run = tuple[RunFolder, RunConfig, list[Unit]]
Tasks = list[tuple[str, tuple[Any, ...]]]


def image_of(row: int) -> bytes:
    """Rows 40 to 49 are copies of 0 to 9, and row 7 of the first positive."""
    return np.random.default_rng(row - 40 if 40 <= row < 50 else row).bytes(900)


def score_row(row: int, source: Path) -> dict[str, Any]:
    """Logits with ties; file 2 has relevant images only, file 5 none; every tenth image is unreadable."""
    found = dict.fromkeys(SCORES_SCHEMA.names) | {"image_id": f"u.parquet#{row}", "source": str(source)}
    found |= {"source_row": row, "content_hash": content_hash(image_of(row))}
    if row % 10 == 3:
        return found | {"error": "corrupt: by hand"}
    logit = float(np.round(np.random.default_rng(1000 + row).normal() * 2, 1))
    logit = {2: abs(logit) + 0.1, 5: -abs(logit)}.get(row // PER_FILE, logit)
    return found | {
        "pu_logit": logit,
        "pu_probability": 1 / (1 + np.exp(-logit)),
        "teacher_label": row * 7 % 5 % CLASSES,
        "teacher_confidence": 0.9,
        "relevant": logit > 0.3,
        "image": image_of(row) if row % 3 else None,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Several units of corpus, eight score files, and the few things that `select` reads of the selector's."""
    folder = tmp_path_factory.mktemp("select")
    corpus = folder / "u.parquet"
    pq.write_table(pa.table({"image": [image_of(k) for k in range(ROWS)]}), corpus, row_group_size=50)
    pq.write_table(pa.table({"image": [image_of(7), b"other"], "label": [0, 1]}), folder / "p.parquet")
    teacher = {"arch": "lenet5", "weights": "t.pt", "num_classes": CLASSES, "channels": 1, "mean": [0.5], "std": [0.5]}
    config = RunConfig(
        output=str(folder / "run"),
        teacher=teacher | {"input_size": 8},
        positives={"uri": str(folder / "p.parquet")},
        corpus={"uri": str(corpus)},
    )
    made = RunFolder(config.output)
    files = [f"scores/00000-{i}.parquet" for i in range(FILES)]
    for i, file in enumerate(files):
        rows = [score_row(k, corpus) for k in range(i * PER_FILE, (i + 1) * PER_FILE)]
        made.write_table(file, pa.Table.from_pylist(rows, schema=SCORES_SCHEMA))
    made.write_json("markers/score/00000.json", {"files": files})
    rng = np.random.default_rng(0)
    held_out = {
        "logit": rng.normal(size=200) * 2,
        "role": ["positives"] * 50 + ["corpus"] * 150,
        "weight": np.ones(200),
    }
    made.write_table("selector/held_out.parquet", pa.table(held_out))
    made.write_json("selector/calibration.json", to_json(Calibration(1.0, 0.0), [Calibration(0.9, 0.1)] * 3))
    made.write_json("selector/prior.json", {"value": 0.3, "trust": "low"})
    sources = sources_by_role(config)
    plan_inputs(made, sources, list_inputs(sources).table, print)
    return made, config, units_from_table(made.read_table("plan.parquet"))


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Tasks:
    """(name, arguments) of each task that this process hands to Ray."""
    seen: Tasks = []
    submit = RemoteFunction._remote

    def spy(self: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        seen.append((self._function_name.rpartition(".")[2], args))
        return submit(self, args, kwargs, **options)

    monkeypatch.setattr(RemoteFunction, "_remote", spy)
    return seen


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a corpus of billions is to the real limits: many tasks, runs and parts."""
    for module, name, value in (
        (select, "FILES_PER_TASK", 1),
        (moving, "RUN_BYTES", 6000),
        (moving, "PART_ROWS", 7),
        (moving, "PART_BYTES", 6000),
        (moving, "BUCKET_ROWS", 4),
        (average_precision, "RANGE_ROWS", 20),
        (copies, "COPY_SHUFFLE_ROWS", 50),
    ):
        monkeypatch.setattr(module, name, value)


def selected(run: Run, into: str, **selection: Any) -> tuple[dict[str, Any], pa.Table]:
    folder, config, units = run
    summary = select.select_images(folder, replace(config, selection=SelectionConfig(**selection)), units, into)
    names = folder.files(into)  # Parquet only
    assert names == [f"{into}/part-{p:05d}.parquet" for p in range(summary["parts"])]
    table = pa.concat_tables([folder.read_table(name) for name in names])
    assert table.schema.equals(SELECTED_SCHEMA)
    return summary, table


def received(refs: tuple[Any, ...]) -> list[Any]:
    """What a task with these arguments gets, but for plain values."""
    return [ray.get(r) for a in refs for r in (a if isinstance(a, list) else [a]) if isinstance(r, ray.ObjectRef)]


RULES: list[dict[str, Any]] = [
    {"rule": "positive"},
    {"rule": "positive", "deduplicate": "none"},
    {"rule": "budget", "budget": 30, "order": "random"},
    {"rule": "quota", "budget": 41},
    {"rule": "precision", "target_precision": 0.8},
    {"rule": "teacher_confidence", "budget": 37},  # all of the same confidence
    {"rule": "all"},
    {"rule": "truth"},
]


def expected(config: RunConfig, **selection: Any) -> list[int]:
    """Rows that a rule takes, in the order of `selected/`; by plain Python."""
    scored = [score_row(k, Path()) for k in range(ROWS)]
    good = [r for r in scored if r["error"] is None]
    for r in good:
        r["key"] = sort_key(config.seed, r["image_id"])
        r["keep"] = keep_key(config.seed, r["image_id"])
        r["pu_logit"] = float(np.float32(r["pu_logit"]))
    good.sort(key=lambda r: r["key"])
    if selection.get("deduplicate") != "none":
        by_keep = sorted(good, key=lambda r: -r["keep"])  # of equal images the lowest stays
        good = sorted({r["content_hash"]: r for r in by_keep}.values(), key=lambda r: r["key"])
    good = [r for r in good if r["content_hash"] != content_hash(image_of(7))]
    rule, budget = selection["rule"], selection.get("budget", 0)
    if rule in ("positive", "budget", "quota"):
        good = [r for r in good if r["pu_logit"] > 0]
    if rule == "truth":
        good = [r for r in good if r["relevant"]]
    if "order" in selection:
        good.sort(key=lambda r: (-(r["key"] % 2**64 >> 40), r["key"]))
    elif rule == "teacher_confidence":
        good.sort(key=lambda r: r["key"])
    else:
        good.sort(key=lambda r: (-r["pu_logit"], r["key"]))
    if rule == "quota":
        classes = [[r for r in good if r["teacher_label"] == k] for k in range(CLASSES)]
        quota = share_quota(np.array([len(c) for c in classes]), budget)
        good = [r for c, n in zip(classes, quota, strict=True) for r in c[:n]]
    elif budget:
        good = good[:budget]
    return [r["source_row"] for r in sorted(good, key=lambda r: r["key"] % 2**64)]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("selection", RULES, ids=lambda s: "-".join(map(str, s.values())))
def test_who_is_taken_does_not_depend_on_the_number_of_tasks(
    run: Run, selection: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole = selected(run, "whole", **selection)
    assert plain["parts"] == 1
    small(monkeypatch)
    monkeypatch.setattr(find_cuts, "GATHERED_ROWS", 2)
    monkeypatch.setattr(find_cuts, "TABLES_AT_ONCE", 3)
    summary, table = selected(run, "small", **selection)
    assert summary["parts"] > 4
    rows = table.column("source_row").to_pylist()
    if selection["rule"] != "precision":
        assert rows == expected(run[1], **selection)
    assert table.column("image").to_pylist() == [image_of(k) for k in rows]
    assert table.equals(whole)
    for name in plain.keys() - {"parts", "histogram", "estimated"}:
        assert summary[name] == plain[name], name
    for name in ("all", "selected", "relevant"):
        assert summary["histogram"][name] == plain["histogram"][name]
    np.testing.assert_allclose(summary["histogram"]["logit"], plain["histogram"]["logit"], rtol=1e-12)
    for name, value in plain["estimated"].items():  # sums of floating point are rounded by task
        assert summary["estimated"][name] == (None if value is None else pytest.approx(value, rel=1e-9))


def test_pictures_with_copies_are_drawn_as_often_as_others() -> None:
    ids = np.array([f"{i}" for i in range(12_000)])
    picture = np.r_[np.arange(2000), np.repeat(np.arange(2000, 4000), 5)]  # half of them are there five times
    keys = np.array([[keep_key(0, i), sort_key(0, i)] for i in ids])
    rows = np.column_stack([picture, keys[:, 0], np.arange(len(ids))])
    dropped = copies._copies_in._function(np.zeros(0, np.int64), True, rows)
    left = np.delete(np.arange(len(ids)), dropped)
    assert sorted(picture[left]) == list(range(4000))
    chosen = left[np.argsort(-unit_interval(keys[left, 1]))[:200]]
    assert (picture[chosen] < 2000).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_told_is_null(run: Run) -> None:
    folder, _, _ = run
    told, _ = selected(run, "rows/told", rule="positive")
    assert all(value is not None for value in told["estimated"].values())
    before = folder.read_json("selector/prior.json")
    folder.write_json("selector/prior.json", before | {"trust": "none"})
    try:
        untold, _ = selected(run, "rows/told", rule="positive")
    finally:
        folder.write_json("selector/prior.json", before)
    assert set(untold["estimated"].values()) == {None}
    assert {**untold, "estimated": None} == {**told, "estimated": None}
    rival, _ = selected(run, "rows/told", rule="teacher_confidence", budget=37)
    assert set(rival["estimated"].values()) == {None}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("into", ["selected", "rows/x"])
def test_any_reader_opens_the_folder_and_the_summary_lies_beside_it(run: Run, into: str) -> None:
    folder, _, _ = run
    old = f"{into}/summary.json"
    folder.write_json(old, {"n_selected": 1})
    assert folder.find_record(selection_in(into)) == {"n_selected": 1}  # of a run made before
    summary, table = selected(run, into, rule="positive")
    assert folder.find_record(selection_in(into)) == summary
    assert folder.read_json({"selected": "selection.json", "rows/x": "rows/x.json"}[into]) == summary
    assert dataset(folder.path(into)).to_table().equals(table)
    with pytest.raises(RunError, match="rule threshold takes none of 216 scored images"):
        selected(run, into, rule="threshold", threshold=1.0)
    assert folder.find_record(selection_in(into)) is None  # of what is not whole there is none


@pytest.mark.usefixtures("ray_cluster")
def test_no_task_is_handed_rows_of_another(run: Run, monkeypatch: pytest.MonkeyPatch, tasks: Tasks) -> None:
    small(monkeypatch)
    summary, _ = selected(run, "handed", rule="positive")
    hashed = [received(args[2:]) for name, args in tasks if name == "_copies_in"]
    assert len(hashed) == 5  # 216 readable rows, 50 in each
    assert sum(len(piece) for pieces in hashed for piece in pieces) == ROWS * 9 // 10
    # Of the selection only places: its bytes go by way of storage.
    written = [received(args) for name, args in tasks if name == "_write_part"]
    assert len(written) == summary["parts"] > 4
    assert not [a for name, args in tasks for a in received(args) if name != "_add_counts" and isinstance(a, pa.Table)]
    # A reference within a list is no dependency to Ray: the task would start, and hold a process, before it is there.
    assert not [
        name for name, args in tasks if any(isinstance(a, list) and isinstance(a[0], ray.ObjectRef) for a in args)
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_holds_no_more_images_than_a_run_or_a_part(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    folder, _, _ = run
    monkeypatch.setattr(RunFolder, "delete_folder", lambda *_: None)  # what the first step leaves stays
    summary, table = selected(run, "shares", rule="all")
    (place,) = Path(folder.path("attempts")).iterdir()
    runs = {
        file.name: moving._read_buckets(folder, f"attempts/{place.name}/{file.name}", 0, file.stat().st_size)
        for file in place.iterdir()
    }
    assert len(runs) == 2 * FILES
    for tables in runs.values():
        # Kept images come as a piece, fetched ones as another: up to 18 of 900 bytes in a score file.
        assert sum(t.nbytes for t in tables) <= 18 * 1100
        order = pa.concat_tables(tables).column("order").to_pylist()
        assert order == sorted(order)
    rows = [row for tables in runs.values() for t in tables for row in t.column("source_row").to_pylist()]
    assert sorted(rows) == sorted(table.column("source_row").to_pylist())
    sizes = [folder.read_table(name).num_rows for name in folder.files("shares")]
    assert max(sizes) <= 7 + 4  # a bucket is never cut
    assert summary["parts"] == len(sizes)


@pytest.mark.usefixtures("ray_cluster")
def test_quotas_need_one_pass_whatever_the_number_of_classes(
    run: Run, monkeypatch: pytest.MonkeyPatch, tasks: Tasks
) -> None:
    small(monkeypatch)
    selected(run, "quotas", rule="quota", budget=41)
    counts = Counter(name for name, _ in tasks)
    assert counts["_count_keys"] == FILES
    assert [n for name, n in counts.items() if name.startswith("_rows_of_bin")] == [FILES]
    tasks.clear()
    monkeypatch.setattr(select, "MAX_TASKS", 3)
    selected(run, "few", rule="positive")
    assert Counter(name for name, _ in tasks)["_count_keys"] == 3


@pytest.mark.usefixtures("ray_cluster")
def test_a_bin_that_is_too_large_is_counted_again(run: Run, monkeypatch: pytest.MonkeyPatch, tasks: Tasks) -> None:
    whole = selected(run, "bins", rule="teacher_confidence", budget=37)[1]
    tasks.clear()
    monkeypatch.setattr(find_cuts, "GATHERED_ROWS", 100)
    assert selected(run, "bins", rule="teacher_confidence", budget=37)[1].equals(whole)
    assert len({args[3].shape for name, args in tasks if name == "_count_keys"}) == 3  # key, key, upper bits of the tie
    (merged,) = [received(args) for name, args in tasks if name == "_nth_rows"]
    assert 0 < sum(map(len, merged)) <= 100


def test_rows_rise_by_their_digits_in_the_order_in_which_they_are_taken() -> None:
    rng = np.random.default_rng(0)
    keys = np.r_[rng.normal(size=300).round(1), [np.inf, -np.inf, 0.0, -0.0]].astype(np.float32)
    ties = rng.integers(-(2**63), 2**63, len(keys))
    ties[1] = ties[0]
    taken = np.lexsort((ties, -keys.astype(np.float64)))
    found = digits(ordered_bits(keys).astype(np.int64), ties)
    assert np.lexsort(found[::-1]).tolist() == taken.tolist()


def test_average_precision_of_parts_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=5000).round(2).astype(np.float32)
    truth = rng.random(5000) < 1 / (1 + np.exp(-keys))
    bits = ordered_bits(keys).astype(np.int64)
    pieces = [average_precision.count_truth(bits[i::7], truth[i::7]) for i in range(7)]
    counts = average_precision.merge_truth(np.concatenate(pieces))
    assert (np.diff(counts[:, 0]) > 0).all()
    low, high = np.split(counts, [150])
    parts = [(low, tuple(high[:, 1:].sum(0).tolist())), (high, (0, 0))]
    found = sum(average_precision.precision_sum(part, above) for part, above in parts) / truth.sum()
    assert found == pytest.approx(average_precision_score(truth, keys), rel=1e-12)


def test_parts_are_as_many_buckets_as_the_limits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "PART_ROWS", 10)
    monkeypatch.setattr(moving, "PART_BYTES", 100)
    assert moving.cut_parts(np.array([4, 6, 1, 12, 0, 3]), np.array([10, 20, 10, 10, 0, 95])) == [0, 2, 3, 5]
    assert moving.cut_parts(np.array([0]), np.array([0])) == [0]
    order = np.sort(np.random.default_rng(0).integers(0, 2**64, 500_000, np.uint64))
    order[-1] = 2**64 - 1  # 2.0**64 as floating point
    for some in (order, order[: 500_000 // 64]):  # a rule that draws takes a range
        to = moving.Runs("", 256, (int(some[0]), int(some[-1])), 1)
        bucket = to.bucket_of(some)
        assert np.unique(bucket).tolist() == list(range(256))
        assert (np.diff(bucket) >= 0).all()
