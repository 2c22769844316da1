"""Is `pukd estimate` right? An estimate of 10,000 images, then the run itself, part by part; writes JSON and Markdown.

python -m benchmarks.estimated --images 10000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.corpus_pass import PAGE, about, told
from pukd_ray.cli import DEMO_CONFIG
from pukd_ray.corpus.pixels import PixelSpec, decode_batch
from pukd_ray.demo.glyphs import encode_small_png

TARGET = 0.25
"""Of the real run's seconds, how far the estimate may be off."""
ROWS_PER_FILE = 1000


def make_lake(folder: Path, images: int) -> None:
    """A corpus of `images` for the demo's teacher: the demo's own, then the same mirrored, then turned over. What is
    unreadable there stays as it is."""
    demo = pa.concat_tables(pq.read_table(file) for file in sorted((DEMO_CONFIG.parent / "corpus").glob("*.parquet")))
    rows = list(zip(demo["image"].to_pylist(), demo["relevant"].to_pylist(), strict=True))
    pixels, _ = decode_batch([image for image, _ in rows], PixelSpec(28, 1, "crop"))
    if images > 3 * len(rows):
        raise ValueError(f"--images: {3 * len(rows):,} at most")
    folder.mkdir(parents=True)
    found = [
        (image if array is None or (up, left) == (1, 1) else encode_small_png(array[0, ::up, ::left].copy()), relevant)
        for up, left in [(1, 1), (1, -1), (-1, 1)]
        for (image, relevant), array in zip(rows, pixels, strict=True)
    ][:images]
    for start in range(0, images, ROWS_PER_FILE):
        image, relevant = zip(*found[start : start + ROWS_PER_FILE], strict=True)
        table = pa.table({"image": pa.array(image, pa.binary()), "relevant": pa.array(relevant, pa.bool_())})
        pq.write_table(table, folder / f"part-{start // ROWS_PER_FILE:03d}.parquet")


def compare(folder: Path, images: int) -> dict[str, Any]:
    """Estimate a run on `images`, then make it; both as users do, in processes of their own."""
    make_lake(folder / "lake", images)
    arguments = ["--corpus.uri", str(folder / "lake"), "--output", str(folder / "run")]
    for command in ("estimate", "run"):
        began = os.times().elapsed
        subprocess.run([sys.executable, "-m", "pukd_ray", command, *arguments], check=True)
        print(f"pukd {command}: {os.times().elapsed - began:.1f} s, load average {os.getloadavg()[0]:.1f}", flush=True)
    estimated = json.loads((folder / "run/estimate.json").read_text())
    real = dict(json.loads((folder / "run/metrics.json").read_text())["seconds"])
    counts = json.loads((folder / "run/markers/selector.json").read_text())["counts"]
    del real["selector"]
    return {
        "images": images,
        "estimated": estimated["seconds"],
        "interval": estimated["interval"],
        "real": {**counts["seconds"], **real},
    }


def off(found: Mapping[str, Any]) -> float:
    """How far the estimate of all parts together is off, relative to the real run; below 0: too short."""
    return float(sum(found["estimated"].values()) / sum(found["real"].values()) - 1)


def table(found: Mapping[str, Any]) -> list[str]:
    """Markdown, part by part."""
    estimated, real = found["estimated"], found["real"]
    lines = ["| | estimated s | real s |", "|---|--:|--:|"]
    lines += [f"| {part} | {estimated[part]:.1f} | {real[part]:.1f} |" for part in estimated]
    lines.append(f"| in all | **{sum(estimated.values()):.1f}** | **{sum(real.values()):.1f}** |")
    low, high = found["interval"]
    held = "is in it" if low <= sum(real.values()) <= high else "is not"
    return [*lines, "", f"{off(found):+.0%}. The interval was {low:.0f} to {high:.0f} s: the real run {held}."]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, write; exit 1 where the estimate is off by more than `TARGET`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="of the corpus (%(default)s)")
    parser.add_argument("--out", type=Path, default=PAGE / "estimated.json", help="a page goes beside it")
    parser.add_argument("--note", default="", help="a sentence for the page")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = {**about(asked.note), **compare(Path(folder), asked.images)}
    lines = ["# An estimate against the run", "", told(results), ""]
    made = (
        f"Made by `python -m benchmarks.estimated --images {asked.images}`, the demo's configuration on another corpus."
    )
    lines += [f"{made} {results['note']}".rstrip(), "", *table(results)]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    asked.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if abs(off(results)) > TARGET:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
