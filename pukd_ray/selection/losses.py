"""The losses that the selector can be trained with. One entry of `LOSSES` adds one, with its name in the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pukd_ray.selection.risk import known_risk, naive_risk, nnpu_risk, vpu_risk

MIXUP = 0.3  # of Beta(MIXUP, MIXUP), VPU's share of U in its mixed inputs (Chen et al. 2020)


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, first P, then U, then known negatives, and what a loss may need beside it."""

    forward: Callable[[Tensor, Tensor], Tensor]
    """(inputs [n, ...], dropout mask bool [n, channels]) -> logits [n]. To be called once: data-parallel training
    waits for one backward pass per forward pass."""
    inputs: Tensor
    """float32 [B + known negatives, ...]."""
    kept: Tensor
    """Dropout mask, bool, of the same rows, [.., channels]."""
    labels: Tensor
    """float32 [B]: +1 of P, -1 of U."""
    n_p: int
    """Rows of P among them."""
    prior: float
    """Share of positives in U to train with in this step."""
    rng: np.random.Generator
    """The same on all ranks, as long as all draw alike."""
    group: dist.ProcessGroup | None
    """The ranks that hold the global batch together."""
    n_known: int = 0
    """Known negatives of the global batch."""


@dataclass(frozen=True)
class Loss:
    """A loss of the selector."""

    name: str
    """As `selector.loss` names it."""
    risk: Callable[[Batch], tuple[Tensor, Tensor]]
    """(value, objective) of a batch, as `pukd_ray.selection.risk` defines them."""
    rescales: bool = False
    """sigmoid(logit) is known up to a factor only, by which its maximum over the data becomes 1."""
    knows: bool = False
    """Known negatives serve it; to others none are given."""


def _nnpu(batch: Batch) -> tuple[Tensor, Tensor]:
    logits, n = batch.forward(batch.inputs, batch.kept), len(batch.labels)
    value, objective = nnpu_risk(logits[:n], batch.labels, batch.prior, group=batch.group)
    if batch.n_known:
        objective = objective + known_risk(logits[n:], batch.prior, batch.n_known, group=batch.group)
    return value, objective


def _naive(batch: Batch) -> tuple[Tensor, Tensor]:
    return naive_risk(batch.forward(batch.inputs, batch.kept), batch.labels, group=batch.group)


def _vpu(batch: Batch) -> tuple[Tensor, Tensor]:
    # Mixing before the network standardises is the same as after it: both are affine.
    n, p, u = len(batch.inputs), batch.inputs[: batch.n_p], batch.inputs[batch.n_p :]
    mix = float(batch.rng.beta(MIXUP, MIXUP))
    mixed = u
    if len(p):  # a plain batch, or a rank's part of one, may have none
        mixed = mix * u + (1 - mix) * p[torch.arange(len(u), device=u.device) % len(p)]
    logits = batch.forward(torch.cat([batch.inputs, mixed]), torch.cat([batch.kept, batch.kept[batch.n_p :]]))
    return vpu_risk(logits[:n], batch.labels, logits[n:], mix, group=batch.group)


LOSSES: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("nnpu", _nnpu, knows=True),
        Loss("naive", _naive),
        Loss("vpu", _vpu, rescales=True),
    )
}
"""By the names of `selector.loss`."""
