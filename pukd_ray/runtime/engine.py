"""Ray: starting or joining it, and what the cluster at hand allows. Nothing here knows about images."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import ray

from pukd_ray.config import ConfigError, ResourcesConfig
from pukd_ray.errors import RunError
from pukd_ray.runtime.devices import KEEP_MEMORY

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy, DataContext


# CPU shares are fractions so that every stage fits a cluster of one CPU; threads are set apart from them.
IO_CPUS = 0.25
CPU_ACTOR_CPUS = 0.5
NO_PROGRESS_SECONDS = 300
TASK_BYTES = 1 << 30
"""What a task takes that reads, unpacks and decodes: its libraries, a block of 32 MiB with its pixels, and one image at
the limit (512 MiB while it is decoded); what it may keep for its consumer, 64 MiB, is among these."""


@dataclass(frozen=True)
class Cluster:
    """The cluster as it is now."""

    cpus: float
    gpus: float
    nodes: int
    autoscales: bool
    """Whether nodes may come."""

    def describe(self) -> str:
        """For people."""
        text = f"{self.nodes} node{'s' * (self.nodes != 1)}, {self.cpus:g} CPUs, {self.gpus:g} GPUs"
        return text + (", autoscaling" if self.autoscales else "")


def told_by_worker(error: Exception) -> str | None:
    """The message of a RunError that a worker raised; None of other errors.

    Ray's errors carry the remote traceback as text; what wraps the error of a user's function has no other trace of it.
    """
    told = re.findall(r"^pukd_ray\.errors\.\w+: (.+)", str(error), re.MULTILINE)
    return told[-1] if told and isinstance(error, ray.exceptions.RayError) else None


def cause_of(error: Exception) -> str:
    """What went wrong, in one line; Ray's errors carry the remote traceback as text, the cause first."""
    if told := told_by_worker(error):
        return told
    if isinstance(error, RunError):
        # What a worker raised comes as Ray's error too: with a traceback for a text, and Ray's advice after the cause.
        return str(error.cause).splitlines()[0] if isinstance(error, ray.exceptions.RayTaskError) else str(error)
    lines = str(error).splitlines()
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Died)\b", line)]
    named = [line for line in named if not line.startswith("ray.exceptions")]
    if isinstance(error, ray.exceptions.RayError) and named:
        return named[0]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def engine(name: str, autoscales: Literal["auto"] | bool = "auto") -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS, or start a private one and stop it at the end; `name` is the Ray namespace,
    `autoscales` the config's `resources.autoscales`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise make every worker repeat `uv run`, environment set-up included.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    for variable, value in KEEP_MEMORY.items():
        os.environ.setdefault(variable, value)  # the processes of a private cluster have them from here
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS", "local")
        try:
            ray.init(address=address, namespace=name, log_to_driver=False, logging_level=logging.ERROR)
        except (ray.exceptions.AuthenticationError, ConnectionError) as error:
            if isinstance(error, ConnectionError) and "InvalidAuthToken" not in str(error.__cause__):
                raise
            raise RunError(
                f"RAY_ADDRESS: the cluster at {address} asks for its token: set RAY_AUTH_MODE=token, and put the token "
                "into ~/.ray/auth_token or RAY_AUTH_TOKEN (docs/cluster.md)"
            ) from error
        if address == "local":
            # Here nobody waits for nodes or for another job; elsewhere Ray's own limit holds, half an hour.
            _data_context().execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
        else:
            # The dashboard's API then tells which training each `RayTrainWorker` belongs to; Ray cannot rename them.
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    quiet()
    try:
        yield inspect_cluster(autoscales)
    finally:
        if started:
            ray.shutdown()


def quiet() -> None:
    """Ray's own progress and plan lines off."""
    context = _data_context()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    warnings.filterwarnings("ignore", message="The (maximum|minimum) number of concurrent")
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def task_attempt() -> int:
    """How often this task, or the actor that it runs on, was begun before: its process or its node died.

    0 outside of tasks. Ray counts the attempts at tasks of actors nowhere: there, all of a second life counts.
    """
    worker = ray._private.worker.global_worker
    if not worker.connected or worker.mode != ray._private.worker.WORKER_MODE:
        return 0
    if actor := ray.get_runtime_context().get_actor_id():
        return _restarts(actor)
    return int(worker.core_worker.get_current_task_attempt_number())


def _data_context() -> DataContext:
    """Ray Data's settings; imported here, since tasks that make no dataset start half a second sooner without it."""
    from ray.data import DataContext

    return DataContext.get_current()


@lru_cache(maxsize=1)
def _restarts(actor: str) -> int:
    """Of this process's actor; asked once, as this life of it is this process."""
    found = ray._private.state.actors(actor)
    return int(found.get("NumRestarts", 0)) if found else 0


