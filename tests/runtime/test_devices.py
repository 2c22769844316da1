"""Devices by assignment, never by what the node has; groups of workers. What Ray would say of GPUs is faked."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import ray.train
import torch
import yaml
from torch import nn

import pukd_ray
from pukd_ray.runtime.devices import (
    ACTOR_BATCH,
    ALONE,
    KEEP_MEMORY,
    BatchRunner,
    Worker,
    assigned_device,
    half_type,
    rows_per_call,
    spare_threads,
    to_fastest_layout,
    tried,
)

PACKAGE = Path(pukd_ray.__file__).parent
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["CPU node", "GPU node"])
def gpu_node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch sees a GPU."""
    seen: bool = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(seen))
    return seen


def assign(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    """Let Ray say that this process was given these."""
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": list(gpus), "TPU": []}, get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


def of_train(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, device: torch.device) -> None:
    """Let Ray Train say this of this process; `device` is what its own `get_device` answers."""
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: device)


@pytest.mark.usefixtures("gpu_node")
def test_a_task_without_a_gpu_stays_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch)
    assert assigned_device() == CPU


@pytest.mark.usefixtures("gpu_node")
def test_a_gpu_that_is_only_pretended_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, "0")
    monkeypatch.setenv("PUKD_PRETENDED_GPUS", "1")
    assert assigned_device() == CPU


