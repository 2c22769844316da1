"""The streaming pass: read -> decode on CPUs -> teacher (and selector) on actors -> a consumer per block.

Sampling, features and scoring all run through here, so P, U and test see the same pixels.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from pukd_ray.config import RunConfig, SourceConfig, TeacherConfig
from pukd_ray.corpus.pixels import PixelSpec, decode_batch
from pukd_ray.corpus.reading import Wanted, read_units
from pukd_ray.engine import IO_CPUS, Cluster, actor_options, actor_pool, decoder_cpus, decoders, gpus_per_actor
from pukd_ray.spans import Span, take_spans, with_spans

ACTOR_BATCH = 256


@dataclass(frozen=True)
class Shared:
    """A value in the object store, wrapped: Ray warns of actors whose direct arguments it could lose."""

    ref: Any

    @classmethod
    def of(cls, value: Any) -> Shared:
        """Put `value` into the object store."""
        return cls(ray.put(value))


def pixel_spec(teacher: TeacherConfig) -> PixelSpec:
    """The one way from bytes to the teacher's input."""
    return PixelSpec(teacher.input_size, teacher.channels, teacher.resize)


@dataclass(frozen=True)
class DecodeImages:
    """Adds `pixels` (uint8 [C, H, W] as raw bytes; null where unreadable) and the reason to `error`."""

    spec: PixelSpec

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows in, the same rows out."""
        began = time.time()
        errors = table.column("error").to_pylist()
        images = table.column("image").to_pylist()
        good = [i for i, error in enumerate(errors) if error is None]
        pixels: list[bytes | None] = [None] * len(errors)
        arrays, reasons = decode_batch([images[i] for i in good], self.spec)
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


def stack_pixels(pixels: pa.ChunkedArray, spec: PixelSpec) -> np.ndarray:
    """Non-null raw pixels -> uint8 [N, C, H, W], writable."""
    joined = b"".join(p for p in pixels.to_pylist() if p is not None)
    return np.frombuffer(bytearray(joined), np.uint8).reshape(-1, *spec.shape)


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


class TeacherActor(TimedActor):
    """Runs the teacher on decoded rows; subclasses say what to keep of it."""

    def __init__(self, teacher: TeacherConfig, weights: Any, grid: int | Literal["auto"]) -> None:
        # torch belongs to the actors, not to the driver or the decoding tasks.
        from pukd_ray.networks.teacher import Teacher, pick_device, use_threads

        use_threads()
        self.spec = pixel_spec(teacher)
        self.teacher = Teacher(teacher, ray.get(weights.ref), pick_device(), grid)

    def extract(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, C, H, W] -> (features [n, F], teacher's logits [n, K]), float32."""
        features, logits = self.teacher(pixels)
        return features.cpu().numpy(), logits.cpu().numpy()

    def forward(self, table: pa.Table) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(table with new reasons, readable [N] bool, and of these pixels, features and logits as of `extract`)."""
        errors = table.column("error").to_pylist()
        readable = np.array([error is None for error in errors])
        pixels = stack_pixels(table.column("pixels"), self.spec)
        features, logits = np.zeros((0, self.teacher.extractor.channels), np.float32), np.zeros((0, 1), np.float32)
        if readable.any():
            features, logits = self.extract(pixels)
            finite = np.isfinite(features).all(1) & np.isfinite(logits).all(1)
            if not finite.all():
                rows = np.flatnonzero(readable)[~finite]
                for i in rows:
                    errors[i] = "nonfinite: the teacher's output on this image is not finite"
                readable[rows] = False
                pixels, features, logits = pixels[finite], features[finite], logits[finite]
                table = table.set_column(table.schema.get_field_index("error"), "error", pa.array(errors, pa.string()))
        return table.drop_columns("pixels"), readable, pixels, features, logits


def teacher_opinion(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label int32, max softmax float32, entropy float32 in nats) of logits [n, K]."""
    z = logits.astype(np.float64)
    if not len(z):
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    z -= z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    p = np.exp(log_p)
    return p.argmax(1).astype(np.int32), p.max(1).astype(np.float32), -(p * log_p).sum(1).astype(np.float32)


def spread(values: np.ndarray, readable: np.ndarray, kind: pa.DataType) -> pa.Array:
    """`values` of the readable rows as a column with nulls for the others."""
    full = np.zeros((len(readable), *values.shape[1:]), values.dtype)
    full[readable] = values
    return pa.array(full, kind, mask=~readable)


def rescale_logits(logits: np.ndarray, log_max_phi: float) -> np.ndarray:
    """Logits of phi / max phi, so that 0 is the threshold 1/2 of VPU too; unchanged where log_max_phi is 0."""
    if log_max_phi == 0.0:
        return logits
    log_phi = np.minimum(-np.logaddexp(0, -logits.astype(np.float64)) - log_max_phi, -1e-7)
    return (log_phi - np.log(-np.expm1(log_phi))).astype(np.float32)


def stream(
    stage: str,
    wanted: Sequence[Wanted],
    sources: dict[str, tuple[SourceConfig, ...]],
    config: RunConfig,
    cluster: Cluster,
    actor: type,
    actor_arguments: Sequence[Any],
    consume: Callable[[pa.Table], pa.Table],
    spans: list[Span],
) -> Iterator[dict[str, Any]]:
    """Stream the wanted rows through `actor`, hand each block to `consume` in a task, yield what that returns.

    `stage` is the dataset's name on the Ray dashboard. `consume` writes or counts and returns a small table, its
    ledger: only that reaches the driver. When the workers were at work is added to `spans`.
    """
    gpus = gpus_per_actor(config.resources, cluster)
    rows = read_units(wanted, sources, num_cpus=decoder_cpus(cluster), concurrency=decoders(cluster))
    # Same resources as the read, other than the actor's: Ray fuses reading and decoding into one task, without a
    # copy of the encoded bytes in between, and leaves it apart from the network, so that the two overlap.
    decoded = rows.map_batches(
        DecodeImages(pixel_spec(config.teacher)),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=decoder_cpus(cluster),
        compute=TaskPoolStrategy(decoders(cluster)),
    )
    scored = decoded.map_batches(
        actor,
        fn_constructor_args=tuple(actor_arguments),
        batch_format="pyarrow",
        batch_size=ACTOR_BATCH,
        compute=actor_pool(config.resources, cluster, gpus, len(wanted)),
        **actor_options(gpus),
    )
    ledger = scored.map_batches(Consume(consume), batch_format="pyarrow", batch_size=None, num_cpus=IO_CPUS)
    ledger.set_name(stage)
    for batch in ledger.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        entries, seen = take_spans(batch)
        spans.extend(seen)
        yield from entries.to_pylist()
