"""The RKD training loop: what each Ray Train worker runs."""

from __future__ import annotations

import io
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pukd_ray.config import DistillConfig, RunConfig
from pukd_ray.distillation.data import Images, InMemory, Streamed, augment, decode_all
from pukd_ray.distillation.loss import rkd_objective
from pukd_ray.distillation.weights import class_weights
from pukd_ray.networks.teacher import Normalise, dump_state, load_network, new_network, use_threads
from pukd_ray.selection.inference import pixel_spec
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
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(0.1 ** sum(step >= steps * q for q in (0.25, 0.5, 0.75)))
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def measure_classes(
    teacher: nn.Module, images: Images, kind: str, device: torch.device, classes: int, world: int
) -> tuple[Tensor, Tensor]:
    """(weights [K], class sums [K]), float64 on the host, from the teacher on all images, eval view."""
    sums = torch.zeros(classes, dtype=torch.float64)
    for pixels in images.once():
        logits = teacher(pixels.to(device)).double()
        if kind == "hard":
            sums += torch.bincount(logits.argmax(1), minlength=classes).double().cpu()
        else:
            sums += logits.softmax(1).sum(0).cpu()
    if world > 1:
        on_device = sums.to(device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    if kind == "none":
        return torch.ones(classes, dtype=torch.float64), sums
    return class_weights(sums, smoothing=SMOOTHING, clip=CLIP), sums


def train_loop(setup: dict[str, Any]) -> dict[str, Any] | None:
    """Ray Train worker: load P and the selection, weigh the classes, distil each arm; rank 0 writes the students."""
    import ray
    import ray.train
    from ray.train.torch import get_device

    config: RunConfig = setup["config"]
    began = time.time()
    use_threads(setup["threads"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    spec = pixel_spec(config.teacher)
    normalise = Normalise(config.teacher).to(device)
    network = load_network(
        config.teacher.arch, config.teacher, ray.get(setup["weights"]), device, what="teacher.weights"
    )
    teacher = nn.Sequential(normalise, network).eval().requires_grad_(False)
    positives = decode_all(setup["positives"], spec)
    shared = (config.distill.batch_size, config.seed, rank, world)
    images: Images
    if setup["streamed"]:
        shard = ray.train.get_dataset_shard("train")
        images = Streamed(shard, setup["count"], spec, config.distill.batch_size // world)
    else:
        images = InMemory(torch.cat([positives, _read_selected(setup, spec)]), *shared)
    steps = total_steps(config.distill, images.count)
    arms: dict[str, Images] = {"student": images}
    if config.distill.baseline == "positives":
        arms["baseline_positives"] = InMemory(positives, *shared)
    report: dict[str, Any] = {"steps": steps, "images": images.count, "arms": {}}
    saved = _load_checkpoint()
    for number, (arm, data) in enumerate(arms.items()):
        if saved and number < saved["number"]:
            report["arms"][arm] = saved["finished"][arm]
            continue
        weights, sums = measure_classes(
            teacher, data, config.distill.class_weights, device, config.teacher.num_classes, world
        )
        resume = saved if saved and number == saved["number"] else None
        history, state = _distil(
            config,
            arm,
            number,
            data,
            teacher,
            normalise,
            weights,
            steps,
            rank,
            world,
            device,
            setup["counter"],
            resume,
            report["arms"],
        )
        report["arms"][arm] = {"class_weights": weights.tolist(), "class_sums": sums.tolist(), "history": history}
        if rank == 0:
            folder = setup["folder"]
            write_bytes(folder.fs, folder.path(f"student/{arm}.pt"), state)
    report["span"] = (began, time.time())
    return report if rank == 0 else None


def _read_selected(setup: dict[str, Any], spec: Any) -> Tensor:
    parts = [
        decode_all(setup["folder"].read_table(name, ["image"]).column("image").to_pylist(), spec)
        for name in setup["selected"]
    ]
    return torch.cat(parts)


def _distil(
    config: RunConfig,
    arm: str,
    number: int,
    images: Images,
    teacher: nn.Module,
    normalise: nn.Module,
    weights: Tensor,
    steps: int,
    rank: int,
    world: int,
    device: torch.device,
    counter: Any,
    resume: dict[str, Any] | None,
    finished: dict[str, Any],
) -> tuple[list[tuple[int, float]], bytes]:
    import ray.train
    from ray.train.torch import prepare_model

    settings = config.distill
    torch.manual_seed(config.seed)
    student = new_network(config.student.arch, config.teacher)
    if world > 1 and device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    model = prepare_model(student)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(settings.schedule, s, steps))
    history: list[tuple[int, float]] = []
    start = 0
    bare = getattr(model, "module", model)
    if resume:
        bare.load_state_dict(resume["student"])
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        start, history = resume["step"], resume["history"]
    noise = torch.rand(1, len(weights), dtype=torch.float64, generator=torch.Generator().manual_seed(config.seed))
    draws = torch.cat([weights[None], weights + settings.epsilon * noise])
    group = dist.group.WORLD if world > 1 else None
    model.train()
    log_every = max(1, steps // LOG_POINTS)
    save_every = -(-steps // CHECKPOINTS)
    for step in range(start, steps):
        pixels = augment(images.batch(step), settings.augment, (config.seed, 4, step), rank, world, settings.batch_size)
        pixels = pixels.to(device, non_blocking=True)
        with torch.no_grad():
            target = teacher(pixels)  # the same view as the student's
        value, objective, _ = rkd_objective(
            model(normalise(pixels)),
            target,
            base_weights=weights,
            epsilon=settings.epsilon,
            adversary=settings.adversary,
            temperature=settings.temperature,
            group=group,
            draws=draws if settings.adversary == "draws" else None,
        )
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        scheduler.step()
        if rank == 0 and ((step + 1) % log_every == 0 or step + 1 == steps):
            history.append((step + 1, float(value)))
            counter.set.remote(
                number * steps + step + 1, steps * setup_arms(settings), f"{arm} loss {float(value):.4f}"
            )
        if (step + 1) % save_every == 0 and step + 1 < steps:
            state = {
                "number": number,
                "finished": dict(finished),
                "step": step + 1,
                "history": history,
                "student": bare.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            _save_checkpoint(state if rank == 0 else None, {"arm": arm, "step": step + 1, "loss": float(value)})
    ray.train.report({"arm": arm, "step": steps, "loss": history[-1][1] if history else float("nan")})
    return history, dump_state(bare.state_dict())


def setup_arms(settings: DistillConfig) -> int:
    """How many students are trained."""
    return 2 if settings.baseline == "positives" else 1


def _save_checkpoint(state: dict[str, Any] | None, metrics: dict[str, Any]) -> None:
    """All ranks report; rank 0 hands over its state, from which a restarted group goes on at the same step."""
    import ray.train

    if state is None:
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
