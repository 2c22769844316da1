"""A pass does the same whether its steps share a process or not; a process that dies costs no row and doubles none."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from small_files import every_format, units_of

from pukd_ray.config import ResourcesConfig, RunConfig, SourceConfig, TeacherConfig
from pukd_ray.corpus import streaming
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.streaming import Pass
from pukd_ray.corpus.units import Unit
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.engine import Cluster
from pukd_ray.runtime.timing import take_spans
from tests.sums import AsIs, SumPixels

pytestmark = pytest.mark.usefixtures("ray_cluster")


def task(tmp_path: Path) -> tuple[RunContext, list[ReadRequest]]:
    sources = tuple(every_format(tmp_path).values())[:3]
    units = [Unit(**{**vars(u), "source": i}) for i, source in enumerate(sources) for u in units_of(source)]
    teacher = TeacherConfig(arch="lenet5", weights="w", num_classes=3, input_size=8, channels=1, mean=[0.5], std=[0.5])
    config = RunConfig(
        output=str(tmp_path / "run"),
        teacher=teacher,
        positives=SourceConfig(uri="p"),
        corpus=sources,
        resources=ResourcesConfig(score_actors=1),
    )
    cluster = Cluster(cpus=2, gpus=0, nodes=1, autoscales=False)
    run = RunContext(RunFolder(config.output), config, cluster, Shared.of(b""))
    return run, [ReadRequest(unit) for unit in units]


def rows(ledgers: Iterable[pa.Table]) -> list[tuple[Any, ...]]:
    found = []
    for ledger in ledgers:
        table, spans = take_spans(ledger)
        assert spans, "nobody says when the work was done"
        found += [tuple(row.values()) for row in table.to_pylist()]
    return sorted(found)


def test_fused_or_apart_is_the_same(tmp_path: Path) -> None:
    run, requests = task(tmp_path)
    work = Pass("sums", SumPixels, (tmp_path / "trap", None), AsIs())
    fused, apart = (rows(way(run, work, requests)) for way in (streaming._fused, streaming._apart))
    assert fused == apart
    assert len(fused) == sum(r.count for r in requests)
    assert {row[2] is None for row in fused} == {True, False}, "readable and unreadable rows"


def test_a_process_that_dies_costs_no_row(tmp_path: Path) -> None:
    run, requests = task(tmp_path)
    quietly = rows(streaming._fused(run, Pass("sums", SumPixels, (tmp_path / "trap", None), AsIs()), requests))
    deadly = quietly[len(quietly) // 2][0]
    trap = tmp_path / "trap"
    assert rows(streaming._fused(run, Pass("sums", SumPixels, (trap, deadly), AsIs()), requests)) == quietly
    assert trap.exists()


def test_a_pass_that_is_given_up_leaves_no_task_behind(tmp_path: Path) -> None:
    run, requests = task(tmp_path)
    ledgers = streaming._fused(run, Pass("sums", SumPixels, (tmp_path / "trap", None), AsIs()), requests)
    next(ledgers)
    ledgers.close()
    for _ in range(100):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.1)
    pytest.fail("tasks still run")
