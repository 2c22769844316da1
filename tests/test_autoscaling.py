"""From a head without workers: nodes come while a stage needs them, and go. The fake nodes are real raylets."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from heads import Head, answered, start_head
from ray.job_submission import JobStatus
from ray.util.state import list_nodes, list_tasks
from synthetic import write_config, write_task

from pukd_ray.run.stages import EVERY_RUN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ACTORS = ("ExtractFeatures", "ScoreImages", "CountCorrect")
NODE_TYPES = {"cpu": ({"CPU": 2}, 2), "gpu": ({"CPU": 2, "GPU": 1}, 2)}


@dataclass(frozen=True)
class Seen:
    """What ran at a moment."""

    second: float
    done: frozenset[str]
    """Stages."""
    cpu: int
    """Nodes of the type."""
    gpu: int


def look(head: Head, markers: Path, began: float) -> Seen:
    alive = [("state", "=", "ALIVE")]
    # Nodes that are about to go no longer answer.
    nodes: list[Any] = answered(lambda: list_nodes(head.dashboard, alive, detail=True, raise_on_missing_output=False))
    workers = [n.resources_total for n in nodes if not n.is_head_node]
    gpus = sum("GPU" in resources for resources in workers)
    done = frozenset(p.stem for p in markers.glob("*.json") if "." not in p.stem)
    return Seen(time.monotonic() - began, done, len(workers) - gpus, gpus)


def ask_for_gpus(head: Head) -> set[str]:
    """Functions and classes of tasks and actors; in a placement group the resource is called `GPU_group_...`."""
    tasks: list[Any] = answered(lambda: list_tasks(head.dashboard, detail=True, limit=10_000))
    return {t.name.removesuffix(".__init__") for t in tasks if any("GPU" in r for r in t.required_resources or {})}


def story(seen: list[Seen]) -> str:
    """What it was like after each change."""
    changed = [b for a, b in pairwise(seen) if (a.done, a.cpu, a.gpu) != (b.done, b.cpu, b.gpu)]
    return "\n".join(
        f"{s.second:4.0f} s: {s.cpu} CPU nodes, {s.gpu} GPU nodes; "
        f"done: {' '.join(x for x in EVERY_RUN if x in s.done)}"
        for s in changed
    )


def test_nodes_come_while_a_stage_needs_them_and_go(tmp_path: Path) -> None:
    config = write_task(tmp_path, images=420, files=7) | {"output_is_shared": True}
    file = write_config(tmp_path, config)
    markers = tmp_path / "run" / "markers"
    with start_head(tmp_path, 0, NODE_TYPES) as head:
        job = head.submit(f"--config {file} --resources.gpus_per_actor 1 --resources.score_actors 2")
        began = time.monotonic()
        seen = [look(head, markers, began)]
        while not head.status(job).is_terminal():
            seen.append(look(head, markers, began))
            time.sleep(1)
        assert head.status(job) == JobStatus.SUCCEEDED, head.logs(job)
        asked = ask_for_gpus(head)
        while (seen[-1].cpu or seen[-1].gpu) and seen[-1].second < 500:
            time.sleep(1)
            seen.append(look(head, markers, began))
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["cluster"]["autoscales"]
    history = story(seen)
    print("", history, sep="\n")
    assert asked == {f"MapWorker(MapBatches({actor}))" for actor in ACTORS} | {"RayTrainWorker"}

    assert (seen[0].cpu, seen[0].gpu) == (0, 0)
    # A pool of two asks for both nodes at once, and has them for the features.
    assert max(s.gpu for s in seen) == 2, history
    assert {"plan"} in [s.done for s in seen if s.gpu == 2], history
    assert max(s.cpu for s in seen) == 2, history
    # No GPU is asked for before there is a plan, none while images are selected, and none once the student is known.
    assert not [s for s in seen if s.gpu and "plan" not in s.done], history
    came = [b for a, b in pairwise(seen) if b.gpu > a.gpu]
    assert came
    assert not [s for s in came if "evaluate" in s.done or ("score" in s.done and "select" not in s.done)], history
    assert (seen[-1].cpu, seen[-1].gpu) == (0, 0), history
