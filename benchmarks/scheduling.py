"""What Ray costs between batches: fake accelerators fed by the real GPU path, on a cluster that is simulated.

python -m benchmarks.scheduling --actors 1 2 4 8 16 32 --seconds 1

Nodes of eight pretended GPUs each, all on this machine; a read and decode task, a call of an actor and a write task per
batch, as a pass has them where accelerators do the network. Batches are small, so that decoding them takes no time to
speak of, and long, so that this machine's cores have room for all processes. With `--requests` also the other path,
where CPUs do the network: so many read requests, a task each, and what the driver spends on one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray
from ray.cluster_utils import Cluster as SimulatedCluster

from benchmarks.corpora import make_corpus
from benchmarks.corpus_pass import PAGE, about, told
from benchmarks.fake_accelerator import FakeAccelerator, read_log
from pukd_ray.config import ResourcesConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.plan import measure_units
from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.streaming import Pass, stream
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.engine import engine, inspect_cluster
from pukd_ray.selection.committing import ChunkLedger, WriteScores

NODE = {"num_gpus": 8, "num_cpus": 4, "object_store_memory": 512 << 20}
ROWS = 64
"""Images of a batch."""
AHEAD = 4
"""Batches that Ray Data hands to an actor of two calls at a time before it has asked for them."""
TARGET = 0.9
"""Least share of the time in which an accelerator computes, at the most accelerators of a sitting."""
HEADER = (
    "| accelerators | s per batch | skipped | batches/s | computing | between batches ms | driver's CPU ms per batch | "
    "cores busy | first batches after s |"
)


@dataclass(frozen=True)
class Steady:
    """The part of a pass in which all accelerators were there, and work was left for all of them."""

    began: float
    ended: float
    batches: float
    """That ended in it, parts of some included."""
    efficiency: float
    """Share of it in which an accelerator computes."""
    overhead_ms: float
    """Time of an accelerator without work, per batch."""


def steady(log: Sequence[Sequence[tuple[float, float]]], skip: int) -> Steady:
    """Of (began, ended) of each accelerator's batches: from when all have done `skip` of them until only what had been
    handed out ahead is left. ValueError where that is no time at all."""
    if min(map(len, log)) < skip:
        raise ValueError(f"an accelerator got fewer than {skip} batches: more of them, please")
    began = max(batches[skip - 1][1] for batches in log)
    starts = sorted(start for batches in log for start, _ in batches)
    ended = starts[max(0, len(starts) - AHEAD * len(log))]
    if ended <= began:
        raise ValueError("too few batches to see any but the first and the last: more of them, please")
    parts = [
        (max(0.0, min(stop, ended) - max(start, began)), stop - start) for batches in log for start, stop in batches
    ]
    busy, count = sum(part for part, _ in parts), sum(part / whole for part, whole in parts)
    there = len(log) * (ended - began)
    return Steady(began, ended, count, busy / there, (there - busy) / count * 1000)


class Sampler(threading.Thread):
    """CPU seconds of this process, and of the whole machine, as they grow."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_asked = threading.Event()
        self._seen: list[tuple[float, float, float]] = []

    def run(self) -> None:
        """Look twice a second."""
        while not self._stop_asked.is_set():
            first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
            busy = sum(map(int, first[1:4])) / os.sysconf("SC_CLK_TCK")
            self._seen.append((time.time(), time.process_time(), busy))
            self._stop_asked.wait(0.5)

    def between(self, began: float, ended: float) -> tuple[float, float]:
        """(this process's, the machine's) CPU seconds in that time; ends the looking."""
        self._stop_asked.set()
        self.join()
        times, *columns = np.array(self._seen).T
        mine, all_ = (float(np.diff(np.interp([began, ended], times, column))[0]) for column in columns)
        return mine, all_


