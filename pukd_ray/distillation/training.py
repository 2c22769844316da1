"""Robust knowledge distillation in plain torch: class weights, views, the training loop.

Nothing here needs Ray; `worker.py` runs it in the workers of Ray Train, the paper's table in tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pukd_ray.config import DistillConfig, RunConfig, TeacherConfig
from pukd_ray.distillation.data import Batch, Images, InMemory, augment
from pukd_ray.distillation.loss import NOT_FINITE, rkd_objective
from pukd_ray.distillation.weights import class_weights
from pukd_ray.networks.teacher import Normalise, all_finite, begun_network, load_network
from pukd_ray.runtime.devices import Worker, half_type, set_up, to_device, to_fastest_layout

SMOOTHING = 1e-3  # of the class sums: a class that the teacher never sees gets a large weight, not an infinite one
CLIP = (0.1, 10.0)  # of the class weights, before they are rescaled
WARM_UP = 0.05  # share of the steps in which the learning rate rises
CHECKPOINTS = 5  # parts that a training is cut into; a state is handed over between them
LOG_POINTS = 200  # losses that are kept, about


def total_steps(config: DistillConfig, images: int) -> int:
    """Steps of the training: `steps`, or `epochs` passes over whole batches."""
    return config.steps or config.epochs * max(1, images // config.batch_size)


def lr_factor(schedule: str, step: int, steps: int) -> float:
    """Multiple of the peak learning rate at `step` (from 0)."""
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(0.1 ** sum(step >= steps * q for q in (0.25, 0.5, 0.75)))
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def frozen_teacher(config: TeacherConfig, weights: bytes, worker: Worker) -> tuple[nn.Module, nn.Module]:
    """(teacher, its normalisation), both from uint8 or float pixels of 0 to 255 [b, C, H, W] on the worker's device."""
    set_up(worker.device, worker.precision)
    normalise = Normalise(config).to(worker.device)
    network = load_network(config.arch, config, weights, worker.device, what="teacher.weights")
    return nn.Sequential(normalise, network).eval().requires_grad_(False), normalise


def shows_as_is(settings: DistillConfig) -> bool:
    """Whether every step shows an image in the same view."""
    return settings.augment == "none" and not settings.mixup


@torch.no_grad()
def within_range(logits: Tensor, teacher: nn.Module, pixels: Tensor, worker: Worker) -> Tensor:
    """The teacher's `logits` [b, K] of `pixels` [b, C, H, W] as float32; rows that are not finite, in it once more."""
    logits = logits.float()
    if half_type(worker.device, worker.precision) == torch.float16:  # others end where float32 does: nothing waits
        beyond = ~all_finite(logits)
        if beyond.any():
            logits[beyond] = teacher(pixels[beyond]).float()
    return logits


@torch.no_grad()
def measure_classes(
    teacher: nn.Module, images: Images, settings: DistillConfig, classes: int, worker: Worker
) -> tuple[Tensor, Tensor]:
    """(weights [K], class sums [K]), float64 on the host, from the teacher on all images, eval view.

    Where P has a share of the batches it has that share of the sums too: they say what the student will see.
    Images in memory that the training shows as they are keep the teacher's logits, so it is asked only once.
    """
    kinds = torch.zeros(2, classes + 1, dtype=torch.float64, device=worker.device)  # selected, P: class sums, images
    cache = images if isinstance(images, InMemory) and shows_as_is(settings) else None
    seen: list[Tensor] = []
    for batch in images.all_batches():
        pixels = to_device(batch.pixels, worker.device)
        with worker.autocast(learns=False):
            logits = teacher(pixels)
        logits = within_range(logits, teacher, pixels, worker)
        if cache:
            seen.append(logits)
        mass = logits.double().softmax(1)
        if settings.class_weights == "hard":
            mass = F.one_hot(logits.argmax(1), classes).double()
        labelled = to_device((batch.labels >= 0).long(), worker.device)
        kinds.index_add_(0, labelled, torch.cat([mass, torch.ones_like(mass[:, :1])], 1))
    if cache:
        whole = seen[0].new_zeros(cache.count, classes)
        whole[worker.mine] = torch.cat(seen)
        if worker.world > 1:
            dist.all_reduce(whole)
        cache.cache_teacher_logits(whole)
    if worker.world > 1:
        dist.all_reduce(kinds)
    sums, counts = kinds.cpu().split([classes, 1], dim=1)
    if settings.positive_share is not None and counts.all():
        shares = sums.new_tensor([[1 - settings.positive_share], [settings.positive_share]])
        sums = sums * shares * images.count / counts
    sums = sums.sum(0)
    if settings.class_weights == "none":
        return torch.ones(classes, dtype=torch.float64), sums
    weights = class_weights(sums, smoothing=SMOOTHING, clip=CLIP)
    if settings.normalise == "mean_weight":
        weights = weights * sums.sum() / (weights * sums).sum()
    return weights, sums


