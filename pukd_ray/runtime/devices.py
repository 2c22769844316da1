"""The one module that knows accelerators: which device a process was assigned, how it computes there, its threads.

Everything else asks it. On a CPU all of it is plain float32, batch by batch, unless bfloat16 is asked for. torch is
imported where it is used: most processes of a run need none.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

Shared = TypeVar("Shared")
Convolved = TypeVar("Convolved", "nn.Module", "Tensor")

ACTOR_BATCH = 256
"""Rows that a network of a streaming pass sees at once on a CPU."""
CALL_BYTES = 2**27
"""Pixels of a call of an actor on an accelerator, at most: several batches, so that copies run beside the computing."""
CALL_ROWS = 8192
BATCH_BYTES = 2**26  # of pixels on an accelerator; twice that is pinned
BATCH_ROWS = 2048
PROBED_ROWS = 16  # that tell what a row takes of an accelerator's memory
MEMORY_SHARE = 0.2  # of what is free, for a batch: two actors may share a device, and libraries want workspaces
CAPTURED_GAP = 0.02  # relative, of outputs and gradients: 16 bits added up in another order differ by a tenth of it
RESIDENT_SHARE = 0.5  # of what is free, for data of a training
CPU_PLANE = 2**18
"""Pixels of a plane, over all images that a network sees at once on a CPU."""
PRETENDED = "PUKD_PRETENDED_GPUS"
"""Environment variable of nodes whose GPUs are a number that Ray was told, to try a cluster's scheduling without any:
their networks compute on the CPU. Never taken for granted: a node with a broken driver must not be slow in silence."""
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
"""Environment of processes that compute on a CPU. Otherwise glibc has each activation mapped and filled with zeros
anew, which took 0.4 of the time of a ResNet-18 at 32 pixels. `jobs/runtime_env.yaml` has the same for clusters."""

Precision = Literal["auto", "bfloat16", "float16", "float32"]
"""Of networks on an accelerator. `auto`: forward passes in float16, as fast as bfloat16 and eight times closer to
float64 (docs/benchmarks/gpu.md); trainings, whose gradients want the range, in bfloat16 where the device has it, else
in float16 with scaled losses. A CPU computes in float32, or in bfloat16 where that is asked for and it can."""


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

    return bool(ray.get_runtime_context().get_accelerator_ids().get("GPU")) and PRETENDED not in os.environ


def half_type(device: torch.device, precision: Precision = "auto", *, learns: bool = False) -> torch.dtype | None:
    """The 16-bit type in which networks compute on `device`; None: float32. `learns`: in training."""
    import torch

    if precision == "float32":
        return None
    if kind_of(device) == "cpu":
        return torch.bfloat16 if precision == "bfloat16" and cpu_has_bfloat16() else None
    if precision == "auto":
        return torch.bfloat16 if learns and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if precision == "bfloat16" else torch.float16


def cpu_has_bfloat16() -> bool:
    """Whether this machine's cores compute in bfloat16: others would only imitate it, slowly."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(
    device: torch.device, precision: Precision = "auto", *, learns: bool = False
) -> AbstractContextManager[Any]:
    """Networks inside compute in `half_type`, but for what needs float32."""
    import torch

    half = half_type(device, precision, learns=learns)
    return nullcontext() if half is None else torch.autocast(torch.device(device).type, half)


def set_up(device: torch.device, precision: Precision = "auto") -> None:
    """Settings of this process for networks on `device`: the current one, the fastest convolutions for shapes that do
    not change, and of float32 all digits where it is asked for."""
    import torch

    if kind_of(device) != "cuda":
        return
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision != "float32"


