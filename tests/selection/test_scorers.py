"""Rules that rank by a column of their own: what they are fitted to, and what tells that a pass did not write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pukd_ray import RunError
from pukd_ray.config import RunConfig
from pukd_ray.resume import check_progress
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.stages import STAGES
from pukd_ray.selection import chunks
from pukd_ray.selection.features import as_half, load_last_tap
from pukd_ray.selection.rules import RULES
from pukd_ray.selection.rules.base import Rule, Scorer, by_column, moments


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the rules as if they had a column of their own."""
    scorer = Scorer(lambda *_: {}, lambda *given: given[2].max(1))
    of_their_own = {
        name: Rule(name=name, text="", rank_by=by_column(name), reads=(name,), scorer=scorer)
        for name in ("all", "prior")
    }
    monkeypatch.setattr(chunks, "RULES", {**RULES, **of_their_own})


def run_config(folder: Path, **more: Any) -> RunConfig:
    teacher = {"arch": "lenet5", "weights": str(folder / "t.pt"), "num_classes": 3, "channels": 1, "input_size": 28}
    (folder / "t.pt").write_bytes(b"weights")
    (folder / "x.parquet").write_bytes(b"x")
    return RunConfig(
        output=str(folder / "run"),
        teacher=teacher | {"mean": [0.5], "std": [0.5]},
        positives={"uri": str(folder / "x.parquet")},
        corpus={"uri": str(folder / "x.parquet")},
        **more,
    )


@pytest.mark.usefixtures("rules")
def test_the_pass_writes_what_the_config_asks_for(tmp_path: Path) -> None:
    def wanted(**more: Any) -> tuple[str, ...]:
        return chunks.rules_of_pass(run_config(tmp_path, **more))

    assert wanted() == wanted(score={"also": ["positive", "truth"]}) == ()  # these need no column
    assert wanted(selection={"rule": "prior"}) == ("prior",)
    assert wanted(selection={"rule": "prior"}, score={"also": ["all", "prior"]}) == ("all", "prior")


