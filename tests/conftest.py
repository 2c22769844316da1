"""One small Ray cluster for all tests that need one; tests that kill or submit start their own."""

import os
from collections.abc import Iterator
from itertools import repeat

import pytest
from flaky import Flaky

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private local cluster of two CPUs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    from pukd_ray.runtime.engine import quiet

    quiet()
    yield
    ray.shutdown()


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    """Storage `flaky://` that fails as told; who waits for it does so without pauses."""
    import fsspec

    from pukd_ray import storage

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Flaky, "faults", repeat(None))
    monkeypatch.setattr(Flaky, "read", [])
    return Flaky


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks train faster, and the same everywhere, on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
