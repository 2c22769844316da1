"""The streaming pass: read -> decode on CPUs -> networks on actors -> a consumer per block.

Sampling, features, scoring and evaluation all run through here, so P, U and test see the same pixels. Where CPUs do
the network, a task takes all four steps for a read request, and only its ledger leaves the process; where accelerators
do, reading and decoding run apart, in tasks that feed the actors. The steps are the same.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.guarded import IMAGE_SECONDS, decode_guarded
from pukd_ray.corpus.pixels import PixelSpec, pixel_spec
from pukd_ray.corpus.reading import ReadRequest, read_blocks, split_requests
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.runtime.devices import ACTOR_BATCH, rows_per_call
from pukd_ray.runtime.engine import (
    IO_CPUS,
    actor_options,
    actor_pool,
    decoder_cpus,
    decoders,
    fuses,
    gpus_per_actor,
    memory_of_task,
    most_tasks,
    task_attempt,
    wait_for_some,
)
from pukd_ray.runtime.timing import Span, take_spans, with_spans


@dataclass(frozen=True)
class DecodeImages:
    """Adds `pixels` (uint8 [C, H, W] as raw bytes; null where unreadable) and the reason to `error`."""

    spec: PixelSpec
    seconds: float = IMAGE_SECONDS
    """Longest time for one image."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows in, the same rows out."""
        began = time.time()
        errors = table.column("error").to_pylist()
        images = table.column("image").to_pylist()
        good = [i for i, error in enumerate(errors) if error is None]
        pixels: list[bytes | None] = [None] * len(errors)
        arrays, reasons = decode_guarded([images[i] for i in good], self.spec, task_attempt(), self.seconds)
        for i, array, reason in zip(good, arrays, reasons, strict=True):
            errors[i] = reason
            pixels[i] = None if array is None else array.tobytes()
        table = table.set_column(table.schema.get_field_index("error"), "error", pa.array(errors, pa.string()))
        return with_spans(table.append_column("pixels", pa.array(pixels, pa.binary())), [(began, time.time())])


@dataclass(frozen=True)
class Consume:
    """Hands a block to `consume`, without the spans noted on it; these go on with the ledger."""

    consume: Callable[[pa.Table], pa.Table]

    def __call__(self, table: pa.Table) -> pa.Table:
        """A block -> its ledger."""
        table, spans = take_spans(table)
        return with_spans(self.consume(table), spans)


class TimedActor(ABC):
    """What runs on decoded rows in an actor, and notes when it was at work."""

    @abstractmethod
    def work(self, table: pa.Table) -> pa.Table:
        """Decoded rows -> what the consumer gets of them, at least one row."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """`work`, timed."""
        began = time.time()
        table, spans = take_spans(table)
        return with_spans(self.work(table), [*spans, (began, time.time())])


def scatter_rows(values: np.ndarray, readable: np.ndarray, kind: pa.DataType) -> pa.Array:
    """`values` of the readable rows as a column with nulls for the others."""
    full = np.zeros((len(readable), *values.shape[1:]), values.dtype)
    full[readable] = values
    return pa.array(full, kind, mask=~readable)


@dataclass(frozen=True)
class Pass:
    """What a streaming pass does with the rows that it is asked for."""

    name: str
    """Of the dataset on the Ray dashboard."""
    actor: type[TimedActor]
    """Gets decoded rows."""
    actor_arguments: tuple[Any, ...]
    consume: Callable[[pa.Table], pa.Table]
    """Writes or counts, in a task, what the actor returns, and returns a small table, its ledger: only that reaches the
    driver."""


@dataclass(frozen=True)
class LedgerPart:
    """What reaches the driver of some blocks of a pass."""

    entries: list[dict[str, Any]]
    """Rows that `Pass.consume` returned."""
    spans: list[Span]
    """When workers were at work on them."""


REQUESTS_PER_CPU = 8
"""Fewer requests are split, so that no CPU waits long for the last."""

FUSED_BYTES = 64 << 20
"""About what a fused pass hands to its consumer at once: unless it keeps images, all rows of a request."""


class FusedPass:
    """All steps of a pass in one process."""

    def __init__(self, work: Pass, spec: PixelSpec, sources: dict[str, tuple[SourceConfig, ...]]) -> None:
        self._decode, self._sources = DecodeImages(spec), sources
        self._actor = work.actor(*work.actor_arguments)
        self._consume = Consume(work.consume)

    def __call__(self, request: ReadRequest) -> Iterator[pa.Table]:
        """A request -> the ledger of each part that was consumed."""
        done: list[pa.Table] = []
        for block in read_blocks(request, self._sources[request.unit.role][request.unit.source]):
            parts = (block.slice(start, ACTOR_BATCH) for start in range(0, block.num_rows, ACTOR_BATCH))
            done += [self._actor(self._decode(part)) for part in parts]
            if sum(table.nbytes for table in done) >= FUSED_BYTES:
                yield self._consume(pa.concat_tables(done))
                done = []
        if done:
            yield self._consume(pa.concat_tables(done))


@lru_cache(maxsize=1)
def _fused_pass(arguments: Shared) -> FusedPass:
    """Networks are loaded once in a process, for as long as it gets requests of the same pass."""
    return FusedPass(*arguments.get())


@ray.remote(num_cpus=1, max_retries=-1)
def _run_fused(arguments: Shared, request: ReadRequest) -> pa.Table:
    """The whole ledger of a request: of one that was tried again, only what the last attempt wrote."""
    return pa.concat_tables(_fused_pass(arguments)(request))


def stream(run: RunContext, work: Pass, requests: Sequence[ReadRequest]) -> Iterator[LedgerPart]:
    """Stream the requested rows through the pass's actors to its consumer; yields what that returns, in any order."""
    for ledger in (_fused if fuses(run.config.resources, run.cluster) else _apart)(run, work, requests):
        entries, spans = take_spans(ledger)
        yield LedgerPart(entries.to_pylist(), spans)


