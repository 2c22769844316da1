"""Images of a training, decoded once into memory or streamed. Plain torch: nothing here needs Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pukd_ray.corpus.pixels import PixelSpec, Unreadable, decode, stack_pixels
from pukd_ray.runtime.batches import EndlessOrder, SharedOrder, marked_rows
from pukd_ray.runtime.devices import ALONE, Worker, resident, to_device


@dataclass(frozen=True)
class Batch:
    """Images and what is known of each."""

    pixels: Tensor
    """uint8 [b, C, H, W]."""
    labels: Tensor
    """The teacher's index of P's labels, int64 [b]; -1: none."""
    weights: Tensor
    """P(relevant), float32 [b]; 1 of P."""

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor) -> Batch:
        """Some rows of it, where it lies."""
        rows = to_device(rows, self.pixels.device)
        return Batch(self.pixels[rows], self.labels[rows], self.weights[rows])

    def on(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(*(to_device(part, device) for part in (self.pixels, self.labels, self.weights)))

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """All rows of all parts."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Images(Protocol):
    """What a training loop needs of its images."""

    count: int

    def batch(self, step: int) -> Batch:
        """This rank's part of the global batch of `step`."""
        ...

    def teacher_logits(self, step: int) -> Tensor | None:
        """The teacher's logits [b, K] of `batch(step)`, where they are known beforehand."""
        ...

    def mixup_partners(self, step: int, batch: Batch) -> Batch:
        """What mixup mixes into each image of `batch`, which is that of `step`."""
        ...

    def all_batches(self) -> Iterator[Batch]:
        """This rank's share of all images, each once, in slices; P that is drawn apart may be whole on every rank."""
        ...


def decode_all(
    images: Iterable[bytes | None],
    spec: PixelSpec,
    labels: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    threads: int | None = None,
) -> Batch:
    """Encoded images, decoded by as many threads as torch has here, or `threads`; unreadable ones are left out (P's
    were reported by the selector)."""

    def pixels(data: bytes | None) -> np.ndarray | None:
        try:
            return decode(data, spec)
        except Unreadable:
            return None

    # Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(threads or max(2, torch.get_num_threads())) as pool:
        good, arrays = [], []
        for i, array in enumerate(pool.map(pixels, images)):
            if array is not None:
                good.append(i)
                arrays.append(array)
    return Batch(
        torch.from_numpy(np.stack(arrays) if arrays else np.zeros((0, *spec.shape), np.uint8)),
        torch.tensor([-1 if labels is None else labels[i] for i in good], dtype=torch.int64),
        torch.tensor([1.0 if weights is None else weights[i] for i in good], dtype=torch.float32),
    )


def decode_labelled(blocks: Iterable[pa.Table], spec: PixelSpec) -> Batch:
    """Blocks of a labelled source, decoded as by `decode_all`."""
    return Batch.join(
        [
            decode_all(block.column("image").to_pylist(), spec, [int(v) for v in block.column("label").to_pylist()])
            for block in blocks
        ]
    )


class InMemory:
    """All images on every rank, on its device where they fit; a rank's batch is its slice of the seeded global one."""

    def __init__(
        self,
        examples: Batch,
        batch_size: int,
        seed: int,
        worker: Worker = ALONE,
        stream: int = 3,
        positive_share: float | None = None,
    ) -> None:
        """`stream` tells the orders of trainings of one seed apart; of each batch `positive_share` has labels."""
        self.count = len(examples)
        pixels = resident(examples.pixels, worker.device)
        self._examples = replace(examples, pixels=pixels).on(pixels.device)
        self._mine = worker.mine
        self._order = SharedOrder(examples.labels.numpy() >= 0, positive_share, batch_size, seed, stream)
        self._teacher_logits: Tensor | None = None

    def _rows(self, step: int) -> Tensor:
        return torch.from_numpy(self._order.batch(step)[self._mine])

    def batch(self, step: int) -> Batch:
        """As `Images.batch`."""
        return self._examples.take(self._rows(step))

    def cache_teacher_logits(self, logits: Tensor) -> None:
        """Keep the teacher's logits [count, K] of all examples, in their order, for `teacher_logits`."""
        self._teacher_logits = logits

    def teacher_logits(self, step: int) -> Tensor | None:
        """As `Images.teacher_logits`; None before `cache_teacher_logits`."""
        kept = self._teacher_logits
        return None if kept is None else kept[to_device(self._rows(step), kept.device)]

    def mixup_partners(self, step: int, batch: Batch) -> Batch:
        """The global batch in reverse order: the same for any number of ranks."""
        del batch
        reverse = self._order.batch(step)[::-1][self._mine]
        return self._examples.take(torch.from_numpy(reverse.copy()))

    def all_batches(self) -> Iterator[Batch]:
        """As `Images.all_batches`."""
        parts = ((part[self._mine].split(512)) for part in (getattr(self._examples, f.name) for f in fields(Batch)))
        for pixels, labels, weights in zip(*parts, strict=True):
            yield Batch(pixels, labels, weights)


