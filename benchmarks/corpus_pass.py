"""The corpus pass against the hardware and against other systems, interleaved; writes JSON and Markdown.

python -m benchmarks.corpus_pass --images jpeg=20000 --networks lenet5 --contenders ceiling ours plain daft
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.corpora import KINDS, make_corpus, size_of
from benchmarks.meter import Cost, measure
from benchmarks.task import NETWORKS, Task, fresh, prepare

MODULES = {
    "ceiling": "benchmarks.ceiling",
    "ours": "benchmarks.ours",
    "plain": "benchmarks.plain",
    "daft": "benchmarks.with_daft",
}
WITHOUT = {("tar", "daft"): "reads no tars"}
PAGE = Path("docs/benchmarks")
EXPLAINED = (
    "Images/s: median, lowest and highest of the rounds, in which the contenders take turns. *Whole command* counts "
    "starting Python, the engine and the networks, and ending; *working* only the time in which images were worked on "
    "(ceiling, ours) or in which the engine was up (plain, daft). Only the ceiling and ours hash every image and keep "
    "the bytes of a tenth of them, and only ours says why an image is unreadable, counts, and can be resumed."
)
HEADER = (
    "| | whole command | working | whole, of the ceiling | working, of the ceiling | CPU s per 1,000 | "
    "peak MiB: driver, workers, store |"
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpora(parser, "jpeg=60000")
    parser.add_argument("--contenders", nargs="+", default=list(MODULES), choices=MODULES)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender, one after the other in a round")
    parser.add_argument("--out", type=Path, default=PAGE / "corpus_pass.json", help="a page goes beside it")
    parser.add_argument("--append", action="store_true", help="go on with what is in --out: a round now, a round later")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else the machine did")
    return parser.parse_args(argv)


def add_corpora(parser: argparse.ArgumentParser, images: str) -> None:
    """What all measurements here ask for."""
    parser.add_argument("--images", nargs="+", default=[images], help=f"KIND=COUNT, of {', '.join(KINDS)}")
    parser.add_argument("--networks", nargs="+", default=["lenet5"], choices=NETWORKS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/pukd_ray/benchmarks")
    parser.add_argument("--seed", type=int, default=0)


def sizes_asked(asked: argparse.Namespace) -> list[tuple[str, int]]:
    """(kind, images) of each corpus."""
    return [(kind, int(count)) for kind, _, count in (text.partition("=") for text in asked.images)]


def sample_of(corpus: Path) -> list[bytes]:
    """Some encoded images."""
    from benchmarks.ceiling import batches

    return next(batches(min(corpus.iterdir())))


def run_once(contender: str, task: Task) -> dict[str, Any]:
    """One measured run, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory(dir=task.folder.parent) as scratch:
        own = fresh(task, Path(scratch) / "run")
        command = [sys.executable, "-m", MODULES[contender], str(own.folder), str(own.corpus), own.network]
        load = os.getloadavg()[0]
        cost: Cost = measure(command)
    return {"load_before": load, **asdict(cost)}


def compare(entry: dict[str, Any], asked: argparse.Namespace, save: Callable[[], None]) -> None:
    """Add rounds to `entry`, a corpus and a network and what earlier rounds cost; `save` is called after each run."""
    kind, count, network, runs = (entry[name] for name in ("kind", "images", "network", "runs"))
    corpus = make_corpus(asked.cache, kind, count, asked.seed)
    entry["bytes"] = size_of(corpus)
    folder = asked.cache / f"task-{corpus.name}-{network}"
    shutil.rmtree(folder, ignore_errors=True)
    task = prepare(folder, corpus, network, sample_of(corpus))
    for file in corpus.rglob("*"):  # once from the disk, so that all contenders find it in memory
        if file.is_file():
            file.read_bytes()
    contenders = [c for c in asked.contenders if (kind, c) not in WITHOUT]
    for round_ in range(asked.rounds):
        shift = round_ % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            run = run_once(contender, task)
            if run["said"]["images"] != count:
                raise RuntimeError(f"{contender} scored {run['said']['images']} of {count} images")
            runs.setdefault(contender, []).append(run)
            print(f"{kind} {network} {contender}: {count / run['seconds']:,.0f} images/s, {run['said']}", flush=True)
            save()


