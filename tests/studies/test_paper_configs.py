"""The shipped configs of the table whose data cannot be had here, on tiny data in the same layouts."""

from __future__ import annotations

import gzip
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pukd_ray import ConfigError
from pukd_ray.studies.config import load_paper_table
from pukd_ray.studies.paper import make_table, train_missing_teacher, write_page

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs" / "paper"
SMALL = {
    "table.seeds": 1,
    "table.per_class": [6],
    "table.equal_epochs": False,
    "table.rows": ["p_only", "kd"],
    "table.budget": None,
    "selector.steps": 20,
    "selector.batch_size": 64,
    "selector.views": 1,
    "selector.prior": 0.5,
    "selection.rule": "positive",
    "distill.steps": 3,
    "distill.batch_size": 16,
}


def picture(size: int, channels: int, label: int | None, rng: np.random.Generator) -> np.ndarray:
    """uint8 [C, S, S]: a bright column, by its label from left to right; noise without one."""
    image = rng.integers(0, 80, (channels, size, size))
    if label is None:
        return np.asarray(rng.integers(0, 255, (channels, size, size)), np.uint8)
    width = size // 10
    image[:, :, label * width : (label + 1) * width] = 250
    return image.astype(np.uint8)


def write_idx(folder: Path, split: str, labels: list[int], rng: np.random.Generator) -> None:
    images = np.concatenate([picture(28, 1, k, rng) for k in labels])
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, len(labels), 28, 28) + images.tobytes())
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def write_pool(folder: Path, size: int, channels: int, rng: np.random.Generator, suffix: str = "png") -> None:
    """120 images, half of them with a label's column."""
    folder.mkdir(parents=True)
    for i in range(120):
        image = picture(size, channels, i % 10 if i % 2 else None, rng)
        shown = image[0] if channels == 1 else np.moveaxis(image, 0, -1)
        Image.fromarray(shown).save(folder / f"{i:03}.{suffix}")


def mnist(data: Path, rng: np.random.Generator) -> dict[str, Any]:
    (data / "mnist").mkdir(parents=True)
    write_idx(data / "mnist", "train", [i % 10 for i in range(160)], rng)
    write_idx(data / "mnist", "t10k", [i % 10 for i in range(40)], rng)
    write_pool(data / "mnist-pool", 28, 1, rng)
    return {
        "table.rows": ["kd", "all", "pu_s1"],
        "teacher_training.epochs": 12,
        "teacher_training.batch_size": 16,
        "distill.memory_gib": 1e-6,  # too little memory: these students stream their images
    }


def cifar10(data: Path, rng: np.random.Generator) -> dict[str, Any]:
    folder = data / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, count in [*((f"data_batch_{i}.bin", 20) for i in range(1, 6)), ("test_batch.bin", 20)]:
        rows = [bytes([i % 10]) + picture(32, 3, i % 10, rng).tobytes() for i in range(count)]
        (folder / name).write_bytes(b"".join(rows))
    write_pool(data / "imagenet32", 32, 3, rng)
    return {
        "teacher.arch": "resnet20_cifar",
        "teacher_training.epochs": 2,
        "teacher_training.batch_size": 25,
        "teacher_training.augment": "none",
    }


def imagenet(data: Path, rng: np.random.Generator) -> dict[str, Any]:
    wnids = ["n01440764", "n01443537", "n01484850"]
    for split, count in (("train", 8), ("val", 2)):
        for label, wnid in enumerate(wnids):
            (data / "imagenet" / split / wnid).mkdir(parents=True)
            for i in range(count):
                image = np.moveaxis(picture(64, 3, 3 * label, rng), 0, -1)
                Image.fromarray(image).save(data / "imagenet" / split / wnid / f"{wnid}_{i}.JPEG")
    write_pool(data / "flickr", 64, 3, rng, "jpg")
    # torchvision's weights cannot be had here, nor does a network of their size learn in seconds.
    return {
        "teacher.arch": "resnet18",
        "teacher.num_classes": 3,
        "teacher.input_size": 64,
        "teacher_training": {"epochs": 1, "batch_size": 8, "augment": "none"},
    }


@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.yaml")))
def test_all_that_a_shipped_config_lacks_is_data(tmp_path: Path, name: str) -> None:
    shutil.copytree(CONFIGS, tmp_path / "jobs" / "configs" / "paper")
    with pytest.raises(ConfigError) as caught:
        load_paper_table(tmp_path / "jobs" / "configs" / "paper" / name)
    missing = re.compile(r"(original|positives|corpus|test)(\.\d+)?\.uri: no such |teacher\.weights: no such file: ")
    assert [fault for fault in caught.value.faults if not missing.match(fault)] == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("write", [mnist, cifar10, imagenet])
def test_the_table_of_a_shipped_config(
    write: Callable[[Path, np.random.Generator], dict[str, Any]], tmp_path: Path
) -> None:
    name = write.__name__
    file = tmp_path / "jobs" / "configs" / "paper" / f"{name}.yaml"
    shutil.copytree(CONFIGS, file.parent)
    with pytest.raises(ConfigError) as caught:
        load_paper_table(file)
    assert all(str(tmp_path / "data") in fault for fault in caught.value.faults)
    assert {fault.partition(":")[0] for fault in caught.value.faults} >= {"original.uri", "corpus.uri", "test.uri"}

    overrides = {**SMALL, **write(tmp_path / "data", np.random.default_rng(0)), "output": str(tmp_path / "table")}
    config = load_paper_table(file, overrides)
    assert train_missing_teacher(config)
    config = load_paper_table(file, overrides)
    table = make_table(config)
    images = {s["row"]: s["images"] for s in table["students"].values()}
    classes = config.teacher.num_classes
    assert images["kd"] == {"mnist": 160, "cifar10": 100, "imagenet": 24}[name]
    if name == "mnist":
        assert images["all"] == 6 * classes + 120
        assert 6 * classes < images["pu_s1"] < images["all"]
    else:
        assert images["p_only"] == 6 * classes
    assert config.student.arch in write_page(config, table, "a test")
