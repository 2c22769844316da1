"""New files against the sample: no alarm on more of the same, one on what differs, whole files as the noise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from record_types import faults_of
from synthetic import corpus, write_task

from pukd_ray import load_config, run_pipeline
from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import ChunkMarker, DriftRecord
from pukd_ray.selection import drift
from pukd_ray.selection.calibration import Calibration
from pukd_ray.selection.chunks import chunk_markers
from pukd_ray.selection.drift import Tally, count_scores, describe_drift, find_drift, refer_to, thresholds, trust_with

CALIBRATION = Calibration(1.0, 0.0)


def draw_files(
    rng: np.random.Generator, files: int, rows: int, prior: float = 0.25, rho: float = 0.0, other_kind: float = 0.0
) -> list[np.ndarray]:
    """Logits of files of unequal size, whose shares of relevant images are correlated so; a part is of another kind."""
    found = []
    for n in rng.integers(rows // 2, rows * 3 // 2 + 1, files):
        share = rng.beta(prior * (1 / rho - 1), (1 - prior) * (1 / rho - 1)) if rho else prior
        z = np.where(rng.random(n) < share, rng.normal(4, 2, n), rng.normal(-5, 2, n)) + rng.normal() * 0.5 * (rho > 0)
        found.append(np.where(rng.random(n) < other_kind, rng.normal(-1, 1.5, n), z))
    return found


def tally(files: list[np.ndarray], edges: np.ndarray, unreadable: int = 0) -> Tally:
    counts = [count_scores(z[unreadable:], CALIBRATION(z[unreadable:]), unreadable, edges) for z in files]
    return Tally.of(np.array(counts), np.array([len(z) for z in files]))


def sample_of(files: list[np.ndarray]) -> tuple[Tally, np.ndarray]:
    z = np.concatenate(files)
    edges = thresholds(z, CALIBRATION(z))
    return tally(files, edges), edges


@pytest.mark.parametrize(
    ("prior", "rho", "files", "new"),
    [
        (0.25, 0.0, 1, 1), (0.25, 0.0, 3, 1), (0.25, 0.0, 100, 5), (0.02, 0.0, 12, 5), (0.25, 0.05, 3, 1),
        (0.25, 0.05, 12, 1), (0.25, 0.05, 100, 5), (0.25, 0.3, 12, 1), (0.25, 0.3, 100, 5), (0.02, 0.05, 12, 1),
    ],
)  # fmt: skip
def test_more_of_the_same_is_no_drift(prior: float, rho: float, files: int, new: int) -> None:
    """At most 2 % of 200 draws, in two chunks, whatever sets files apart."""
    alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sample, edges = sample_of(draw_files(rng, files, min(400, 6400 // files), prior, rho))
        chunks = {str(c): tally(draw_files(rng, new, 400, prior, rho), edges) for c in range(2)}
        found = find_drift(sample, chunks)
        assert found is not None
        alarms += found["found"]
    assert alarms <= 4


def test_files_that_differ_from_each_other_need_more_to_be_a_drift() -> None:
    """What is no news among files with a mind of their own would be some among files that are alike."""
    rng = np.random.default_rng(0)
    alike, edges = sample_of(draw_files(rng, 12, 400))
    apart = tally(draw_files(rng, 12, 400, rho=0.3), edges)
    new = tally([np.concatenate(draw_files(rng, 1, 400, prior=0.5))], edges)
    assert drift.compare(alike, new).reasons
    assert not drift.compare(apart, new).reasons


@pytest.mark.parametrize(
    ("new", "unreadable", "reason"),
    [
        ({"prior": 0.75}, 0, "look relevant, of the sample 2"),
        ({"prior": 0.08}, 0, "look relevant, of the sample 2"),
        ({"other_kind": 0.4}, 0, "the scores' distribution is 0."),
        ({}, 60, "cannot be read, of the sample 0.0%"),
    ],
)
def test_what_differs_is_a_drift(new: dict[str, float], unreadable: int, reason: str) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sample, edges = sample_of(draw_files(rng, 12, 400))
        found = find_drift(sample, {"00000": tally(draw_files(rng, 3, 400, **new), edges, unreadable)})
        assert found is not None
        assert found["found"]
        assert any(reason in r for r in found["reasons"])
        assert faults_of(found, DriftRecord) == []
        assert "--redo selector" in describe_drift(found)


@pytest.mark.parametrize(("before", "after"), [("high", "low"), ("low", "low"), ("none", "none")])
def test_trust_drops_with_a_drift(before: str, after: str) -> None:
    rng = np.random.default_rng(0)
    sample, edges = sample_of(draw_files(rng, 12, 400))
    prior: Any = {"trust": before, "reasons": ["P is small"]}
    same, other = (
        find_drift(sample, {"00000": tally(draw_files(rng, 3, 400, prior=share), edges)}) for share in (0.25, 0.75)
    )
    assert trust_with(None, prior) == trust_with(same, prior) == {"level": before, "reasons": ["P is small"]}
    trust = trust_with(other, prior)
    assert trust["level"] == after
    assert trust["reasons"][0] == "P is small"
    assert trust["reasons"][1].startswith("new files are not like the sample: ")


def test_one_chunk_that_differs_does_not_hide_among_others() -> None:
    rng = np.random.default_rng(0)
    sample, edges = sample_of(draw_files(rng, 40, 400))
    chunks = {f"0000{c}": tally(draw_files(rng, 10, 400), edges) for c in range(4)}
    chunks["00004"] = tally(draw_files(rng, 2, 400, prior=0.75), edges)
    found = find_drift(sample, chunks)
    assert found is not None
    assert all(reason.startswith("chunk 00004: ") for reason in found["reasons"])
    assert found["found"]
    assert find_drift(sample, {}) is None


def test_tallies_add_up_and_survive_storage() -> None:
    rng = np.random.default_rng(0)
    files = draw_files(rng, 8, 300)
    whole, edges = sample_of(files)
    parts = tally(files[:3], edges) + tally(files[3:], edges)
    for name, value in whole.to_json().items():
        np.testing.assert_allclose(parts.to_json()[name], value)  # type: ignore[literal-required]
    again = Tally.from_json(whole.to_json())
    np.testing.assert_array_equal(again.shares, whole.shares)
    z = np.concatenate(files)
    np.testing.assert_allclose(whole.shares[:-2], [(z > e).mean() for e in edges])
    assert whole.shares[-2] == pytest.approx(CALIBRATION(z).mean())


def unit(number: int, file: str, rows: int = 100) -> Unit:
    return Unit(unit_id=f"u{number}", role="corpus", source=0, format="parquet", files=(file,), ids=(file,), start=0,
                rows=rows)  # fmt: skip


@pytest.mark.parametrize(("files", "groups"), [(2, 30), (15, 15)])
def test_the_sample_is_grouped_by_files_if_it_has_enough(files: int, groups: int) -> None:
    units = [unit(i, f"f{i % files}") for i in range(30)]
    asked = {u.unit_id: 50 for u in units}
    names = np.repeat([u.unit_id for u in units], 48)  # two of each cannot be read
    logits = np.random.default_rng(0).normal(size=len(names)).astype(np.float32)
    found = refer_to([*units, unit(99, "never sampled")], asked, names, logits, CALIBRATION)
    assert found.tally.groups == groups
    assert found.tally.rows == 1500
    assert found.tally.shares[-1] == pytest.approx(2 / 50)
    assert "u99" in found.known
    new = [unit(100, "g"), unit(101, "g"), unit(99, "never sampled")]
    counts = {u.unit_id: np.zeros(len(found.edges) + 2) for u in new}
    tally_of_new = found.tally_of(new, counts)
    assert tally_of_new is not None
    assert (tally_of_new.rows, tally_of_new.groups) == (200, 1 if groups == files else 2)
    assert found.tally_of(new[2:], counts) is None


BARE = {"selector.blend": False}  # the network's logit alone goes through the pass as well


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_cluster")
def test_new_files_of_a_run_are_compared_and_only_they(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path, images=900)
    config = load_config(tmp_path / "config.yaml", {"selector.steps": 60, "score.chunk_images": 2000} | BARE)
    folder = RunFolder(config.output)

    def score() -> tuple[ChunkMarker, str]:
        run_pipeline(config, until="score")
        return chunk_markers(folder)[-1], capsys.readouterr().out  # type: ignore[return-value]

    first, _ = score()
    assert first["new"] is None
    assert not {f for f in folder.files("selector") if "blend" in f or "nearness" in f}
    pq.write_table(corpus(300, 0.3, 11), tmp_path / "lake" / "part-3.parquet")
    same, out = score()
    assert same["new"] is not None
    assert (same["new"]["rows"], same["new"]["groups"]) == (300, 1)
    assert "not like the sample" not in out
    pq.write_table(corpus(300, 0.9, 12), tmp_path / "lake" / "part-4.parquet")
    third, out = score()
    assert third["new"] is not None
    assert third["new"]["rows"] == 300
    assert "new files are not like the sample that the selector was trained on" in out
    assert "--redo selector" in out
    units = Counter(unit for marker in chunk_markers(folder) for unit in marker["units"])
    assert set(units.values()) == {1}