def inspect_cluster(autoscales: Literal["auto"] | bool = "auto") -> Cluster:
    """Resources of all living nodes; whether more may come, if the config does not say it."""
    nodes = _living_nodes()
    cpus, gpus = (float(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if autoscales == "auto":
        # Ray 2.60 tells nobody whether there is an autoscaler; but a head that takes no work waits for others to do it.
        autoscales = any("node:__internal_head__" in node and not node.get("CPU") for node in nodes)
    return Cluster(cpus, gpus, len(nodes), autoscales)


def gpus_per_actor(resources: ResourcesConfig, cluster: Cluster) -> float:
    """GPUs of each scoring actor."""
    return gpus_of("resources.gpus_per_actor", resources.gpus_per_actor, cluster)


def gpus_per_train_worker(resources: ResourcesConfig, cluster: Cluster) -> float:
    """GPUs of each Train worker: whole ones, unless asked otherwise, also where actors share them."""
    asked = resources.gpus_per_train_worker
    if asked == "auto":
        return 1.0 if gpus_per_actor(resources, cluster) else 0.0
    return float(asked)


def gpus_of(key: str, asked: Literal["auto"] | float, cluster: Cluster) -> float:
    """What the config's `key` asks for; `auto` goes by the CLUSTER's hardware, never the driver's."""
    if asked != "auto":
        return float(asked)
    if cluster.gpus:
        return 1.0
    if cluster.autoscales:
        raise ConfigError(
            [
                f"{key}: auto cannot tell: the cluster has an autoscaler and no GPU yet; "
                "set 1 to wait for GPU nodes, or 0 to run on CPUs"
            ]
        )
    return 0.0


def fuses(resources: ResourcesConfig, cluster: Cluster) -> bool:
    """Whether all steps of a pass share a process: where the network runs on CPUs as the other steps do, nothing is won
    by sending bytes and pixels from process to process. An accelerator wants many CPUs to feed it."""
    return not gpus_per_actor(resources, cluster)


def most_tasks(resources: ResourcesConfig) -> int:
    """Most tasks of a fused pass that wait or run at a time: what `score_actors` allows, else as many as bring nodes
    where there is an autoscaler, and no more than the driver is to remember."""
    asked = resources.score_actors
    return 1000 if asked == "auto" else asked if isinstance(asked, int) else asked[1]


def wait_for_some(tasks: list[ray.ObjectRef]) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
    """(those that are done, the others), as soon as one is done.

    RunError if none is for as long as Ray Data would wait, and there is no CPU that any could run on.
    """
    limit = _data_context().execution_no_progress_timeout_s
    while True:
        done, left = ray.wait(tasks, timeout=limit if limit > 0 else None)
        if done:
            return done, left
        if not ray.cluster_resources().get("CPU"):
            raise RunError(f"no node with a CPU came in {limit:g} seconds: start again once there are nodes")


def actor_pool(resources: ResourcesConfig, cluster: Cluster, gpus: float, work: int) -> ActorPoolStrategy:
    """Pool of actors of `gpus` each; `work` is the number of read requests, more actors than that would idle."""
    from ray.data import ActorPoolStrategy

    # Two calls at a time: while one waits for the GPU, the other unpacks its rows or makes a table of what it got.
    calls: dict[str, Any] = {"max_concurrent_calls_per_actor": 2, "enable_true_multi_threading": True} if gpus else {}
    if isinstance(resources.score_actors, tuple):
        low, high = resources.score_actors
        return ActorPoolStrategy(min_size=low, max_size=high, **calls)
    if resources.score_actors != "auto":
        return ActorPoolStrategy(size=resources.score_actors, **calls)
    size = max(1, min(int(cluster.gpus / gpus), work))
    if cluster.autoscales:
        return ActorPoolStrategy(min_size=size, max_size=max(size, min(1000, work)), **calls)
    return ActorPoolStrategy(size=size, **calls)


def _living_nodes() -> list[dict[str, float]]:
    """Resources of each."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def memory_of_task(cluster: Cluster, cpus: float) -> dict[str, int]:
    """What a task of `cpus` that reads and decodes asks for beside them: `TASK_BYTES`, but no more than its CPUs' part
    of a node's memory, so that no core is idle for it. Nothing where nodes may come: of these Ray may not know the
    memory, and would wait for ever for one that has some."""
    if cluster.autoscales:
        return {}
    nodes = _living_nodes()
    parts = [node["memory"] / node["CPU"] for node in nodes if node.get("CPU") and node.get("memory")]
    return {"memory": int(min(TASK_BYTES, cpus * min(parts)))} if parts else {}


def decoder_cpus(cluster: Cluster) -> float:
    """CPU share of a task that reads and decodes: what it really takes, so that an autoscaler brings CPUs for all of
    the work; less on small clusters, where all operators of a stage must fit."""
    return 1.0 if cluster.autoscales or cluster.cpus >= 4 else IO_CPUS


def decoders(cluster: Cluster) -> int | None:
    """Most tasks that read and decode at a time: one per CPU, since each is a process to start; free to grow with
    an autoscaler."""
    return None if cluster.autoscales else max(1, int(cluster.cpus))


def actor_options(gpus: float) -> dict[str, float]:
    """Resources of one network actor."""
    return {"num_gpus": gpus, "num_cpus": CPU_ACTOR_CPUS}


def worker_resources(cpus: float, gpus: float) -> dict[str, float]:
    """Resources of one worker of a training."""
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
