"""Training the selector: plain torch, the same for any number of workers.

Every rank draws the same global batches from one seeded stream and takes its slice of them, so the
gradient of a step does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pukd_ray.config import TeacherConfig
from pukd_ray.networks.selector import DROPOUT, PixelSelector, SelectorHead
from pukd_ray.networks.teacher import Teacher
from pukd_ray.runtime.batches import EndlessOrder
from pukd_ray.runtime.devices import ALONE, Worker, as_tensor, resident, to_device
from pukd_ray.selection.losses import LOSSES, Batch

SelectorNetwork = SelectorHead | PixelSelector
P_SHARE = 1 / 4  # of each balanced batch (docs/method.md, "Batches"); its size is a multiple of four
WEIGHT_DECAY = 1e-4
FINETUNE_STEPS = 0.25  # of the head's, after them
# A low prior from the start can end in "all negative", where the sigmoid loss has no gradient: on the tuning pools with
# 2 % relevant, 300 steps gave an average precision of 0.34 to 0.83 without, 0.87 to 0.90 with a prior that falls.
FIRST_PRIOR = 0.2
FALLING = 0.65  # of the schedule
FINETUNE_LR = 0.1  # of the head's: features that are good already should not be lost (Kumar et al. 2022)


@dataclass(frozen=True)
class Examples:
    """What a network is trained on: P in one or more views, and U; NumPy's arrays, or tensors on a device."""

    p: Any
    """[n_p, views, ...], the image itself first."""
    u: Any
    """[n_u, ...]: features float16 [C], or pixels uint8 [C, H, W]."""
    known: np.ndarray | None = None
    """Known negatives, [n, ...] as of U."""
    known_shares: np.ndarray | None = None
    """Chance of each to be drawn, float64 [n]; None: all alike."""

    def take(self, p_rows: np.ndarray, u_rows: np.ndarray) -> Examples:
        """Some rows of P and U, where they lie."""
        return replace(self, p=self.p[p_rows], u=self.u[u_rows])

    def on(self, worker: Worker) -> Examples:
        """The same on the worker's accelerator, where they fit: batches are then taken there. For a CPU as they are."""
        if worker.on_cpu:
            return self
        return replace(self, p=resident(self.p, worker.device), u=resident(self.u, worker.device))


@dataclass(frozen=True)
class Trunk:
    """The teacher, to be fine-tuned as trunk of the selector, and the pixels of the examples."""

    teacher: TeacherConfig
    weights: bytes
    grid: int | Literal["auto"]
    pixels: Examples


def seen_by(features: Examples, trunk: Trunk | None) -> Examples:
    """What the trained network takes: features, or pixels where the trunk is fine-tuned."""
    return features if trunk is None else trunk.pixels


@dataclass(frozen=True)
class Training:
    """How a selector is trained."""

    loss: str
    """Name in `pukd_ray.selection.losses.LOSSES`."""
    prior: float
    steps: int
    batch_size: int
    lr: float
    seed: int
    batches: str = "balanced"
    horizon: int | None = None
    """Steps of the schedules, if training stops before its end."""
    first_prior: float = FIRST_PRIOR
    """What nnPU starts with where `prior` is lower."""

    def prior_at(self, step: int) -> float:
        """nnPU's prior at a step (1, 2, ...): falls geometrically from `first_prior`."""
        return self.falling(self.prior, step)

    def falling(self, prior: float, step: int) -> float:
        """The same for another prior to end with."""
        start = max(prior, self.first_prior)
        done = min(1.0, step / (FALLING * (self.horizon or self.steps)))
        return float(start * (prior / start) ** done)

    def finetuning(self) -> Training:
        """The same for the trunk and its head, after the head."""
        horizon = self.horizon or self.steps
        return replace(
            self,
            steps=max(1, round(self.steps * FINETUNE_STEPS)),
            horizon=max(1, round(horizon * FINETUNE_STEPS)),
            lr=self.lr * FINETUNE_LR,
            first_prior=self.prior,
        )


@dataclass(frozen=True)
class Callbacks:
    """What the caller of a training wants of it."""

    checkpoints: Sequence[int] = ()
    on_checkpoint: Callable[[int, SelectorNetwork], None] | None = None
    """Called with the step and the network after each of `checkpoints`."""
    on_step: Callable[[int, float], None] | None = None
    """Called with the step and the risk of its global batch."""


def fit_selector(
    features: Examples,
    training: Training,
    trunk: Trunk | None = None,
    callbacks: Callbacks = Callbacks(),
    worker: Worker = ALONE,
) -> SelectorNetwork:
    """Train a head on features and, with a trunk, go on with both on pixels.

    Returns the SelectorHead, or the PixelSelector. Steps of checkpoints are those of the last phase.
    """
    features = features.on(worker)
    torch.manual_seed(training.seed)
    head = SelectorHead(features.u.shape[1]).to(worker.device)
    head.standardise_by(features.u)
    if trunk is None:
        train(head, features, training, callbacks, worker)
        return head
    whole = replace(training, steps=training.horizon or training.steps)
    train(head, features, whole, replace(callbacks, checkpoints=()), worker)
    pixels = trunk.pixels.on(worker)
    teacher = Teacher(trunk.teacher, trunk.weights, worker.device, trunk.grid, worker.precision)
    network = PixelSelector(teacher.extractor, teacher.normalise, head, worker.precision)
    network.freeze_unused(as_floats(pixels.p[:2, 0], worker.device))
    train(network, pixels, training.finetuning(), callbacks, worker)
    return network