def one_pass(run: RunContext, requests: Sequence[ReadRequest], seconds: float, skip: int) -> dict[str, Any]:
    """A pass over `requests`, a batch each that takes `seconds`; the first `skip` of each accelerator do not count."""
    with tempfile.TemporaryDirectory() as log:
        work = Pass("score", FakeAccelerator, (seconds, log), WriteScores(run.folder, "attempts/benchmark", ()))
        ledger, sampler, started = ChunkLedger(), Sampler(), time.time()
        sampler.start()
        # Batches here are of fewer rows than a card would get.
        with mock.patch("pukd_ray.corpus.streaming.rows_per_call", return_value=ROWS):
            for part in stream(run, work, requests):
                ledger.add(part)
        found = read_log(Path(log))
    actors = run.config.resources.score_actors
    if len(found) != actors or ledger.rows.total() != ROWS * len(requests):
        raise RuntimeError(f"{len(found)} of {actors} actors worked, on {ledger.rows.total()} rows")
    window = steady(found, skip)
    driver, machine = sampler.between(window.began, window.ended)
    span = window.ended - window.began
    return {
        **asdict(window),
        "actors": actors,
        "seconds": seconds,
        "skipped": skip,
        "batches_per_second": window.batches / span,
        "driver_cpu_ms": driver / window.batches * 1000,
        "cores_busy": machine / span,
        "start": window.began - started,
        "all": time.time() - started,
    }


def many_tasks(run: RunContext, requests: Sequence[ReadRequest]) -> dict[str, Any]:
    """A pass of one task per request, nothing of which takes long."""
    with tempfile.TemporaryDirectory() as log:
        work = Pass("score", FakeAccelerator, (0.0, log), WriteScores(run.folder, "attempts/benchmark", ()))
        ledger, started, before = ChunkLedger(), time.time(), time.process_time()
        for part in stream(run, work, requests):
            ledger.add(part)
    cpu, seconds = time.process_time() - before, time.time() - started
    if ledger.rows.total() != sum(request.count for request in requests):
        raise RuntimeError(f"{ledger.rows.total()} rows came of {len(requests)} requests")
    count = len(requests)
    return {"requests": count, "driver_cpu_ms": cpu / count * 1000, "requests_per_second": count / seconds}


def requests_of(run: RunContext, count: int) -> list[ReadRequest]:
    """`count` requests of a batch; the corpus again and again."""
    pieces = [
        ReadRequest(unit, np.arange(start, start + ROWS))
        for unit in run.units
        for start in range(0, unit.rows - ROWS + 1, ROWS)
    ]
    return [pieces[i % len(pieces)] for i in range(count)]


@dataclass(frozen=True)
class DriverCost:
    """CPU ms of the driver, fitted to passes by least squares."""

    always: float
    """In any second of a pass."""
    accelerator: float
    """In any second, for each accelerator."""
    batch: float
    """For each batch."""

    @classmethod
    def of(cls, passes: Sequence[dict[str, Any]]) -> DriverCost:
        """From three passes or more, of more than one number of accelerators; of each such number those that skip
        the most batches count, since others show the start too."""
        steadiest = {p["actors"]: p["skipped"] for p in sorted(passes, key=lambda p: p["skipped"])}
        passes = [p for p in passes if p["skipped"] == steadiest[p["actors"]]]
        terms = np.array([[1.0, p["actors"], p["batches_per_second"]] for p in passes])
        if np.linalg.matrix_rank(terms) < 3:
            raise ValueError("the driver's cost takes three passes that differ in accelerators and in batches a second")
        spent = [p["driver_cpu_ms"] * p["batches_per_second"] for p in passes]
        return cls(*np.linalg.lstsq(terms, np.array(spent), rcond=None)[0].tolist())

    def batches_per_second(self, accelerators: int) -> float:
        """That fill a core of the driver, of so many together."""
        return (1000 - self.always - self.accelerator * accelerators) / self.batch

    def accelerators(self, batches_per_second: float) -> float:
        """How many that take so many batches each fill a core of the driver."""
        return (1000 - self.always) / (self.accelerator + self.batch * batches_per_second)


def page(results: dict[str, Any]) -> str:
    """The Markdown."""
    entries = sorted(results["passes"], key=lambda e: (-e["seconds"], e["actors"]))
    lines = ["# Between batches, simulated", "", told(results), ""]
    lines += [f"Made by {' and '.join(f'`{command}`' for command in results['commands'])}. {EXPLAINED}"]
    lines += ["", results["note"]] * bool(results["note"]) + ["", HEADER, "|--:" * 9 + "|"]
    lines += [
        f"| {e['actors']} | {e['seconds']:g} | {e['skipped']} | {e['batches_per_second']:.1f} | "
        f"{e['efficiency']:.2f} | {e['overhead_ms']:.0f} | {e['driver_cpu_ms']:.1f} | {e['cores_busy']:.1f} | "
        f"{e['start']:.0f} |"
        for e in entries
    ]
    try:
        cost = DriverCost.of(entries)
    except ValueError:
        pass  # too few passes so far
    else:
        lines += [
            "",
            f"Of the driver's CPU a pass takes {cost.always:.0f} ms in any second, {cost.accelerator:.1f} ms more for "
            f"each accelerator, and {cost.batch:.1f} ms for each batch: with a core of its own it is full with "
            f"{cost.accelerators(1):.0f} accelerators of a batch a second each, or {cost.accelerators(10):.0f} of ten.",
        ]
    for found in results["tasks"]:
        lines += [
            "",
            f"Where CPUs do the network a request is one task, {found['driver_cpu_ms']:.1f} ms of the driver's CPU "
            f"({found['requests']:,} requests, {found['requests_per_second']:.0f} a second).",
        ]
    return "\n".join(lines) + "\n"