@dataclass(frozen=True)
class Distillation:
    """One student's training."""

    config: RunConfig
    images: Images
    teacher: nn.Module
    """uint8 or float pixels of 0 to 255 -> logits."""
    normalise: nn.Module
    class_weights: Tensor
    """[K], before the adversary moves them."""
    steps: int
    worker: Worker
    start: bytes | None = None
    """Content of the file `student.start`."""


def view(run: Distillation, step: int) -> tuple[Tensor, list[tuple[Tensor, Batch]]]:
    """(pixels [b, C, H, W] of a step, [(share [b], batch)] of what they show), all on the worker's device: one batch,
    or two that are mixed.

    Random numbers are those of the global batch, so that they do not depend on the number of ranks.
    """
    settings, seed, worker = run.config.distill, run.config.seed, run.worker
    batch = run.images.batch(step).on(worker.device)
    pixels = augment(batch.pixels, settings.augment, (seed, 4, step), settings.batch_size, worker)
    if not settings.mixup:
        return pixels, [(torch.ones(len(batch), device=worker.device), batch)]
    other = run.images.mixup_partners(step, batch).on(worker.device)
    drawn = np.random.default_rng([seed, 7, step]).beta(settings.mixup, settings.mixup, settings.batch_size)
    share = to_device(torch.from_numpy(drawn[worker.mine][: len(batch)]).float(), worker.device)
    each = share[:, None, None, None]
    mixed_in = augment(other.pixels, settings.augment, (seed, 8, step), settings.batch_size, worker)
    return each * pixels + (1 - each) * mixed_in, [(share, batch), (1 - share, other)]


def seed_step(seed: int, step: int, worker: Worker) -> None:
    """Seed what a network draws by itself in a step, as dropout does: by the step, so that a resumed training draws
    what the whole one did, and by the rank, so that each draws its own."""
    mixed = int(np.random.SeedSequence([seed, 13, step, worker.rank]).generate_state(1, np.uint64)[0])
    if worker.on_cpu:  # torch.manual_seed tells all kinds of devices, which takes a hundred times longer
        torch.default_generator.manual_seed(mixed)
    else:
        torch.manual_seed(mixed)


def label_loss(logits: Tensor, shown: list[tuple[Tensor, Batch]]) -> Tensor:
    """Sum over the batch of the cross-entropy on P's labels, each by its share of the image; others count 0."""
    total = logits.new_zeros(())
    for share, batch in shown:
        each = F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="none")
        total = total + (share * each).sum()
    return total


