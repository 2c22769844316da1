"""Small files of every format."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pukd_ray.config import SourceConfig
from pukd_ray.corpus.pixels import encode_png
from pukd_ray.corpus.plan import make_units, measure
from pukd_ray.corpus.sources import list_source
from pukd_ray.corpus.units import Unit

PNG = [encode_png(np.full((1, 4, 4), i, np.uint8)) for i in range(40)]


def units_of(source: SourceConfig) -> list[Unit]:
    format_name, files, _ = list_source(source, "corpus")
    measured = [(f, measure(f, format_name, source), f.relative) for f in files]
    return make_units("corpus", 0, source, format_name, measured)


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


MEMBERS = [
    ("a/0.png", PNG[0]),
    ("a/0.cls", b"3\n"),
    ("a/1.json", json.dumps({"label": "cat", "ok": True, "kind": 4.0}).encode()),
    ("a/1.png", PNG[1]),
    ("2.png", PNG[2]),
    ("3.png", PNG[3]),
    ("2.cls", b"5"),  # not next to its image: no label
    ("4.left.png", PNG[4]),
    ("4.right.PNG", PNG[5]),
    ("4.cls", b"bird"),
    ("5.png", b""),
    ("5.json", b"{no json"),
    ("6.png", PNG[6]),
    ("6.cls", "²".encode()),
    ("3.png", PNG[7]),
    ("7.txt", b"no image"),
    ("8.png", PNG[8]),
    ("8.cls", b"-1"),
]


def write_idx(folder: Path, images: np.ndarray, labels: list[int] | None, suffix: str = "") -> Path:
    pack: Callable[[bytes], bytes] = gzip.compress if suffix else bytes
    path = folder / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(pack(struct.pack(">IIII", 0x0803, *images.shape) + images.tobytes()))
    if labels is not None:
        name = f"train-labels-idx1-ubyte{suffix}"
        (folder / name).write_bytes(pack(struct.pack(">II", 0x0801, len(labels)) + bytes(labels)))
    return path


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_jsonl(path: Path, lines: list[object]) -> Path:
    """Text stands for itself."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def every_format(folder: Path) -> dict[str, SourceConfig]:
    for name in ("parquet", "images", "tar", "idx", "cifar", "jsonl"):
        (folder / name).mkdir()
    for i in range(2):
        table = pa.table({"image": PNG[20 * i : 20 * i + 20], "key": [f"k{20 * i + j}" for j in range(20)]})
        pq.write_table(table, folder / f"parquet/{i}.parquet", row_group_size=7)
        write_tar(folder / f"tar/{i}.tar", MEMBERS[: 8 + 10 * i])
    for i, png in enumerate(PNG):
        (folder / f"images/{i:02d}.png").write_bytes(png)
    write_idx(folder / "idx", np.arange(30 * 4, dtype=np.uint8).reshape(30, 2, 2), list(range(30)))
    (folder / "cifar/b.bin").write_bytes(b"".join(bytes([i]) + bytes([i + 50]) * 3072 for i in range(9)))
    lines = [{"image": b64(png), "label": i} for i, png in enumerate(PNG[:25])]
    write_jsonl(folder / "jsonl/a.jsonl", lines[:15])
    write_jsonl(folder / "jsonl/b.jsonl", lines[15:])
    names = ("parquet", "images", "tar", "idx", "cifar", "jsonl")
    found = {name: SourceConfig(uri=str(folder / name)) for name in names}
    return found | {"ids": SourceConfig(uri=str(folder / "parquet"), id_column="key")}


def many_formats(folder: Path) -> dict[str, SourceConfig]:
    sources = every_format(folder)
    (folder / "zipped").mkdir()
    write_idx(folder / "zipped", np.arange(9 * 4, dtype=np.uint8).reshape(9, 2, 2), list(range(9)), ".gz")
    write_tar(folder / "zipped.tar.gz", MEMBERS, "w:gz")
    (folder / "lines").mkdir()
    for i in range(2):
        write_jsonl(folder / f"lines/{i}.jsonl.gz", [{"image": b64(png)} for png in PNG[: 9 + i]])
    names = ("zipped", "zipped.tar.gz", "lines")
    return sources | {name: SourceConfig(uri=str(folder / name)) for name in names}


def on_flaky(source: SourceConfig) -> SourceConfig:
    return replace(source, uri=f"flaky://{source.uri}")
