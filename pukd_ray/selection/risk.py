"""Risks that train a positive-unlabelled (PU) classifier: nnPU, naive and VPU, on one process or many.

A batch holds labelled positives P (label +1) and unlabelled images U (label -1); ``z`` is a logit, ``s`` the
sigmoid. Each risk returns ``(value, objective)``, two scalars: log ``value``, backpropagate ``objective``.
They differ because nnPU ascends on its negative risk once that is impossibly small, and because, with a
process group, ``value`` is that of the global batch while ``objective`` is one rank's part of it.

Data parallel: a clamp or a logarithm of a mean over one shard is not that of the global batch. So the ranks
share a few sums (one all_reduce in float64, no autograd through it), and ``objective`` carries the factor W,
their number, which the mean over ranks that DistributedDataParallel takes of gradients cancels. The gradient
is then that of the global batch for any split of it, unequal shards included. Every rank must call, even with
no P.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

KNOWN = 0.3
"""What known negatives weigh beside U (docs/method.md, "Quality of a selection")."""


def nnpu_risk(
    logits: Tensor,
    labels: Tensor,
    prior: float,
    *,
    beta: float = 0.0,
    gamma: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Non-negative PU risk with the sigmoid loss (Kiryo et al. 2017, algorithm 1).

    With ``a = mean_P s(-z)`` and the risk on negatives ``r_minus = mean_U s(z) - prior * mean_P s(z)``:

    ==================== ======================= ====================
    branch               value                   objective
    ==================== ======================= ====================
    ``r_minus >= -beta`` ``prior * a + r_minus`` the same
    ``r_minus < -beta``  ``prior * a - beta``    ``-gamma * r_minus``
    ==================== ======================= ====================

    A mean over nothing counts as 0. A global batch without P, or without U, only pushes all logits down:
    compose batches that hold both.

    Args:
        logits: [B], any real dtype; computed in float64, also under autocast.
        labels: [B], +1 for P and -1 for U, any real dtype.
        prior: share of positives in U, in (0, 1). Err high: at half of the true prior nothing is selected.
        beta: how far ``r_minus`` may fall below 0 before it counts as overfitting, >= 0.
        gamma: scale of the ascent in the negative branch, >= 0.
        group: the ranks that hold the batch together; None: this is the whole batch.

    Returns:
        ``(value, objective)``: scalars of the dtype of the logits, at least float32; ``value`` is detached.

    Raises:
        ValueError: a bad shape or argument; or, on all ranks alike, a non-finite logit or a label other than
            +1 and -1 on any of them.

    Examples:
        Two of P and four of U. Well apart, U scores so low that ``r_minus`` is negative: the step goes up on it.

        >>> import torch
        >>> from pukd_ray import nnpu_risk
        >>> labels = torch.tensor([1, 1, -1, -1, -1, -1])
        >>> value, objective = nnpu_risk(torch.tensor([2.0, 1.0, 1.5, -1.0, -2.0, -3.0]), labels, prior=0.25)
        >>> round(value.item(), 4), round(objective.item(), 4)
        (0.1603, 0.1603)
        >>> value, objective = nnpu_risk(torch.tensor([4.0, 3.0, -3.0, -4.0, -5.0, -6.0]), labels, prior=0.25)
        >>> round(value.item(), 4), round(objective.item(), 4)
        (0.0082, 0.2232)
    """
    _check_prior(prior)
    if not (beta >= 0 and gamma >= 0):
        raise ValueError(f"beta and gamma must be >= 0, not {beta} and {gamma}")
    z, y = _checked(logits, labels)
    local = _sums_by_label(torch.sigmoid(-y * z), y)
    total, ranks = _over_ranks(local, z, y, group)
    n_p, n_u = _counts(total)

    def risks(sum_p: Tensor, count_p: Tensor, sum_u: Tensor, _count_u: Tensor) -> tuple[Tensor, Tensor]:
        # s(z) = 1 - s(-z), so the sum of s(z) over P is the rest.
        return prior * sum_p / n_p, sum_u / n_u - prior * (count_p - sum_p) / n_p

    r_plus, r_minus = risks(*total)
    local_r_plus, local_r_minus = risks(*local)
    # Not a clamp or relu: they would drop the gradient of r_minus and keep the one of r_plus.
    if r_minus < -beta:
        value, objective = r_plus - beta, -gamma * local_r_minus
    else:
        value, objective = r_plus + r_minus, local_r_plus + local_r_minus
    return _scalars(logits, value, ranks * objective)


