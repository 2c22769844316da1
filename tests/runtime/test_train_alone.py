"""One worker on a CPU trains in a task: no group of processes is started for it, and it survives its worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train

from pukd_ray.config import ResourcesConfig
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import Worker
from pukd_ray.runtime.engine import Cluster, engine
from pukd_ray.runtime.train_group import train_group


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with engine("alone") as cluster:
        yield cluster


def loop(setup: dict[str, Any]) -> dict[str, Any]:
    """Ends its process the first time that it comes to step 1, as a machine that is taken away would."""
    folder: Path = setup["folder"]
    worker = Worker.current()
    start = int((folder / "step").read_text()) if (folder / "step").exists() else 0
    for step in range(start, 2):
        if step == 1 and start == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "step").write_text(str(step + 1))
        ray.train.report({"step": step + 1})
    return {"start": start, "rank": worker.rank, "world": worker.world, "device": str(worker.device)}


def test_a_killed_training_goes_on_without_a_group(cluster: Cluster, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    report = train_group(loop, {"folder": tmp_path}, folder, "selector", ResourcesConfig(), cluster)
    assert report == {"start": 1, "rank": 0, "world": 1, "device": "cpu"}
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def fail(setup: dict[str, Any]) -> None:
    raise ValueError(f"{setup['what']} is not finite")


def test_what_the_training_raises_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loss is not finite"):
        train_group(fail, {"what": "the loss"}, RunFolder(str(tmp_path)), "selector", ResourcesConfig(), cluster)
