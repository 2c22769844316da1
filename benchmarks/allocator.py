"""What it costs on a CPU that glibc gives the memory of activations back: images/s without and with `KEEP_MEMORY`.

python -m benchmarks.allocator
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pukd_ray.networks.zoo import build_network
from pukd_ray.runtime.devices import CPU_PLANE, KEEP_MEMORY, use_threads

REPEATS = 5


def rate(images: int, work: Callable[[], object]) -> float:
    """Images/s of one thread, after one call to warm up."""
    work()
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return REPEATS * images / (time.perf_counter() - began)


def measure() -> None:
    """Print what this process, with its environment, can do."""
    use_threads()
    networks = {
        (arch, size): build_network(arch, num_classes=10, channels=3, input_size=size).eval()
        for arch, size in (("resnet18_cifar", 32), ("resnet18", 224), ("resnet20_cifar", 32), ("resnet8_cifar", 32))
    }
    for arch, size, images in (("resnet18_cifar", 32, 256), ("resnet18", 224, 32)):
        network, pixels = networks[arch, size], torch.randn(images, 3, size, size)
        for batch in sorted({images, min(images, CPU_PLANE // size**2)}, reverse=True):
            with torch.inference_mode():
                found = rate(images, lambda n=network, p=pixels, b=batch: [n(part) for part in p.split(b)])  # type: ignore[misc]
            print(f"{arch} at {size}, batches of {batch}: {found:,.0f} images/s", flush=True)
    teacher, student = networks["resnet20_cifar", 32], networks["resnet8_cifar", 32].train()
    optimizer, pixels = torch.optim.SGD(student.parameters(), 0.1), torch.randn(256, 3, 32, 32)

    def step() -> None:
        with torch.no_grad():
            target = teacher(pixels).softmax(1)
        loss = F.kl_div(F.log_softmax(student(pixels), 1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(f"distillation, ResNet-20 to ResNet-8, batches of 256: {rate(256, step):,.0f} images/s", flush=True)


def main() -> None:
    """Both environments, one after the other."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for title, env in (("as glibc comes", {}), ("with KEEP_MEMORY", KEEP_MEMORY)):
        print(title, flush=True)
        command = [sys.executable, "-c", "from benchmarks.allocator import measure; measure()"]
        subprocess.run(command, env={**os.environ, **env}, check=True)


if __name__ == "__main__":
    main()
