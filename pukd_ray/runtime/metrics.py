"""A run's figures for Prometheus and the Ray dashboard, beside Ray's own; nothing in the system reads them back.

On a node's metrics endpoint their names begin with `ray_pukd_`. The label `run` is the namespace of the Ray job, which
is the run's name, so that runs that share a cluster stay apart.
"""

from __future__ import annotations

import threading
import time
from functools import cache

import ray
from ray.util.metrics import Counter, Gauge

LABELS: dict[str, tuple[type[Gauge] | type[Counter], tuple[str, ...], str]] = {
    "stage_done": (Gauge, ("stage", "unit"), "Images, steps or other units of the stage that are done"),
    "stage_total": (Gauge, ("stage", "unit"), "All units of the stage"),
    "stage_per_second": (Gauge, ("stage", "unit"), "Units done per second, lately"),
    "stage_seconds_left": (Gauge, ("stage", "unit"), "Seconds that the stage still takes at this rate"),
    "images_scored": (Counter, (), "Corpus images that were scored"),
    "images_rejected": (Counter, ("reason",), "Corpus images that could not be read"),
    "images_selected": (Gauge, (), "Corpus images in the selection"),
    "loss": (Gauge, ("network",), "Training loss at the last step that was logged"),
    "top1": (Gauge, ("network",), "Accuracy on the test set, 0 to 1"),
}


REFRESH_SECONDS = 1.0
"""Ray forgets a gauge that was not set for two of its export intervals, which are 10 seconds by default."""

_last: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}


def record(name: str, value: float, **labels: str) -> None:
    """Set the gauge, or add to the counter, `name` of LABELS; does nothing where Ray does not run.

    A gauge keeps its value until Ray is shut down.
    """
    if not ray.is_initialized():
        return
    metric, tags = _metric(name), {"run": ray.get_runtime_context().namespace, **labels}
    if isinstance(metric, Counter):
        if value:
            metric.inc(value, tags)
        return
    metric.set(value, tags)
    _last[name, tuple(tags.items())] = value
    _refresher()


@cache
def _metric(name: str) -> Gauge | Counter:
    kind, labels, description = LABELS[name]
    return kind(f"pukd_{name}", description, ("run", *labels))


@cache
def _refresher() -> threading.Thread:
    thread = threading.Thread(target=_refresh, daemon=True)
    thread.start()
    return thread


def _refresh() -> None:
    while True:
        time.sleep(REFRESH_SECONDS)
        if not ray.is_initialized():
            _last.clear()
        for (name, tags), value in list(_last.items()):
            _metric(name).set(value, dict(tags))
