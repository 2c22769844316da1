"""The soak: one undisturbed run, then disturbed ones, each finished, compared, and told in a line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from pukd_ray.errors import RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.stages import EVERY_RUN, stages_from
from pukd_ray.soak.driver import Driver
from pukd_ray.soak.faults import FAULTS, GONE_SECONDS, Fault, Nodes, Scene
from pukd_ray.soak.task import Left, attempts, compare, manifests, write_task
from pukd_ray.soak.trouble import SITE, SWITCH

MOST_STARTS = 10
"""Of one run: whatever is done to it, it comes to its end."""
DONE = "done"
"""In place of a stage: the moment came after the run's end."""
START_SECONDS = 1.0
"""Between the lease and the first stage, about."""
FIRST_TO_TAKE_OVER = "score"
"""Runs that are struck in this stage or later begin with what the undisturbed one had before."""
SETTLED_AFTER = 3
"""Runs of a driver after which its memory is looked at: the first import and cache."""


@dataclass
class Tally:
    """What a soak has seen."""

    runs: int = 0
    images: int = 0
    lost: int = 0
    double: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    """Faults, by name."""
    stages: Counter[str] = field(default_factory=Counter)
    """Faults, by the stage they fell into."""
    starts: int = 0
    """Runs that were started again."""
    stops: Counter[str] = field(default_factory=Counter)
    """What runs that stopped by themselves said, by fault."""
    different: list[str] = field(default_factory=list)
    """What was not as in the undisturbed run."""
    seen: list[tuple[int, int]] = field(default_factory=list)
    """(bytes, open files) of the driver that lives, after each of its runs."""

    @property
    def wrong(self) -> bool:
        """Whether a run came out otherwise than the undisturbed one."""
        return bool(self.lost or self.double or self.different)

    def lines(self, minutes: float) -> list[str]:
        """For people."""

        def counted(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

        shown = [
            f"soak      {minutes:.1f} min: {self.runs} runs, {self.struck.total()} faults, {self.images:,} images, "
            f"lost {self.lost}, double {self.double}, otherwise different {len(self.different)}",
            f"faults    {counted(self.struck)}",
            f"stages    {counted(self.stages)}",
            f"restarts  {self.starts}; stopped by themselves: {counted(self.stops)}",
        ]
        if len(self.seen) > SETTLED_AFTER:
            (first, files), (last, more) = self.seen[SETTLED_AFTER - 1], self.seen[-1]
            shown.append(
                f"growth    of a driver from its run {SETTLED_AFTER} to its run {len(self.seen)}: memory "
                f"{first >> 20} to {last >> 20} MiB, open files {files} to {more}"
            )
        return [*shown, *(f"          {fault}" for fault in self.different)]


def soak(folder: Path, minutes: float, faults: int | None, seed: int) -> Tally:
    """Disturb runs for so long, or until so many faults have struck; RunError if one came out otherwise.

    `folder` is empty, and empty again afterwards but for what runs that came out otherwise have left.
    """
    began = time.monotonic()
    rng, tally = Random(seed), Tally()
    with _stage(folder) as stage:
        calm_seconds = stage.undisturbed()
        print(f"undisturbed: {sum(calm_seconds.values()):.1f} s of stages, {len(stage.calm.scores)} images", flush=True)
        kinds: list[Fault] = []
        while (time.monotonic() - began < 60 * minutes) if faults is None else tally.struck.total() < faults:
            kinds = kinds or rng.sample(FAULTS, len(FAULTS))
            stage.disturb(kinds.pop(), _where(tally, rng), rng, calm_seconds, tally)
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), GONE_SECONDS)
    if left:
        tally.different.append(f"{len(left)} processes are left: {', '.join(p.name() for p in left)}")
    print("\n".join(tally.lines((time.monotonic() - began) / 60)), flush=True)
    if tally.wrong:
        raise RunError(f"soak: not all came out as undisturbed, see above; what did not is kept in {folder}")
    return tally


def _where(tally: Tally, rng: Random) -> str:
    """A stage that has been struck least."""
    fewest = min(tally.stages[name] for name in EVERY_RUN)
    return rng.choice([name for name in EVERY_RUN if tally.stages[name] == fewest])


