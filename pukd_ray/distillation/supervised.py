"""Supervised training of a teacher, for users without one: cross-entropy on labelled images."""

from __future__ import annotations

from typing import Any

import ray
import torch
import torch.nn.functional as F

from pukd_ray.config import SourceConfig, TeacherConfig, TeacherTrainingConfig
from pukd_ray.corpus.labelled import LabelError, index_sources
from pukd_ray.corpus.pixels import pixel_spec
from pukd_ray.corpus.reading import read_blocks
from pukd_ray.distillation.data import augment, decode_labelled
from pukd_ray.distillation.training import lr_factor
from pukd_ray.errors import RunError
from pukd_ray.networks.teacher import Normalise, dump_state, new_network
from pukd_ray.runtime.batches import EndlessOrder
from pukd_ray.runtime.console import remote_progress, say
from pukd_ray.runtime.devices import assigned_device, spare_threads, use_threads
from pukd_ray.runtime.engine import Cluster, gpus_of
from pukd_ray.storage import open_storage, write_bytes


def _load(
    role: str, sources: tuple[SourceConfig, ...], teacher: TeacherConfig
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...] | None]:
    labelled = index_sources(role, sources, teacher, say)
    blocks = (block for w in labelled.requests for block in read_blocks(w, sources[w.unit.source]))
    images = decode_labelled(blocks, pixel_spec(teacher))
    return images.pixels, images.labels, labelled.classes


@ray.remote
def _train(config: TeacherTrainingConfig, counter: Any) -> tuple[bytes, dict[str, Any]]:
    use_threads(spare_threads())
    device = assigned_device()
    pixels, labels, classes = _load("train", config.train, config.teacher)
    torch.manual_seed(config.seed)
    network = new_network(config.teacher.arch, config.teacher).to(device).train()
    normalise = Normalise(config.teacher).to(device)
    steps = config.epochs * max(1, len(pixels) // config.batch_size)
    optimizer = torch.optim.SGD(network.parameters(), config.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor("cosine", s, steps))
    order = EndlessOrder(len(pixels), config.batch_size, config.seed, 5)
    for step in range(steps):
        rows = torch.from_numpy(order.batch(step))
        x = augment(pixels[rows], config.augment, (config.seed, 6, step), config.batch_size)
        loss = F.cross_entropy(network(normalise(x.to(device))), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step + 1 == steps:
            counter.set.remote(step + 1, steps, "teacher", loss.item())
    network.eval()
    report: dict[str, Any] = {"images": len(pixels), "steps": steps, "classes": classes}
    if config.test is not None:
        test, test_labels, _ = _load("test", config.test, config.teacher)
        with torch.inference_mode():
            hits = [
                (network(normalise(x.to(device))).argmax(1).cpu() == y)
                for x, y in zip(test.split(512), test_labels.split(512), strict=True)
            ]
        report |= {"test_images": len(test), "top1": float(torch.cat(hits).float().mean())}
    return dump_state(network.state_dict()), report


def train_teacher(config: TeacherTrainingConfig, cluster: Cluster) -> dict[str, Any]:
    """Train on the cluster (on `gpus` of its GPUs), write `teacher.weights`, return counts and test accuracy."""
    with remote_progress("teacher") as counter:
        task = _train.options(num_cpus=1.0, num_gpus=gpus_of("gpus", config.gpus, cluster))
        try:
            state, report = ray.get(task.remote(config, counter))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LabelError):
                raise RunError(str(error.cause)) from error
            raise
    write_bytes(*open_storage(config.teacher.weights), state)
    return {**report, "bytes": len(state)}
