"""What a student learns from: labelled rows of sources and files of selected images, loaded whole or streamed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pukd_ray.config import RunConfig, SourceConfig
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.labelled import index_labelled
from pukd_ray.corpus.pixels import PixelSpec, pixel_spec
from pukd_ray.corpus.reading import ReadRequest, read_blocks
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import DecodeImages
from pukd_ray.corpus.units import UNIT_FILES, Unit, regroup
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import ALONE, Worker

if TYPE_CHECKING:
    from ray.data import Dataset

    from pukd_ray.distillation.data import Batch, Images, Shard


@dataclass(frozen=True)
class TrainingSet:
    """Where the images are; nothing is read before `load` or `stream`."""

    count: int
    """Images, unreadable ones of `labelled` included."""
    labelled: tuple[ReadRequest, ...]
    """Rows with labels: P, or the teacher's own training images."""
    sources: dict[str, tuple[SourceConfig, ...]]
    """By role, of `labelled`."""
    folder: RunFolder
    files: tuple[str, ...] = ()
    """Of `folder`, in the schema of `selected/`."""

    def with_selected(self, name: str, count: int) -> TrainingSet:
        """The same and the `count` selected images in the run's folder `name`."""
        files = tuple(f for f in self.folder.files(name) if f.endswith(".parquet"))
        return replace(self, count=self.count + count, files=files)

    def sample(self, count: int, seed: int) -> TrainingSet:
        """`count` of the labelled images, drawn at random; all if there are no more."""
        assert not self.files
        sizes = [0 if w.labels is None else len(w.labels) for w in self.labelled]
        ends = np.cumsum(sizes)
        drawn = np.sort(np.random.default_rng([seed, 11]).permutation(int(ends[-1]))[:count])
        parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
        requests = []
        for w, rows, end, size in zip(self.labelled, parts, ends, sizes, strict=True):
            if len(rows) and w.labels is not None:
                mine = rows - (end - size)
                positions = np.arange(size) if w.positions is None else w.positions
                requests.append(replace(w, positions=positions[mine], labels=w.labels[mine]))
        return replace(self, count=len(drawn), labelled=tuple(requests))

    def fits_memory(self, config: RunConfig) -> bool:
        """Whether the decoded images stay within `distill.memory_gib`."""
        return self.count * math.prod(pixel_spec(config.teacher).shape) <= config.distill.memory_gib * 2**30

    def draws_apart(self, config: RunConfig) -> bool:
        """Whether P has a share of each batch: a worker that streams the selection then holds P in memory."""
        return config.distill.positive_share is not None and bool(self.files) and bool(self.labelled)

    def images(self, config: RunConfig, worker: Worker, shard: Shard | None = None) -> Images:
        """A worker's images for the training loop: from its `shard` of a `stream`, or loaded."""
        from pukd_ray.distillation.data import InMemory, Streamed

        spec, settings = pixel_spec(config.teacher), config.distill
        if shard is None:
            share = settings.positive_share
            return InMemory(self.load(spec, worker), settings.batch_size, config.seed, worker, positive_share=share)
        # A part of what images in memory may take: the buffer copies them.
        buffer_bytes = settings.memory_gib * 2**30 / 4
        batch_size, seed = settings.batch_size // worker.world, config.seed + worker.rank
        if not self.draws_apart(config):
            return Streamed(shard, self.count, spec, batch_size, buffer_bytes, seed)
        # Whole on every worker: each draws its own share of its batches, in its own order.
        positives = replace(self, files=()).load(spec, worker)
        return Streamed(
            shard, self.count, spec, batch_size, buffer_bytes, seed, positives, settings.positive_share or 0.0
        )

    def load(self, spec: PixelSpec, worker: Worker = ALONE) -> Batch:
        """All images, decoded, each by one of the workers; unreadable ones are left out."""
        # torch belongs to the workers that train, not to the tasks that read for them.
        from pukd_ray.distillation.data import Batch, decode_all, decode_labelled

        def labelled(request: ReadRequest) -> Batch:
            blocks = read_blocks(request, self.sources[request.unit.role][request.unit.source])
            return decode_labelled(blocks, spec)

        def selected(name: str) -> Batch:
            table = self.folder.read_table(name, ["image", "pu_probability"])
            images, weights = (table.column(c).to_pylist() for c in ("image", "pu_probability"))
            return decode_all(images, spec, weights=weights)

        parts = [partial(labelled, request) for request in self.labelled] + [partial(selected, f) for f in self.files]
        of_ranks = worker.everyones([decode() for decode in parts[worker.mine]])
        return Batch.join([of_ranks[i % worker.world][i // worker.world] for i in range(len(parts))])

    def stream(self, config: RunConfig, cpus: float) -> Dataset:
        """What `images` wants of a set too large for memory, as a dataset with the columns that `Streamed` reads:
        all of it, or the selection if P is drawn apart; each task that reads and decodes has that share of CPUs."""
        from ray.data import from_items

        from pukd_ray.corpus.datasource import read_units

        parts = []
        if not self.draws_apart(config):
            read = read_units(mix_units(self.labelled, config.seed), self.sources, num_cpus=cpus)
            parts.append(read.map_batches(_labelled_rows, batch_format="pyarrow", num_cpus=cpus))
        if self.files:
            names = from_items([{"file": f} for f in self.files], override_num_blocks=len(self.files))
            parts.append(
                names.map_batches(
                    partial(_selected_rows, folder=self.folder), batch_format="pyarrow", batch_size=1, num_cpus=cpus
                )
            )
        encoded = parts[0].union(*parts[1:]) if parts[1:] else parts[0]
        spec = pixel_spec(config.teacher)
        decoded = encoded.map_batches(DecodeImages(spec), batch_format="pyarrow", num_cpus=cpus)
        return decoded.map_batches(_readable_pixels, batch_format="pyarrow", num_cpus=cpus)


def mix_units(wanted: Sequence[ReadRequest], seed: int) -> list[ReadRequest]:
    """The same labelled rows, units in random order and single images in random units: folders come class by class."""
    rng = np.random.default_rng([seed, 9])
    mixed = []
    singles: defaultdict[tuple[str, int], list[tuple[Unit, int, int]]] = defaultdict(list)
    for w in wanted:
        if w.unit.error or not FORMATS[w.unit.format].single_images:
            mixed.append(w)
            continue
        assert w.positions is not None
        assert w.labels is not None
        for position, label in zip(w.positions, w.labels, strict=True):
            singles[w.unit.role, w.unit.source].append((w.unit, int(position), int(label)))
    for images in singles.values():
        order = rng.permutation(len(images))
        for part in np.array_split(order, -(-len(order) // UNIT_FILES)):
            chosen = [images[i] for i in part]
            unit = regroup([(unit, position) for unit, position, _ in chosen])
            mixed.append(ReadRequest(unit, np.arange(len(chosen)), np.array([label for *_, label in chosen], np.int64)))
    return [mixed[i] for i in rng.permutation(len(mixed))]


def positives_of(folder: RunFolder, config: RunConfig, units: Sequence[Unit]) -> TrainingSet:
    """P alone."""
    labelled = index_labelled("positives", units, config.positives, config.teacher)
    return TrainingSet(labelled.count, labelled.requests, sources_by_role(config), folder)


def _labelled_rows(table: pa.Table) -> pa.Table:
    labels = pc.cast(table.column("label"), pa.int64())
    return _rows(table.column("image"), table.column("error"), labels, pa.array([1.0] * table.num_rows, pa.float32()))


def _selected_rows(table: pa.Table, folder: RunFolder) -> pa.Table:
    """File names -> the encoded images in them."""
    read = pa.concat_tables(
        [folder.read_table(name, ["image", "pu_probability"]) for name in table.column("file").to_pylist()]
    )
    nothing = pa.nulls(read.num_rows, pa.string())
    return _rows(read.column("image"), nothing, pa.array([-1] * read.num_rows), read.column("pu_probability"))


def _rows(image: Any, error: Any, label: Any, weight: Any) -> pa.Table:
    return pa.table({"image": image, "error": error, "label": label, "weight": weight})


def _readable_pixels(table: pa.Table) -> pa.Table:
    return table.select(["pixels", "label", "weight"]).filter(pc.is_valid(table.column("pixels")))