class Shard(Protocol):
    """A rank's part of a data set that does not fit into memory, as Ray Data's iterators are."""

    def iter_batches(
        self,
        *,
        batch_size: int,
        batch_format: str,
        drop_last: bool,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
    ) -> Iterable[pa.Table]:
        """All rows, with the columns that `Streamed` names; drawn from a buffer of so many, where one is asked for."""
        ...


class Streamed:
    """A rank's shard with columns `pixels` (uint8 [C, H, W] as raw bytes), `label`, `weight`, read again and again.

    Every rank takes the same number of steps whatever its shard holds, so none waits for another for ever. Batches are
    drawn from a buffer of about `buffer_bytes` of pixels: files may hold images in any order. A share of each batch may
    be the `positives`, which are in memory and then not in the shard.
    """

    def __init__(
        self,
        shard: Shard,
        count: int,
        spec: PixelSpec,
        batch_size: int,
        buffer_bytes: float,
        seed: int,
        positives: Batch | None = None,
        positive_share: float = 0.0,
    ) -> None:
        self.count = count
        of_positives = marked_rows(positive_share, batch_size) if positives else 0
        self._positives = positives
        self._order = EndlessOrder(len(positives), of_positives, seed, 10) if positives and of_positives else None
        self._shard, self._spec, self._batch_size, self._seed = shard, spec, batch_size - of_positives, seed
        self._buffer = max(batch_size, min(count, int(buffer_bytes / math.prod(spec.shape))))
        self._batches: Iterator[Batch] = iter(())

    def _read(self, *, shuffle_seed: int | None) -> Iterator[Batch]:
        """Whole batches in a seeded order; without a seed all rows as they come."""
        shuffled = shuffle_seed is not None
        for batch in self._shard.iter_batches(
            batch_size=self._batch_size,
            batch_format="pyarrow",
            drop_last=shuffled,
            local_shuffle_buffer_size=self._buffer if shuffled else None,
            local_shuffle_seed=shuffle_seed,
        ):
            yield Batch(
                torch.from_numpy(stack_pixels(batch.column("pixels").to_pylist(), self._spec)),
                torch.tensor(batch.column("label").to_pylist(), dtype=torch.int64),
                torch.tensor(batch.column("weight").to_pylist(), dtype=torch.float32),
            )

    def batch(self, step: int) -> Batch:
        """As `Images.batch`."""
        for _ in range(2):
            found = next(self._batches, None)
            if found is not None and self._positives and self._order:
                return Batch.join([self._positives.take(torch.from_numpy(self._order.batch(step))), found])
            if found is not None:
                return found
            self._batches = self._read(shuffle_seed=self._seed + step)
        raise RuntimeError(
            "a worker's shard is smaller than its batch: lower distill.batch_size or resources.train_workers"
        )

    def teacher_logits(self, step: int) -> Tensor | None:
        """None: streamed images come in any order."""
        del step
        return None

    def mixup_partners(self, step: int, batch: Batch) -> Batch:
        """The rank's own batch in reverse order."""
        del step
        return batch.take(torch.arange(len(batch)).flip(0))

    def all_batches(self) -> Iterator[Batch]:
        """As `Images.all_batches`."""
        if self._positives:
            yield self._positives
        yield from self._read(shuffle_seed=None)


def augment(pixels: Tensor, kind: str, seed: Sequence[int], batch_size: int, worker: Worker = ALONE) -> Tensor:
    """Random crop of the image padded by 1/8 with black, and flip; uint8 [b, C, H, W], where they are.

    The random numbers are those of the global batch of `batch_size`, of which the worker's part is used.
    """
    if kind == "none":
        return pixels
    size = pixels.shape[-1]
    pad = max(1, size // 8)
    rng = np.random.default_rng(list(seed))
    draws = rng.integers(0, 2 * pad + 1, (batch_size, 2))[worker.mine]
    flips = rng.random(batch_size)[worker.mine] < 0.5
    drawn = np.column_stack([draws, flips & (kind == "crop_flip")])[: len(pixels)]
    top, left, flip = to_device(torch.from_numpy(drawn), pixels.device).unbind(1)
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    span = torch.arange(size, device=pixels.device)
    rows, columns = top[:, None] + span, left[:, None] + span
    columns = torch.where(flip[:, None] == 1, columns.flip(1), columns)
    index = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
