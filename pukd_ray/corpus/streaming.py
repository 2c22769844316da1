"""The streaming pass: read -> decode on CPUs -> networks on actors -> a consumer per block.

Sampling, features, scoring and evaluation all run through here, so P, U and test see the same pixels. Where CPUs do
the network, an actor per core takes all four steps, and only ledgers leave it; where accelerators do, reading and
decoding run apart in tasks that feed the actors. The steps are the same.
"""

from __future__ import annotations

import math
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import TaskPoolStrategy

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.context import RunContext
from pukd_ray.corpus.guarded import IMAGE_SECONDS, decode_guarded
from pukd_ray.corpus.pixels import PixelSpec, pixel_spec
from pukd_ray.corpus.reading import ReadRequest, read_blocks, read_units
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
    task_attempt,
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


FUSED_BYTES = 64 << 20
"""About what a fused actor hands to its consumer at once: unless it keeps images, all rows of a request."""


class FusedPass:
    """All steps of a pass in one process: takes read requests, returns ledgers."""

    def __init__(self, work: Pass, spec: PixelSpec, sources: dict[str, tuple[SourceConfig, ...]]) -> None:
        self._decode, self._sources = DecodeImages(spec), sources
        self._actor = work.actor(*work.actor_arguments)
        self._consume = Consume(work.consume)

    def __call__(self, requests: pa.Table) -> Iterator[pa.Table]:
        """Pickled requests -> the ledger of each part that was consumed."""
        for request in map(pickle.loads, requests.column("request").to_pylist()):
            done: list[pa.Table] = []
            for block in read_blocks(request, self._sources[request.unit.role][request.unit.source]):
                parts = (block.slice(start, ACTOR_BATCH) for start in range(0, block.num_rows, ACTOR_BATCH))
                done += [self._actor(self._decode(part)) for part in parts]
                if sum(table.nbytes for table in done) >= FUSED_BYTES:
                    yield self._consume(pa.concat_tables(done))
                    done = []
            if done:
                yield self._consume(pa.concat_tables(done))


@dataclass(frozen=True)
class LedgerPart:
    """What reaches the driver of some blocks of a pass."""

    entries: list[dict[str, Any]]
    """Rows that `Pass.consume` returned."""
    spans: list[Span]
    """When workers were at work on them."""


def stream(run: RunContext, work: Pass, requests: Sequence[ReadRequest]) -> Iterator[LedgerPart]:
    """Stream the requested rows through the pass's actors to its consumer; yields what that returns, in any order."""
    ledger = (_fused if fuses(run.config.resources, run.cluster) else _apart)(run, work, requests)
    ledger.set_name(work.name)
    for batch in ledger.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        entries, spans = take_spans(batch)
        yield LedgerPart(entries.to_pylist(), spans)


def _fused(run: RunContext, work: Pass, requests: Sequence[ReadRequest]) -> ray.data.Dataset:
    config, cluster = run.config, run.cluster
    pickled = [pa.table({"request": [pickle.dumps(request)]}) for request in requests]
    return ray.data.from_arrow(pickled).map_batches(
        FusedPass,
        fn_constructor_args=(work, pixel_spec(config.teacher), sources_by_role(config)),
        batch_format="pyarrow",
        batch_size=None,
        compute=actor_pool(config.resources, cluster, 0, len(requests)),
        **actor_options(0, cluster),
    )


def _apart(run: RunContext, work: Pass, requests: Sequence[ReadRequest]) -> ray.data.Dataset:
    config, cluster = run.config, run.cluster
    gpus = gpus_per_actor(config.resources, cluster)
    spec = pixel_spec(config.teacher)
    rows = read_units(requests, sources_by_role(config), num_cpus=decoder_cpus(cluster), concurrency=decoders(cluster))
    # Same resources as the read, other than the actor's: Ray fuses reading and decoding into one task, without a
    # copy of the encoded bytes in between, and leaves it apart from the network, so that the two overlap.
    decoded = rows.map_batches(
        DecodeImages(spec),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=decoder_cpus(cluster),
        compute=TaskPoolStrategy(decoders(cluster)),
    )
    scored = decoded.map_batches(
        work.actor,
        fn_constructor_args=work.actor_arguments,
        batch_format="pyarrow",
        batch_size=rows_per_call(gpus > 0, math.prod(spec.shape)),
        compute=actor_pool(config.resources, cluster, gpus, len(requests)),
        **actor_options(gpus, cluster),
    )
    return scored.map_batches(Consume(work.consume), batch_format="pyarrow", batch_size=None, num_cpus=IO_CPUS)