def rows_per_call(on_accelerator: bool, row_bytes: int) -> int:
    """Rows that an actor of a streaming pass is handed at once."""
    if not on_accelerator:
        return ACTOR_BATCH
    return max(ACTOR_BATCH, min(CALL_ROWS, CALL_BYTES // row_bytes) // ACTOR_BATCH * ACTOR_BATCH)


def for_inference(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` on `device`, in eval mode and its fastest layout."""
    return to_fastest_layout(network.to(device).eval())


def kind_of(device: Any) -> str:
    """`cpu`, or the kind of accelerator."""
    import torch

    return str(torch.device(device).type)


def name_of(device: Any) -> str:
    """`CPU`, or what the accelerator is called."""
    import torch

    return "CPU" if kind_of(device) == "cpu" else str(torch.cuda.get_device_name(device))


def as_tensor(rows: np.ndarray | Tensor) -> Tensor:
    """`rows` as a tensor, not copied; for reading only: they may be shared memory, of which torch would warn."""
    import torch

    if isinstance(rows, torch.Tensor):
        return rows
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(rows)


def resident(rows: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """`rows` on `device` where it has room for them, else where they are: batches then travel one by one."""
    import torch

    rows = as_tensor(rows)
    if kind_of(device) == "cpu" or rows.device == torch.device(device):
        return rows
    free, _ = torch.cuda.mem_get_info(device)
    if rows.numel() * rows.element_size() > RESIDENT_SHARE * free:
        return rows
    return _copied(rows, device)


def _copied(rows: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, piece by piece: what is not pinned is copied at a fraction of the speed."""
    import torch

    there = torch.empty(rows.shape, dtype=rows.dtype, device=device)
    if not rows.numel():
        return there
    size = max(1, BATCH_BYTES * len(rows) // (rows.numel() * rows.element_size()))
    for start in range(0, len(rows), size):
        there[start : start + size].copy_(rows[start : start + size].pin_memory(), non_blocking=True)
    return there


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`; to an accelerator while the host goes on."""
    if kind_of(device) == value.device.type:
        return value
    return value.pin_memory().to(device, non_blocking=True) if value.device.type == "cpu" else value.to(device)


class BatchRunner:
    """Runs a function of batches over rows that the host has: uint8 rows [n, ...] -> columns [n, ...].

    A CPU gets all rows at once, large images in several batches. An accelerator gets batches of one size, the last
    one filled up: as large as memory allows, halved where it does not. They are copied from pinned memory while the
    one before is computed, and only their columns come back; the host meanwhile goes on to the next. Threads may share
    a runner: while one waits for its last batch, or works on what it got, another one's is computed.
    """

    def __init__(
        self,
        compute: Callable[..., Mapping[str, Tensor]],
        device: torch.device,
        batch_rows: int | None = None,
    ) -> None:
        """`compute` gets rows on the device and returns columns there; `batch_rows`, if given, is the size to start
        with."""
        self._compute, self._device = compute, device
        self._on_cpu = kind_of(device) == "cpu"
        self.batch_rows = batch_rows
        self._one_at_a_time = threading.Lock()  # hooks that watch a network would see another thread's batch
        self._of_thread = threading.local()

    def __call__(self, rows: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
        """As the class says; at least one row. `options` go to `compute`."""
        import torch

        with torch.inference_mode():
            if self._on_cpu and self.batch_rows is None:
                size = max(1, CPU_PLANE // max(1, math.prod(rows.shape[2:])))
                found = [self._compute(as_tensor(rows[i : i + size]), **options) for i in range(0, len(rows), size)]
                return {name: np.concatenate([part[name].numpy() for part in found]) for name in found[0]}
            if self.batch_rows is None:
                self.batch_rows = self._fitting_rows(rows)
            under_way: deque[Callable[[], dict[str, np.ndarray]]] = deque()
            parts: list[dict[str, np.ndarray]] = []
            start = 0
            while start < len(rows):
                size = self.batch_rows  # another thread may halve it
                try:
                    under_way.append(self._start(rows[start : start + size], size, options))
                    start += size
                    has_room = True
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    has_room = False
                if not has_room:  # not in the handler: its traceback holds the batch
                    self._halve(size)
                if len(under_way) == 2:
                    parts.append(under_way.popleft()())
            parts += [finish() for finish in under_way]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _fitting_rows(self, rows: np.ndarray) -> int:
        """The power of two that fits: few rows tell what each of them takes."""
        import torch

        limit = max(1, min(BATCH_ROWS, BATCH_BYTES // rows[0].nbytes))
        few = min(PROBED_ROWS, len(rows))
        with self._one_at_a_time:
            batch = as_tensor(np.ascontiguousarray(rows[:few])).to(self._device)
            before = torch.cuda.memory_allocated(self._device)
            for _ in range(2):  # the first tries algorithms out, some with large workspaces
                torch.cuda.reset_peak_memory_stats(self._device)
                self._compute(batch)
            each = (torch.cuda.max_memory_allocated(self._device) - before) / few
            free, _ = torch.cuda.mem_get_info(self._device)
        limit = min(limit, max(1, int(MEMORY_SHARE * free / max(each, 1))))
        return int(2 ** (limit.bit_length() - 1))

    def _halve(self, size: int) -> None:
        import torch

        self.batch_rows = min(self.batch_rows or size, size // 2)
        self._of_thread.lanes = None
        if not self._on_cpu:
            torch.cuda.empty_cache()

    def _start(self, part: np.ndarray, size: int, options: Mapping[str, Any]) -> Callable[[], dict[str, np.ndarray]]:
        """Have a batch of `size` rows computed; what is returned waits for its columns."""
        lane = self._next_lane((size, *part.shape[1:]))
        filled = lane.fill(part)
        with self._one_at_a_time:
            lane.take(self._compute(filled, **options))
        return lambda: lane.finish(len(part))

    def _next_lane(self, shape: tuple[int, ...]) -> _Lane:
        lanes = getattr(self._of_thread, "lanes", None)
        if lanes is None or lanes[0].shape != shape:
            lanes = deque(_Lane(shape, self._device) for _ in range(2))
            self._of_thread.lanes = lanes
        lanes.rotate()
        found: _Lane = lanes[0]
        return found


class _Lane:
    """Memory of one batch under way: pinned on the host, and on the device. Free again once it was finished."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        import torch

        self.shape = shape
        self._pinned = kind_of(device) != "cpu"
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._pinned)
        self._device = torch.zeros(shape, dtype=torch.uint8, device=device) if self._pinned else self._host
        self._back: dict[str, Tensor] = {}
        if self._pinned:
            self._copies = torch.cuda.Stream(device)
            self._computes = torch.cuda.current_stream(device)
            self._copies.wait_stream(self._computes)
            self._copied, self._done = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, part: np.ndarray) -> Tensor:
        """The batch on the device, its last rows what was there before: the shape must not change."""
        import torch

        self._host.numpy()[: len(part)] = part
        if self._pinned:
            with torch.cuda.stream(self._copies):
                self._device.copy_(self._host, non_blocking=True)
                self._copied.record(self._copies)
            self._computes.wait_event(self._copied)
        return self._device

    def take(self, columns: Mapping[str, Tensor]) -> None:
        """Have the columns copied back."""
        import torch

        for name, column in columns.items():
            back = self._back.get(name)
            if back is None or back.dtype != column.dtype or back.shape != column.shape:
                back = torch.empty(column.shape, dtype=column.dtype, pin_memory=self._pinned)
                self._back[name] = back
            back.copy_(column, non_blocking=True)
        if self._pinned:
            self._done.record(self._computes)

    def finish(self, rows: int) -> dict[str, np.ndarray]:
        """Wait; the columns of the first `rows`."""
        if self._pinned:
            self._done.synchronize()
        return {name: back[:rows].numpy().copy() for name, back in self._back.items()}


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
    precision: Precision = "auto"
    captures: bool = True
    """Whether `captured` captures, where it can."""

    @classmethod
    def current(cls, precision: Precision = "auto") -> Worker:
        """Of this worker of Ray Train: its rank, the size of its group, the device that it was assigned."""
        import ray.train
        import torch
        from ray.train.torch import get_device

        context = ray.train.get_context()
        # A worker of Ray Train sees the GPUs of all workers of its node; `get_device` knows which is its own, but takes
        # the first of the node where it was given none.
        device = get_device() if _has_accelerator() else torch.device("cpu")
        return cls(context.get_world_rank(), context.get_world_size(), device, precision)

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
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU."""
        return kind_of(self.device) == "cpu"

    def autocast(self, *, learns: bool) -> AbstractContextManager[Any]:
        """`autocast` on the device."""
        return autocast(self.device, self.precision, learns=learns)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps gradients within float16's range; does nothing where networks do not compute in it."""
        import torch

        half = half_type(self.device, self.precision, learns=True)
        return torch.amp.GradScaler(kind_of(self.device), enabled=half == torch.float16)

    @property
    def fused(self) -> bool | None:
        """What optimizers are told: on an accelerator, one kernel for all parameters; on a CPU their default."""
        return None if self.on_cpu else True

    def captured(self, network: nn.Module, sample: Tensor, *, learns: bool) -> Callable[[Tensor], Tensor]:
        """`network` under autocast, for inputs like `sample`: on an accelerator one launch of a CUDA graph instead of
        hundreds of kernels, for whose launches steps on small images would wait. Its result lasts until the next call.
        As it is on a CPU, in a group, and where it cannot be captured."""
        import torch

        def plain(inputs: Tensor) -> Tensor:
            with self.autocast(learns=learns):
                result: Tensor = network(inputs)
            return result

        if self.on_cpu or self.world > 1 or not self.captures:
            return plain
        half = half_type(self.device, self.precision, learns=learns)
        capture: Any = torch.cuda.make_graphed_callables if learns else _replayed

        def graph() -> Callable[[Tensor], Tensor]:
            with torch.autocast(kind_of(self.device), half, enabled=half is not None, cache_enabled=False):
                found: Callable[[Tensor], Tensor] = capture(network, (sample,))
            return found

        return tried(network, plain, graph, sample, learns=learns)

    def everyones(self, value: Shared) -> list[Shared]:
        """`value` of every rank, in their order. Every rank must call."""
        if self.world == 1:
            return [value]
        import ray
        import torch.distributed as dist

        # Through the object store: whole data sets come to a node once, and are not copied there.
        mine, told = ray.put(value), [b""] * self.world
        dist.all_gather_object(told, ray.cloudpickle.dumps(mine))  # plain pickle forgets who owns it
        values: list[Shared] = ray.get([ray.cloudpickle.loads(ref) for ref in told])
        dist.barrier()  # what a rank has put lives as long as it refers to it
        return values

    def prepare(self, network: nn.Module) -> nn.Module:
        """`network` for data-parallel training: on the device, gradients averaged over the group."""
        set_up(self.device, self.precision)
        network = network.to(self.device)
        if self.group is None:
            return network
        from torch.nn.parallel import DistributedDataParallel

        # Not Ray's `prepare_model`, which goes by what the node has.
        if self.on_cpu:
            return DistributedDataParallel(network)
        return DistributedDataParallel(network, device_ids=[self.device])

    def share_batch_statistics(self, network: nn.Module) -> nn.Module:
        """BatchNorm over the global batch, where the device can (synchronised BatchNorm needs a GPU)."""
        from torch import nn

        if self.world == 1 or self.on_cpu:
            return network
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return converted


def tried(
    network: nn.Module,
    plain: Callable[[Tensor], Tensor],
    capture: Callable[[], Callable[[Tensor], Tensor]],
    sample: Tensor,
    *,
    learns: bool,
) -> Callable[[Tensor], Tensor]:
    """What `capture` makes of `network`, if on other inputs than `sample` it gives what `plain` does, gradients
    included; else `plain`, and a warning. Buffers, such as batch statistics, are what they were."""
    import torch

    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad] if learns else []
    others = sample.flip(0)

    def answers(ask: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(learns):
            found = ask(others)
            slopes = torch.autograd.grad(found.float().square().mean(), learnt) if learns else ()
        return [torch.cat([part.detach().float().flatten() for part in parts]) for parts in ((found,), slopes) if parts]

    # In place: what was captured refers to their memory.
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        expected = answers(plain)
        chosen = capture()
        gaps = [float((a - b).norm() / b.norm()) for a, b in zip(answers(chosen), expected, strict=True)]
        if not all(gap < CAPTURED_GAP for gap in gaps):
            raise RuntimeError(f"its answers then differ by {gaps}")
    except RuntimeError as error:
        warnings.warn(f"{type(network).__name__} is not captured as a CUDA graph: {error}", stacklevel=3)
        network.__dict__.pop("forward", None)  # where torch puts the captured one
        chosen = plain
    with torch.no_grad():
        for buffer, value in zip(network.buffers(), before, strict=True):
            buffer.copy_(value)
    return chosen


def _replayed(network: nn.Module, samples: tuple[Tensor]) -> Callable[[Tensor], Tensor]:
    """`network` without gradients for inputs like `samples[0]`, captured."""
    import torch

    inputs = samples[0].clone()
    with torch.no_grad():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # algorithms are chosen, workspaces made
                network(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result: Tensor = network(inputs)

    def replay(given: Tensor) -> Tensor:
        inputs.copy_(given)
        graph.replay()
        return result

    return replay


ALONE = Worker()
"""Not data-parallel: the whole batch, on the CPU."""
