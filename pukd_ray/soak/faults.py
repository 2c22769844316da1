"""What is done to a run, and to what it runs on. One entry adds a fault."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import psutil

from pukd_ray.errors import RunError
from pukd_ray.soak.driver import Driver
from pukd_ray.soak.trouble import PROTOCOL

GONE_SECONDS = 30.0
"""In which all that a killed driver had started must be gone."""
NO_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of workers without a task, and of agents, with which a node ends: the head's must not."""


class Nodes:
    """A cluster on this machine: a head and one more node, of a CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._node = self._cluster.add_node(num_cpus=1)
        self.address = str(self._cluster.address)

    def lose_one(self) -> None:
        """Kill a node, as a machine that is taken away; another one comes."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=1)

    def check(self) -> None:
        """RunError if the head, which no fault strikes, is gone."""
        if any(kind in ("raylet", "gcs_server") for kind, _ in self._cluster.head_node.dead_processes()):
            raise RunError(
                "soak: the head of its own cluster is gone, which no fault strikes: Ray's logs say why; where a "
                "machine is so busy that heartbeats come late leave it more of the processors, and start again"
            )

    def end(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


@dataclass
class Scene:
    """A run as it is disturbed."""

    driver: Driver
    other: Callable[[], Driver]
    """Another process that may drive."""
    nodes: Nodes
    switch: Path
    """Of `trouble.py`."""
    rng: Random
    config: Path
    overrides: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    """What is not as it should be."""


@dataclass(frozen=True)
class Fault:
    """One kind."""

    name: str
    strike: Callable[[Scene], bool]
    """Does it; whether there was anything to do it to."""
    driver: Literal["lives", "dies", "alone"]
    """Which process drives: one that lives through all, one that is killed, or one with an engine of its own."""
    scheme: str = ""
    """Of the output."""


def _kill_driver(scene: Scene) -> bool:
    scene.driver.end()
    return True


def _kill_driver_and_engine(scene: Scene) -> bool:
    me = psutil.Process(scene.driver.process.pid)
    started = [me, *me.children(recursive=True)]
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(started, GONE_SECONDS)
    if left:
        scene.faults.append(f"{len(left)} processes of a killed driver are left")
    return True


def _kill_worker(scene: Scene) -> bool:
    working = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and not title.startswith(NO_WORK):
                working.append(process)
    if not working:
        return False
    with suppress(psutil.NoSuchProcess):
        scene.rng.choice(working).kill()
    return True


def _kill_node(scene: Scene) -> bool:
    scene.nodes.lose_one()
    return True


def _storage_fails(scene: Scene) -> bool:
    scene.switch.write_text(str(errno.EIO))
    time.sleep(scene.rng.uniform(1, 5))
    scene.switch.unlink()
    return True


def _storage_refuses(scene: Scene) -> bool:
    scene.switch.write_text(str(errno.EACCES))
    until = time.monotonic() + GONE_SECONDS
    while not scene.driver.answered and time.monotonic() < until:
        time.sleep(0.05)
    scene.switch.unlink()
    return True


def _start_again(scene: Scene) -> bool:
    other = scene.other()
    other.ask(scene.config, scene.overrides)
    answer = other.answer()
    told = "" if answer is None else answer["error"] or ""
    if " is in use by process " not in told and not scene.driver.answered:
        scene.faults.append(f"a second driver was not refused: {answer}")
    return True


FAULTS = (
    Fault("driver killed", _kill_driver, "dies"),
    Fault("driver and engine killed", _kill_driver_and_engine, "alone"),
    Fault("worker killed", _kill_worker, "lives"),
    Fault("node killed", _kill_node, "lives"),
    Fault("output fails for seconds", _storage_fails, "lives", f"{PROTOCOL}://"),
    Fault("output refuses", _storage_refuses, "lives", f"{PROTOCOL}://"),
    Fault("started twice", _start_again, "lives"),
)
