"""The pools that selection is measured on: corpora of known truth, drawn by seed from Fashion-MNIST and renderings.

A pool is a list of indices into one bank of images, so features of the bank serve all pools. Tuning and final pools
have no image in common, and neither has one of the test images. The task is the demo's: the teacher knows five of
the ten classes and was trained on the first 40,000 training images, from which P is drawn.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pukd_ray.demo.build import CLASSES, OTHER_CLASSES, SOURCE_CLASSES, TEACHER_IMAGES, read_split
from pukd_ray.demo.glyphs import encode_small_png, render_glyphs, render_textures

RENDERED = {"glyph": 15_000, "distorted glyph": 15_000, "texture": 15_000}
DISTORTION = 0.5
TUNING_SHARE = 0.4  # of each kind; the final pools draw from the rest
POOLS: Mapping[str, Mapping[str, int]] = {
    "hard": dict.fromkeys(CLASSES, 1_000) | dict.fromkeys(OTHER_CLASSES, 3_000),
    "easy": dict.fromkeys(CLASSES, 1_000) | {"glyph": 7_500, "texture": 7_500},
    "rare": dict.fromkeys(CLASSES, 120)
    | dict.fromkeys(OTHER_CLASSES, 3_000)
    | {"distorted glyph": 7_200, "texture": 7_200},
    "imbalanced": dict(zip(CLASSES, (1_100, 620, 350, 200, 110), strict=True)) | dict.fromkeys(OTHER_CLASSES, 1_400),
}
"""Images of each kind in a final pool; tuning pools have 60 % of each."""
TUNING_SIZE = 0.6
MEASURED = ("hard", "easy", "rare", "imbalanced")
"""The pools that docs/results.md has, in its order."""


@dataclass(frozen=True)
class Bank:
    """Every image that a pool may hold."""

    images: np.ndarray
    """uint8 [N, 28, 28], or [N, 3, 32, 32]."""
    kinds: np.ndarray
    """Class name or kind of rendering, [N]."""
    ids: np.ndarray
    """Where each image comes from: `train/<row>` or `<kind>/<number>`, [N]."""


@dataclass(frozen=True)
class Pool:
    """One draw of P and a corpus: rows of the bank."""

    positives: np.ndarray
    labels: np.ndarray
    """Teacher index of each positive, [n_p]."""
    corpus: np.ndarray
    relevant: np.ndarray
    """Truth of each corpus row, bool [n_u]."""

    def facts(self, bank: Bank) -> dict[str, Any]:
        """Counts by kind and the SHA-256 of the corpus's ids in order, one per line."""
        ids = "".join(f"{i}\n" for i in bank.ids[self.corpus])
        return {
            "images": len(self.corpus),
            "relevant": int(self.relevant.sum()),
            "positives": len(self.positives),
            "by_kind": dict(sorted(Counter(bank.kinds[self.corpus].tolist()).items())),
            "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        }


def load_photographs(source: Path) -> Bank:
    """The 60,000 training images of Fashion-MNIST in `source` (IDX files)."""
    train = read_split(source, "train")
    ids = np.array([f"train/{i}" for i in range(len(train.labels))])
    return Bank(train.images, np.array(SOURCE_CLASSES)[train.labels], ids)


def load_bank(source: Path, processes: int = 2) -> Bank:
    """The photographs, then the rendered images."""
    photographs = load_photographs(source)
    images, kinds, ids = [photographs.images], [photographs.kinds], [photographs.ids]
    with ProcessPoolExecutor(processes) as executor:
        for kind, pngs in zip(RENDERED, executor.map(_render, RENDERED), strict=True):
            images.append(np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs]))
            kinds.append(np.full(len(pngs), kind))
            ids.append(np.array([f"{kind}/{i}" for i in range(len(pngs))]))
    return Bank(np.concatenate(images), np.concatenate(kinds), np.concatenate(ids))