EXPLAINED = (
    "Nodes of 8 pretended GPUs, all on this machine; a batch of a few small PNGs is one task that reads and decodes, "
    "one call of an actor that sleeps, one task that writes. Counted from when every accelerator has done as many "
    "batches as are *skipped* until only what was handed out ahead is left. *Computing*: share of that time in which "
    "an accelerator has a batch; *between batches*: what is lost per batch and accelerator. Cores busy: of this "
    "machine, all processes."
)


def measure(asked: argparse.Namespace, save: Any) -> None:
    """All passes on one cluster that grows; `save` gets each."""
    from benchmarks.task import Task

    corpus = make_corpus(asked.cache, "png", 8192)
    simulated = SimulatedCluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 512 << 20},
    )
    os.environ["RAY_ADDRESS"] = simulated.address
    try:
        with tempfile.TemporaryDirectory() as folder, engine("scheduling"):
            config = Task(Path(folder), corpus, "resnet18_cifar").config
            sources = {"corpus": sources_by_role(config)["corpus"]}
            units = measure_units(sources, list_inputs(sources).table, lambda _: None)
            if asked.requests:
                on_cpus = replace(config, resources=ResourcesConfig(gpus_per_actor=0))
                run = RunContext(RunFolder(folder), on_cpus, inspect_cluster(), Shared.of(b""), units)
                save(many_tasks(run, requests_of(run, asked.requests)))
            for actors in sorted(asked.actors):
                while inspect_cluster().gpus < actors:
                    simulated.add_node(**NODE)
                config = replace(config, resources=ResourcesConfig(score_actors=actors))
                run = RunContext(RunFolder(folder), config, inspect_cluster(), Shared.of(b""), units)
                for seconds in asked.seconds:
                    requests = requests_of(run, actors * asked.batches)
                    save(one_pass(run, requests, seconds, asked.skip))
    finally:
        ray.shutdown()
        simulated.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write; exit 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seconds", nargs="+", type=float, default=[1.0], help="that a batch takes")
    parser.add_argument("--batches", type=int, default=30, help="of each accelerator (%(default)s)")
    parser.add_argument("--skip", type=int, default=1, help="first batches of each that do not count (%(default)s)")
    parser.add_argument("--requests", type=int, default=0, help="of the other path (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/pukd_ray/benchmarks")
    parser.add_argument("--out", type=Path, default=PAGE / "scheduling.json", help="a page goes beside it")
    parser.add_argument("--append", action="store_true", help="go on with what is in --out")
    parser.add_argument("--note", default="", help="sentences for the page")
    asked = parser.parse_args(argv)
    before = json.loads(asked.out.read_text()) if asked.append else {"commands": [], "passes": [], "tasks": []}
    command = (
        f"python -m benchmarks.scheduling --actors {' '.join(map(str, asked.actors))} "
        f"--seconds {' '.join(f'{s:g}' for s in asked.seconds)} --batches {asked.batches} --skip {asked.skip} "
        f"--requests {asked.requests}"
    )
    results = {**before, **about(asked.note), "commands": [*before["commands"], command]}
    asked.out.parent.mkdir(parents=True, exist_ok=True)

    def save(found: dict[str, Any]) -> None:
        results["tasks" if "requests" in found else "passes"].append(found)
        print(json.dumps(found), flush=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        asked.out.with_suffix(".md").write_text(page(results))

    measure(asked, save)
    print(page(results))
    if not asked.actors:
        return
    most, longest = max(asked.actors), max(asked.seconds)
    last = [e for e in results["passes"] if (e["actors"], e["seconds"]) == (most, longest)][-1]
    if last["efficiency"] < TARGET:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