def _fused(run: RunContext, work: Pass, requests: Sequence[ReadRequest]) -> Iterator[pa.Table]:
    """A task per request, in processes that the stages of a run share: their imports are done once."""
    config, cluster = run.config, run.cluster
    arguments = Shared.of((work, pixel_spec(config.teacher), sources_by_role(config)))
    waiting = iter(split_requests(requests, int(cluster.cpus) * REQUESTS_PER_CPU))
    task = _run_fused.options(name=work.name, **memory_of_task(cluster, 1))
    running = [task.remote(arguments, r) for r in islice(waiting, most_tasks(config.resources))]
    try:
        while running:
            done, running = wait_for_some(running)
            running += [task.remote(arguments, r) for r in islice(waiting, len(done))]
            yield from ray.get(done)
    finally:
        if ray.is_initialized():  # what is closed after the engine would start another
            for left in running:
                ray.cancel(left)


def _apart(run: RunContext, work: Pass, requests: Sequence[ReadRequest]) -> Iterator[pa.Table]:
    """Ray Data: tasks that read and decode, actors, tasks that consume."""
    from ray.data import TaskPoolStrategy

    from pukd_ray.corpus.datasource import read_units

    config, cluster = run.config, run.cluster
    gpus = gpus_per_actor(config.resources, cluster)
    spec = pixel_spec(config.teacher)
    asked = {"num_cpus": decoder_cpus(cluster), **memory_of_task(cluster, decoder_cpus(cluster))}
    rows = read_units(requests, sources_by_role(config), concurrency=decoders(cluster), **asked)
    # Same resources as the read, other than the actor's: Ray fuses reading and decoding into one task, without a
    # copy of the encoded bytes in between, and leaves it apart from the network, so that the two overlap.
    decoded = rows.map_batches(
        DecodeImages(spec),
        batch_format="pyarrow",
        batch_size=None,
        compute=TaskPoolStrategy(decoders(cluster)),
        **asked,
    )
    scored = decoded.map_batches(
        work.actor,
        fn_constructor_args=work.actor_arguments,
        batch_format="pyarrow",
        batch_size=rows_per_call(gpus > 0, math.prod(spec.shape)),
        compute=actor_pool(config.resources, cluster, gpus, len(requests)),
        **actor_options(gpus),
    )
    ledger = scored.map_batches(Consume(work.consume), batch_format="pyarrow", batch_size=None, num_cpus=IO_CPUS)
    ledger.set_name(work.name)
    yield from ledger.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
