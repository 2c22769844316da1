"""Training the attention head on cached features: plain torch, the same for any number of workers.

Every rank draws the same global batches from one seeded stream and takes its slice of them, so the
gradient of a step does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pukd_ray.batches import EndlessOrder
from pukd_ray.networks.head import AttentionHead
from pukd_ray.selection.risk import naive_risk, nnpu_risk, vpu_risk

P_SHARE = 4  # a quarter of each batch is P (method sheet 1.6)
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class HeadTraining:
    """What the head is trained for."""

    loss: str
    prior: float
    steps: int
    batch_size: int
    lr: float
    seed: int
    horizon: int | None = None
    """Steps of the learning-rate schedule, if training stops before its end."""


@dataclass(frozen=True)
class Scaler:
    """Per-dimension standardisation by the statistics of U, float32 [C] each."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Scaler:
        """Statistics of features [N, C]."""
        values = features.astype(np.float32)
        std = values.std(0)
        # A dimension that never varies carries nothing; dividing by its rounding noise would.
        return cls(values.mean(0), np.where(std > 1e-6, std, 1.0).astype(np.float32))

    def __call__(self, features: np.ndarray) -> Tensor:
        """[N, C] of any float dtype -> standardised float32 tensor."""
        return torch.from_numpy((features.astype(np.float32) - self.mean) / self.std)


def train_head(
    p: np.ndarray,
    u: np.ndarray,
    scaler: Scaler,
    training: HeadTraining,
    *,
    checkpoints: Sequence[int] = (),
    on_checkpoint: Callable[[int, nn.Module], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    rank: int = 0,
    world: int = 1,
    group: ProcessGroup | None = None,
    device: torch.device | None = None,
) -> AttentionHead:
    """Train on features p [n_p, C] and u [n_u, C] (all of them on every rank) for `training.steps` steps.

    `prepare` wraps the head for data parallelism; `on_checkpoint` sees it after the given steps.
    """
    device = device or torch.device("cpu")
    torch.manual_seed(training.seed)
    head = AttentionHead(p.shape[1]).to(device)
    model = prepare(head) if prepare else head
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.horizon or training.steps)
    n_p = training.batch_size // P_SHARE
    p_order = EndlessOrder(len(p), n_p, training.seed, 0)
    u_order = EndlessOrder(len(u), training.batch_size - n_p, training.seed, 1)
    mixes = np.random.default_rng([training.seed, 2]).beta(0.3, 0.3, training.steps)
    due = set(checkpoints)
    for step in range(1, training.steps + 1):
        p_rows, u_rows = p_order.batch(step - 1)[rank::world], u_order.batch(step - 1)[rank::world]
        x = torch.cat([scaler(p[p_rows]), scaler(u[u_rows])]).to(device)
        labels = torch.ones(len(x), device=device)
        labels[len(p_rows) :] = -1
        if training.loss == "nnpu":
            value, objective = nnpu_risk(model(x), labels, training.prior, group=group)
        elif training.loss == "naive":
            value, objective = naive_risk(model(x), labels, group=group)
        else:
            mix = float(mixes[step - 1])
            partners = x[: len(p_rows)][torch.arange(len(u_rows), device=device) % len(p_rows)]
            mixed = mix * x[len(p_rows) :] + (1 - mix) * partners
            logits = model(torch.cat([x, mixed]))  # one forward: DDP must see all inputs of a step at once
            value, objective = vpu_risk(logits[: len(x)], labels, logits[len(x) :], mix, group=group)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
        if on_step:
            on_step(step, float(value))
        if on_checkpoint and step in due:
            on_checkpoint(step, head)
    return head


@torch.inference_mode()
def head_logits(
    head: nn.Module, scaler: Scaler, features: np.ndarray, device: torch.device | None = None
) -> np.ndarray:
    """Logits float32 [N] of features [N, C], in slices so that large samples fit."""
    head.eval()
    parts = [
        head(scaler(features[i : i + 8192]).to(device or torch.device("cpu"))).cpu().numpy()
        for i in range(0, len(features), 8192)
    ]
    head.train()
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
