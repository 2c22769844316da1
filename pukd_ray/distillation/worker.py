"""What each worker of Ray Train runs in stage `distill`: images of its rank, checkpoints, the students written."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

import ray.train
import torch

from pukd_ray.config import RunConfig
from pukd_ray.distillation.training import Distillation, distil, frozen_teacher, measure_classes, total_steps
from pukd_ray.distillation.training_set import TrainingSet
from pukd_ray.networks.teacher import dump_safetensors, dump_state, load_state
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import Worker, spare_threads, use_threads

CHECKPOINT = "student/checkpoint.pt"
"""Of an unfinished training; replaced at each."""


@dataclass(frozen=True)
class Arm:
    """One student to train: on which images."""

    name: str
    """Its file is `student/<name>.pt`."""
    data: TrainingSet
    streamed: bool = False
    """Read as the shard of that name; else loaded."""


def train_loop(setup: dict[str, Any]) -> dict[str, Any] | None:
    """Ray Train worker: for each arm load its images, weigh the classes, distil; rank 0 writes the students."""
    config: RunConfig = setup["config"]
    folder: RunFolder = setup["folder"]
    began = time.time()
    context = ray.train.get_context()
    use_threads(spare_threads(context.get_local_world_size()))
    worker = Worker.current(config.resources.precision)
    teacher, normalise = frozen_teacher(config.teacher, setup["weights"].get(), worker)
    arms: list[Arm] = setup["arms"]
    report: dict[str, Any] = {}
    start = None if setup["start"] is None else setup["start"].get()
    saved = _load_checkpoint(folder)
    for number, arm in enumerate(arms):
        if saved and number < saved["number"]:
            report[arm.name] = saved["finished"][arm.name]
            continue
        shard = ray.train.get_dataset_shard(arm.name) if arm.streamed else None
        images = arm.data.images(config, worker, shard)
        # All arms take the steps of the first: what differs is what they learn from.
        steps = report[arms[0].name]["steps"] if report else total_steps(config.distill, images.count)
        weights, sums = measure_classes(teacher, images, config.distill, config.teacher.num_classes, worker)
        run = Distillation(config, images, teacher, normalise, weights, steps, worker, start)

        def save(state: dict[str, Any], number: int = number) -> None:
            _save_checkpoint(folder, {"number": number, "finished": dict(report), **state}, worker)

        def tell(step: int, loss: float, number: int = number, steps: int = steps, name: str = arm.name) -> None:
            setup["counter"].set.remote(number * steps + step, steps * len(arms), name, loss)

        history, students = distil(run, saved if saved and number == saved["number"] else None, save, tell)
        report[arm.name] = {
            "images": images.count,
            "steps": steps,
            "class_weights": weights.tolist(),
            "class_sums": sums.tolist(),
            "history": history,
        }
        if worker.rank == 0:
            for suffix, state in students.items():
                folder.write_bytes(f"student/{arm.name}{suffix}.pt", dump_state(state))
            if arm is arms[0]:
                folder.write_bytes("student/student.safetensors", dump_safetensors(students[""], setup["about"]))
    return {"arms": report, "span": (began, time.time())} if worker.rank == 0 else None


def _save_checkpoint(folder: RunFolder, state: dict[str, Any], worker: Worker) -> None:
    """Rank 0 writes the state from which a restarted worker or group goes on; all ranks report to Ray Train."""
    if worker.rank == 0:
        data = io.BytesIO()
        torch.save(state, data)
        folder.write_bytes(CHECKPOINT, data.getvalue())
    ray.train.report({"step": state["step"], "loss": state["history"][-1][1]})


def _load_checkpoint(folder: RunFolder) -> dict[str, Any] | None:
    return dict(load_state(folder.read_bytes(CHECKPOINT))) if folder.exists(CHECKPOINT) else None
