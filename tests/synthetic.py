"""A tiny task with real files: a teacher that tells bright quadrants apart, a corpus of squares and noise.

Small enough that a whole pipeline takes seconds of computing; nothing in it is mocked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from pukd_ray.corpus.pixels import encode_png
from pukd_ray.networks.zoo import build_network

SIZE = 16
CLASSES = 4
RNG = 7


def square(label: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [1, 16, 16]: noise with a bright square in quadrant `label`."""
    image = rng.integers(0, 60, (1, SIZE, SIZE))
    top, left = divmod(label, 2)
    image[:, top * 8 + 1 : top * 8 + 7, left * 8 + 1 : left * 8 + 7] += 170
    return image.astype(np.uint8)


def irrelevant(rng: np.random.Generator) -> np.ndarray:
    """uint8 [1, 16, 16]: noise with a bright diagonal or cross."""
    image = rng.integers(0, 60, (1, SIZE, SIZE))
    at = rng.integers(2, 14)
    if rng.random() < 0.5:
        image[:, np.arange(SIZE), np.roll(np.arange(SIZE), at)] += 170
    else:
        image[:, at] += 170
        image[:, :, at] = 200
    return image.astype(np.uint8)


def labelled(count: int, seed: int) -> pa.Table:
    """`count` squares, classes in turn."""
    rng = np.random.default_rng(seed)
    labels = [i % CLASSES for i in range(count)]
    return pa.table({"image": [encode_png(square(k, rng)) for k in labels], "label": labels})


def corpus(count: int, relevant: float, seed: int) -> pa.Table:
    """`count` images, a share of them squares; the truth in `relevant`."""
    rng = np.random.default_rng(seed)
    truth = rng.random(count) < relevant
    images = [encode_png(square(int(rng.integers(CLASSES)), rng) if t else irrelevant(rng)) for t in truth]
    return pa.table({"image": images, "relevant": truth})


def write_teacher(path: Path) -> None:
    """Train LeNet-5 on squares until it is right; seconds."""
    from pukd_ray.corpus.pixels import PixelSpec, decode

    torch.manual_seed(0)
    table = labelled(400, RNG)
    spec = PixelSpec(SIZE, 1, "crop")
    x = torch.from_numpy(np.stack([decode(b, spec) for b in table.column("image").to_pylist()])).float() / 255
    y = torch.tensor(table.column("label").to_pylist())
    network = build_network("lenet5", num_classes=CLASSES, channels=1, input_size=SIZE)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(80):
        rows = torch.arange(step * 50, step * 50 + 50) % 400
        loss = torch.nn.functional.cross_entropy(network((x[rows] - 0.3) / 0.3), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network((x - 0.3) / 0.3).argmax(1) == y).float().mean() > 0.99
    torch.save(network.state_dict(), path)


def write_task(folder: Path, *, images: int = 1200, relevant: float = 0.3, files: int = 3) -> dict[str, Any]:
    """Teacher, P, corpus and test in `folder`, and `config.yaml`; returns the config as a dict."""
    folder.mkdir(parents=True, exist_ok=True)
    write_teacher(folder / "teacher.pt")
    pq.write_table(labelled(80, 1), folder / "p.parquet")
    pq.write_table(labelled(80, 2), folder / "test.parquet")
    (folder / "lake").mkdir()
    table = corpus(images, relevant, 3)
    step = -(-images // files)
    for i in range(files):
        pq.write_table(table.slice(i * step, step), folder / "lake" / f"part-{i}.parquet", row_group_size=200)
    config = {
        "name": "tiny",
        "output": str(folder / "run"),
        "teacher": {
            "arch": "lenet5",
            "weights": "teacher.pt",
            "num_classes": CLASSES,
            "input_size": SIZE,
            "channels": 1,
            "mean": [0.3],
            "std": [0.3],
        },
        "positives": {"uri": "p.parquet"},
        "corpus": {"uri": "lake", "relevant_column": "relevant"},
        "test": {"uri": "test.parquet"},
        "selector": {"steps": 100, "batch_size": 128, "lr": 0.005},
        "score": {"chunk_images": 500},
        "student": {"arch": "lenet5_half"},
        "distill": {"steps": 60, "batch_size": 64, "lr": 0.05},
    }
    write_config(folder, config)
    return config


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """`config` as YAML."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