def train(
    network: SelectorNetwork,
    examples: Examples,
    training: Training,
    callbacks: Callbacks = Callbacks(),
    worker: Worker = ALONE,
) -> None:
    """Train `network` in place for `training.steps` steps; all examples are on every rank."""
    model = worker.prepare(network)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=training.lr, weight_decay=WEIGHT_DECAY, fused=worker.fused)
    scaler = worker.scaler()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.horizon or training.steps)
    batches = _batches(len(examples.p), len(examples.u), training)
    views = np.random.default_rng([training.seed, 3])
    rng = np.random.default_rng([training.seed, 2])
    loss = LOSSES[training.loss]
    due = set(callbacks.checkpoints)
    mine, device = worker.mine, worker.device
    known = examples.known if loss.knows and examples.known is not None else np.zeros(0)
    n_known = int(training.batch_size * P_SHARE) if len(known) else 0
    drawing = np.random.default_rng([training.seed, 4])
    for step in range(1, training.steps + 1):
        p_rows, u_rows = batches(step - 1)
        view = views.integers(0, examples.p.shape[1], len(p_rows))
        known_rows = drawing.choice(len(known), n_known, p=examples.known_shares) if n_known else u_rows[:0]
        sizes = [len(p_rows), len(u_rows), n_known]
        mask = dropout_mask(sum(sizes), network.channels, (training.seed, step), worker)
        kept = torch.cat([part[mine] for part in mask.split(sizes)])
        p_rows, view, u_rows, known_rows = p_rows[mine], view[mine], u_rows[mine], known_rows[mine]
        x = drawn(examples, p_rows, view, u_rows, device)
        labels = torch.ones(len(x), device=device)
        labels[len(p_rows) :] = -1
        if n_known:
            x = torch.cat([x, as_floats(known[known_rows], device)])
        batch = Batch(model, x, kept, labels, len(p_rows), training.prior_at(step), rng, worker.group, n_known)
        value, objective = loss.risk(batch)
        optimizer.zero_grad()
        scaler.scale(objective).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if callbacks.on_step:
            callbacks.on_step(step, float(value))
        if callbacks.on_checkpoint and step in due:
            callbacks.on_checkpoint(step, network)


def drawn(
    examples: Examples, p_rows: np.ndarray, views: np.ndarray, u_rows: np.ndarray, device: torch.device
) -> Tensor:
    """The rows of P, each in its view, and of U, one after the other: float32 on the device."""
    if isinstance(examples.p, np.ndarray) and isinstance(examples.u, np.ndarray):
        return as_floats(np.concatenate([examples.p[p_rows, views], examples.u[u_rows]]), device)
    parts = as_floats(examples.p[p_rows, views], device), as_floats(examples.u[u_rows], device)
    return torch.cat(parts)


def as_floats(rows: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """float32 on the device, to where they travel as they are."""
    return to_device(as_tensor(rows), device).float()


def dropout_mask(rows: int, channels: int, seed: tuple[int, int], worker: Worker) -> Tensor:
    """Bool [rows, channels] of the global batch, on the device: every rank draws the same and uses its part."""
    if worker.on_cpu:
        drawn = np.frombuffer(np.random.default_rng(seed).bytes(rows * channels), np.uint8)
        return torch.from_numpy(drawn.reshape(rows, channels) >= round(256 * DROPOUT))
    own = torch.Generator(worker.device).manual_seed(seed[0] * 2**31 + seed[1])
    return torch.rand(rows, channels, device=worker.device, generator=own) >= DROPOUT


def _batches(n_p: int, n_u: int, training: Training) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """(rows of P, rows of U) of the global batch of each step."""
    if training.batches == "balanced":
        n_p_drawn = int(training.batch_size * P_SHARE)
        p_order = EndlessOrder(n_p, n_p_drawn, training.seed, 0)
        u_order = EndlessOrder(n_u, training.batch_size - n_p_drawn, training.seed, 1)
        return lambda step: (p_order.batch(step), u_order.batch(step))
    order = EndlessOrder(n_p + n_u, training.batch_size, training.seed, 0)

    def shuffled(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = order.batch(step)
        return rows[rows < n_p], rows[rows >= n_p] - n_p

    return shuffled


@torch.inference_mode()
def logits_of(
    network: SelectorNetwork, inputs: np.ndarray | Tensor, device: torch.device | None = None, batch: int = 4096
) -> np.ndarray:
    """PU logits float32 [N] of inputs [N, ...], in slices so that large samples fit."""
    place = device or torch.device("cpu")
    parts: list[Tensor] = [network(as_floats(inputs[i : i + batch], place)) for i in range(0, len(inputs), batch)]
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, np.float32)


def log_max_phi(
    network: SelectorNetwork, examples: Examples, training: Training, device: torch.device | None = None
) -> float:
    """What `rescale_logits` needs where the loss rescales: log of the largest phi = sigmoid(logit) over the data; else
    0."""
    if not LOSSES[training.loss].rescales:
        return 0.0
    highest = max(float(logits_of(network, part, device).max()) for part in (examples.p[:, 0], examples.u))
    return float(-np.log1p(np.exp(-highest)))
