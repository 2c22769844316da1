"""What a person sees: one moving line while a stage runs, one plain line when it has ended."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tqdm import tqdm

from pukd_ray.runtime.metrics import record
from pukd_ray.storage import redact


def say(text: str) -> None:
    """One line for the user, at once."""
    tqdm.write(redact(text), file=sys.stdout)
    sys.stdout.flush()


class _Bar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """A bar that is seen by Prometheus too."""

    stage = ""

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
        file=sys.stdout,
        mininterval=0.5 if terminal else 10,
        maxinterval=10,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        leave=False,
        ascii=not terminal,
        delay=0 if terminal else 5,
        bar_format=None if terminal else "{desc} {n_fmt}/{total_fmt}{unit}  {rate_fmt}  {remaining} left\n",
    ) as bar:
        bar.stage = stage
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

    def watch() -> None:
        with progress(stage, None, unit) as bar:
            while not stop.wait(1.0):
                try:
                    state = ray.get(counter.get.remote(), timeout=5)
                except ray.exceptions.RayError:
                    continue
                if state is not None:
                    done, bar.total, network, loss = state
                    bar.set_postfix_str(f"{network} loss {loss:.4f}", refresh=False)
                    bar.update(done - bar.n)
                    record("loss", loss, network=network)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        stop.set()
        thread.join(timeout=10)
        ray.kill(counter)
