"""One 5-fold split of P and the sample of U serves prior, step choice, proxy accuracy and calibration.

Round 1 trains each fold's head P against U; its held-out scores give a first prior. Round 2 trains the selector under
the PU risk with that prior; its held-out logits choose the number of steps, calibrate and refine the prior. No image
is ever scored by a network that was trained on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from pukd_ray.runtime.timing import Span
from pukd_ray.selection.calibration import Binned, Calibration, resample_weights, rescale_logits
from pukd_ray.selection.losses import LOSSES
from pukd_ray.selection.prior import bbe_prior, dedpul_prior, elkan_noto_ratio, positive_weights, prior_warnings
from pukd_ray.selection.risk import proxy_accuracy
from pukd_ray.selection.training import (
    Callbacks,
    Examples,
    SelectorNetwork,
    Training,
    Trunk,
    fit_selector,
    log_max_phi,
    logits_of,
    seen_by,
)

FOLDS = 5
CHECKPOINTS = 10
BOOTSTRAPS = 200
# The refined prior assumes that nothing but relevant images scores highest, and is too high where others look alike: up
# to this share of the top may be others, but not more than near the boundary (seen on the tuning pools of
# pukd_ray.demo.pools: 5 % too high where classes overlap, right where they do not).
LOOKALIKES = 0.1


@dataclass(frozen=True)
class Groups:
    """What P and U fall into, in the order of their rows."""

    units: np.ndarray
    """Unit of each of U, [n_u]: the bootstrap draws them whole."""
    p_classes: np.ndarray
    """The teacher's label of each of P, int64 [n_p]."""
    u_classes: np.ndarray
    """The same for U, [n_u]."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out logits of one fold at each checkpoint, float32 [checkpoints, n], and whose they are."""

    steps: tuple[int, ...]
    p_rows: np.ndarray
    u_rows: np.ndarray
    p_logits: np.ndarray
    u_logits: np.ndarray
    span: Span


def fold_of(count: int, seed: int) -> np.ndarray:
    """Fold number of each of `count` rows, sizes equal up to one."""
    return np.random.default_rng(seed).permutation(np.arange(count) % FOLDS)


def checkpoint_steps(steps: int) -> tuple[int, ...]:
    """Up to CHECKPOINTS evenly spaced steps, the last one included."""
    return tuple(sorted({max(1, round(steps * (i + 1) / CHECKPOINTS)) for i in range(CHECKPOINTS)}))


def latest_good(curve: Sequence[float], p_logits: np.ndarray, prior: float) -> int:
    """Index of the last checkpoint that is as good as the best, up to the standard error of its proxy accuracy.

    One-standard-error rule (Breiman et al. 1984), here towards longer trainings: noise in the recall of P should not
    end one early, while the learning rate is still high. `p_logits` [n_p] are those of the best.
    """
    recall = float((p_logits > 0).mean())
    error = 2 * prior * float(np.sqrt(recall * (1 - recall) / len(p_logits)))
    return int(np.flatnonzero(np.array(curve) >= max(curve) - error)[-1])


def fit_fold(features: Examples, fold: int, training: Training, trunk: Trunk | None = None) -> HeldOut:
    """Train on the other folds, score this one; of P only the images themselves are scored."""
    began = time.time()
    p_fold, u_fold = fold_of(len(features.p), training.seed), fold_of(len(features.u), training.seed + 1)
    p_rows, u_rows = np.flatnonzero(p_fold == fold), np.flatnonzero(u_fold == fold)
    rest = np.flatnonzero(p_fold != fold), np.flatnonzero(u_fold != fold)
    seen = seen_by(features, trunk)
    held_out, learnt = seen.take(p_rows, u_rows), seen.take(*rest)
    last = training if trunk is None else training.finetuning()
    steps = checkpoint_steps(last.steps)
    p_logits: list[np.ndarray] = []
    u_logits: list[np.ndarray] = []

    def score(step: int, network: SelectorNetwork) -> None:
        del step
        scale = log_max_phi(network, learnt, training)
        p_logits.append(rescale_logits(logits_of(network, held_out.p[:, 0]), scale))
        u_logits.append(rescale_logits(logits_of(network, held_out.u), scale))

    if trunk is not None:
        trunk = replace(trunk, pixels=learnt)
    fit_selector(features.take(*rest), training, trunk, Callbacks(steps, score))
    return HeldOut(steps, p_rows, u_rows, np.stack(p_logits), np.stack(u_logits), (began, time.time()))


