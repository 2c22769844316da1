"""The one module that knows accelerators: which device a process was assigned, its threads, its memory layout.

Everything else asks it. torch is imported where it is used: most processes of a run need none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

Convolved = TypeVar("Convolved", "nn.Module", "Tensor")

ACTOR_BATCH = 256
"""Rows that a network of a streaming pass sees at once."""


def use_threads(count: int = 1) -> None:
    """Threads of this process; Ray runs a process per core, and their threads would fight."""
    import torch

    torch.set_num_threads(count)


def spare_threads(workers: int = 1) -> int:
    """Threads of each of `workers` trainings on this process's node, one core left to Ray: threads that spin on a
    busy core cost more than they bring."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    cpus = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, (int(cpus) - 1) // workers)


def assigned_device() -> torch.device:
    """The accelerator that Ray assigned to this task or actor, else the CPU.

    By assignment, not by what the node has: a process that asked for no GPU stays off it, even where CUDA sees one.
    """
    import torch

    # Ray lets a task or actor see only the accelerators that it was given: the first one seen is its own.
    return torch.device("cuda", 0) if _has_accelerator() else torch.device("cpu")


def _has_accelerator() -> bool:
    import ray

    return bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))


def to_fastest_layout(value: Convolved) -> Convolved:
    """A network, or images [B, C, H, W], in the memory layout in which CPUs and GPUs compute convolutions fastest."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.contiguous(memory_format=torch.channels_last)
    return value.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Worker:
    """Where a process stands in a data-parallel group; the default is a group of one on the CPU."""

    rank: int = 0
    world: int = 1
    device: Any = "cpu"
    """A torch.device, or what torch takes for one."""

    @classmethod
    def current(cls) -> Worker:
        """Of this worker of Ray Train: its rank, the size of its group, the device that it was assigned."""
        import ray.train
        import torch
        from ray.train.torch import get_device

        context = ray.train.get_context()
        # A worker of Ray Train sees the GPUs of all workers of its node; `get_device` knows which is its own, but takes
        # the first of the node where it was given none.
        device = get_device() if _has_accelerator() else torch.device("cpu")
        return cls(context.get_world_rank(), context.get_world_size(), device)

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that hold a batch together; None where this process holds all of it, or no group was formed."""
        if self.world == 1:
            return None
        import torch.distributed as dist

        return dist.group.WORLD

    @property
    def mine(self) -> slice:
        """This rank's part of the rows of a global batch."""
        return slice(self.rank, None, self.world)

    @property
    def _on_cpu(self) -> bool:
        import torch

        return torch.device(self.device).type == "cpu"

    def prepare(self, network: nn.Module) -> nn.Module:
        """`network` for data-parallel training: on the device, gradients averaged over the group."""
        network = network.to(self.device)
        if self.group is None:
            return network
        import torch
        from torch.nn.parallel import DistributedDataParallel

        # Not Ray's `prepare_model`, which goes by what the node has.
        if self._on_cpu:
            return DistributedDataParallel(network)
        torch.cuda.set_device(self.device)
        return DistributedDataParallel(network, device_ids=[self.device])

    def share_batch_statistics(self, network: nn.Module) -> nn.Module:
        """BatchNorm over the global batch, where the device can (synchronised BatchNorm needs a GPU)."""
        from torch import nn

        if self.world == 1 or self._on_cpu:
            return network
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted


ALONE = Worker()
"""Not data-parallel: the whole batch, on the CPU."""
