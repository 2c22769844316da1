"""The best hand-written loop: a process per core, each with its share of the images, no engine between them.

The same decoder, network, head and table as this project's score stage; nothing survives a crash, nothing is counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.task import Task
from pukd_ray.runtime.devices import KEEP_MEMORY, BatchRunner

BATCH = 256
MANY_FILES = 8
"""Files per core, from which on whole files are shared out evenly enough."""


def batches(file: Path) -> Iterator[list[bytes]]:
    """Encoded images of a Parquet file, a tar or a folder."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH, columns=["image"]):
            yield batch.column(0).to_pylist()
        return
    if file.suffix == ".tar":
        with tarfile.open(file) as tar:
            images: Iterator[bytes] = (tar.extractfile(m).read() for m in tar if m.isfile())  # type: ignore[union-attr]
            yield from _grouped(images)
        return
    yield from _grouped(path.read_bytes() for path in sorted(file.iterdir()))


def _grouped(images: Iterator[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    for image in images:
        group.append(image)
        if len(group) == BATCH:
            yield group
            group = []
    if group:
        yield group


def share(files: Sequence[Path], rank: int, world: int) -> Iterator[tuple[Path, Iterator[tuple[int, list[bytes]]]]]:
    """This rank's files, each with (first row, encoded images) of its batches; where files are few, of all files every
    `world`-th batch."""

    def of_file(file: Path, number: int, step: int) -> Iterator[tuple[int, list[bytes]]]:
        row = 0
        for i, encoded in enumerate(batches(file)):
            if i % step == number:
                yield row, encoded
            row += len(encoded)

    if len(files) < MANY_FILES * world:
        return ((file, of_file(file, rank, world)) for file in files)
    return ((file, of_file(file, 0, 1)) for file in files[rank::world])


def work(rank: int, world: int, task: Task, out: str) -> None:
    """Score this rank's images; one table per file."""
    import hashlib

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from pukd_ray.corpus.perceptual import hash_column, perceptual_hashes
    from pukd_ray.corpus.pixels import decode_batch, pixel_spec
    from pukd_ray.run.folder import SCORES_SCHEMA

    torch.set_num_threads(1)
    teacher, head, calibration = task.load()
    spec = pixel_spec(task.teacher)
    began, cpu, images = time.time(), time.process_time(), 0
    network = BatchRunner(lambda x: dict(zip(("features", "logits"), teacher(x), strict=True)), teacher.device)
    for file, mine in share(sorted(task.corpus.iterdir()), rank, world):
        tables = []
        for row, encoded in mine:
            pixels, errors = decode_batch(encoded, spec)
            good = np.array([p is not None for p in pixels])
            with torch.inference_mode():
                seen = np.stack([p for p in pixels if p is not None])
                found = network(seen)
                features, logits = (torch.from_numpy(found[name]) for name in ("features", "logits"))
                z = head(features.half().float()).numpy()
                p = logits.softmax(1)
                entropy = -(p * p.clamp_min(1e-30).log()).sum(1).numpy()
                confidence, label = (t.numpy() for t in p.max(1))
            probability = calibration(z).astype(np.float32)
            kept = iter(probability >= task.config.score.keep_above)

            def column(values: np.ndarray, good: np.ndarray = good) -> pa.Array:
                full = np.zeros(len(good), values.dtype)
                full[good] = values
                return pa.array(full, mask=~good)

            columns = {
                "image_id": [f"{file.name}#{row + i}" for i in range(len(encoded))],
                "source": [str(file)] * len(encoded),
                "source_row": np.arange(row, row + len(encoded)),
                "content_hash": [
                    int.from_bytes(hashlib.blake2b(d, digest_size=8).digest(), "big", signed=True) for d in encoded
                ],
                "error": pa.array(errors, pa.string()),
                "pu_logit": column(z),
                "pu_probability": column(probability),
                "teacher_label": column(label.astype(np.int32)),
                "teacher_confidence": column(confidence),
                "teacher_entropy": column(entropy),
                "relevant": pa.nulls(len(encoded), pa.bool_()),
                "image": [d if g and next(kept) else None for d, g in zip(encoded, good, strict=True)],
                "perceptual_hash": hash_column(*perceptual_hashes(seen), good),
            }
            tables.append(pa.table(columns, schema=SCORES_SCHEMA))
            images += len(encoded)
        if tables:
            name = f"{file.name}-{rank}.parquet"
            pq.write_table(pa.concat_tables(tables), Path(out) / name, compression="zstd")
    (Path(out) / f"rank-{rank}.json").write_text(json.dumps([began, time.time(), images, time.process_time() - cpu]))


def main(folder: str, corpus: str, network: str) -> None:
    """Run it; prints its seconds as JSON, once from the command's start and once from when all had their networks."""
    began = time.time()
    task = Task(Path(folder), Path(corpus), network)
    out = Path(folder) / "ceiling"
    out.mkdir()
    world = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    os.environ.update(KEEP_MEMORY)  # the best there is: as this project's own processes have it
    ranks = [context.Process(target=work, args=(rank, world, task, str(out))) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a process ended with {process.exitcode}")
    spans = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world)]
    first, last = min(s[0] for s in spans), max(s[1] for s in spans)
    images, cpu = sum(s[2] for s in spans), sum(s[3] for s in spans)
    print(json.dumps({"images": images, "start": first - began, "computing": last - first, "cpu": cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:])
