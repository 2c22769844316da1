"""Supervised training of a teacher, for users without one: cross-entropy on labelled images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pukd_ray.config import SourceConfig, TeacherConfig, TeacherTrainingConfig
from pukd_ray.corpus.labelled import LabelError, index_sources
from pukd_ray.corpus.pixels import pixel_spec
from pukd_ray.corpus.reading import read_blocks
from pukd_ray.distillation.data import Batch, InMemory, augment, decode_labelled
from pukd_ray.distillation.training import lr_factor, moving_average
from pukd_ray.errors import RunError
from pukd_ray.networks.teacher import Normalise, begun_network, dump_state
from pukd_ray.runtime.console import remote_progress, say
from pukd_ray.runtime.devices import Worker, assigned_device, spare_threads, to_device, to_fastest_layout, use_threads
from pukd_ray.runtime.engine import Cluster, gpus_of
from pukd_ray.storage import open_storage, patiently, read_file, write_bytes

_mean = moving_average(lambda count: count / (count + 1))


def _load(role: str, sources: tuple[SourceConfig, ...], teacher: TeacherConfig) -> tuple[Batch, tuple[str, ...] | None]:
    labelled = index_sources(role, sources, teacher, say)
    blocks = (block for w in labelled.requests for block in read_blocks(w, sources[w.unit.source]))
    return decode_labelled(blocks, pixel_spec(teacher)), labelled.classes


def _steps(config: TeacherTrainingConfig, images: int) -> tuple[int, int]:
    """(those before the averaging, all)."""
    per_epoch = max(1, images // config.batch_size)
    return config.epochs * per_epoch, (config.epochs + config.swa_epochs) * per_epoch


def fit_classifier(
    config: TeacherTrainingConfig,
    examples: Batch,
    worker: Worker,
    on_step: Callable[[int, int, float], None],
    start: bytes | None = None,
) -> nn.Module:
    """Train `config.teacher` on labelled images, with cross-entropy; `on_step` gets step, steps, loss now and then.

    `start` is the content of `config.start`.
    """
    torch.manual_seed(config.seed)
    network = worker.prepare(begun_network(config.teacher.arch, config.teacher, start)).train()
    if not worker.on_cpu:
        network = to_fastest_layout(network)
    normalise = Normalise(config.teacher).to(worker.device)
    images = InMemory(examples, config.batch_size, config.seed, worker, stream=5)
    usual, steps = _steps(config, images.count)
    optimizer = torch.optim.SGD(
        network.parameters(), config.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=worker.fused
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: lr_factor("cosine", s, usual) if s < usual else config.swa_lr / config.lr
    )
    average = AveragedModel(network, multi_avg_fn=_mean, use_buffers=True) if config.swa_epochs else None
    scaler = worker.scaler()
    for step in range(steps):
        batch = images.batch(step).on(worker.device)
        x = augment(batch.pixels, config.augment, (config.seed, 6, step), config.batch_size)
        x = normalise(x)
        if step == 0:
            ask = worker.captured(network, x, learns=True)
        loss = F.cross_entropy(ask(x).float(), batch.labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if average and step >= usual:
            average.update_parameters(network)
        if step % 20 == 0 or step + 1 == steps:
            value = loss.item()
            if not math.isfinite(value):
                key, rate = ("lr", config.lr) if step < usual else ("swa_lr", config.swa_lr)
                raise RunError(f"the loss is {value} after {step + 1:,} steps: lower {key}, {rate:g} now")
            on_step(step + 1, steps, value)
    return (average.module if average else network).eval()


@torch.inference_mode()
def top1(network: nn.Module, teacher: TeacherConfig, examples: Batch, worker: Worker) -> float:
    """Accuracy on labelled images."""
    normalise = Normalise(teacher).to(worker.device)
    hits = torch.zeros((), device=worker.device)
    for pixels, labels in zip(examples.pixels.split(512), examples.labels.split(512), strict=True):
        with worker.autocast(learns=False):
            found = network(normalise(to_device(pixels, worker.device))).argmax(1)
        hits += (found == to_device(labels, worker.device)).sum()
    return float(hits) / len(examples)


@ray.remote
def _train(config: TeacherTrainingConfig, counter: Any) -> tuple[bytes, dict[str, Any]]:
    use_threads(spare_threads())
    worker = Worker(device=assigned_device(), precision=config.precision)
    examples, classes = _load("train", config.train, config.teacher)

    def tell(step: int, steps: int, loss: float) -> None:
        counter.set.remote(step, steps, "teacher", loss)

    start = None if config.start is None else read_file(config.start)
    network = fit_classifier(config, examples, worker, tell, start)
    report: dict[str, Any] = {"images": len(examples), "steps": _steps(config, len(examples))[1], "classes": classes}
    if config.test is not None:
        test, _ = _load("test", config.test, config.teacher)
        report |= {"test_images": len(test), "top1": top1(network, config.teacher, test, worker)}
    return dump_state(network.state_dict()), report


def train_teacher(config: TeacherTrainingConfig, cluster: Cluster) -> dict[str, Any]:
    """Train on the cluster (on `gpus` of its GPUs), write `teacher.weights`, return counts and test accuracy.

    Raises RunError if the loss is not finite, for labels that do not fit, and if that cannot be written.
    """
    with remote_progress("teacher") as counter:
        task = _train.options(num_cpus=1.0, num_gpus=gpus_of("gpus", config.gpus, cluster))
        try:
            state, report = ray.get(task.remote(config, counter))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LabelError | RunError):
                raise RunError(str(error.cause)) from error
            raise
    uri = config.teacher.weights
    patiently(uri, lambda: write_bytes(*open_storage(uri), state))
    return {**report, "bytes": len(state)}
