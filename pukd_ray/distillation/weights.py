"""Class weights of robust distillation (Xu et al. 2019): from the teacher, and the worst case near those.

The selected images are imbalanced, and all that is known of their classes is the teacher's opinion. So the
student trains against the weights that hurt it most within a distance epsilon of the estimated ones. The loss
is linear in the weights, ``sum_k w_k l_k``, hence its maximum over a ball has a closed form. K is the number
of classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BALLS = ("l2_sum_zero", "l2", "linf", "linf_sum_zero")
"""Sets of weights around the base ones; the ``sum_zero`` ones keep their sum, hence the scale of the loss."""


def class_weights(softmax_sums: Tensor, *, smoothing: float = 0.0, clip: tuple[float, float] | None = None) -> Tensor:
    """Weights inverse to the classes' sizes: ``w_k = K (1 / c_k) / sum_j (1 / c_j)`` (Xu et al. 2019).

    Args:
        softmax_sums: [K], the teacher's softmax outputs summed over the images (soft), or its predictions
            counted (hard); any real dtype.
        smoothing: adds ``smoothing * N / K`` to each sum, N their total, lest a class that the teacher hardly
            ever gives takes all the weight; >= 0, e.g. 1e-3.
        clip: (low, high), 0 < low <= high: bounds put on the weights before they are scaled to sum K once
            more, which can move them past the bounds again.

    Returns:
        [K], float64, positive, summing to K.

    Raises:
        ValueError: not a non-empty vector; a negative or non-finite sum; a sum of zero (after smoothing); a
            bad ``smoothing`` or ``clip``.

    Examples:
        >>> import torch
        >>> from pukd_ray import class_weights
        >>> [round(w, 4) for w in class_weights(torch.tensor([60.0, 30.0, 10.0])).tolist()]
        [0.3333, 0.6667, 2.0]

        A class that the teacher never gives:

        >>> weights = class_weights(torch.tensor([60.0, 40.0, 0.0]), smoothing=1e-3, clip=(0.1, 10.0))
        >>> [round(w, 4) for w in weights.tolist()]
        [0.0939, 0.0939, 2.8123]
    """
    sums = softmax_sums.detach().double()
    if sums.ndim != 1 or sums.numel() == 0:
        raise ValueError(f"softmax_sums must be [K], not {list(sums.shape)}")
    if not bool((sums.isfinite() & (sums >= 0)).all()):
        raise ValueError("softmax_sums must be finite and >= 0")
    if not 0 <= smoothing < float("inf"):
        raise ValueError(f"smoothing must be >= 0 and finite, not {smoothing}")
    if clip is not None and not 0 < clip[0] <= clip[1]:
        raise ValueError(f"clip must be (low, high) with 0 < low <= high, not {clip}")
    sums = sums + smoothing * sums.mean()
    empty = (sums == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the teacher never predicts classes {empty}: their weight is undefined, set smoothing > 0")
    weights = _scaled_to_count(sums.min() / sums)  # 1 / sums could overflow
    return weights if clip is None else _scaled_to_count(weights.clamp(*clip))


def worst_case_weights(base: Tensor, per_class_loss: Tensor, epsilon: float, ball: str) -> Tensor:
    """The weights within a ball around ``base`` that maximise ``sum_k w_k l_k``, in closed form.

    With r = min(epsilon, min(base)), so that weights stay >= 0, and m the mean of l:

    - ``l2``: ``base + r * l / |l|``.
    - ``linf``: ``base + r``.
    - ``l2_sum_zero``: ``base + r * (l - m) / |l - m|``.
    - ``linf_sum_zero``: +r on the K // 2 largest l, -r on the K // 2 smallest; equals rank by class index.

    Where the loss prefers no direction (l = 0, or all l equal for the ``sum_zero`` balls) the result is
    ``base``. The gradient of the maximum is that of the loss with these weights held constant (Danskin's
    theorem).

    Args:
        base: [K], >= 0, from `class_weights`.
        per_class_loss: [K], >= 0 up to rounding: the loss that each class contributes to the mean loss.
        epsilon: radius of the ball, >= 0.
        ball: one of `BALLS`.

    Returns:
        [K], float64.

    Raises:
        ValueError: an unknown ball; differing or wrong shapes; negative or non-finite numbers.

    Examples:
        The class that loses most gains weight, at the cost of the one that loses least.

        >>> import torch
        >>> from pukd_ray import worst_case_weights
        >>> base, losses = torch.ones(3), torch.tensor([0.3, 0.1, 0.2])
        >>> [round(w, 4) for w in worst_case_weights(base, losses, 0.1, "l2_sum_zero").tolist()]
        [1.0707, 0.9293, 1.0]
        >>> [round(w, 4) for w in worst_case_weights(base, losses, 0.1, "linf_sum_zero").tolist()]
        [1.1, 0.9, 1.0]
    """
    if ball not in BALLS:
        raise ValueError(f"ball must be one of {', '.join(BALLS)}, not {ball!r}")
    base, loss = base.detach().double(), per_class_loss.detach().double()
    if base.ndim != 1 or base.numel() == 0 or base.shape != loss.shape:
        raise ValueError(f"base and per_class_loss must both be [K], not {list(base.shape)} and {list(loss.shape)}")
    if not bool((base.isfinite() & (base >= 0)).all()):
        raise ValueError("base weights must be finite and >= 0")
    if not bool(loss.isfinite().all()):
        raise ValueError("per_class_loss must be finite: the training has diverged")
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be >= 0 and finite, not {epsilon}")
    return worst_case(base, loss, epsilon, ball)


def worst_case(base: Tensor, loss: Tensor, epsilon: float, ball: str) -> Tensor:
    """`worst_case_weights` of float64 arguments that nobody checks: nothing here waits for a device."""
    if ball.endswith("sum_zero"):
        # Relative to the smallest: otherwise the rounding error of the mean of (nearly) equal losses would be
        # normalised to a full step, and the sum of that is not zero.
        loss = loss - loss.min()
    radius = base.min().clamp(max=epsilon)
    match ball:
        case "l2":
            step = _unit(loss)
        case "linf":
            step = torch.ones_like(base)
        case "l2_sum_zero":
            step = _unit(loss - loss.mean())
        case _:
            step = torch.zeros_like(base)
            order = loss.argsort(descending=True, stable=True)
            half = len(base) // 2
            step[order[:half]] = 1
            step[order[len(base) - half :]] = -1
    moved = (base + radius * step).clamp(min=0)  # -1e-17 is rounding, not a weight
    return torch.where(loss.any(), moved, base)


def sampled_worst_case(draws: Tensor, per_class_loss: Tensor) -> Tensor:
    """The row w of ``draws`` with the largest ``sum_k w_k l_k``, the first of equals.

    This is the adversary of the authors' code, which draws ``base + U[0, epsilon)^K`` once and takes the
    worst draw in each step. As noise and losses are >= 0, ``base`` itself never wins there.

    Args:
        draws: [M, K], the candidates, ``base`` among them; the same on every rank.
        per_class_loss: [K], of the global batch.

    Returns:
        [K], float64.

    Raises:
        ValueError: wrong shapes, or non-finite numbers.
    """
    draws, loss = draws.detach().double(), per_class_loss.detach().double()
    if draws.ndim != 2 or len(draws) == 0 or draws.shape[1:] != loss.shape:
        raise ValueError(f"draws must be [M, K] and per_class_loss [K], not {list(draws.shape)} and {list(loss.shape)}")
    if not bool(draws.isfinite().all() and loss.isfinite().all()):
        raise ValueError("draws and per_class_loss must be finite")
    return worst_draw(draws, loss)


def worst_draw(draws: Tensor, loss: Tensor) -> Tensor:
    """`sampled_worst_case` of float64 arguments that nobody checks."""
    first = (draws * loss).sum(dim=1).argmax()  # of equals
    return draws.index_select(0, first[None])[0]  # an index would be looked at


def _scaled_to_count(weights: Tensor) -> Tensor:
    return weights * (len(weights) / weights.sum())


def _unit(direction: Tensor) -> Tensor:
    direction = direction / direction.abs().max()  # squares of tiny losses would underflow
    length: Tensor = torch.linalg.vector_norm(direction)
    return direction / length
