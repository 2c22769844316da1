"""Ray Data as its documentation has offline batch inference on images, frozen: what a user writes first.

After "End-to-end: Offline Batch Inference" (https://docs.ray.io/en/latest/data/batch_inference.html) and "Working with
Images" (https://docs.ray.io/en/latest/data/working-with-images.html) of Ray 2.60: read, a preprocessing function, a
predictor class on an actor pool, write. Full decode by Pillow; no hash, no kept bytes, one bad image ends the run.
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image

from benchmarks.task import Task

Batch = dict[str, Any]


class Preprocess:
    """Encoded bytes -> pixels."""

    def __init__(self, column: str, size: int, channels: int) -> None:
        self.column, self.size, self.mode = column, size, "L" if channels == 1 else "RGB"

    def __call__(self, row: Batch) -> Batch:
        """One row, as the documentation's `ds.map(preprocess)` has it."""
        image = Image.open(io.BytesIO(row[self.column])).convert(self.mode).resize((self.size, self.size))
        pixels = np.asarray(image)
        return {"pixels": pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)}


class Predictor:
    """The network, loaded once per actor."""

    def __init__(self, task: Task) -> None:
        import torch

        torch.set_num_threads(1)
        self.teacher, self.head, self.calibration = task.load()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of pixels -> scores."""
        import torch

        with torch.inference_mode():
            features, logits = self.teacher(np.ascontiguousarray(batch["pixels"]))
            z = self.head(features).numpy()
            confidence, label = logits.softmax(1).max(1)
        return {
            "pu_logit": z,
            "pu_probability": self.calibration(z).astype(np.float32),
            "teacher_label": label.numpy(),
            "teacher_confidence": confidence.numpy(),
        }


def main(folder: str, corpus: str, network: str) -> None:
    """Run it; prints its seconds as JSON."""
    began = time.time()
    task = Task(Path(folder), Path(corpus), network)
    ray.init(log_to_driver=False, address="local")
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = time.time()
    first = next(path for path in Path(corpus).rglob("*") if path.is_file())
    if first.suffix == ".parquet":
        ds, column = ray.data.read_parquet(corpus), "image"
    elif first.suffix == ".tar":
        ds, column = ray.data.read_webdataset(corpus, decoder=None), "jpg"
    else:
        folders = [str(path) for path in sorted(Path(corpus).iterdir())]
        ds, column = ray.data.read_binary_files(folders), "bytes"
    preprocess = Preprocess(column, task.teacher.input_size, task.teacher.channels)
    cpus = int(ray.cluster_resources()["CPU"])
    ds = ds.map(preprocess).map_batches(
        Predictor,
        fn_constructor_args=(task,),
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=max(1, cpus // 2)),
    )
    ds.write_parquet(f"{folder}/plain")
    ended = time.time()
    images = sum(_rows(path) for path in Path(folder, "plain").glob("*.parquet"))
    ray.shutdown()
    print(json.dumps({"images": images, "start": started - began, "stage": ended - started}))


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