@contextmanager
def _stage(folder: Path) -> Iterator[_Stage]:
    """Task, cluster and drivers; all gone at the end."""
    config = write_task(folder / "task")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    before = dict(os.environ)
    paths = [str(folder / "site"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]  # a cluster to join, a job's settings
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        SWITCH: str(folder / "switch"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    made = None
    nodes = Nodes()
    try:
        made = _Stage(folder, config, nodes)
        yield made
    finally:
        for driver in made.drivers.values() if made else ():
            driver.end()
        nodes.end()
        os.environ.clear()
        os.environ |= before
        for name in ("task", "site", "calm"):
            shutil.rmtree(folder / name, ignore_errors=True)


class _Stage:
    """Where runs are disturbed."""

    calm: Left

    def __init__(self, folder: Path, config: Path, nodes: Nodes) -> None:
        self._folder, self._config, self._nodes = folder, config, nodes
        self.drivers: dict[str, Driver] = {}

    def _driver(self, role: str) -> Driver:
        """The process of a role, a new one if there is none any more."""
        found = self.drivers.get(role)
        if found is None or found.process.poll() is not None:
            joins = {} if role == "alone" else {"RAY_ADDRESS": self._nodes.address}
            found = self.drivers[role] = Driver(dict(os.environ) | joins, self._folder / "drivers.log")
        return found

    def undisturbed(self) -> dict[str, float]:
        """Make the run to compare with; seconds of its stages."""
        driver, run = self._driver("lives"), self._folder / "calm"
        driver.ask(self._config, {"output": str(run)})
        answer = driver.answer()
        if answer is None or answer["error"]:
            raise RunError(f"soak: the undisturbed run failed, see {self._folder / 'drivers.log'}: {answer}")
        self.calm = Left.of(run)
        return {name: json.loads((run / "markers" / f"{name}.json").read_text())["seconds"] for name in EVERY_RUN}

    def disturb(self, fault: Fault, stage: str, rng: Random, seconds: dict[str, float], tally: Tally) -> None:
        """Strike a run while it is in `stage`, finish it, compare it."""
        self._nodes.check()
        began, run = time.monotonic(), self._folder / f"run-{tally.runs:04d}"
        overrides = {"output": f"{fault.scheme}{run}"}
        driver = self._driver(fault.driver)
        self._begin(run, stage)
        scene = Scene(
            driver, lambda: self._driver("second"), self._nodes, self._folder / "switch", rng, self._config, overrides
        )
        driver.ask(self._config, overrides)
        _wait_for(run, stage, rng.random() * (seconds[stage] + START_SECONDS), driver)
        before, tried, at = manifests(run), attempts(run), _stage_of(run)
        if driver.answered or not fault.strike(scene):
            at = DONE
        starts, stops = self._finish(fault, overrides, tally)
        difference = compare(run, self.calm)
        faults = [*scene.faults, *difference.faults]
        after = manifests(run)
        if any(after.get(name) != manifest for name, manifest in before.items()):
            faults.append("a chunk was committed again")
        if len(tried) > 1:
            faults.append(f"{len(tried)} attempts were there at once")
        tally.runs += 1
        tally.images += difference.images
        tally.lost += difference.lost
        tally.double += difference.double
        tally.starts += starts
        tally.stops.update([fault.name] * len(stops))
        if at != DONE:
            tally.struck[fault.name] += 1
            tally.stages[at] += 1
        wrong = bool(faults or difference.lost or difference.double)
        tally.different += [f"{run.name}, {fault.name} in {at}: {text}" for text in faults]
        told = f"; stopped: {stops[-1]}" if stops else ""
        print(
            f"{run.name}  {fault.name} in {at}; {time.monotonic() - began:.1f} s, started again {starts} times, "
            f"lost {difference.lost}, double {difference.double}, {'; '.join(faults) or 'the same'}{told}",
            flush=True,
        )
        if not wrong:
            shutil.rmtree(run)

    def _begin(self, run: Path, stage: str) -> None:
        """What comes before the stage is taken over from the undisturbed run, to save time."""
        if EVERY_RUN.index(stage) < EVERY_RUN.index(FIRST_TO_TAKE_OVER):
            return
        shutil.copytree(self._folder / "calm", run, ignore=shutil.ignore_patterns("lease"))
        RunFolder(str(run)).retire(stages_from(stage))
        shutil.rmtree(run / "old")

    def _finish(self, fault: Fault, overrides: dict[str, Any], tally: Tally) -> tuple[int, list[str]]:
        """(how often the run had to be started again, what it said when it stopped by itself)."""
        stops: list[str] = []
        for starts in range(MOST_STARTS):
            if starts:
                self._driver(fault.driver).ask(self._config, overrides)
            try:
                answer = self.drivers[fault.driver].answer()
            except RuntimeError:
                self._nodes.check()  # then it hangs for that
                raise
            if answer and fault.driver == "lives":
                tally.seen.append((answer["bytes"], answer["files"]))
            if answer and not answer["error"]:
                return starts, stops
            if answer:
                stops.append(answer["error"])
        raise RunError(f"soak: a run does not come to its end: {stops or 'its driver dies'}; see {self._folder}")


def _stage_of(run: Path) -> str:
    """The first that is not done."""
    return next((name for name in EVERY_RUN if not (run / "markers" / f"{name}.json").exists()), DONE)


def _wait_for(run: Path, stage: str, seconds: float, driver: Driver) -> None:
    """Until the driver has been in the stage, or before it, for so long, or the run has ended."""
    before = EVERY_RUN[: EVERY_RUN.index(stage)]
    signs = [run / "markers" / "lease", *(run / "markers" / f"{name}.json" for name in before)]
    while not all(sign.exists() for sign in signs) and not driver.answered:
        time.sleep(0.02)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not driver.answered:
        time.sleep(0.02)
