"""What a run will take, concluded from three trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pukd_ray.config import ConfigError, RunConfig
from pukd_ray.corpus.units import Unit
from pukd_ray.estimate import Amounts, Line, Prices, Trial, conclude, estimate_run, lines_of, take_units
from pukd_ray.run.ahead import duration
from pukd_ray.runtime.engine import Cluster

CLUSTER = Cluster(cpus=8, gpus=2, nodes=2, autoscales=False)


def unit(role: str, number: int, rows: int) -> Unit:
    file = f"{role}-{number}.parquet"
    return Unit(
        unit_id=f"{role}{number}", role=role, source=0, format="parquet", files=(file,), ids=(file,), start=0, rows=rows
    )


UNITS = [*(unit("corpus", i, 5000) for i in range(20)), unit("positives", 0, 500), unit("test", 0, 1000)]


def test_a_line_goes_through_both_trials() -> None:
    line = Line.through((500, 7.0), (2000, 13.0))
    assert line.at(500) == pytest.approx(7.0)
    assert line.at(2000) == pytest.approx(13.0)
    assert line.at(100_000) == pytest.approx(5.0 + 400.0)


def test_noise_makes_no_negative_rate_and_no_negative_start() -> None:
    assert Line.through((500, 9.0), (2000, 8.0)).rate == 0
    assert Line.through((500, 1.0), (2000, 13.0)).start == 0


def test_equal_amounts_tell_a_start_only() -> None:
    line = Line.through((0, 4.0), (0, 6.0))
    assert (line.start, line.rate) == (5.0, 0.0)


def test_units_are_taken_from_all_over_the_corpus() -> None:
    taken = take_units(UNITS[:20], 800, seed=0)
    assert sum(u.rows for u in taken) == 800
    assert len({u.files for u in taken}) == 8
    assert sum(u.rows for u in take_units(UNITS[:2], 800, seed=0)) == 800
    assert taken == take_units(UNITS[:20], 800, seed=0)
    assert {u.files for u in taken} != {u.files for u in take_units(UNITS[:20], 800, seed=1)}


RATES = {
    "features": 0.01, "prior": 1e-4, "fits": 1e-4, "evidence": 0.001, "score": 0.005, "select": 0.002, "distill": 0.001,
    "evaluate": 0.01, "report": 0,
}  # fmt: skip


def rows(steps: int, sample: int) -> dict[str, float]:
    """Through the networks: five folds, and the last training; 3 for forward and backward; 300 steps in the grid."""
    grid = 3 * 5 * min(steps, 300) * 256 + sample
    return {"prior_rows": grid, "fit_rows": 3 * 6 * steps * 256 + 12 * sample}


def trial(images: int, steps: int, selected: int, start: float = 2.0) -> Trial:
    """By a law: every part takes `start` s and its rate times its amount."""
    amounts = Amounts(images, 500, images, images, selected, **rows(steps, images), distill_images=steps * 64.0)
    seconds = {part: start + rate * amounts.of(part) for part, rate in RATES.items()}
    return Trial(amounts, seconds, score_bytes=images * 100, selected_bytes=selected * 1000)


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    from pukd_ray.cli import DEMO_CONFIG
    from pukd_ray.preflight import load_config

    return load_config(DEMO_CONFIG, {"output": str(tmp_path / "run")})


def test_a_law_is_found_again(run_config: RunConfig) -> None:
    wanted = replace(
        run_config,
        selector=replace(run_config.selector, sample=50_000, steps=2000),
        score=replace(run_config.score, chunk_images=50_000),
        distill=replace(run_config.distill, steps=10_000, batch_size=64, baseline="none"),
    )
    prices = Prices(cpu_hour=0.1, gpu_hour=2.0, gib_month=1.0)
    trials = trial(500, 50, 100, start=5.0), trial(500, 50, 100), trial(2000, 200, 400)
    found = conclude(wanted, CLUSTER, UNITS, 3.0, trials, prices)
    once = 3.0  # what the first trial takes beyond the second
    assert found["seconds"] == {
        "plan": 3.0,
        "features": once + 2 + 0.01 * 50_500,
        "prior": once + 2 + 1e-4 * (3 * 5 * 300 * 256 + 50_000),  # of 2,000 steps the grid takes 300
        "fits": once + 2 + 1e-4 * (3 * 6 * 2000 * 256 + 12 * 50_000),
        "evidence": once + 2 + 0.001 * 50_500,
        "score": once + 2 * 2 + 0.005 * 100_000,  # two chunks start twice
        "select": once + 2 + 0.002 * 120_000,
        "distill": once + 2 + 0.001 * 640_000,
        "evaluate": once + 2 + 0.01 * 1000,
        "report": once + 2.0,
    }
    hours = found["total_seconds"] / 3600
    assert found["money"] == pytest.approx(hours * (8 * 0.1 + 2 * 2.0))
    assert found["interval"][0] < found["total_seconds"] < found["interval"][1]
    # Twice the cluster halves what is parallel, and no start and no training.
    halved = 3.0 + 0.01 * 50_500 + 0.005 * 100_000 + 0.002 * 120_000 + 0.01 * 1000
    assert found["twice"]["total_seconds"] == pytest.approx(found["total_seconds"] - halved / 2, abs=0.1)
    assert found["storage_gib"] == pytest.approx((100_000 * 100 + 20_000 * 1000) / 2**30)
    assert any("money" in line for line in lines_of(found))


@pytest.mark.parametrize(
    ("rule", "budget", "selected"),
    [
        ("positive", None, 20_000),  # 400 of the trial's 2,000
        ("positive", 50_000, 20_000),  # which it does not go by
        ("budget", 5_000, 5_000),
        ("budget", 50_000, 20_000),  # all positives
        ("random", 50_000, 50_000),
        ("random", 5_000_000, 100_000),  # the whole corpus
    ],
)
def test_a_budget_counts_where_the_rule_goes_by_it_and_can_fill_it(
    rule: str, budget: int | None, selected: int, run_config: RunConfig
) -> None:
    selection = replace(run_config.selection, budget=budget, rule=rule)
    distill = replace(run_config.distill, steps=None, epochs=10, batch_size=100, baseline="none")
    wanted = replace(run_config, selection=selection, distill=distill)
    trials = trial(500, 50, 100), trial(500, 50, 100), trial(2000, 200, 400)
    found = conclude(wanted, CLUSTER, UNITS, 3.0, trials, Prices())
    assert found["images"]["selected"] == selected
    assert found["seconds"]["distill"] == pytest.approx(2 + 0.001 * 10 * (selected + 500))
    assert found["storage_gib"] == pytest.approx((100_000 * 100 + selected * 1000) / 2**30)


def test_few_images_make_no_trial(run_config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="--images"):
        estimate_run(run_config, Prices(), 100)


@pytest.mark.parametrize(("seconds", "text"), [(75, "75 s"), (750, "12.5 min"), (12_240, "3.4 h")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
