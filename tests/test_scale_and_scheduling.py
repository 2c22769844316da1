"""The benchmarks of scale, scheduling and estimates say what their figures say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import billion, estimated, scale
from benchmarks.fake_accelerator import FakeAccelerator, read_log
from benchmarks.scheduling import DriverCost, steady
from pukd_ray.corpus.reading import ROW_SCHEMA
from pukd_ray.run.folder import scores_schema
from pukd_ray.runtime.timing import with_spans


def accelerator(batches: int, pause: float, first: float = 0.0) -> list[tuple[float, float]]:
    """Batches of a second, with a pause after each."""
    return [(first + i * (1 + pause), first + i * (1 + pause) + 1) for i in range(batches)]


def test_pauses_between_batches_are_what_is_lost() -> None:
    found = steady([accelerator(40, 0.25, first) for first in (0.0, 0.5)], 1)
    assert found.efficiency == pytest.approx(0.8, abs=0.01)
    assert found.overhead_ms == pytest.approx(250, abs=15)
    assert found.batches == pytest.approx(2 * (found.ended - found.began) / 1.25, rel=0.05)


def test_an_accelerator_that_starves_counts_while_there_is_work() -> None:
    found = steady([accelerator(40, 0.0), accelerator(10, 0.0)], 1)
    assert found.efficiency == pytest.approx((32 + 10 - 2) / (2 * 31), abs=0.05)
    assert found.ended > 30


def test_the_end_of_the_work_is_no_loss() -> None:
    assert steady([accelerator(40, 0.0), accelerator(38, 0.0)], 1).efficiency == pytest.approx(1.0, abs=0.01)


def test_too_few_batches_say_so() -> None:
    with pytest.raises(ValueError, match="too few batches"):
        steady([accelerator(3, 0.0), accelerator(3, 0.0)], 1)
    with pytest.raises(ValueError, match="fewer than 9"):
        steady([accelerator(40, 0.0), accelerator(8, 0.0)], 9)


def test_batches_while_others_still_start_are_skipped() -> None:
    late = accelerator(10, 3.0) + [(37.0 + i, 38.0 + i) for i in range(30)]
    assert steady([late, accelerator(70, 0.0)], 1).efficiency < 0.9
    assert steady([late, accelerator(70, 0.0)], 10).efficiency == pytest.approx(1.0, abs=0.01)


def test_the_driver_costs_something_all_the_time_per_accelerator_and_per_batch() -> None:
    def seen(actors: int, rate: float, skipped: int = 1, more: float = 0.0) -> dict[str, float]:
        spent = (30 + 2 * actors + 8 * rate + more) / rate
        return {"actors": actors, "batches_per_second": rate, "skipped": skipped, "driver_cpu_ms": spent}

    passes = [seen(1, 0.5), seen(8, 5.0), seen(32, 4.4, more=50), seen(32, 16.0, skipped=16)]
    cost = DriverCost.of(passes)
    assert (cost.always, cost.accelerator, cost.batch) == pytest.approx((30, 2, 8))
    assert cost.accelerators(1) == pytest.approx(97)
    with pytest.raises(ValueError, match="three passes that differ"):
        DriverCost.of(passes[:2])


def test_the_fake_accelerator_takes_its_time_and_leaves_the_rows_of_a_pass(tmp_path: Path) -> None:
    common = {"source": "a", "source_row": 0, "content_hash": 1}
    told = [{"image_id": "a#0", "image": b"x", **common}, {"image_id": "a#1", "error": "empty", **common}]
    rows = pa.Table.from_pylist(told, ROW_SCHEMA)
    rows = rows.append_column("unit", pa.array(["u", "u"])).append_column("pixels", pa.array([b"p", None]))
    before = time.time()
    done = FakeAccelerator(0.05, str(tmp_path))(with_spans(rows, [(1.0, 2.0)]))
    ((batch,),) = read_log(tmp_path)
    assert batch[1] - batch[0] >= 0.05
    assert before <= batch[0] < batch[1] <= time.time()
    assert done.select(scores_schema([]).names).cast(scores_schema([])).column("error").to_pylist() == [None, "empty"]
    assert done.column("unit").to_pylist() == ["u", "u"]


def size(images: int, seconds: float, grown: float = 10.0, spilled: float = 0.0, cpu: float = 0) -> dict[str, Any]:
    said = {"computing": seconds, "stage": seconds + 1, "units": 5, "chunks": 1, "spilled_mib": spilled}
    said |= {"driver_mib": [90.0, 100.0, 100.0 + grown]}
    about = {
        "peak_mib": {"driver": 120, "workers": 5},
        "cpu": {"driver": 9, "score + _merge": 6 + 2 * (cpu or seconds)},
    }
    return {"images": images, "runs": [{"seconds": seconds + 9, "said": said, **about}]}


def test_every_target_of_scale_can_be_missed() -> None:
    def met(*sizes: dict[str, Any]) -> list[bool]:
        return [good for _, good in scale.verdicts(sizes)]

    assert met(size(1000, 1), size(10_000, 10.5)) == [True, True, True, True]
    assert met(size(1000, 1), size(10_000, 12)) == [False, True, True, True]
    assert met(size(1000, 1), size(10_000, 10), size(20_000, 20, cpu=22)) == [True, False, True, True]
    assert met(size(1000, 1), size(10_000, 10, grown=250)) == [True, True, False, True]
    assert met(size(1000, 1), size(10_000, 10, spilled=1)) == [True, True, True, False]


def test_what_a_further_image_costs_leaves_the_start_out() -> None:
    assert scale.marginal([size(1000, 1), size(10_000, 10)]) == [pytest.approx(2.0)]


def test_the_page_of_scale_has_rates_and_memory() -> None:
    about = {"date": "d", "cpus": 2, "cpu": "c", "python": "3", "versions": {}, "command": "x", "note": ""}
    lines = scale.page({**about, "sizes": [size(1000, 1), size(10_000, 20)]}).splitlines()
    assert "| 10,000 | 5, 1 | 500 | 0.50 | 8.0 | 21.0 | 100, 110, 120 | 5 | 0 | 0 |" in lines
    assert "- **missed**: the slowest size has 0.50 of the rate of the fastest" in lines


def test_a_lake_is_the_demo_and_then_the_demo_mirrored(tmp_path: Path) -> None:
    estimated.make_lake(tmp_path / "lake", 6500)
    files = sorted((tmp_path / "lake").iterdir())
    lake = pa.concat_tables(pq.read_table(file) for file in files)
    assert (len(files), lake.num_rows) == (7, 6500)
    images = lake.column("image").to_pylist()
    again = [a == b for a, b in zip(images, images[6400:], strict=False)]
    assert sum(again) < 10  # what cannot be read, or is symmetric
    assert lake.column("relevant").to_pylist()[:100] == lake.column("relevant").to_pylist()[6400:]


def test_an_estimate_is_compared_part_by_part() -> None:
    found = {"estimated": {"fits": 6.0, "score": 2.0}, "real": {"fits": 8.0, "score": 2.0}, "interval": [5.0, 9.0]}
    assert estimated.off(found) == pytest.approx(-0.2)
    lines = estimated.table(found)
    assert "| fits | 6.0 | 8.0 |" in lines
    assert lines[-1] == "-20%. The interval was 5 to 9 s: the real run is not."


FIGURES = billion.Figures(
    photo_bytes=40_000,
    core_rate=1000,
    gpu_rate=10_000,
    decode_rate=200,
    row_bytes=100,
    largest=10**6,
    driver=DriverCost(always=40, accelerator=5, batch=10),
    request_ms=2,
)
PRICES = billion.Prices(cpu_hour=0.1, gpu_hour=2, gib_month=1, thousand_gets=0.001, thousand_puts=0.01)


def test_where_there_are_cards_the_slower_of_decoding_and_of_them_decides() -> None:
    few, many = billion.SetUp("a", "n", cpus=100, gpus=4), billion.SetUp("b", "n", cpus=400, gpus=4)
    assert few.rate(FIGURES, 0.9) == pytest.approx(18_000)
    assert many.rate(FIGURES, 0.9) == pytest.approx(36_000)
    assert billion.SetUp("c", "n", cpus=100).rate(FIGURES, 0.9) == pytest.approx(90_000)


def test_a_billion_is_what_its_parts_cost() -> None:
    row = billion.costs(1e9, 0.5, 1.0, billion.SetUp("c", "n", cpus=100), FIGURES, PRICES)
    assert row["**the pass takes**"] == "**2.8 h**"  # 1e9 / 100,000 s
    assert row["**its machines cost**"] == "**28**"  # 277.8 CPU hours
    units = 1e9 / 1677  # of 64 MiB
    gets, puts = 1e9 * 40_000 / 2**23 + 2 * units, units + 1e9 / 100_000
    assert row["these requests cost"] == f"{gets / 1000 * 0.001 + puts / 1000 * 0.01:,.0f}"
    assert row["which cost a month"] == f"{1e9 * 20_100 / 2**30:,.0f}"
    assert row["that one driver can hand out"] == "500"
    cards = billion.costs(1e9, 0.5, 1.0, billion.SetUp("b", "n", cpus=10_000, gpus=32), FIGURES, PRICES)
    assert cards["pieces of work a second"] == f"{320_000 / 768:,.0f}"
    assert cards["that one driver can hand out"] == "80, **5.2 times too few**"


def test_the_page_of_a_billion_says_what_it_is_from() -> None:
    text = billion.page(1e9, 0.02, 0.9, FIGURES, PRICES)
    assert "1,000 times fewer" in text
    assert "one driver feeds 7 cards" in text
    assert max(map(len, text.splitlines())) < 250


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_estimate_is_within_a_quarter_of_the_run(tmp_path: Path) -> None:
    estimated.main(["--out", str(tmp_path / "estimated.json")])