def busy_seconds(run: dict[str, Any]) -> float:
    """Seconds without the start: those in which images were worked on, or all after the engine was up."""
    said = run["said"]
    return float(said.get("computing", said.get("stage")))


def rate(runs: list[dict[str, Any]], images: int, *, start: bool) -> list[float]:
    """Images per second of each run, over the whole command or without its start."""
    return [images / (run["seconds"] if start else busy_seconds(run)) for run in runs]


def spread(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def page(results: dict[str, Any]) -> str:
    """The Markdown of all comparisons."""
    lines = [
        "# The corpus pass, measured",
        "",
        told(results),
        "",
        f"{EXPLAINED} {results['note']}",
    ]
    for entry in results["comparisons"]:
        if "ceiling" not in entry["runs"]:  # nothing to compare with yet
            continue
        lines += [
            "",
            f"## {entry['kind']}, {entry['network']}",
            "",
            f"{entry['images']:,} images, {entry['bytes'] / entry['images'] / 1000:.1f} kB each; `{entry['command']}`.",
            _load_of(entry),
            "",
            HEADER,
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        top = {s: statistics.median(rate(entry["runs"]["ceiling"], entry["images"], start=s)) for s in (True, False)}
        for contender, runs in entry["runs"].items():
            whole, working = (rate(runs, entry["images"], start=s) for s in (True, False))
            cpu = statistics.median(sum(r["cpu"].values()) for r in runs) / entry["images"] * 1000
            peak = [max(r["peak_mib"].get(k, 0) for r in runs) for k in ("driver", "workers", "object store")]
            lines.append(
                f"| {contender} | {spread(whole)} | {spread(working)} | {statistics.median(whole) / top[True]:.2f} | "
                f"{statistics.median(working) / top[False]:.2f} | {cpu:.2f} | {', '.join(f'{p:,.0f}' for p in peak)} |"
            )
        lines += ["", "CPU seconds per 1,000 images by process, of the median run:", ""]
        for contender, runs in entry["runs"].items():
            middle = sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]
            parts = sorted(middle["cpu"].items(), key=lambda kv: -kv[1])[:6]
            shown = ", ".join(f"{name} {value / entry['images'] * 1000:.2f}" for name, value in parts)
            lines.append(f"- {contender}: {shown}")
    return "\n".join(lines) + "\n"


def _load_of(entry: dict[str, Any]) -> str:
    loads = [run["load_before"] for runs in entry["runs"].values() for run in runs if "load_before" in run]
    return f"Load average before the runs: {min(loads):.1f} to {max(loads):.1f}." if loads else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def about(note: str) -> dict[str, Any]:
    """When, on what and with which versions something was measured, and a sentence to it."""
    packages = ("ray", "torch", "torchvision", "pyarrow", "numpy", "pillow", "daft")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "note": note,
    }


def told(results: dict[str, Any]) -> str:
    """The same for people."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    machine = f"{results['cpus']} cores ({results['cpu']})"
    return f"{results['date']}, {machine}, Python {results['python']}, {versions}."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    asked = arguments(argv)
    results: dict[str, Any] = {
        **about(asked.note),
        "comparisons": json.loads(asked.out.read_text())["comparisons"] if asked.append else [],
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = results["comparisons"]

    def save() -> None:
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        asked.out.with_suffix(".md").write_text(page(results))

    for kind, count in sizes_asked(asked):
        for network in asked.networks:
            this: dict[str, Any] = {"kind": kind, "images": count, "network": network}
            entry = next((e for e in entries if this.items() <= e.items()), None)
            if entry is None:
                entry = {**this, "runs": {}}
                entries.append(entry)
            entry["command"] = "python -m benchmarks.corpus_pass " + " ".join(_public(asked, kind, count, network))
            compare(entry, asked, save)
    print(page(results))


def _public(asked: argparse.Namespace, kind: str, count: int, network: str) -> list[str]:
    return [
        *("--images", f"{kind}={count}", "--networks", network, "--contenders", *asked.contenders),
        *("--rounds", str(asked.rounds), "--seed", str(asked.seed)),
    ]


if __name__ == "__main__":
    main()
