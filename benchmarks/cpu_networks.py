"""What networks do on one core of a CPU, images/s: as torch and glibc come, with the memory of activations kept, in
the layout that convolutions like, in bfloat16 where the core has it. Markdown on standard output.

python -m benchmarks.cpu_networks
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from pukd_ray.networks.zoo import build_network
from pukd_ray.runtime.devices import (
    CPU_PLANE,
    KEEP_MEMORY,
    Precision,
    Worker,
    autocast,
    cpu_has_bfloat16,
    for_inference,
    to_fastest_layout,
    use_threads,
)

ROUNDS = 5
IMAGES = 256
NETWORKS = (
    ("lenet5", 1, 28),
    ("resnet20_cifar", 3, 32),
    ("resnet18_cifar", 3, 32),
    ("resnet18", 3, 224),
    ("resnet50", 3, 224),
    ("mobilenet_v3_small", 3, 224),
    ("vit_b_16", 3, 224),
)
STEP = "distillation step, resnet20_cifar to resnet8_cifar at 32"


@dataclass(frozen=True)
class Setting:
    """A column of the table."""

    title: str
    laid_out: bool
    precision: Precision = "float32"
    environment: dict[str, str] = field(default_factory=lambda: dict(KEEP_MEMORY))


SETTINGS = (
    Setting("as they come", laid_out=False, environment={}),
    Setting("memory kept", laid_out=False),
    Setting("channels last", laid_out=True),
    Setting("bfloat16", laid_out=True, precision="bfloat16"),
)


def rate(images: int, work: Callable[[], object]) -> float:
    """Images/s of one thread, the best of some calls after one to warm up."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return images / min(seconds)


def forward_rate(network: nn.Module, channels: int, size: int, setting: Setting) -> float:
    """Images/s of the network on as many images at once as a pass hands it."""
    cpu = torch.device("cpu")
    network = for_inference(network, cpu) if setting.laid_out else network.eval()
    pixels = torch.randn(min(IMAGES, max(1, CPU_PLANE // size**2)), channels, size, size)

    def forward() -> None:
        with torch.inference_mode(), autocast(cpu, setting.precision):
            network(pixels)

    return rate(len(pixels), forward)


def step_rate(setting: Setting) -> float:
    """Images/s of a step of distillation."""
    teacher, student = (
        build_network(arch, num_classes=10, channels=3, input_size=32) for arch in ("resnet20_cifar", "resnet8_cifar")
    )
    worker = Worker(precision=setting.precision)
    pixels = torch.randn(IMAGES, 3, 32, 32)
    if setting.laid_out:
        teacher, student, pixels = (to_fastest_layout(teacher), to_fastest_layout(student), to_fastest_layout(pixels))
    teacher.eval()
    optimizer = torch.optim.SGD(student.train().parameters(), 0.01)

    def step() -> None:
        with torch.no_grad(), worker.autocast(learns=False):
            target = teacher(pixels).float().softmax(1)
        with worker.autocast(learns=True):
            logits = student(pixels)
        optimizer.zero_grad()
        F.kl_div(F.log_softmax(logits.float(), 1), target, reduction="batchmean").backward()
        optimizer.step()

    return rate(IMAGES, step)


def measure(title: str) -> None:
    """Print, as JSON, what this process, with its environment, does under a setting."""
    use_threads()
    setting = next(s for s in SETTINGS if s.title == title)
    found = {}
    for arch, channels, size in NETWORKS:
        network = build_network(arch, num_classes=10, channels=channels, input_size=size)
        found[f"{arch} at {size}"] = forward_rate(network, channels, size, setting)
    print(json.dumps(found | {STEP: step_rate(setting)}))


def main() -> None:
    """Each setting in a process of its own, one after the other."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    settings = [s for s in SETTINGS if s.precision == "float32" or cpu_has_bfloat16()]
    columns = []
    for setting in settings:
        call = f"from benchmarks.cpu_networks import measure; measure({setting.title!r})"
        env = {**os.environ, **setting.environment}
        done = subprocess.run([sys.executable, "-c", call], env=env, check=True, stdout=subprocess.PIPE)
        columns.append(json.loads(done.stdout))
    print("| | " + " | ".join(s.title for s in settings) + " | last of second |")
    print("|---" * (2 + len(settings)) + "|")
    for what in columns[0]:
        rates = [column[what] for column in columns]
        print(f"| {what} | " + " | ".join(f"{r:,.0f}" for r in rates) + f" | {rates[-1] / rates[1]:.2f} |")


if __name__ == "__main__":
    main()
