"""The table's students: each trained by one Ray task, alone, so that many can be under way at a time."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from typing import Any

import ray

from pukd_ray.config import RunConfig
from pukd_ray.corpus.context import Shared
from pukd_ray.distillation.distill import start_of
from pukd_ray.distillation.training_set import TrainingSet
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import progress, say
from pukd_ray.runtime.devices import Worker, assigned_device, name_of, use_threads
from pukd_ray.runtime.engine import CPU_ACTOR_CPUS, IO_CPUS, Cluster, cause_of, gpus_per_train_worker


@dataclass(frozen=True)
class StudentJob:
    """One student to train."""

    key: str
    """Its files are `students/<key>.*` of `folder`."""
    config: RunConfig
    """With `distill.steps` set."""
    data: TrainingSet
    folder: RunFolder
    facts: dict[str, Any]
    """Goes into its result as it is."""

    @property
    def training(self) -> str:
        """Jobs in which it is the same would train the same student: rows may differ in name only."""
        return json.dumps([self.config.output, self.facts["inputs"]], sort_keys=True)

    @property
    def streamed(self) -> bool:
        """Whether its images are too many for memory."""
        return not self.data.fits_memory(self.config)


def train_students(jobs: list[StudentJob], done: int, weights: Shared, cluster: Cluster) -> dict[str, str]:
    """Train them all, as many at a time as the cluster has room for; each is kept as soon as it is done.

    Returns {key: why} of those that failed: one must not cost the others.
    """
    failed: dict[str, str] = {}
    if not jobs:
        return failed
    gpus = gpus_per_train_worker(jobs[0].config.resources, cluster)
    start = start_of(jobs[0].config)
    # Students that stream must leave CPUs to the tasks that read for them, or all would wait for ever.
    some_stream = any(job.streamed for job in jobs) and not cluster.autoscales
    room = max(1, int(cluster.cpus // 2)) if some_stream else len(jobs)
    left = list(jobs)
    waiting: dict[ray.ObjectRef, StudentJob] = {}
    with progress("students", done + len(jobs), "students", done) as bar:
        while left or waiting:
            while left and len(waiting) < room:
                job = left.pop(0)
                task = _train_student.options(num_cpus=CPU_ACTOR_CPUS if job.streamed else 1.0, num_gpus=gpus)
                waiting[task.remote(job, weights.ref, start and start.ref)] = job
            (finished,), _ = ray.wait(list(waiting))
            job = waiting.pop(finished)
            try:
                ray.get(finished)
            except ray.exceptions.RayError as error:
                failed[job.key] = cause_of(error)
                say(f"          failed: {job.key}: {failed[job.key]}")
            bar.update(1)
    return failed


def seconds_before(resume: dict[str, Any] | None, device: str) -> float | None:
    """What the training that is gone on with has taken; None if part of it was on another device: seconds of two have
    no sum that says what the student costs."""
    if resume is None:
        return 0.0
    seconds: float | None = resume["seconds"] if resume.get("device") == device else None
    return seconds


@ray.remote(max_retries=3)
def _train_student(job: StudentJob, weights: bytes, start: bytes | None) -> None:
    """Writes the student and then its result; a retried task goes on from the last state it kept."""
    import torch

    from pukd_ray.distillation.training import (
        Distillation,
        distil,
        effective_classes,
        frozen_teacher,
        measure_classes,
    )
    from pukd_ray.networks.teacher import dump_state, load_state

    use_threads()
    began = time.monotonic()
    config, folder, settings = job.config, job.folder, job.config.distill
    worker = Worker(device=assigned_device(), precision=config.resources.precision)
    teacher, normalise = frozen_teacher(config.teacher, weights, worker)
    shard = None
    if job.streamed:
        # Several streams share the cluster: with whole CPUs they could wait for each other for ever.
        shard = job.data.stream(config, IO_CPUS).iterator()
    images = job.data.images(config, worker, shard)
    assert settings.steps is not None
    class_weights, sums = measure_classes(teacher, images, settings, config.teacher.num_classes, worker)
    state_file = f"students/{job.key}.state.pt"
    resume: Any = None
    if folder.exists(state_file):
        kept = load_state(folder.read_bytes(state_file))
        if kept.get("inputs") == job.training:  # else its settings have changed since
            resume = kept
    device = name_of(worker.device)
    before = seconds_before(resume, device)

    def spent() -> float | None:
        return None if before is None else before + time.monotonic() - began

    def save(state: dict[str, Any]) -> None:
        sink = io.BytesIO()
        torch.save({**state, "inputs": job.training, "device": device, "seconds": spent()}, sink)
        folder.write_bytes(state_file, sink.getvalue())

    run = Distillation(config, images, teacher, normalise, class_weights, settings.steps, worker, start)
    history, students = distil(run, resume, save)
    folder.write_bytes(f"students/{job.key}.pt", dump_state(students[""]))
    seconds = spent()
    result = {
        **job.facts,
        "images": images.count,
        "steps": settings.steps,
        "images_seen": settings.steps * settings.batch_size,
        "device": device,
        "seconds": None if seconds is None else round(seconds, 2),
        "class_weights": class_weights.tolist(),
        "effective_classes": effective_classes(sums.numpy()),
        "loss": history,
    }
    folder.write_json(f"students/{job.key}.json", result)
    if folder.exists(state_file):
        folder.delete(state_file)