def known_risk(logits: Tensor, prior: float, count: int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """``KNOWN * (1 - prior) * mean s(z)`` over known negatives: what they add to the objective of `nnpu_risk`.

    A part of the risk on negatives, seen instead of estimated: the convex combination of Sakai et al. (2017) up to its
    scale.

    Args:
        logits: this rank's, [n].
        prior: share of positives in U.
        count: known negatives of the global batch, on all ranks.
        group: as in `nnpu_risk`.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    return KNOWN * (1 - prior) * ranks / count * torch.sigmoid(logits).sum()


def naive_risk(logits: Tensor, labels: Tensor, *, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Class-balanced logistic loss of P against U: ``1/2 mean_P softplus(-z) + 1/2 mean_U softplus(z)``.

    It takes U for negatives: the baseline that every PU method has to beat. It also trains the scorer that
    prior estimates need: its minimum ``s(z) = f_p / (f_p + f_u)`` rises with the density ratio of P and U.

    Args, Returns and Raises are those of `nnpu_risk`; a mean over nothing counts as 0.
    """
    z, y = _checked(logits, labels)
    local = _sums_by_label(-F.logsigmoid(y * z), y)  # softplus is only approximate beyond 20
    total, ranks = _over_ranks(local, z, y, group)
    n_p, n_u = _counts(total)
    value, objective = (0.5 * (sum_p / n_p + sum_u / n_u) for sum_p, _, sum_u, _ in (total, local))
    return _scalars(logits, value, ranks * objective)


def vpu_risk(
    logits: Tensor,
    labels: Tensor,
    mixed_logits: Tensor,
    mix: Tensor | float,
    *,
    weight: float = 0.3,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Variational PU risk, which needs no prior (Chen et al. 2020).

    ``log mean_U phi - mean_P log phi + weight * mean (log target - log phi(mixed))^2`` with ``phi = s(z)``.
    The last term asks for consistency under MixUp: each unlabelled ``x_u`` is mixed with some positive
    ``x_p`` to ``mix * x_u + (1 - mix) * x_p``, with the target ``mix * phi(x_u) + (1 - mix)``. The authors
    draw one mix per batch from Beta(0.3, 0.3) and let the gradient flow through the target too. The trained
    phi is known only up to a factor: divide it by its maximum over the data before comparing it with 1/2.

    Args:
        logits: [B], as in `nnpu_risk`.
        labels: [B], as in `nnpu_risk`.
        mixed_logits: [n_u], one for each unlabelled entry of ``logits``, in the order they have there.
        mix: the share of ``x_u`` in the mixed inputs, in [0, 1]; scalar or [n_u].
        weight: of the consistency term, >= 0; the authors use 0.03 on CIFAR-10 and 0.3 elsewhere.
        group: as in `nnpu_risk`; each rank mixes its own images.

    Returns:
        ``(value, objective)`` as `nnpu_risk`, but of ``objective`` only the gradient has a meaning: exactly
        that of the global ``value``. A mean over nothing counts as 0, and so does its logarithm.

    Raises:
        ValueError: as `nnpu_risk`; also for a bad ``mixed_logits``, ``mix`` or ``weight``.
    """
    z, y = _checked(logits, labels)
    unlabelled = y == -1
    mixed = mixed_logits.double()
    share = torch.as_tensor(mix, dtype=z.dtype, device=z.device)
    if mixed.shape != z[unlabelled].shape:
        raise ValueError(f"mixed_logits must be [n_u], here {list(z[unlabelled].shape)}, not {list(mixed.shape)}")
    if (share.ndim and share.shape != mixed.shape) or not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError("mix must be a scalar or [n_u], within [0, 1]")
    if not weight >= 0:
        raise ValueError(f"weight must be >= 0, not {weight}")
    log_phi = F.logsigmoid(z)
    # log(mix * phi + 1 - mix), never leaving log space: the mix may be 1 and phi underflow.
    log_target = torch.logaddexp(share.log() + log_phi[unlabelled], torch.log1p(-share))
    gap = ((log_target - F.logsigmoid(mixed)) ** 2).sum()
    local = _sums_by_label(torch.where(unlabelled, log_phi.exp(), -log_phi), y)
    (*total, total_gap), ranks = _over_ranks([*local, gap], torch.cat([z, mixed]), y, group)
    n_p, n_u = _counts(total)
    phi_sum = total[2].clamp(min=sys.float_info.min)  # 0 if all logits of U are below -745
    log_mean_phi = (phi_sum / n_u).log() if total[3] > 0 else torch.zeros_like(phi_sum)
    value = log_mean_phi + total[0] / n_p + weight * total_gap / n_u
    # d log(sum phi) = d(sum phi) / sum phi: with the global sum held constant, the ranks' parts add up.
    objective = local[2] / phi_sum.item() + local[0] / n_p + weight * gap / n_u
    return _scalars(logits, value, ranks * objective)


def proxy_accuracy(p_logits: Tensor, u_logits: Tensor, prior: float) -> float:
    """Accuracy of ``z > 0`` on U, estimated without true labels: ``2 * prior * TPR + 1 - prior - u_plus``.

    ``TPR`` and ``u_plus`` are the shares of P and U with ``z > 0``. Unbiased if P was held out, is
    distributed like the positives of U, and the prior is right; noise can take it outside [0, 1]. It is the
    criterion for model choice of arXiv 2509.24228.

    Args:
        p_logits: [n_p], of held-out positives.
        u_logits: [n_u], of unlabelled images.
        prior: share of positives in U, in (0, 1).

    Raises:
        ValueError: an empty or non-finite input, or a prior outside (0, 1).

    Examples:
        Three quarters of P and a quarter of U are taken, where a quarter of U is positive.

        >>> import torch
        >>> from pukd_ray.selection.risk import proxy_accuracy
        >>> proxy_accuracy(torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([1.5, -1.0, -2.0, -3.0]), prior=0.25)
        0.875
    """
    _check_prior(prior)
    for name, logits in (("p_logits", p_logits), ("u_logits", u_logits)):
        if logits.numel() == 0 or not bool(logits.isfinite().all()):
            raise ValueError(f"{name} must be non-empty and finite")
    recall, selected = ((logits > 0).double().mean().item() for logits in (p_logits, u_logits))
    return 2 * prior * recall + 1 - prior - selected


def _sums_by_label(loss: Tensor, y: Tensor) -> list[Tensor]:
    """[sum over P, size of P, sum over U, size of U] of a per-sample loss, on this rank."""
    # Masks, not selections: to select, the host would have to wait for the device.
    positive, unlabelled = y == 1, y == -1
    return [(loss * positive).sum(), positive.sum(), (loss * unlabelled).sum(), unlabelled.sum()]


def _over_ranks(
    sums: Sequence[Tensor], z: Tensor, y: Tensor, group: dist.ProcessGroup | None
) -> tuple[list[Tensor], int]:
    """``sums`` added over the ranks, as float64 scalars on the host, and the number of ranks.

    Faulty logits and labels are counted along with them: a rank that raised by itself would leave the others
    waiting in the collective.
    """
    faults = [(~z.isfinite()).sum(), (y.abs() != 1).sum()]
    packed = torch.stack([t.detach().double() for t in (*sums, *faults)])
    ranks = 1
    if group is not None:
        dist.all_reduce(packed, group=group)
        ranks = dist.get_world_size(group)
    *total, bad_logits, bad_labels = packed.cpu().unbind()  # the one wait for the device
    if bad_logits > 0:
        raise ValueError(f"{bad_logits:.0f} logits are not finite: lower the learning rate or check the inputs")
    if bad_labels > 0:
        raise ValueError(f"{bad_labels:.0f} labels are neither +1 (positive) nor -1 (unlabelled)")
    return total, ranks


def _counts(total: Sequence[Tensor]) -> tuple[float, float]:
    """Global sizes of P and U as divisors: 1 for none, which makes that mean 0."""
    return max(total[1].item(), 1.0), max(total[3].item(), 1.0)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels in float64, once their shapes agree.

    A batch is a few thousand numbers, so precision is free. In float32 the slope s(z) s(-z) of a saturated
    logit has lost four digits at |z| = 10 and all of them at 17; autocast leaves float64 alone.
    """
    if logits.ndim != 1 or logits.shape != labels.shape:
        raise ValueError(f"logits and labels must both be [B], not {list(logits.shape)} and {list(labels.shape)}")
    return logits.double(), labels.double()


def _scalars(logits: Tensor, value: Tensor, objective: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the logits, but at least float32, and on their device."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return value.to(logits.device, dtype), objective.to(dtype)


def _check_prior(prior: float) -> None:
    if not 0 < prior < 1:
        raise ValueError(f"prior must lie strictly between 0 and 1, not {prior}")
