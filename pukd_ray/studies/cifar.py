"""The pool `cifar`: P from CIFAR-10, U from Tiny ImageNet, truth by class name; the published setting, and a harder one
than it sounds, since the two sets differ in framing and sharpness too.

The folder of the images has `cifar10/train.parquet` (`image`: encoded bytes, `label`: 0 to 9) and
`tiny_imagenet32/*.parquet` (`image`, `wnid`), shuffled once; and, unless another teacher is given, the public
checkpoint `teachers/resnet20-12fca82f.th` (Y. Idelbayev, BSD-2-Clause).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pukd_ray.config import ConfigError, TeacherConfig
from pukd_ray.demo.pools import TUNING_SHARE, TUNING_SIZE, Bank, Pool

POOL = "cifar"
"""Its name."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CORPUS = 20_000
SHARES = (0.005, 0.02, 0.11, 0.5)
"""Of relevant images, in the corpora that accuracy is drawn against (`draw_share`); in Tiny ImageNet it is 0.115."""
# The synsets of Tiny ImageNet that show a class of CIFAR-10; airplane, deer and horse are missing.
RELEVANT = frozenset(
    f"n{number:08}"
    for number in (
        *(2_814_533, 3_670_208, 4_285_008, 3_100_240),
        *(2_058_221, 2_056_570, 1_855_672, 2_002_724),
        *(2_124_075, 2_123_045, 2_123_394),
        *(2_106_662, 2_099_712, 2_099_601, 2_094_433, 2_085_620, 2_113_799),
        *(1_641_577, 1_644_900),
        *(3_662_601, 3_447_447),
        *(3_796_401, 3_977_966),
    )
)


def load_cifar(folder: Path) -> Bank:
    """All images there, P's first; uint8 [N, 3, 32, 32]."""
    files = [(folder / "cifar10" / "train.parquet", "label")]
    files += [(file, "wnid") for file in sorted((folder / "tiny_imagenet32").glob("*.parquet"))]
    images, kinds, ids = [], [], []
    for file, column in files:
        table = pq.read_table(file, columns=["image", column])
        images.append(np.stack([_decode(image) for image in table.column("image").to_pylist()]))
        values = table.column(column).to_numpy()
        kinds.append(np.array(CLASSES)[values] if column == "label" else values.astype(str))
        ids.append(np.array([f"{file.stem}/{i}" for i in range(len(values))]))
    return Bank(np.concatenate(images), np.concatenate(kinds), np.concatenate(ids))


def _decode(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).transpose(2, 0, 1)


def draw_cifar(bank: Bank, *, seed: int, per_class: int = 100, tuning: bool = False) -> Pool:
    """Draw P and a corpus, as `draw_pool` does: tuning and final pools have no image in common."""
    rng = np.random.default_rng([seed, 10, tuning])
    of_p = np.isin(bank.kinds, CLASSES)

    def part(members: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(members)
        cut = round(len(rows) * TUNING_SHARE)
        return rows[:cut] if tuning else rows[cut:]

    corpus = rng.choice(part(~of_p), round(CORPUS * (TUNING_SIZE if tuning else 1)), replace=False)
    positives = [rng.permutation(part(bank.kinds == name))[:per_class] for name in CLASSES]
    relevant = np.isin(bank.kinds[corpus], list(RELEVANT))
    return Pool(np.concatenate(positives), np.repeat(np.arange(len(CLASSES)), per_class), corpus, relevant)


def draw_share(bank: Bank, share: float, *, seed: int) -> Pool:
    """Draw a corpus of `CORPUS` of all the bank's images, of which a `share` is relevant; without P.

    Of one seed, one of a larger share has the relevant images of a smaller one, and more. Raises ConfigError if the
    bank has too few images.
    """
    rng = np.random.default_rng([seed, 12])
    is_relevant = np.isin(bank.kinds, list(RELEVANT))
    relevant = rng.permutation(np.flatnonzero(is_relevant))
    others = rng.permutation(np.flatnonzero(~is_relevant & ~np.isin(bank.kinds, CLASSES)))
    wanted = round(CORPUS * share)
    if len(relevant) < wanted or len(others) < CORPUS - wanted:
        raise ConfigError(
            [
                f"--data: its tiny_imagenet32/ has {len(relevant):,} relevant images and {len(others):,} others, fewer "
                f"than the {wanted:,} and {CORPUS - wanted:,} of a corpus: it takes all of Tiny ImageNet"
            ]
        )
    corpus = rng.permutation(np.r_[relevant[:wanted], others[: CORPUS - wanted]])
    nothing = np.empty(0, np.int64)
    return Pool(nothing, nothing, corpus, is_relevant[corpus])


def cifar_teacher(folder: Path) -> tuple[TeacherConfig, bytes]:
    """(config, weights) of the public ResNet-20."""
    file = folder / "teachers" / "resnet20-12fca82f.th"
    teacher = TeacherConfig(
        arch="resnet20_cifar",
        weights=str(file),
        num_classes=len(CLASSES),
        channels=3,
        input_size=32,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    return teacher, file.read_bytes()
