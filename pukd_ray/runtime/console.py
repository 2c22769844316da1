"""What a person sees: one moving line while a stage runs, one plain line when it has ended."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import ray
from tqdm import tqdm

from pukd_ray.run.ahead import duration
from pukd_ray.run.records import DoingRecord
from pukd_ray.runtime.colour import coloured
from pukd_ray.runtime.metrics import record
from pukd_ray.storage import redact


def say(text: str) -> None:
    """One line for the user, at once."""
    tqdm.write(coloured(redact(text), sys.stdout), file=sys.stdout)
    sys.stdout.flush()


@dataclass
class Now:
    """What this driver is at: a stage, and the last of its bars."""

    stage: str = ""
    began: float = 0.0
    """Of `time.monotonic`, as all times here."""
    expected: float | None = None
    """Seconds that the stage takes by the estimate; None without."""
    later: float | None = None
    """Those of the stages after it."""
    bar: _Bar | None = None

    def seconds_left(self) -> float | None:
        """Of the stage: at the rate of its bar so far, or else by the estimate."""
        bar, elapsed = self.bar, time.monotonic() - self.began
        # A bar of another name is of a part of the stage: it says nothing of the others.
        if bar is not None and bar.stage == self.stage and bar.total and bar.n > bar.initial:
            return (time.monotonic() - bar.began) * (bar.total - bar.n) / (bar.n - bar.initial)
        return None if self.expected is None else max(0.0, self.expected - elapsed)

    def seconds_left_in_all(self) -> float | None:
        """Of this stage and those after it; None without an estimate."""
        left = self.seconds_left()
        return None if left is None or self.later is None else left + self.later

    def record(self) -> DoingRecord | None:
        """For those who look from elsewhere; None between runs."""
        if not self.stage:
            return None
        bar, left, in_all = self.bar, self.seconds_left(), self.seconds_left_in_all()
        return {
            "stage": self.stage,
            "seconds": round(time.monotonic() - self.began, 1),
            "part": "" if bar is None else bar.stage,  # a bar without a total is neither true nor false
            "done": 0.0 if bar is None else float(bar.n),
            "total": None if bar is None or bar.total is None else float(bar.total),
            "unit": "" if bar is None else bar.unit.strip(),
            "seconds_left": left if left is None else round(left, 1),
            "seconds_left_in_all": in_all if in_all is None else round(in_all, 1),
        }


_now = Now()


@contextmanager
def at_stage(stage: str, expected: float | None, later: float | None) -> Iterator[None]:
    """While the body runs a stage; `expected` and `later` as of `Now`."""
    global _now
    _now = Now(stage, time.monotonic(), expected, later)
    try:
        yield
    finally:
        _now = Now()


def doing() -> DoingRecord | None:
    """What this driver is at; None between stages."""
    return _now.record()


class _Log:
    """A stream that is no terminal, to which a bar writes lines: tqdm would move the cursor, and blank lines out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


class _Bar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """A bar that is seen by Prometheus too, and by the run's lease."""

    stage = ""
    began = 0.0

    @property
    def format_dict(self) -> Any:
        left = _now.seconds_left_in_all() if _now.stage else None
        return {**super().format_dict, "in_all": "" if left is None else f", {duration(left)} in all"}

    def __str__(self) -> str:
        return re.sub(r"s/ (\w+?)s?\b", r" s/\1", super().__str__())  # tqdm's own: 2.30s/ folds

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        figures = self.format_dict
        labels = {"stage": self.stage, "unit": self.unit.strip()}
        record("stage_done", self.n, **labels)
        rate = figures["rate"] or (self.n - self.initial) / max(figures["elapsed"], 1e-9)
        record("stage_per_second", rate, **labels)
        if self.total is not None:
            record("stage_total", self.total, **labels)
            if rate:
                record("stage_seconds_left", (self.total - self.n) / rate, **labels)
        return shown


@contextmanager
def progress(stage: str, total: int | None, unit: str, done: int = 0) -> Iterator[tqdm[Any]]:
    """Count, rate and time left; moves in place on a terminal, a line every ten seconds in a log."""
    terminal = sys.stdout.isatty()
    with _Bar(
        total=total,
        initial=done,
        desc=f"{stage:<9}",
        unit=f" {unit}",
        file=sys.stdout if terminal else _Log(sys.stdout),
        mininterval=0.5 if terminal else 10,
        maxinterval=10,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        leave=False,
        ascii=not terminal,
        delay=0 if terminal else 5,
        bar_format="{l_bar}{bar}{r_bar}{in_all}"
        if terminal
        else "{desc} {n_fmt}/{total_fmt}{unit}  {rate_fmt}  {remaining} left{in_all}",
    ) as bar:
        bar.stage, bar.began = stage, time.monotonic()
        _now.bar = bar
        yield bar


@ray.remote(num_cpus=0)
class StepCounter:
    """Holds how far remote training has come; workers write, the driver reads."""

    def __init__(self) -> None:
        self._state: tuple[int, int, str, float] | None = None

    def set(self, done: int, total: int, network: str, loss: float) -> None:
        """Called by rank 0 every few steps."""
        self._state = (done, total, network, loss)

    def get(self) -> tuple[int, int, str, float] | None:
        """(steps done, all steps, what is trained, its loss), or None if not begun."""
        return self._state


@contextmanager
def remote_progress(stage: str, unit: str = "steps") -> Iterator[Any]:
    """Show a `StepCounter` while the body waits for remote work; yields the actor handle for the workers."""
    counter = StepCounter.remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def look(bar: Any) -> None:
        try:
            state = ray.get(counter.get.remote(), timeout=5)
        except ray.exceptions.RayError:
            return
        if state is not None:
            done, bar.total, network, loss = state
            bar.set_postfix_str(f"{network} loss {loss:.4f}", refresh=False)
            bar.update(done - bar.n)
            record("loss", loss, network=network)

    def watch() -> None:
        with progress(stage, None, unit) as bar:
            while not stop.wait(1.0):
                look(bar)
            look(bar)  # a training may be over before the first look, and is after the last

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        stop.set()
        thread.join(timeout=10)
        ray.kill(counter)
