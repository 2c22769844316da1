"""Units as a Ray Data `Datasource`; imported where a dataset is made: Ray Data takes half a second to import."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Dataset, TaskPoolStrategy, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.reading import ReadRequest, read_blocks


class UnitDatasource(Datasource):
    """Ray Data source over units: one read task each, ids and offsets exact."""

    def __init__(self, requests: Sequence[ReadRequest], sources: dict[str, tuple[SourceConfig, ...]]) -> None:
        super().__init__()
        self._requests = list(requests)
        self._sources = sources

    def get_name(self) -> str:
        """Name of the operator on the dashboard."""
        return "ReadUnits"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: encoded images vary too much."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per unit whatever `parallelism` says: units are the grain of the plan."""
        del parallelism, data_context
        tasks = []
        for request in self._requests:
            metadata = BlockMetadata(num_rows=request.count, size_bytes=None, input_files=None, exec_stats=None)
            source = self._sources[request.unit.role][request.unit.source]
            read = partial(_read_task, request, source)
            tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _read_task(request: ReadRequest, source: SourceConfig) -> Iterable[pa.Table]:
    return read_blocks(request, source)


def read_units(
    requests: Sequence[ReadRequest],
    sources: dict[str, tuple[SourceConfig, ...]],
    *,
    num_cpus: float,
    memory: float | None = None,
    concurrency: int | None = None,
) -> Dataset:
    """Lazy dataset of the requested rows, read by at most `concurrency` tasks at a time, of `memory` bytes each."""
    return read_datasource(
        UnitDatasource(requests, sources),
        override_num_blocks=max(1, len(requests)),
        num_cpus=num_cpus,
        memory=memory,
        compute=TaskPoolStrategy(concurrency),
    )
