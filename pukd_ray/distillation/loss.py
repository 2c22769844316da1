"""The objective of robust knowledge distillation (RKD, Xu et al. 2019), on one process or many.

The loss of a batch is ``(T^2 / sum_i s_i) sum_i s_i w[c_i] KL(teacher_i || student_i)``, both softened by the
temperature T, where ``c_i`` is the teacher's class of image i, ``s_i`` its own weight (1 unless given) and w the
worst-case class weights for this very batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pukd_ray.distillation.weights import BALLS, sampled_worst_case, worst_case, worst_case_weights, worst_draw

ADVERSARIES = (*BALLS, "draws", "none")
"""Who chooses the class weights: a closed form, the worst of given draws, or nobody (the base weights)."""

NOT_FINITE = "the global batch is empty, or a logit is not finite: lower the learning rate"


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each sample, in nats, both softened by the temperature; without factor T^2.

    Args:
        student_logits: [N, K], any real dtype; below float32 the computation is in float32, also under
            autocast.
        teacher_logits: [N, K]; no gradient flows into them.
        temperature: > 0.

    Returns:
        [N], at least float32.

    Raises:
        ValueError: differing or wrong shapes, or a bad temperature.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must both be [N, K], "
            f"not {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, not {temperature}")
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    with torch.autocast(student_logits.device.type, enabled=False):
        student = F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
        teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def per_class_sums(kl: Tensor, teacher_labels: Tensor, num_classes: int) -> Tensor:
    """Sums of ``kl`` [N] over the samples of each class: [num_classes], float64, without gradient.

    Args:
        kl: [N], from `kl_divergence`.
        teacher_labels: [N], integer, in [0, num_classes).
        num_classes: K.
    """
    sums = torch.zeros(num_classes, dtype=torch.float64, device=kl.device)
    return sums.index_add_(0, teacher_labels, kl.detach().double())


def rkd_objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    base_weights: Tensor,
    epsilon: float,
    adversary: str,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    draws: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The robust distillation loss of the global batch under its worst-case class weights.

    A sample's class is the teacher's argmax. The weights follow from what each class contributes to the loss
    of the global batch (one all_reduce of K + 1 detached float64 numbers), so that all ranks use the same
    ones: a worst case per rank would be another, stronger adversary. In the gradient they are constants
    (Danskin's theorem). ``objective`` carries the factor W, the number of ranks, which the mean over ranks of
    DistributedDataParallel cancels: the gradient is that of the global batch for any split of it. Every rank
    must call.

    Args:
        student_logits: [N, K], as in `kl_divergence`.
        teacher_logits: [N, K].
        base_weights: [K], from `class_weights`.
        epsilon: radius around them, as in `worst_case_weights`; ``draws`` and ``none`` do not use it.
        adversary: one of `ADVERSARIES`.
        temperature: T, > 0.
        group: the ranks that hold the batch together; None: this is the whole batch.
        draws: [M, K], the candidates for the adversary ``draws``, the same on every rank.
        sample_weights: [N], >= 0, such as P(relevant); only their ratios within the global batch matter.

    Returns:
        ``(value, objective, weights)``: the loss of the global batch, to log; the scalar to backpropagate;
        the weights used, [K], float64, all where the logits are. Only ``objective`` carries a gradient.

    Raises:
        ValueError: a bad shape or argument; or, on all ranks alike, an empty global batch (or one without
            weight) or a non-finite loss. On an accelerator nothing waits for it, and such a ``value`` is not finite:
            say `NOT_FINITE` when you look at it.
    """
    if adversary not in ADVERSARIES:
        raise ValueError(f"adversary must be one of {', '.join(ADVERSARIES)}, not {adversary!r}")
    if adversary == "draws" and draws is None:
        raise ValueError("the adversary 'draws' needs draws [M, K]")
    kl = kl_divergence(student_logits, teacher_logits, temperature)
    num_samples, num_classes = student_logits.shape
    if base_weights.shape != (num_classes,):
        raise ValueError(f"base_weights must be [{num_classes}], not {list(base_weights.shape)}")
    if sample_weights is not None and sample_weights.shape != (num_samples,):
        raise ValueError(f"sample_weights must be [{num_samples}], not {list(sample_weights.shape)}")
    if sample_weights is not None:
        kl = kl * sample_weights.detach().to(kl)
    classes = teacher_logits.argmax(dim=1)
    sums = per_class_sums(kl, classes, num_classes)
    mass = sums.new_tensor(num_samples) if sample_weights is None else sample_weights.to(sums).sum()
    totals = torch.cat([sums, mass[None]])
    ranks = 1
    if group is not None:
        dist.all_reduce(totals, group=group)
        ranks = dist.get_world_size(group)
    scale = temperature**2 / totals[-1]  # by nothing: not finite
    per_class_loss = totals[:-1] * scale
    on_host = totals.device.type == "cpu"  # elsewhere a look at a number would wait for the device
    # Only after the collective: a rank that raised by itself would leave the others waiting in it.
    if on_host and not bool(per_class_loss.isfinite().all()):
        raise ValueError(NOT_FINITE)
    weights = base_weights.detach().to(totals)
    if draws is not None and adversary == "draws":
        weights = (sampled_worst_case if on_host else worst_draw)(draws.to(totals), per_class_loss)
    elif adversary != "none":
        weights = (worst_case_weights if on_host else worst_case)(weights, per_class_loss, epsilon, adversary)
    value = (weights * per_class_loss).sum().to(kl)
    objective = (ranks * scale).to(kl) * (weights.to(kl)[classes] * kl).sum()
    return value, objective, weights
