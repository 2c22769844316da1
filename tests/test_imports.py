"""What a process imports is what it waits for: seconds of torch where no network is."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = {"torch", "torchvision", "sklearn", "matplotlib", "ray.train", "ray.data", "pandas"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("pukd_ray.pipeline", set()),  # a finished run ends here
        ("pukd_ray.corpus.streaming", set()),
        ("pukd_ray.selection.scoring", set()),  # unpickled by each task of the pass; torch comes with the network
        ("pukd_ray.selection.select", set()),
        ("pukd_ray.selection.tasks", {"torch", "torchvision"}),
        ("pukd_ray.distillation.worker", {"torch", "torchvision", "ray.train", "ray.data", "pandas"}),
    ],
)
def test_slow_modules_are_imported_where_they_are_used(module: str, allowed: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert SLOW & set(done.stdout.split()) <= allowed
