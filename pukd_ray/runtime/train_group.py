"""Ray Train as both trainings of a run use it: a group of workers, of which the first returns a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

from pukd_ray.config import ResourcesConfig
from pukd_ray.errors import PlaceError, RunError
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.engine import Cluster, gpus_per_train_worker, worker_resources

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.train.v2.api.exceptions import WorkerGroupError

MAX_FAILURES = 3
_PROGRAM = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, TypeError, ValueError),
    RunError,
)


def train_group(
    loop: Callable[[dict[str, Any]], dict[str, Any] | None],
    setup: dict[str, Any],
    folder: RunFolder,
    stage: str,
    resources: ResourcesConfig,
    cluster: Cluster,
    cpus: float = 1.0,
    datasets: dict[str, Dataset] | None = None,
) -> dict[str, Any]:
    """Run `loop(setup)` in each of `resources.train_workers` workers of `cpus` CPUs and their GPUs.

    If that is [min, max], the group has as many as there is room for. It is started again, from its last checkpoint,
    when it has lost one, or when Ray Train sees room for more, for which it looks once a minute: the loop must take its
    part from the size that its group has now.

    Ray Train keeps its own files and checkpoints under `<stage>/train-<stage>` of the run; its metrics and the
    dashboard's API (`/api/train/v2/runs/v1`) use that name. A group that loses a worker, or cannot reach its storage,
    is started again from its last checkpoint, up to three times; one whose program fails would do so again, and is not.
    One worker on a CPU is a task: six processes need not start for it.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    gpus = gpus_per_train_worker(resources, cluster)
    workers = resources.train_workers

    def alone() -> Any:
        return ray.get(_train_alone.options(num_cpus=cpus, name=f"train-{stage}").remote(loop, setup))

    def group() -> Any:
        trainer = TorchTrainer(
            loop,
            train_loop_config=setup,
            # A group of one exchanges nothing, so it does without NCCL, which costs time and memory of the GPU.
            torch_config=TorchConfig(backend="gloo" if workers == 1 else None),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker=worker_resources(cpus, gpus),
            ),
            run_config=ray.train.RunConfig(
                name=f"train-{stage}",
                storage_path=folder.path(stage),
                storage_filesystem=folder.fs,
            ),
            datasets=datasets,
        )
        return trainer.fit().return_value

    train = alone if workers == 1 and not gpus and not datasets else group
    failures = 0
    while True:
        try:
            report: dict[str, Any] = train()
            return report
        except (WorkerGroupError, PlaceError) as error:
            failures += 1
            if failures > MAX_FAILURES or not _may_pass(error):
                raise


@ray.remote(max_retries=MAX_FAILURES)
def _train_alone(loop: Callable[[dict[str, Any]], dict[str, Any] | None], setup: dict[str, Any]) -> Any:
    """The loop in Ray Train's local mode, in a process that may have run other tasks, its imports done."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(loop, train_loop_config=setup, scaling_config=ScalingConfig(num_workers=0))
    return trainer.fit().return_value


def _may_pass(error: WorkerGroupError | PlaceError) -> bool:
    """Whether the system failed, and not the program in one of the workers; others fail of that one's end."""
    if isinstance(error, PlaceError):
        return True
    faults = [getattr(fault, "_base_exc", fault) for fault in error.worker_failures.values()]
    return not any(isinstance(fault, _PROGRAM) and not isinstance(fault, PlaceError) for fault in faults)
