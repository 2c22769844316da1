"""The stage `select` on score files of a size of one's choice, made up and deleted again; prints one line of JSON.

python -m benchmarks.meter python -m benchmarks.select_rows --rows 1000000

Six of ten teachers' confidences are exactly 1, one image in ten has its bytes kept, one in a hundred is a copy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pukd_ray.config import RunConfig, SelectionConfig
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.plan import plan_inputs
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.units import units_from_table
from pukd_ray.run.folder import SCORES_SCHEMA, RunFolder
from pukd_ray.runtime.engine import engine
from pukd_ray.selection.calibration import Calibration, to_json
from pukd_ray.selection.committing import FILE_ROWS, GROUP_ROWS
from pukd_ray.selection.select import select_images

CLASSES = 10
RULES = (
    SelectionConfig(rule="positive"),
    SelectionConfig(rule="quota", budget=50_000),
    SelectionConfig(rule="teacher_confidence", budget=50_000),
)


def score_file(first: int, count: int, image_bytes: int) -> pa.Table:
    """`count` rows of a made-up pass, from row `first` on."""
    rng = np.random.default_rng(first)
    logit = (rng.normal(size=count) * 2 - 2.6).astype(np.float32)
    confidence = np.where(rng.random(count) < 0.6, 1.0, rng.random(count)).astype(np.float32)
    hashes = rng.integers(-(2**63), 2**63, count)
    hashes[::100] = np.arange(len(hashes[::100])) % 1000
    images = [rng.bytes(image_bytes) if kept else None for kept in logit > 0]
    columns = {
        "image_id": [f"shard-{first:09d}.parquet#{row}" for row in range(count)],
        "source": [f"s3://lake/shard-{first:09d}.parquet"] * count,
        "source_row": np.arange(count),
        "content_hash": hashes,
        "error": pa.nulls(count, pa.string()),
        "pu_logit": logit,
        "pu_probability": 1 / (1 + np.exp(-logit)),
        "teacher_label": rng.integers(0, CLASSES, count).astype(np.int32),
        "teacher_confidence": confidence,
        "teacher_entropy": np.zeros(count, np.float32),
        "relevant": rng.random(count) < 1 / (1 + np.exp(-logit)),
        "image": pa.array(images, pa.binary()),
        "perceptual_hash": pa.nulls(count, pa.binary(16)),
    }
    return pa.table(columns).cast(SCORES_SCHEMA)


def make_run(place: Path, rows: int, image_bytes: int) -> tuple[RunFolder, RunConfig]:
    """A run whose pass is done."""
    pq.write_table(pa.table({"image": [encode_png(np.zeros((1, 8, 8), np.uint8))], "label": [0]}), place / "p.parquet")
    teacher = {"arch": "lenet5", "weights": "t.pt", "num_classes": CLASSES, "channels": 1, "mean": [0.5], "std": [0.5]}
    source = {"uri": str(place / "p.parquet")}
    raw: dict[str, Any] = {"teacher": teacher | {"input_size": 8}, "positives": source, "corpus": source}
    config = RunConfig(output=str(place / "run"), **raw)
    folder = RunFolder(config.output)
    files = []
    for first in range(0, rows, FILE_ROWS):
        table = score_file(first, min(FILE_ROWS, rows - first), image_bytes)
        files.append(f"scores/00000-{first:09d}.parquet")
        folder.write(files[-1], partial(pq.write_table, table, row_group_size=GROUP_ROWS, compression="zstd"))
    folder.write_json("markers/score/00000.json", {"files": files})
    rng = np.random.default_rng(0)
    held_out = {"logit": rng.normal(size=2000), "role": ["positives", "corpus"] * 1000, "weight": np.ones(2000)}
    folder.write_table("selector/held_out.parquet", pa.table(held_out))
    folder.write_json("selector/calibration.json", to_json(Calibration(1.0, 0.0), [Calibration(0.9, 0.1)] * 3))
    folder.write_json("selector/prior.json", {"value": 0.1, "trust": "high"})
    return folder, config


def main() -> None:
    """Select by several rules, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--image-bytes", type=int, default=4000, help="of each image that the pass kept")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as place, engine("select-rows") as cluster:
        folder, config = make_run(Path(place), arguments.rows, arguments.image_bytes)
        sources = {"positives": sources_by_role(config)["positives"]}
        plan_inputs(folder, sources, list_inputs(sources).table, print)
        units = units_from_table(folder.read_table("plan.parquet"))
        for selection in RULES:
            began = time.time()
            summary = select_images(folder, replace(config, selection=selection), units)
            seconds = time.time() - began
            found[selection.rule] = {
                "n_selected": summary["n_selected"],
                "parts": summary["parts"],
                "seconds": round(seconds, 1),
                "cpu_us_per_row": round(seconds * cluster.cpus / arguments.rows * 1e6, 1),
            }
    print(json.dumps({"rows": arguments.rows, "image_bytes": arguments.image_bytes, **found}))


if __name__ == "__main__":
    main()
