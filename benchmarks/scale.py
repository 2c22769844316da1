"""Does the score stage stay as fast, and as small, however many images there are? Writes JSON and Markdown.

python -m benchmarks.scale --sizes 20000 200000 1000000
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.corpora import make_corpus
from benchmarks.corpus_pass import PAGE, about, busy_seconds, run_once, sample_of, told
from benchmarks.task import NETWORKS, prepare

ALIKE = 0.9
"""Least rate of a size, of the highest one."""
GROWTH_MIB = 200
"""Of the driver, at most, from the start of the stage to its end."""
EXPLAINED = (
    "Images/s while images are worked on, median of the runs: starting Python, Ray and the networks is apart. "
    "*Driver*: memory of its own (`RssAnon`) at the start of the stage, at its end, and at most; *store*: shared "
    "memory that the object store has touched at most; *spilled*: what it wrote to disk for want of room."
)
HEADER = (
    "| images | units, chunks | images/s | of the fastest | start-up s | stage s | driver MiB: start, end, peak | "
    "workers MiB | store MiB | spilled MiB |"
)


def verdicts(entries: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """(what was found, whether it is as it should be) of all sizes together."""
    rates = [entry_rate(entry) for entry in entries]
    runs = [run["said"] for entry in entries for run in entry["runs"]]
    alike, price = min(rates) / max(rates), marginal(entries)
    growth = max(said["driver_mib"][2] - said["driver_mib"][1] for said in runs)
    spilled = sum(said["spilled_mib"] for said in runs)
    return [
        (f"the slowest size has {alike:.2f} of the rate of the fastest", alike >= ALIKE),
        (
            f"1,000 further images take the workers {' and '.join(f'{s:.3f}' for s in price)} s of CPU, size by size",
            max(price, default=1.0) * ALIKE <= min(price, default=1.0),
        ),
        (f"the driver grew by {growth:,.0f} MiB at most", growth < GROWTH_MIB),
        (f"{spilled:,.0f} MiB were spilled", spilled == 0),
    ]


def worker_cpu(entry: dict[str, Any]) -> float:
    """CPU seconds of the processes that score, in the median run."""
    return float(statistics.median(sum(v for k, v in run["cpu"].items() if "score" in k) for run in entry["runs"]))


def marginal(entries: Sequence[dict[str, Any]]) -> list[float]:
    """CPU seconds per 1,000 images that a size has more than the one before: imports, which each run pays once, fall
    out, and nearly so does other work on the machine, which takes time but little CPU."""
    return [
        (worker_cpu(large) - worker_cpu(small)) / (large["images"] - small["images"]) * 1000
        for small, large in pairwise(entries)
    ]


def entry_rate(entry: dict[str, Any]) -> float:
    """Images per second of the median run."""
    return float(statistics.median(entry["images"] / busy_seconds(run) for run in entry["runs"]))


def page(results: dict[str, Any]) -> str:
    """The Markdown."""
    entries = results["sizes"]
    best = max(map(entry_rate, entries))
    lines = ["# The same pass over more images", "", told(results), "", f"Made by `{results['command']}`. {EXPLAINED}"]
    lines += [results["note"]] * bool(results["note"]) + ["", HEADER, "|--:" * 10 + "|"]
    for entry in entries:
        runs = entry["runs"]
        middle = sorted(runs, key=busy_seconds)[len(runs) // 2]
        said, peak = middle["said"], middle["peak_mib"]
        _, start, end = said["driver_mib"]
        outside = middle["seconds"] - said["stage"]
        lines.append(
            f"| {entry['images']:,} | {said['units']:,}, {said['chunks']} | {entry_rate(entry):,.0f} | "
            f"{entry_rate(entry) / best:.2f} | {outside:.1f} | {said['stage']:.1f} | {start:,.0f}, {end:,.0f}, "
            f"{peak['driver']:,.0f} | {peak['workers']:,.0f} | {peak.get('object store', 0):,.0f} | "
            f"{said['spilled_mib']:,.0f} |"
        )
    lines += ["", *(f"- {'met' if good else '**missed**'}: {what}" for what, good in verdicts(entries))]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write; exit 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[20_000, 200_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=1, help="runs of each size, one after the other in a round")
    parser.add_argument("--network", default="lenet5", choices=NETWORKS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/pukd_ray/benchmarks")
    parser.add_argument("--out", type=Path, default=PAGE / "scale.json", help="a page goes beside it")
    parser.add_argument("--append", action="store_true", help="go on with what is in --out")
    parser.add_argument("--note", default="", help="a sentence for the page")
    asked = parser.parse_args(argv)
    results: dict[str, Any] = json.loads(asked.out.read_text()) if asked.append else {"sizes": []}
    results = {**about(asked.note), "command": _public(asked), "network": asked.network, "sizes": results["sizes"]}
    for _ in range(asked.rounds):
        for count in asked.sizes:
            corpus = make_corpus(asked.cache, "png", count)
            folder = asked.cache / f"task-{corpus.name}-{asked.network}"
            shutil.rmtree(folder, ignore_errors=True)
            run = run_once("ours", prepare(folder, corpus, asked.network, sample_of(corpus)))
            if run["said"]["images"] != count:
                raise RuntimeError(f"{run['said']['images']} of {count} images were scored")
            entry = next((e for e in results["sizes"] if e["images"] == count), None)
            if entry is None:
                entry = {"images": count, "runs": []}
                results["sizes"] = sorted([*results["sizes"], entry], key=lambda e: e["images"])
            entry["runs"].append(run)
            print(f"{count:,} images: {count / busy_seconds(run):,.0f} images/s, {run['said']}", flush=True)
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(results, indent=1) + "\n")
            asked.out.with_suffix(".md").write_text(page(results))
    print(page(results))
    if not all(good for _, good in verdicts(results["sizes"])):
        raise SystemExit(1)


def _public(asked: argparse.Namespace) -> str:
    sizes = " ".join(map(str, asked.sizes))
    return f"python -m benchmarks.scale --sizes {sizes} --network {asked.network} --rounds {asked.rounds}"


if __name__ == "__main__":
    main()
