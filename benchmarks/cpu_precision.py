"""What a CPU's bfloat16 does to the scores of a finished run, and to the time they take: Markdown on standard output.

python -m benchmarks.cpu_precision --run runs/demo

Images are drawn from the run's scores, fetched and decoded; teacher and selector see them on one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import spearmanr

from pukd_ray.corpus.fetch import fetch_images
from pukd_ray.corpus.pixels import decode_batch, pixel_spec
from pukd_ray.networks.selector import as_cached, load_head
from pukd_ray.networks.teacher import Teacher
from pukd_ray.preflight.loading import config_of_run
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import KEEP_MEMORY, BatchRunner, Precision, cpu_has_bfloat16, use_threads
from pukd_ray.selection.calibration import from_json
from pukd_ray.selection.chunks import score_files
from pukd_ray.storage import read_file

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
HEADER = (
    "| | float32, images/s | bfloat16 | ratio | Spearman of `pu_logit` | decisions | teacher's labels | features |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|"
)
COLUMNS = ["image", "source", "source_row"]


def draw(folder: RunFolder, count: int, seed: int) -> pa.Table:
    """`count` readable rows of the scores, at random."""
    files = score_files(folder)
    tables = [folder.read_table(file, [*COLUMNS, "error"]) for file in files]
    rows = pa.concat_tables([t.filter(t.column("error").is_null()).select(COLUMNS) for t in tables])
    order = np.random.default_rng(seed).permutation(rows.num_rows)[:count]
    return rows.take(np.sort(order))


def measure(path: str, count: int, seed: int, rounds: int) -> None:
    """Print the table of one run."""
    use_threads()
    folder = RunFolder(path)
    config = config_of_run(folder)
    spec = pixel_spec(config.teacher)
    encoded = fetch_images(folder, config, draw(folder, count, seed)).column("image").to_pylist()
    pixels = np.stack([p for p in decode_batch(encoded, spec)[0] if p is not None])
    head, _ = load_head(folder.read_bytes("selector/head.pt"))
    calibration, _ = from_json(folder.read_json("selector/calibration.json"))
    cpu = torch.device("cpu")
    weights = read_file(config.teacher.weights)
    teachers = {p: Teacher(config.teacher, weights, cpu, config.selector.grid, p) for p in PRECISIONS}

    def columns(teacher: Teacher) -> BatchRunner:
        def compute(batch: torch.Tensor) -> dict[str, torch.Tensor]:
            features, logits = teacher(batch)
            return {"z": head(as_cached(features).float()), "label": logits.argmax(1), "features": features}

        return BatchRunner(compute, cpu)

    runners = {p: columns(teacher) for p, teacher in teachers.items()}
    found, seconds = {}, {p: float("inf") for p in PRECISIONS}
    for _ in range(rounds):
        for precision, runner in runners.items():
            began = time.perf_counter()
            found[precision] = runner(pixels)
            seconds[precision] = min(seconds[precision], time.perf_counter() - began)
    exact, half = (found[p] for p in PRECISIONS)
    decisions = [calibration(f["z"]) >= 0.5 for f in (exact, half)]
    error = np.linalg.norm(half["features"] - exact["features"]) / np.linalg.norm(exact["features"])
    rates = [len(pixels) / seconds[p] for p in PRECISIONS]
    print(
        f"| {config.name}: {config.teacher.arch} at {config.teacher.input_size}, {len(pixels):,} images "
        f"| {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[1] / rates[0]:.2f} "
        f"| {spearmanr(exact['z'], half['z']).statistic:.4f} | {np.mean(decisions[0] == decisions[1]):.2%} "
        f"| {np.mean(exact['label'] == half['label']):.2%} | {error:.0e} |",
        flush=True,
    )


def main() -> None:
    """Each run in a process with the environment that Ray's have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", required=True, help="folders of runs whose stage score is done")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="the best of which counts")
    args = parser.parse_args()
    if not cpu_has_bfloat16():
        raise SystemExit("this machine's cores have no bfloat16: there is nothing to compare")
    print(f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, pyarrow {pa.__version__}\n")
    print(HEADER, flush=True)
    for run in args.run:
        told = f"measure({run!r}, {args.images}, {args.seed}, {args.rounds})"
        call = f"from benchmarks.cpu_precision import measure; {told}"
        subprocess.run([sys.executable, "-c", call], env={**os.environ, **KEEP_MEMORY}, check=True)


if __name__ == "__main__":
    main()