@dataclass(frozen=True)
class PriorReport:
    """The estimated prior and what speaks for and against it."""

    value: float
    lower: float
    upper: float
    threshold: float
    folds: tuple[float, ...]
    dedpul: float
    elkan_noto: float
    auc: float
    """Held-out P against U: free of the prior, keeps the order of selectors."""
    bootstrap: tuple[float, ...]
    warnings: tuple[str, ...]


def _auc(p: np.ndarray, u: np.ndarray) -> float:
    return float(roc_auc_score(np.r_[np.ones(len(p)), np.zeros(len(u))], np.r_[p, u]))


def _in_row_order(
    held_out: Sequence[HeldOut], p_parts: Sequence[np.ndarray], u_parts: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The folds' values of P [n_p] and U [n_u], float32, back in the order of the rows."""
    p_rows, u_rows = (np.concatenate([getattr(h, rows) for h in held_out]) for rows in ("p_rows", "u_rows"))
    p, u = np.empty(len(p_rows), np.float32), np.empty(len(u_rows), np.float32)
    p[p_rows], u[u_rows] = np.concatenate(p_parts), np.concatenate(u_parts)
    return p, u


def estimate_prior(held_out: Sequence[HeldOut], groups: Groups, seed: int) -> PriorReport:
    """Pool the folds' held-out scores, standardised per fold, and estimate the prior with its interval."""
    aucs = [np.mean([_auc(h.p_logits[i], h.u_logits[i]) for h in held_out]) for i in range(len(held_out[0].steps))]
    best = int(np.argmax(aucs))
    scales = [(h.u_logits[best].mean(), h.u_logits[best].std() or 1.0) for h in held_out]
    p, u = _in_row_order(
        held_out,
        [(h.p_logits[best] - mean) / sd for h, (mean, sd) in zip(held_out, scales, strict=True)],
        [(h.u_logits[best] - mean) / sd for h, (mean, sd) in zip(held_out, scales, strict=True)],
    )
    weights = positive_weights(p, u, groups.p_classes, groups.u_classes)
    folds = [bbe_prior(p[h.p_rows], u[h.u_rows], p_weights=weights[h.p_rows]).value for h in held_out]
    raw_p, raw_u = _in_row_order(held_out, [h.p_logits[best] for h in held_out], [h.u_logits[best] for h in held_out])
    estimate = bbe_prior(p, u, p_weights=weights)
    dedpul, ratio = dedpul_prior(p, u, weights), elkan_noto_ratio(expit(raw_p), expit(raw_u), weights)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(BOOTSTRAPS):
        p_rows = np.repeat(np.arange(len(p)), resample_weights(rng, len(p)).astype(int))
        u_rows = np.repeat(np.arange(len(u)), resample_weights(rng, len(u), groups.units).astype(int))
        drawn = positive_weights(p[p_rows], u[u_rows], groups.p_classes[p_rows], groups.u_classes[u_rows])
        draws.append(bbe_prior(p[p_rows], u[u_rows], p_weights=drawn).value)
    lower, upper = np.quantile(draws, [0.05, 0.95])
    return PriorReport(
        value=estimate.value,
        lower=float(min(lower, estimate.value)),
        upper=float(max(upper, estimate.value)),
        threshold=estimate.threshold,
        folds=tuple(folds),
        dedpul=dedpul,
        elkan_noto=ratio,
        auc=_auc(p, u),
        bootstrap=tuple(draws),
        warnings=tuple(prior_warnings(estimate, dedpul=dedpul, elkan_noto=ratio)),
    )


@dataclass(frozen=True)
class FitReport:
    """What the PU round says about the selector that will be trained on everything."""

    prior: float
    """The prior given, or the one refined on this round's logits."""
    prior_interval: tuple[float, float]
    """90 %, from the bootstrap."""
    refined: bool
    steps: int
    """Chosen by proxy accuracy; of the head where the trunk is fine-tuned too."""
    proxy_accuracy: float
    proxy_curve: tuple[tuple[int, float], ...]
    recall: float
    """Share of held-out P with logit > 0."""
    selected_share: float
    """Share of held-out U with logit > 0."""
    calibration: Calibration
    bootstrap: tuple[Calibration, ...]
    """Refits on resampled P and units, each with its own prior."""
    p_logits: np.ndarray
    p_weights: np.ndarray
    """By which P stands for the relevant images of U, float64 [n_p], mean 1."""
    u_logits: np.ndarray


def assess_fit(
    held_out: Sequence[HeldOut],
    groups: Groups,
    prior: float,
    training: Training,
    first: PriorReport | None,
) -> FitReport:
    """Choose the steps and calibrate on the folds' pooled held-out logits.

    Args:
        held_out: one per fold.
        groups: of P and U.
        prior: known, or a first estimate.
        training: what the folds were trained for.
        first: where `prior` comes from if it is an estimate. It is then refined, where the loss allows it, by
            conditional likelihood with room for look-alikes. Where that is less than half or more than one and a
            half times the first, it is not believed.
    """
    tried = held_out[0].steps

    def pooled(i: int) -> tuple[np.ndarray, np.ndarray]:
        return _in_row_order(held_out, [h.p_logits[i] for h in held_out], [h.u_logits[i] for h in held_out])

    # Of the whole schedule the same share, where the folds' last phase had fewer steps.
    steps = [max(1, round(step * training.steps / tried[-1])) for step in tried]
    curve = []
    for i in range(len(tried)):
        p, u = pooled(i)
        curve.append(proxy_accuracy(torch.from_numpy(p), torch.from_numpy(u), prior))
    best = latest_good(curve, pooled(int(np.argmax(curve)))[0], prior)
    p, u = pooled(best)
    logits = Binned.of(p, u)
    rng = np.random.default_rng(training.seed)
    # Those of the first round again, from logits that know more.
    p_weights = positive_weights(p, u, groups.p_classes, groups.u_classes)
    weights = [
        (p_weights * resample_weights(rng, len(p)), resample_weights(rng, len(u), groups.units))
        for _ in range(BOOTSTRAPS)
    ]
    refined = False
    if first is not None and LOSSES[training.loss].refines_prior:
        calibration, estimate = logits.fit(None, p_weights)
        refined = 0.5 * prior < estimate < 1.5 * prior
    if refined:
        alike = calibration(u)
        lookalikes = min(LOOKALIKES, float(np.minimum(alike, 1 - alike).sum() / alike.sum()))
        prior, draws = estimate, [logits.fit(None, *drawn) for drawn in weights]
    else:
        lookalikes = 0.0
        priors = [prior] * BOOTSTRAPS if first is None else np.clip(first.bootstrap, 1e-4, 1 - 1e-4).tolist()
        calibration, _ = logits.fit(prior, p_weights)
        draws = [(logits.fit(known, *drawn)[0], known) for known, drawn in zip(priors, weights, strict=True)]
    plateaus = 1 - rng.uniform(0, lookalikes, BOOTSTRAPS)
    refits = [replace(refit, plateau=float(share)) for (refit, _), share in zip(draws, plateaus, strict=True)]
    calibration = replace(calibration, plateau=1 - lookalikes / 2)
    prior = calibration.plateau * prior
    lower, upper = np.quantile(plateaus * [known for _, known in draws], [0.05, 0.95])
    return FitReport(
        prior=prior,
        prior_interval=(float(min(lower, prior)), float(max(upper, prior))),
        refined=refined,
        steps=steps[best],
        proxy_accuracy=curve[best],
        proxy_curve=tuple(zip(steps, curve, strict=True)),
        recall=float((p > 0).mean()),
        selected_share=float((u > 0).mean()),
        calibration=calibration,
        bootstrap=tuple(refits),
        p_logits=p,
        p_weights=p_weights,
        u_logits=u,
    )
