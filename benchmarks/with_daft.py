"""Daft's native runner on the same task, after its "Multimodal" guides (https://docs.daft.ai): decode and resize are
Daft's own expressions, the network a class UDF. Full decode; no hash, no kept bytes. Extra `bench`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.task import Task

COLUMNS = ("pu_logit", "pu_probability", "teacher_label", "teacher_confidence")


def main(folder: str, corpus: str, network: str) -> None:
    """Run it; prints its seconds as JSON."""
    began = time.time()
    import daft
    from daft import DataType, col

    task = Task(Path(folder), Path(corpus), network)
    size, channels = task.teacher.input_size, task.teacher.channels
    kinds = (DataType.float32(), DataType.float32(), DataType.int64(), DataType.float32())
    scores = DataType.struct(dict(zip(COLUMNS, kinds, strict=True)))

    @daft.cls(max_concurrency=len(os.sched_getaffinity(0)))
    class Predictor:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(1)
            self.of_thread = threading.local()  # hooks that watch a network would see another thread's batch

        @daft.method.batch(return_dtype=scores, unnest=True, batch_size=256)
        def predict(self, pixels: Any) -> list[dict[str, Any]]:
            import torch

            if not hasattr(self.of_thread, "networks"):
                self.of_thread.networks = task.load()
            teacher, head, calibration = self.of_thread.networks
            stacked = np.stack([np.asarray(p).reshape(size, size, channels) for p in pixels.to_pylist()])
            with torch.inference_mode():
                features, logits = teacher(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))
                z = head(features).numpy()
                confidence, label = logits.softmax(1).max(1)
            columns = (z, calibration(z).astype(np.float32), label.numpy(), confidence.numpy())
            return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]

    first = next(path for path in Path(corpus).rglob("*") if path.is_file())
    if first.suffix == ".parquet":
        frame = daft.read_parquet(f"{corpus}/*.parquet")
    else:
        frame = daft.from_glob_path(f"{corpus}/**/*.jpg").with_column("image", col("path").download())
    pixels = col("image").decode_image(mode="L" if channels == 1 else "RGB").resize(size, size)
    predictor: Any = Predictor()
    frame = frame.select(predictor.predict(pixels))
    started = time.time()
    frame.write_parquet(f"{folder}/daft")
    ended = time.time()
    import pyarrow.parquet as pq

    images = sum(pq.read_metadata(path).num_rows for path in Path(folder, "daft").glob("*.parquet"))
    print(json.dumps({"images": int(images), "start": started - began, "stage": ended - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