def distil(
    run: Distillation,
    resume: dict[str, Any] | None = None,
    on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[list[tuple[int, float]], dict[str, dict[str, Tensor]]]:
    """Train a student: (losses at steps, state_dicts by suffix of their file, "" the student).

    `on_checkpoint` gets a state to `resume` from a few times; `on_step` the step and its loss, now and then, on rank 0.
    """
    config, settings, worker, steps = run.config, run.config.distill, run.worker, run.steps
    torch.manual_seed(config.seed)
    student = begun_network(config.student.arch, config.teacher, run.start)
    model = worker.prepare(to_fastest_layout(worker.share_batch_statistics(student)))
    bare = getattr(model, "module", model)
    average = (
        AveragedModel(bare, multi_avg_fn=moving_average(partial(_keeps, settings.ema)), use_buffers=True)
        if settings.ema
        else None
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=worker.fused,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(settings.schedule, s, steps))
    scaler = worker.scaler()
    parts = {"student": bare, "optimizer": optimizer, "scheduler": scheduler}
    if scaler.is_enabled():
        parts["scaler"] = scaler
    if average:
        parts["average"] = average
    history: list[tuple[int, float]] = []
    start = 0
    if resume:
        for name, part in parts.items():
            part.load_state_dict(resume[name])
        start, history = resume["step"], resume["history"]
    base = run.class_weights.to(worker.device)
    noise = torch.rand(1, len(base), dtype=torch.float64, generator=torch.Generator().manual_seed(config.seed))
    draws = torch.cat([base[None], base + settings.epsilon * noise.to(worker.device)])
    model.train()
    log_every = max(1, steps // LOG_POINTS)
    save_every = -(-steps // CHECKPOINTS)
    for step in range(start, steps):
        pixels, shown = view(run, step)
        target = run.images.teacher_logits(step) if shows_as_is(settings) else None
        images = to_fastest_layout(run.normalise(pixels))
        if step == start:
            ask_teacher = worker.captured(run.teacher, pixels, learns=False) if target is None else run.teacher
            ask_student = worker.captured(model, images, learns=True)
        if target is None:
            with torch.no_grad():
                target = ask_teacher(pixels)  # the same view as the student's
            target = within_range(target, run.teacher, pixels, worker)
        seed_step(config.seed, step, worker)  # after the capture, which draws too
        target, logits = target.float(), ask_student(images).float()
        weights = None
        if settings.sample_weights == "pu_probability":
            weights = torch.stack([share * batch.weights for share, batch in shown]).sum(0)
        value, objective, _ = rkd_objective(
            logits,
            target,
            base_weights=base,
            epsilon=settings.epsilon,
            adversary=settings.adversary,
            temperature=settings.temperature,
            group=worker.group,
            draws=draws if settings.adversary == "draws" else None,
            sample_weights=weights,
        )
        if settings.label_weight:
            # As in the distillation loss, the number of ranks makes up for the mean over them.
            objective = objective + settings.label_weight * worker.world / settings.batch_size * label_loss(
                logits, shown
            )
        optimizer.zero_grad()
        scaler.scale(objective).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if average:
            average.update_parameters(bare)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            loss = float(value)  # waits for the device
            if not math.isfinite(loss):
                raise ValueError(NOT_FINITE)
            history.append((step + 1, loss))
            if on_step and worker.rank == 0:
                on_step(step + 1, loss)
        if on_checkpoint and (step + 1) % save_every == 0 and step + 1 < steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            on_checkpoint({"step": step + 1, "history": history, **states})
    students = {"": bare.state_dict()}
    if average:
        students = {"": average.module.state_dict(), "_last": bare.state_dict()}
    return history, students


def _keeps(decay: float, count: int) -> float:
    """Exponential, but early steps average over what there is: the random start does not linger."""
    return min(decay, (1 + count) / (10 + count))


def moving_average(
    keeps: Callable[[int], float],
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """For torch's AveragedModel: `keeps` is the share of an average of so many that stays.

    Of what is not a real number, such as BatchNorm's counters, the last is taken.
    """

    def update(averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        share = 1 - keeps(int(count))
        for average, value in zip(averages, current, strict=True):
            if average.is_floating_point():
                average.lerp_(value, share)
            else:
                average.copy_(value)

    return update


def effective_classes(sums: np.ndarray) -> float:
    """exp(entropy) of the class shares: K when balanced, 1 when all is one class."""
    shares = np.asarray(sums, np.float64) / np.sum(sums)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
