"""The RKD training loop: what each Ray Train worker runs."""

from __future__ import annotations

import io
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pukd_ray.config import DistillConfig, RunConfig, TeacherConfig
from pukd_ray.corpus.pixels import pixel_spec
from pukd_ray.distillation.data import Batch, Images, InMemory, Streamed, augment
from pukd_ray.distillation.loss import rkd_objective
from pukd_ray.distillation.training_set import TrainingSet
from pukd_ray.distillation.weights import class_weights
from pukd_ray.networks.teacher import Normalise, dump_state, load_network, new_network
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import Worker, spare_threads, to_fastest_layout, use_threads
from pukd_ray.storage import write_bytes

SMOOTHING = 1e-3
CLIP = (0.1, 10.0)
WARM_UP = 0.05
CHECKPOINTS = 5
LOG_POINTS = 200


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


@dataclass(frozen=True)
class Arm:
    """One student to train: on which images."""

    name: str
    """Its file is `student/<name>.pt`."""
    data: TrainingSet
    streamed: bool = False


def frozen_teacher(config: TeacherConfig, weights: bytes, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(teacher, its normalisation), both from uint8 or float pixels of 0 to 255 [b, C, H, W]."""
    normalise = Normalise(config).to(device)
    network = load_network(config.arch, config, weights, device, what="teacher.weights")
    return nn.Sequential(normalise, network).eval().requires_grad_(False), normalise


def shows_as_is(settings: DistillConfig) -> bool:
    """Whether every step shows an image in the same view."""
    return settings.augment == "none" and not settings.mixup


@torch.no_grad()
def measure_classes(
    teacher: nn.Module, images: Images, settings: DistillConfig, classes: int, worker: Worker
) -> tuple[Tensor, Tensor]:
    """(weights [K], class sums [K]), float64 on the host, from the teacher on all images, eval view.

    Images in memory that the training shows as they are keep the teacher's answers, so it is asked only once.
    """
    sums = torch.zeros(classes, dtype=torch.float64)
    keeper = images if isinstance(images, InMemory) and shows_as_is(settings) else None
    answers: list[Tensor] = []
    for pixels in images.once():
        logits = teacher(pixels.to(worker.device))
        if keeper:
            answers.append(logits)
        logits = logits.double()
        if settings.class_weights == "hard":
            sums += torch.bincount(logits.argmax(1), minlength=classes).double().cpu()
        else:
            sums += logits.softmax(1).sum(0).cpu()
    if keeper:
        known = answers[0].new_zeros(keeper.count, classes)
        known[worker.rank :: worker.world] = torch.cat(answers)
        if worker.world > 1:
            dist.all_reduce(known)
        keeper.know(known)
    if worker.world > 1:
        on_device = sums.to(worker.device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    if settings.class_weights == "none":
        return torch.ones(classes, dtype=torch.float64), sums
    weights = class_weights(sums, smoothing=SMOOTHING, clip=CLIP)
    if settings.normalise == "mean_weight":
        weights = weights * sums.sum() / (weights * sums).sum()
    return weights, sums


def train_loop(setup: dict[str, Any]) -> dict[str, Any] | None:
    """Ray Train worker: for each arm load its images, weigh the classes, distil; rank 0 writes the students."""
    import ray
    import ray.train

    config: RunConfig = setup["config"]
    folder: RunFolder = setup["folder"]
    began = time.time()
    context = ray.train.get_context()
    use_threads(spare_threads(context.get_local_world_size()))
    worker = Worker.current()
    teacher, normalise = frozen_teacher(config.teacher, setup["weights"].get(), worker.device)
    arms: list[Arm] = setup["arms"]
    report: dict[str, Any] = {}
    saved = _load_checkpoint()
    for number, arm in enumerate(arms):
        if saved and number < saved["number"]:
            report[arm.name] = saved["finished"][arm.name]
            continue
        images = _images_of(arm, config, worker)
        # All arms take the steps of the first: what differs is what they learn from.
        steps = report[arms[0].name]["steps"] if report else total_steps(config.distill, images.count)
        weights, sums = measure_classes(teacher, images, config.distill, config.teacher.num_classes, worker)
        run = Distillation(config, arm.name, images, teacher, normalise, weights, steps, worker)

        def keep(state: dict[str, Any], number: int = number) -> None:
            _save_checkpoint({"number": number, "finished": dict(report), **state}, worker)

        def tell(step: int, loss: float, number: int = number, steps: int = steps, name: str = arm.name) -> None:
            setup["counter"].set.remote(number * steps + step, steps * len(arms), name, loss)

        history, students = distil(run, saved if saved and number == saved["number"] else None, keep, tell)
        report[arm.name] = {
            "images": images.count,
            "steps": steps,
            "class_weights": weights.tolist(),
            "class_sums": sums.tolist(),
            "history": history,
        }
        if worker.rank == 0:
            for suffix, state in students.items():
                write_bytes(folder.fs, folder.path(f"student/{arm.name}{suffix}.pt"), dump_state(state))
    return {"arms": report, "span": (began, time.time())} if worker.rank == 0 else None


def shuffled_bytes(settings: DistillConfig) -> float:
    """Pixels that a stream holds to draw batches from: a part of what images in memory may take, for it copies them."""
    return settings.memory_gib * 2**30 / 4


def _images_of(arm: Arm, config: RunConfig, worker: Worker) -> Images:
    import ray.train

    spec, batch_size = pixel_spec(config.teacher), config.distill.batch_size
    if arm.streamed:
        shard = ray.train.get_dataset_shard(arm.name)
        buffer = shuffled_bytes(config.distill)
        return Streamed(shard, arm.data.count, spec, batch_size // worker.world, buffer, config.seed + worker.rank)
    return InMemory(arm.data.load(spec), batch_size, config.seed, worker.rank, worker.world)


@dataclass(frozen=True)
class Distillation:
    """One student's training."""

    config: RunConfig
    name: str
    images: Images
    teacher: nn.Module
    """uint8 or float pixels of 0 to 255 -> logits."""
    normalise: nn.Module
    weights: Tensor
    """Of the classes, [K]."""
    steps: int
    worker: Worker


def view(run: Distillation, step: int) -> tuple[Tensor, list[tuple[Tensor, Batch]]]:
    """(pixels [b, C, H, W] of a step, [(share [b], batch)] of what they show): one batch, or two that are mixed.

    Random numbers are those of the global batch, so that they do not depend on the number of ranks.
    """
    settings, seed, worker = run.config.distill, run.config.seed, run.worker
    batch = run.images.batch(step)
    cut = (worker.rank, worker.world, settings.batch_size)
    pixels = augment(batch.pixels, settings.augment, (seed, 4, step), *cut)
    if not settings.mixup:
        return pixels, [(torch.ones(len(batch)), batch)]
    other = run.images.partners(step, batch)
    drawn = np.random.default_rng([seed, 7, step]).beta(settings.mixup, settings.mixup, settings.batch_size)
    share = torch.from_numpy(drawn[worker.rank :: worker.world][: len(batch)]).float()
    each = share[:, None, None, None]
    mixed = each * pixels + (1 - each) * augment(other.pixels, settings.augment, (seed, 8, step), *cut)
    return mixed, [(share, batch), (1 - share, other)]


def label_loss(logits: Tensor, shown: list[tuple[Tensor, Batch]]) -> Tensor:
    """Sum over the batch of the cross-entropy on P's labels, each by its share of the image; others count 0."""
    total = logits.new_zeros(())
    for share, batch in shown:
        labels = batch.labels.to(logits.device)
        each = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        total = total + (share.to(logits) * each).sum()
    return total


def distil(
    run: Distillation,
    resume: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> tuple[list[tuple[int, float]], dict[str, dict[str, Tensor]]]:
    """Train a student: (losses at steps, state_dicts by suffix of their file, "" the student).

    `keep` gets a state to `resume` from a few times; `tell` step and loss as it goes on.
    """
    config, settings, worker, steps = run.config, run.config.distill, run.worker, run.steps
    torch.manual_seed(config.seed)
    student = new_network(config.student.arch, config.teacher)
    model = worker.prepare(to_fastest_layout(worker.share_batch_statistics(student)))
    bare = getattr(model, "module", model)
    average = (
        AveragedModel(bare, multi_avg_fn=_moving_average(settings.ema), use_buffers=True) if settings.ema else None
    )
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(settings.schedule, s, steps))
    parts = {"student": bare, "optimizer": optimizer, "scheduler": scheduler}
    if average:
        parts["average"] = average
    history: list[tuple[int, float]] = []
    start = 0
    if resume:
        for name, part in parts.items():
            part.load_state_dict(resume[name])
        start, history = resume["step"], resume["history"]
    noise = torch.rand(1, len(run.weights), dtype=torch.float64, generator=torch.Generator().manual_seed(config.seed))
    draws = torch.cat([run.weights[None], run.weights + settings.epsilon * noise])
    model.train()
    log_every = max(1, steps // LOG_POINTS)
    save_every = -(-steps // CHECKPOINTS)
    for step in range(start, steps):
        pixels, shown = view(run, step)
        pixels = pixels.to(worker.device, non_blocking=True)
        target = run.images.answers(step) if shows_as_is(settings) else None
        if target is None:
            with torch.no_grad():
                target = run.teacher(pixels)  # the same view as the student's
        logits = model(run.normalise(pixels).contiguous(memory_format=torch.channels_last))
        weights = None
        if settings.sample_weights == "pu_probability":
            weights = torch.stack([share * batch.weights for share, batch in shown]).sum(0).to(worker.device)
        value, objective, _ = rkd_objective(
            logits,
            target,
            base_weights=run.weights,
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
        objective.backward()
        optimizer.step()
        scheduler.step()
        if average:
            average.update_parameters(bare)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            history.append((step + 1, float(value)))
            if tell and worker.rank == 0:
                tell(step + 1, float(value))
        if keep and (step + 1) % save_every == 0 and step + 1 < steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            keep({"step": step + 1, "history": history, **states})
    students = {"": bare.state_dict()}
    if average:
        students = {"": average.module.state_dict(), "_last": bare.state_dict()}
    return history, students


def _moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Exponential, but early steps average over what there is: the random start does not linger."""

    def update(averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        keep = min(decay, (1 + int(count)) / (10 + int(count)))
        for average, value in zip(averages, current, strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - keep)
            else:
                average.copy_(value)

    return update


def _save_checkpoint(state: dict[str, Any], worker: Worker) -> None:
    """All ranks report; rank 0 hands over its state, from which a restarted group goes on at the same step."""
    import ray.train

    metrics = {"step": state["step"], "loss": state["history"][-1][1]}
    if worker.rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "state.pt")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _load_checkpoint() -> dict[str, Any] | None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        data = (Path(folder) / "state.pt").read_bytes()
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def effective_classes(sums: np.ndarray) -> float:
    """exp(entropy) of the class shares: K when balanced, 1 when all is one class."""
    shares = np.asarray(sums, np.float64) / np.sum(sums)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))
