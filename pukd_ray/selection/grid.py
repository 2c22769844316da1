"""nnPU at a grid of class priors in one training: the networks of a grid share batches, masks and their first product.

Where each of them draws its boundary through U says which prior is right (`pukd_ray.selection.evidence`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pukd_ray.networks.selector import DROPOUT, moments
from pukd_ray.runtime.batches import EndlessOrder
from pukd_ray.runtime.devices import ALONE, Worker, to_device
from pukd_ray.runtime.timing import Span
from pukd_ray.selection.training import P_SHARE, WEIGHT_DECAY, Examples, Training, as_floats, drawn, dropout_mask

WIDTH = 64  # of each network's hidden layer; a wider one moves no valley, a narrower one blunts it
# Log-spaced where no boundary ever had a gap (below 0.03), in steps of about 1.5 where the valley has to be found.
COARSE = (0.002, 0.005, 0.012, 0.03, 0.07, 0.13, 0.21, 0.32, 0.47, 0.68)
FINE = 6
"""Further priors between the neighbours of the emptiest boundary."""


class GridHead(nn.Module):
    """Selectors of the architecture of `SelectorHead`, one for each prior: features [B, C] -> logits [B, G].

    All start alike: what differs between two of them is then the prior. `mean` and `std` [C] are buffers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, u: np.ndarray | Tensor, count: int, seed: int, width: int = WIDTH) -> None:
        super().__init__()
        channels, hidden = u.shape[1], max(8, width // 16)
        generator = torch.Generator().manual_seed(seed)

        def alike(*shape: int, fan: int) -> nn.Parameter:
            one = (torch.rand(1, *shape, generator=generator) * 2 - 1) / fan**0.5
            return nn.Parameter(one.repeat(count, *[1] * len(shape)))

        self.first, self.first_bias = alike(width, channels, fan=channels), alike(width, fan=channels)
        self.reduce, self.expand = alike(width, hidden, fan=width), alike(hidden, width, fan=hidden)
        self.classify, self.bias = alike(width, fan=width), alike(fan=width)
        if isinstance(u, np.ndarray):
            mean = torch.from_numpy(u.mean(0, dtype=np.float64))
            std = torch.from_numpy(u.astype(np.float32).std(0, dtype=np.float64))
            std = torch.where(std > 1e-4, std, 1.0)
        else:
            mean, std = moments(u)
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """As the class says; `kept` bool [B, C] is the dropout mask of training."""
        x = (features - self.mean) / self.std
        if kept is not None:
            x = x * kept / (1 - DROPOUT)
        count, width, channels = self.first.shape
        product = x @ self.first.reshape(count * width, channels).t() + self.first_bias.reshape(-1)
        hidden = torch.relu(product).view(-1, count, width).transpose(0, 1)  # [G, B, width]
        gate = torch.sigmoid(torch.relu(hidden @ self.reduce) @ self.expand)
        logits: Tensor = ((hidden * gate) @ self.classify[:, :, None])[..., 0].t() + self.bias
        return logits


def grid_risk(logits: Tensor, n_p: int, priors: Tensor) -> Tensor:
    """Sum over the grid of the objectives of `nnpu_risk`; the first `n_p` rows of logits [B, G] are P."""
    s = torch.sigmoid(logits)
    a, u = 1 - s[:n_p].mean(0), s[n_p:].mean(0)
    r_minus = u - priors * (1 - a)
    return torch.where(r_minus < 0, -r_minus, priors * a + r_minus).sum()


def fit_grid(features: Examples, training: Training, priors: Sequence[float], worker: Worker = ALONE) -> GridHead:
    """Train a selector for each of `priors`, as `training` says but for its prior, its loss and its width."""
    features = features.on(worker)
    head = GridHead(features.u, len(priors), training.seed).to(worker.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=training.lr, weight_decay=WEIGHT_DECAY, fused=worker.fused)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    n_p = round(training.batch_size * P_SHARE)
    p_order = EndlessOrder(len(features.p), n_p, training.seed, 0)
    u_order = EndlessOrder(len(features.u), training.batch_size - n_p, training.seed, 1)
    rng = np.random.default_rng([training.seed, 3])
    for step in range(training.steps):
        views = rng.integers(0, features.p.shape[1], n_p)
        x = drawn(features, p_order.batch(step), views, u_order.batch(step), worker.device)
        if worker.on_cpu:
            kept = torch.from_numpy(rng.random(x.shape, np.float32) >= DROPOUT)
        else:
            kept = dropout_mask(len(x), x.shape[1], (training.seed, step), worker)
        at = torch.tensor([training.falling(prior, step + 1) for prior in priors])
        objective = grid_risk(head(x, kept), n_p, to_device(at, worker.device))
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
    return head


@torch.inference_mode()
def grid_logits(head: GridHead, features: np.ndarray | Tensor, batch: int = 4096) -> np.ndarray:
    """float32 [G, N] of features [N, C]."""
    place = head.first.device
    parts = [head(as_floats(features[i : i + batch], place)) for i in range(0, len(features), batch)]
    return torch.cat(parts).t().contiguous().cpu().numpy()


@dataclass(frozen=True)
class GridFold:
    """Held-out logits of one fold at each prior, and whose they are."""

    p_rows: np.ndarray
    u_rows: np.ndarray
    p_logits: np.ndarray
    """float32 [G, rows of P]."""
    u_logits: np.ndarray
    span: Span


@dataclass(frozen=True)
class Grid:
    """Held-out logits of all rows at each prior, ascending."""

    priors: np.ndarray
    """[G]."""
    p: np.ndarray
    """float32 [G, n_p]."""
    u: np.ndarray
    """float32 [G, n_u]."""

    @classmethod
    def of(cls, priors: Sequence[float], folds: Sequence[GridFold]) -> Grid:
        """The folds' logits, back in the order of the rows."""
        count = len(priors)
        p = np.empty((count, sum(len(f.p_rows) for f in folds)), np.float32)
        u = np.empty((count, sum(len(f.u_rows) for f in folds)), np.float32)
        for fold in folds:
            p[:, fold.p_rows], u[:, fold.u_rows] = fold.p_logits, fold.u_logits
        return cls(np.array(priors, np.float64), p, u)

    def joined(self, other: Grid) -> Grid:
        """With the priors of another grid of the same rows."""
        priors = np.r_[self.priors, other.priors]
        order = np.argsort(priors, kind="stable")
        return Grid(priors[order], np.concatenate([self.p, other.p])[order], np.concatenate([self.u, other.u])[order])


def fit_grid_fold(
    features: Examples,
    held_out: tuple[np.ndarray, np.ndarray],
    training: Training,
    priors: Sequence[float],
    worker: Worker = ALONE,
) -> GridFold:
    """Train on all but the rows (of P, of U) in `held_out`, score these; of P only the images themselves."""
    began = time.time()
    features = features.on(worker)
    p_rows, u_rows = held_out
    rest = np.setdiff1d(np.arange(len(features.p)), p_rows), np.setdiff1d(np.arange(len(features.u)), u_rows)
    head = fit_grid(features.take(*rest), training, priors, worker)
    p, u = grid_logits(head, features.p[p_rows, 0]), grid_logits(head, features.u[u_rows])
    return GridFold(p_rows, u_rows, p, u, (began, time.time()))