def _render(kind: str) -> list[bytes]:
    if kind == "texture":
        return render_textures(RENDERED[kind], seed=0)
    return render_glyphs(RENDERED[kind], seed=0, distort=0.0 if kind == "glyph" else DISTORTION)


def draw_pool(
    bank: Bank, name: str, *, seed: int, per_class: int = 100, tuning: bool = False, bias: float = 0.0
) -> Pool:
    """Draw P and a corpus; another seed draws other images of the same part.

    P: `per_class` images of each class that the teacher knows, from those that it was trained on. Relevant corpus
    images are of these classes and unknown to the teacher. With a `bias` P is drawn with probability proportional to
    exp(bias * z), z the standardised mean pixel of the class's images: bright ones are preferred, in P alone.
    """
    size = TUNING_SIZE if tuning else 1
    counts = {kind: round(count * size) for kind, count in POOLS[name].items()}
    rng = np.random.default_rng([seed, list(POOLS).index(name), tuning])
    return draw_counts(bank, counts, rng, seed=seed, per_class=per_class, tuning=tuning, bias=bias)


def draw_counts(
    bank: Bank,
    counts: Mapping[str, int],
    rng: np.random.Generator,
    *,
    seed: int,
    per_class: int,
    tuning: bool,
    bias: float,
) -> Pool:
    """`draw_pool` with as many images of each kind in the corpus as `counts` says, drawn by `rng`."""
    taught = _taught(bank)
    corpus = np.concatenate(
        [
            rng.choice(_part((bank.kinds == kind) & ~taught, tuning), count, replace=False)
            for kind, count in counts.items()
        ]
    )
    corpus = rng.permutation(corpus)
    of_class = [_part(taught & (bank.kinds == label), tuning) for label in CLASSES]
    # Nested: the 20 of a class are among its 100 of the same seed.
    positives = np.concatenate([_draw(bank, rows, seed, bias)[:per_class] for rows in of_class])
    return Pool(positives, np.repeat(np.arange(len(CLASSES)), per_class), corpus, np.isin(bank.kinds[corpus], CLASSES))


def available(bank: Bank, tuning: bool) -> dict[str, int]:
    """How many images of each kind a corpus may have."""
    taught = _taught(bank)
    return {str(kind): len(_part((bank.kinds == kind) & ~taught, tuning)) for kind in np.unique(bank.kinds)}


def _taught(bank: Bank) -> np.ndarray:
    """Which images the teacher was trained on, bool [N]."""
    return np.asarray(np.isin(bank.kinds, CLASSES) & (np.arange(len(bank.ids)) < TEACHER_IMAGES))


def _draw(bank: Bank, rows: np.ndarray, seed: int, bias: float) -> np.ndarray:
    """`rows` in random order; with a bias as drawn one by one with these probabilities (Gumbel's trick)."""
    rng = np.random.default_rng([seed, 9])
    if not bias:
        return rng.permutation(rows)
    mean = bank.images[rows].mean((1, 2))
    z = (mean - mean.mean()) / mean.std()
    order: np.ndarray = rows[np.argsort(-(bias * z + rng.gumbel(size=len(rows))), kind="stable")]
    return order


def _part(members: np.ndarray, tuning: bool) -> np.ndarray:
    """Rows of the tuning part, or of the final one, of the images marked in `members` [N]."""
    rows = np.flatnonzero(members)
    cut = round(len(rows) * TUNING_SHARE)
    return rows[:cut] if tuning else rows[cut:]


def write_pool(bank: Bank, pool: Pool, folder: Path) -> dict[str, Any]:
    """Write `corpus.parquet` (PNG bytes, truth, origin), and `positives.parquet` if there are any, into `folder`;
    return the pool's facts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, extra in (
        ("positives", pool.positives, {"label": pool.labels}),
        ("corpus", pool.corpus, {"relevant": pool.relevant}),
    ):
        if not len(rows):
            continue
        columns = {"image": [encode_small_png(image) for image in bank.images[rows]], "origin": bank.ids[rows], **extra}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=2_000, compression="zstd")
    return pool.facts(bank)