@pytest.mark.usefixtures("rules")
def test_scores_without_the_column_of_the_rule_are_told_before_anything_moves(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_json("markers/score/00000.json", {"files": [], "columns": ["all", "prior"]})
    folder.write_text("selected/part", "")
    assert chunks.missing_columns(folder, ["all", "positive", "prior"]) == []
    folder.write_json("markers/score/00001.json", {"files": []})  # a chunk of an older version
    assert chunks.missing_columns(folder, ["all", "positive", "prior"]) == ["all", "prior"]
    check_progress(folder, run_config(tmp_path), "distill", STAGES)  # asks for none
    config = run_config(tmp_path, selection={"rule": "prior"}, score={"also": ["all"]})
    for redo in (None, "select"):
        with pytest.raises(Exception, match="--redo score") as caught:
            check_progress(folder, config, redo, STAGES)
        assert [f.partition(":")[0] for f in caught.value.faults] == ["score.also", "selection.rule", "output"]
        assert "rule prior" in caught.value.faults[1]
        assert not folder.exists("old")
    check_progress(folder, config, "score", STAGES)
    assert folder.exists("old")
    assert chunks.missing_columns(folder, ["all"]) == []  # nothing is scored yet


def cache(folder: RunFolder, last_tap: bool) -> dict[str, np.ndarray]:
    """Three files of a feature cache, rows in any order; rows that cannot be read in each."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        is_p = i % 3 == 0
        views = rng.normal(size=(4 if is_p else 1, 5))
        row = {"role": "positives" if is_p else "corpus", "unit": f"u{i % 2}", "source_row": i, "image_id": f"i{i:02d}"}
        row |= {"error": None, "label": str(i % 4) if is_p else None, "last_tap": as_half(views[0])}
        rows.append(row if i % 10 else row | {"error": "corrupt: by hand", "last_tap": None})
    for start in range(3):
        names = [n for n in rows[0] if last_tap or n != "last_tap"]
        part = [{n: r[n] for n in names} for r in rows[start::3][::-1]]
        for r in part:
            if r.get("last_tap") is not None:
                r["last_tap"] = r["last_tap"].tobytes()
        schema = [
            (n, pa.int64() if n == "source_row" else pa.binary() if n == "last_tap" else pa.string()) for n in names
        ]
        folder.write_table(f"selector/features/{start}.parquet", pa.Table.from_pylist(part, schema=pa.schema(schema)))
    return {r["image_id"]: r["last_tap"] for r in rows if r["error"] is None}


def test_scorers_are_fitted_to_the_last_tap_in_the_order_of_ids(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    taps = cache(folder, last_tap=True)
    files = folder.files("selector/features")
    p, u, labels = load_last_tap(folder, files)
    p_ids = [i for unit in (0, 1) for i in range(30) if i % 3 == 0 and i % 10 and i % 2 == unit]
    u_ids = [i for unit in (0, 1) for i in range(30) if i % 3 and i % 10 and i % 2 == unit]
    assert p.dtype == u.dtype == np.float32
    np.testing.assert_array_equal(p, [taps[f"i{i:02d}"] for i in p_ids])
    np.testing.assert_array_equal(u, [taps[f"i{i:02d}"] for i in u_ids])
    assert labels.tolist() == [i % 4 for i in p_ids]
    for one, again in zip((p, u, labels), load_last_tap(folder, files[::-1]), strict=True):
        np.testing.assert_array_equal(one, again)


def test_a_cache_without_it_says_what_to_do(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    cache(folder, last_tap=False)
    with pytest.raises(RunError, match="--redo selector"):
        load_last_tap(folder, folder.files("selector/features"))


def test_moments_standardise_and_spare_what_never_varies() -> None:
    features = np.random.default_rng(0).normal(3, 2, (500, 4)).astype(np.float32)
    features[:, 1] = 7
    found = moments(features)
    z = (features - found["mean"]) / found["std"]
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), [1, 0, 1, 1], atol=1e-5)


def sample(n_p: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P, which differs from U by three dimensions of six, U, and images of both kinds."""
    rng = np.random.default_rng(seed)
    shift = np.array([3, 3, 3, 0, 0, 0])
    relevant = rng.random(400) < 0.3
    u = rng.normal(size=(400, 6)) * [1, 1, 1, 9, 1, 1] + relevant[:, None] * shift
    p = rng.normal(size=(n_p, 6)) * [1, 1, 1, 9, 1, 1] + shift
    return p.astype(np.float32), u.astype(np.float32), relevant


@pytest.mark.parametrize("n_p", [3, 10, 40])
def test_knn_is_the_cosine_to_the_tenth_nearest_positive(n_p: int) -> None:
    p, u, relevant = sample(n_p)
    scorer = RULES["knn"].scorer
    assert scorer is not None
    scores = scorer.score(scorer.fit(p, u, np.zeros(n_p, np.int64)), u, np.zeros((400, 3)))
    assert scores.dtype == np.float32
    mean, std = u.mean(0), u.std(0)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = (a - mean) / std, (b - mean) / std
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [sorted((cosine(x, q) for q in p), reverse=True)[min(10, n_p) - 1] for x in u]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    if n_p == 40:
        assert roc_auc_score(relevant, scores) > 0.9
    assert np.isfinite(scorer.score(scorer.fit(p, u, np.zeros(n_p)), u.mean(0, keepdims=True), np.zeros((1, 3)))).all()


def test_a_linear_probe_is_logistic_regression_of_p_against_u() -> None:
    p, u, relevant = sample(40)
    scorer = RULES["linear_probe"].scorer
    assert scorer is not None
    scores = scorer.score(scorer.fit(p, u, np.zeros(40)), u, np.zeros((400, 3)))
    assert scores.dtype == np.float32
    z = np.concatenate([p, u]) - u.mean(0)
    z /= u.std(0)
    probe = LogisticRegression(class_weight="balanced").fit(z, [1] * 40 + [0] * 400)
    np.testing.assert_allclose(scores, probe.decision_function(z[40:]), atol=1e-2)
    assert roc_auc_score(relevant, scores) > 0.9