@pytest.mark.usefixtures("gpu_node")
def test_a_task_takes_the_first_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides the others: that of id 3 is the first."""
    assign(monkeypatch, "3")
    assert assigned_device() == GPU


@pytest.mark.usefixtures("gpu_node")
def test_a_worker_of_ray_train_without_a_gpu_stays_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch)
    of_train(monkeypatch, 1, 3, GPU)  # Ray's own answer there
    assert Worker.current() == Worker(1, 3, CPU)


def test_a_worker_of_ray_train_takes_its_own_of_those_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assign(monkeypatch, "2")
    of_train(monkeypatch, 2, 4, torch.device("cuda", 2))
    assert Worker.current() == Worker(2, 4, torch.device("cuda", 2))


def test_the_parts_of_a_batch_are_the_batch() -> None:
    batch = np.arange(11)
    parts = [batch[Worker(rank, 3).mine] for rank in range(3)]
    assert [part.tolist() for part in parts] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert batch[ALONE.mine].tolist() == batch.tolist()
    assert torch.arange(11)[Worker(1, 3).mine].tolist() == [1, 4, 7, 10]


@pytest.mark.usefixtures("gpu_node")
def test_a_group_of_one_exchanges_nothing() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert ALONE.group is None
    assert ALONE.prepare(network) is network
    assert ALONE.share_batch_statistics(network) is network
    assert Worker(device=torch.device("meta")).prepare(nn.Linear(1, 1)).weight.device.type == "meta"


def test_batch_statistics_are_shared_between_accelerators_only() -> None:
    def norm(worker: Worker) -> str:
        return type(worker.share_batch_statistics(nn.Sequential(nn.BatchNorm2d(2)))[0]).__name__

    assert norm(Worker(0, 2, CPU)) == "BatchNorm2d"
    assert norm(Worker(0, 2, GPU)) == "SyncBatchNorm"
    assert norm(Worker(0, 1, GPU)) == "BatchNorm2d"


def test_networks_and_images_get_the_same_layout() -> None:
    network = to_fastest_layout(nn.Conv2d(3, 4, 3))
    images = torch.rand(2, 3, 5, 5)
    laid_out = to_fastest_layout(images)
    for value in (network.weight, laid_out):
        assert value.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out, images)


@pytest.mark.parametrize(("cpus", "workers", "threads"), [(1, 1, 1), (2, 1, 1), (16, 1, 15), (16, 4, 3), (4, 8, 1)])
def test_trainings_of_a_node_share_its_cores_but_one(
    cpus: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assign(monkeypatch)
    nodes = [{"NodeID": "there", "Resources": {"CPU": 64}}, {"NodeID": "here", "Resources": {"CPU": cpus}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert spare_threads(workers) == threads


@pytest.mark.parametrize("native", [False, True])
def test_networks_compute_in_the_16_bits_that_the_card_has(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert half_type(GPU) == torch.float16
    assert half_type(GPU, learns=True) == (torch.bfloat16 if native else torch.float16)
    assert [half_type(GPU, p) for p in ("bfloat16", "float16", "float32")] == [torch.bfloat16, torch.float16, None]
    monkeypatch.setattr("pukd_ray.runtime.devices.cpu_has_bfloat16", lambda: native)
    assert [half_type(CPU, p, learns=True) for p in ("auto", "float16", "float32")] == [None] * 3
    assert half_type(CPU, "bfloat16") == (torch.bfloat16 if native else None)
    with ALONE.autocast(learns=True):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert not ALONE.scaler().is_enabled()


def test_an_actor_on_an_accelerator_is_handed_several_batches_at_once() -> None:
    assert rows_per_call(False, 3 * 224 * 224) == ACTOR_BATCH
    assert [rows_per_call(True, 3 * size**2) for size in (32, 224, 1024)] == [8192, 768, ACTOR_BATCH]


def summed(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"sum": batch.long().sum(1), "first": batch[:, 0]}


@pytest.mark.parametrize("batch_rows", [None, 1, 4, 8, 100])
def test_columns_come_back_in_order_whatever_the_batch(batch_rows: int | None) -> None:
    sizes = []

    def compute(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(batch))
        return summed(batch)

    rows = np.random.default_rng(0).integers(0, 256, (29, 5), dtype=np.uint8)
    rows.flags.writeable = False
    found = BatchRunner(compute, CPU, batch_rows)(rows)
    assert found["sum"].tolist() == rows.sum(1).tolist()
    assert found["first"].tolist() == rows[:, 0].tolist()
    assert found["first"].dtype == np.uint8
    assert set(sizes) == {batch_rows or 29}  # one shape, the last batch filled up


def test_a_batch_that_does_not_fit_is_halved() -> None:
    def compute(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(batch) > 6 or (len(batch) > 3 and int(batch[0, 0]) > 100):  # later rows are dear
            raise torch.OutOfMemoryError("CUDA out of memory")
        return summed(batch)

    rows = np.arange(200, dtype=np.uint8).repeat(2).reshape(200, 2)
    runner = BatchRunner(compute, CPU, 64)
    assert runner(rows)["first"].tolist() == rows[:, 0].tolist()
    assert runner.batch_rows == 2

    def never(_: torch.Tensor) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        BatchRunner(never, CPU, 4)(rows)


@pytest.mark.parametrize("fault", [None, "output", "gradient", "refused"])
def test_what_is_captured_is_tried_against_the_network_as_it_is(fault: str | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    sample = torch.rand(16, 4)

    def graph() -> Callable[[torch.Tensor], torch.Tensor]:
        if fault == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay(inputs: torch.Tensor) -> torch.Tensor:
            found = network[2](network[1](network[0](inputs)))
            if fault == "output":  # of the batch that it was captured with
                return network[2](network[1](network[0](sample)))
            return found.detach() * 0.5 + found * 0.5 if fault == "gradient" else found

        network.forward = replay
        return replay

    before = [buffer.clone() for buffer in network.buffers()]
    as_it_is = nn.Sequential.forward.__get__(network)
    if fault is None:
        assert tried(network, as_it_is, graph, sample, learns=True) is network.forward
    else:
        with pytest.warns(UserWarning, match="is not captured"):
            assert tried(network, as_it_is, graph, sample, learns=True) is as_it_is
        assert "forward" not in network.__dict__
    for buffer, value in zip(network.buffers(), before, strict=True):
        torch.testing.assert_close(buffer, value, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_threads_share_a_runner() -> None:
    runner = BatchRunner(summed, CPU, 4)
    tables = [np.full((30, 3), i, np.uint8) for i in range(20)]
    with ThreadPoolExecutor(4) as threads:
        for i, found in enumerate(threads.map(runner, tables)):
            assert found["sum"].tolist() == [3 * i] * 30


@pytest.mark.parametrize("word", ["cuda", "channels_last", "get_accelerator_ids", "SyncBatchNorm", "pin_memory"])
def test_no_other_module_knows_accelerators(word: str) -> None:
    modules = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in modules.items() if re.search(word, text, re.IGNORECASE)] == ["runtime/devices.py"]


def test_most_processes_need_no_torch() -> None:
    code = "import sys, pukd_ray.runtime.devices; print({'torch', 'ray'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "set()"


def test_a_cpu_takes_large_images_in_several_batches() -> None:
    taken: list[int] = []

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        taken.append(len(pixels))
        return {"mean": pixels.float().mean((1, 2, 3))}

    rows = np.random.default_rng(0).integers(0, 256, (5, 1, 512, 256), np.uint8)
    found = BatchRunner(compute, torch.device("cpu"))(rows)
    assert taken == [2, 2, 1]
    np.testing.assert_allclose(found["mean"], rows.mean((1, 2, 3)), rtol=1e-5)
    BatchRunner(compute, torch.device("cpu"))(rows[:, :, :32, :32].copy())
    assert taken[-1] == len(rows), "small ones at once"


def test_jobs_keep_memory_as_private_clusters_do() -> None:
    said = yaml.safe_load((Path(pukd_ray.__path__[0]).parent / "jobs/runtime_env.yaml").read_text())
    assert said["env_vars"] == KEEP_MEMORY
