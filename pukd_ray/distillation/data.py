"""Images of a training, decoded once into memory or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pukd_ray.batches import EndlessOrder
from pukd_ray.corpus.pixels import PixelSpec, Unreadable, decode, decode_batch


class Images(Protocol):
    """What a training loop needs of its images."""

    count: int

    def batch(self, step: int) -> Tensor:
        """This rank's uint8 [b, C, H, W] of the global batch of `step`."""
        ...

    def once(self) -> Iterator[Tensor]:
        """This rank's share of all images, once, in slices."""
        ...


def decode_all(images: Iterable[bytes | None], spec: PixelSpec, threads: int = 2) -> Tensor:
    """Encoded images -> uint8 [N, C, H, W]; unreadable ones are left out (P's were reported by the selector)."""

    def pixels(data: bytes | None) -> np.ndarray | None:
        try:
            return decode(data, spec)
        except Unreadable:
            return None

    # Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor(threads) as pool:
        arrays = [array for array in pool.map(pixels, images) if array is not None]
    if not arrays:
        return torch.zeros((0, spec.channels, spec.size, spec.size), dtype=torch.uint8)
    return torch.from_numpy(np.stack(arrays))


def decode_labelled(blocks: Iterable[pa.Table], spec: PixelSpec) -> tuple[Tensor, Tensor]:
    """Blocks of a labelled source -> (uint8 [N, C, H, W], int64 labels [N]); unreadable images are left out."""
    pixels, labels = [], []
    for block in blocks:
        arrays, _ = decode_batch(block.column("image").to_pylist(), spec)
        for array, label in zip(arrays, block.column("label").to_pylist(), strict=True):
            if array is not None:
                pixels.append(array)
                labels.append(int(label))
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


class InMemory:
    """All images on every rank; a rank's batch is its slice of the seeded global one."""

    def __init__(self, pixels: Tensor, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.count = len(pixels)
        self._pixels, self._rank, self._world = pixels, rank, world
        self._order = EndlessOrder(self.count, batch_size, seed, 3)

    def batch(self, step: int) -> Tensor:
        """As `Images.batch`."""
        return self._pixels[torch.from_numpy(self._order.batch(step)[self._rank :: self._world])]

    def once(self) -> Iterator[Tensor]:
        """As `Images.once`."""
        yield from self._pixels[self._rank :: self._world].split(512)


class Streamed:
    """A rank's shard of a Ray dataset with a `pixels` column, read again and again.

    Every rank takes the same number of steps whatever its shard holds, so none waits for another for ever.
    """

    def __init__(self, shard: Any, count: int, spec: PixelSpec, batch_size: int) -> None:
        self.count = count
        self._shard, self._spec, self._batch_size = shard, spec, batch_size
        self._batches: Iterator[Tensor] = iter(())

    def _read(self, *, drop_last: bool) -> Iterator[Tensor]:
        shape = (-1, self._spec.channels, self._spec.size, self._spec.size)
        for batch in self._shard.iter_batches(batch_size=self._batch_size, batch_format="pyarrow", drop_last=drop_last):
            joined = b"".join(batch.column("pixels").to_pylist())
            yield torch.from_numpy(np.frombuffer(bytearray(joined), np.uint8).reshape(shape))

    def batch(self, step: int) -> Tensor:
        """As `Images.batch`; the order is that of the stream, which is the seeded hash order of `selected/`."""
        del step
        for _ in range(2):
            found = next(self._batches, None)
            if found is not None:
                return found
            self._batches = self._read(drop_last=True)
        raise RuntimeError(
            "a worker's shard is smaller than its batch: lower distill.batch_size or resources.train_workers"
        )

    def once(self) -> Iterator[Tensor]:
        """As `Images.once`."""
        yield from self._read(drop_last=False)


def augment(pixels: Tensor, kind: str, seed: Sequence[int], rank: int, world: int, global_size: int) -> Tensor:
    """Random crop of the image padded by 1/8 with black, and flip; uint8 [b, C, H, W].

    The random numbers are those of the global batch, of which this rank's slice is used.
    """
    if kind == "none":
        return pixels
    size = pixels.shape[-1]
    pad = max(1, size // 8)
    rng = np.random.default_rng(list(seed))
    draws = rng.integers(0, 2 * pad + 1, (global_size, 2))[rank::world]
    flips = rng.random(global_size)[rank::world] < 0.5
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    span = torch.arange(size)
    top, left = torch.from_numpy(draws[: len(pixels)]).unbind(1)
    rows, columns = top[:, None] + span, left[:, None] + span
    if kind == "crop_flip":
        columns = torch.where(torch.from_numpy(flips[: len(pixels)])[:, None], columns.flip(1), columns)
    index = torch.arange(len(pixels))[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
