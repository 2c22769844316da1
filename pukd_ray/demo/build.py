"""Makes the bundled demo data out of Fashion-MNIST; `jobs/make_demo_data.py` is its command.

The teacher knows five of the ten classes and was trained on the first 40,000 training images. The positives are
some of those, the corpus holds only later ones, and the test set comes from the original test set: no image is in
two of them.
"""

import gzip
import hashlib
import json
import platform
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import features

from pukd_ray.demo.glyphs import encode_small_png, render_glyphs

SOURCE_CLASSES = (  # in the order of the original labels
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CLASSES = SOURCE_CLASSES[::2]  # what the teacher knows, in the order of its indices
OTHER_CLASSES = SOURCE_CLASSES[1::2]
TEACHER_IMAGES = 40_000  # the training images before this one are the teacher's

SEED = 0
POSITIVES_PER_CLASS = 100
RELEVANT_PER_CLASS = 320  # five classes of it are a quarter of the corpus
OTHERS_PER_CLASS = 876
GLYPHS = 400
BROKEN = {"null": 4, "empty": 2, "text": 4, "truncated": 4, "flipped": 3, "bomb": 3}
TEST_PER_CLASS = 500
FULL_GLYPHS = 5_000  # of the run on all images; its first 400 are those of the bundled corpus
CORPUS_FILES = 4
ROW_GROUP = 800

MANIFEST = "manifest.json"


class Split(NamedTuple):
    """One half of Fashion-MNIST as it is published."""

    name: str  # `train` or `t10k`
    images: NDArray[np.uint8]  # [N, 28, 28]
    labels: NDArray[np.uint8]  # [N], index into SOURCE_CLASSES


class Row(NamedTuple):
    """One image of a bundled file."""

    image: bytes | None
    kind: str  # a class name, `glyph` or `broken/...`
    origin: str  # for people: which image it is


def build_demo(source: Path, folder: Path) -> dict[str, Any]:
    """Write the bundled files and their manifest into `folder`; return the manifest."""
    rng = np.random.default_rng(SEED)
    train, test = read_split(source, "train"), read_split(source, "t10k")
    positives = _draw(train, slice(TEACHER_IMAGES), dict.fromkeys(CLASSES, POSITIVES_PER_CLASS), rng)
    tests = _draw(test, slice(None), dict.fromkeys(CLASSES, TEST_PER_CLASS), rng)
    corpus = _corpus(train, rng)
    size = -(-len(corpus) // CORPUS_FILES)

    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    write_parquet(folder / "positives.parquet", positives, labelled=True)
    write_parquet(folder / "test.parquet", tests, labelled=True)
    contents: dict[str, list[Row]] = {"classes.txt": [], "positives.parquet": positives, "test.parquet": tests}
    for part in range(CORPUS_FILES):
        rows = corpus[part * size : (part + 1) * size]
        name = f"corpus/part-{part}.parquet"
        write_parquet(folder / name, rows, labelled=False)
        contents[name] = rows

    manifest = {
        "command": "python jobs/make_demo_data.py",
        "source": "Debian's package dataset-fashion-mnist",
        "made_with": made_with(),
        "files": {name: _entry(folder / name, rows) for name, rows in contents.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def build_full_glyphs(folder: Path) -> Path:
    """Write the glyphs that join the corpus of the run on all images; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "glyphs.parquet"
    write_parquet(path, _glyphs(FULL_GLYPHS), labelled=False)
    return path


def made_with() -> dict[str, str]:
    """What decides the exact bytes; one Pillow comes with different FreeTypes and zlibs."""
    return {
        "machine": platform.machine(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "pillow's freetype": str(features.version("freetype2")),
        "pillow's zlib": str(features.version("zlib_ng") or features.version("zlib")),
        "pyarrow": pa.__version__,
        "python's zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def read_split(source: Path, name: str) -> Split:
    """Read one half of Fashion-MNIST from its two IDX files."""
    with gzip.open(source / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(source / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return Split(name, images, labels)


def write_parquet(path: Path, rows: Iterable[Row], *, labelled: bool) -> None:
    """Write rows with their labels, or without labels but with the truth whether they are relevant."""
    images, kinds, origins = zip(*rows, strict=True)
    columns: dict[str, pa.Array] = {"image": pa.array(images, pa.binary())}
    if labelled:
        columns["label"] = pa.array([CLASSES.index(kind) for kind in kinds], pa.int64())
    else:
        columns["label"] = pa.nulls(len(kinds), pa.int64())
        columns["relevant"] = pa.array([kind in CLASSES for kind in kinds], pa.bool_())
    columns["origin"] = pa.array(origins, pa.string())
    pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP, compression="zstd", use_dictionary=False)


def _corpus(train: Split, rng: np.random.Generator) -> list[Row]:
    """Relevant photos, other photos, glyphs and unreadable entries in random order."""
    quota = dict.fromkeys(CLASSES, RELEVANT_PER_CLASS) | dict.fromkeys(OTHER_CLASSES, OTHERS_PER_CLASS)
    rows = _draw(train, slice(TEACHER_IMAGES, None), quota, rng)
    glyphs = _glyphs(GLYPHS + sum(BROKEN.values()))
    rows += glyphs[:GLYPHS]
    intact = iter(glyphs[GLYPHS:])
    for kind, count in BROKEN.items():
        for number in range(count):
            image = broken_image(kind, number, next(intact).image or b"")
            rows.append(Row(image, f"broken/{kind}", f"broken/{kind}-{number}"))
    return [rows[i] for i in rng.permutation(len(rows))]


def _draw(split: Split, part: slice, quota: Mapping[str, int], rng: np.random.Generator) -> list[Row]:
    """Random images of one part of a split, as many of each class as `quota` says, in their original order."""
    numbers = np.arange(len(split.labels))[part]
    drawn = []
    for name, count in quota.items():
        candidates = numbers[split.labels[part] == SOURCE_CLASSES.index(name)]
        drawn += rng.choice(candidates, count, replace=False).tolist()
    return [
        Row(encode_small_png(split.images[i]), SOURCE_CLASSES[split.labels[i]], f"{split.name}/{i}")
        for i in sorted(drawn)
    ]


def _glyphs(count: int) -> list[Row]:
    return [Row(png, "glyph", f"glyph/{number}") for number, png in enumerate(render_glyphs(count, seed=SEED))]


def broken_image(kind: str, number: int, png: bytes) -> bytes | None:
    """Damage a PNG in one of the ways of BROKEN; `number` keeps those apart that do not come from its bytes."""
    match kind:
        case "null":
            return None
        case "empty":
            return b""
        case "text":
            return f"404 Not Found: /images/{number}.png\n".encode()
        case "truncated":
            return png[: len(png) * 2 // 3]
        case "flipped":
            start, stop = len(png) * 2 // 5, len(png) * 3 // 5
            return png[:start] + bytes(byte ^ 0xFF for byte in png[start:stop]) + png[stop:]
        case "bomb":  # a small file that declares gigabytes of pixels
            header = struct.pack(">IIBBBBB", 60_000, 60_000 + number, 8, 0, 0, 0, 0)
            chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(60_001))), (b"IEND", b"")
            return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)
    raise ValueError(f"unknown kind of damage {kind!r}; known: {', '.join(BROKEN)}")


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _entry(path: Path, rows: list[Row]) -> dict[str, Any]:
    """What the manifest says about a file."""
    content = path.read_bytes()
    entry: dict[str, Any] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if rows:
        entry |= {"rows": len(rows), "by_kind": dict(sorted(Counter(row.kind for row in rows).items()))}
    return entry
