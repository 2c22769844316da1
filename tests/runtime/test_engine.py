"""What the cluster at hand allows; the clusters are made up, the rules are not."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayTaskError, UserCodeException

from pukd_ray.config import ConfigError, ResourcesConfig
from pukd_ray.errors import PlaceError, RunError
from pukd_ray.runtime.engine import (
    IO_CPUS,
    TASK_BYTES,
    Cluster,
    actor_pool,
    cause_of,
    decoder_cpus,
    decoders,
    fuses,
    gpus_of,
    gpus_per_actor,
    gpus_per_train_worker,
    inspect_cluster,
    memory_of_task,
    most_tasks,
    told_by_worker,
    wait_for_some,
)

LAPTOP = Cluster(cpus=2, gpus=0, nodes=1, autoscales=False)
FARM = Cluster(cpus=64, gpus=8, nodes=4, autoscales=False)
EMPTY_HEAD = Cluster(cpus=0, gpus=0, nodes=1, autoscales=True)
GROWN = Cluster(cpus=32, gpus=2, nodes=3, autoscales=True)


def test_gpus_go_by_the_cluster_unless_said() -> None:
    auto = ResourcesConfig()
    assert [gpus_per_actor(auto, c) for c in (LAPTOP, FARM, GROWN)] == [0, 1, 1]
    half = ResourcesConfig(gpus_per_actor=0.5)
    assert [gpus_per_actor(half, c) for c in (LAPTOP, EMPTY_HEAD)] == [0.5, 0.5]


def test_a_training_has_a_gpu_of_its_own_where_actors_share_them() -> None:
    half = ResourcesConfig(gpus_per_actor=0.5)
    assert [gpus_per_train_worker(r, FARM) for r in (ResourcesConfig(), half)] == [1, 1]
    assert gpus_per_train_worker(ResourcesConfig(gpus_per_actor=0), FARM) == 0
    assert gpus_per_train_worker(ResourcesConfig(gpus_per_train_worker=0.25), FARM) == 0.25
    assert gpus_per_train_worker(ResourcesConfig(), LAPTOP) == 0


def test_a_head_that_takes_no_work_is_waiting_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"node:__internal_head__": 1.0, "memory": 1e9}
    worker = {"CPU": 16.0, "GPU": 1.0}

    def seen(*nodes: dict[str, float], says: Any = "auto") -> Cluster:
        alive = [{"Alive": True, "Resources": node} for node in nodes]
        monkeypatch.setattr("ray.nodes", lambda: [*alive, {"Alive": False, "Resources": worker}])
        return inspect_cluster(says)

    assert seen(head) == EMPTY_HEAD
    assert seen(head, worker, worker) == Cluster(cpus=32, gpus=2, nodes=3, autoscales=True)
    assert seen(head | {"CPU": 2.0}) == LAPTOP
    # A head that works, and an autoscaler, which the config tells of; and an empty head without one.
    assert seen(head | {"CPU": 2.0}, says=True) == replace(LAPTOP, autoscales=True)
    assert seen(head, worker, says=False) == Cluster(cpus=16, gpus=1, nodes=2, autoscales=False)


def test_auto_gives_up_where_gpus_may_still_come() -> None:
    with pytest.raises(ConfigError, match=r"gpus: auto cannot tell.*set 1 to wait for GPU nodes, or 0"):
        gpus_of("gpus", "auto", EMPTY_HEAD)
    assert gpus_of("gpus", 0, EMPTY_HEAD) == 0


def sizes(resources: ResourcesConfig, cluster: Cluster, gpus: float, work: int) -> tuple[int, int]:
    pool = actor_pool(resources, cluster, gpus, work)
    return pool.min_size, pool.max_size


def test_a_pool_has_an_actor_per_gpu_but_none_without_work() -> None:
    auto = ResourcesConfig()
    assert sizes(auto, FARM, 1, 100) == (8, 8)
    assert sizes(auto, FARM, 0.5, 100) == (16, 16)
    assert sizes(auto, FARM, 1, 3) == (3, 3)


def test_all_steps_share_a_process_where_no_accelerator_is_asked_for() -> None:
    auto = ResourcesConfig()
    assert [fuses(auto, c) for c in (LAPTOP, FARM, GROWN)] == [True, False, False]
    assert [fuses(ResourcesConfig(gpus_per_actor=0), c) for c in (FARM, EMPTY_HEAD)] == [True, True]


def test_a_fused_pass_takes_no_more_than_the_config_says() -> None:
    asked = (ResourcesConfig(), ResourcesConfig(score_actors=3), ResourcesConfig(score_actors=(2, 6)))
    assert [most_tasks(a) for a in asked] == [1000, 3, 6]


def test_a_pool_grows_where_nodes_can_come() -> None:
    auto = ResourcesConfig()
    assert sizes(auto, EMPTY_HEAD, 1, 100) == (1, 100)
    assert sizes(auto, GROWN, 1, 5000) == (2, 1000)


def test_a_pool_is_as_large_as_the_config_says() -> None:
    assert sizes(ResourcesConfig(score_actors=5), FARM, 1, 2) == (5, 5)
    assert sizes(ResourcesConfig(score_actors=(2, 6)), EMPTY_HEAD, 1, 100) == (2, 6)


def test_decoding_asks_for_what_it_takes_where_there_is_room() -> None:
    assert [decoder_cpus(c) for c in (LAPTOP, FARM, EMPTY_HEAD)] == [IO_CPUS, 1.0, 1.0]
    assert [decoders(c) for c in (LAPTOP, FARM, EMPTY_HEAD)] == [2, 64, None]


def test_tasks_that_decode_ask_for_memory_but_never_for_more_than_their_cpus_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(cpus: float, cluster: Cluster, *nodes: dict[str, float]) -> dict[str, int]:
        monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        return memory_of_task(cluster, cpus)

    roomy, tight = {"CPU": 16.0, "memory": 64 * 2.0**30}, {"CPU": 16.0, "memory": 8 * 2.0**30}
    assert asked(1, FARM, roomy) == {"memory": TASK_BYTES}
    assert asked(1, FARM, roomy, tight) == {"memory": 2**29}
    assert asked(0.25, FARM, tight) == {"memory": 2**27}
    assert asked(1, GROWN, roomy) == asked(1, FARM, {"CPU": 2.0}) == asked(1, FARM) == {}


def test_a_pass_waits_for_busy_cpus_but_not_for_ever_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [([], [1, 2]), ([], [1, 2]), ([2], [1])]
    cpus = [4.0, 2.0]
    monkeypatch.setattr("ray.wait", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": cpus.pop(0)})
    assert wait_for_some([1, 2]) == ([2], [1])
    answers.append(([], [1]))
    monkeypatch.setattr("ray.cluster_resources", dict)
    with pytest.raises(RunError, match="no node with a CPU"):
        wait_for_some([1])


def test_what_a_worker_raised_is_told_in_its_own_words() -> None:
    """Through Ray Data, which wraps what a user's function raises, and keeps of it the text only."""

    def wrapped(error: Exception) -> RayTaskError:
        try:
            try:
                try:
                    raise OSError(5, "Input/output error")
                except OSError as cause:
                    raise error from cause
            except Exception as ours:
                raise UserCodeException("UDF failed to process a data block.") from ours
        except UserCodeException as seen:
            return RayTaskError("map", traceback.format_exc(), seen)

    error = wrapped(PlaceError("s3://lake/a: the storage refuses it: do this, and go on"))
    assert cause_of(error) == told_by_worker(error) == "s3://lake/a: the storage refuses it: do this, and go on"
    assert told_by_worker(wrapped(ValueError("no"))) is None
    assert told_by_worker(ValueError("pukd_ray.errors.RunError: not from a worker")) is None
