"""One 5-fold split of P and the sample of U serves prior, step choice, proxy accuracy and calibration.

Round 1 trains each fold's head P against U; its held-out scores give the prior. Round 2 trains it under the
PU risk with that prior; its held-out logits choose the number of steps and calibrate. No image is ever
scored by a head that was trained on it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from pukd_ray.selection.calibration import Calibration, fit_platt, resample_weights
from pukd_ray.selection.prior import bbe_prior, dedpul_prior, elkan_noto_ratio, prior_warnings
from pukd_ray.selection.risk import proxy_accuracy
from pukd_ray.selection.training import HeadTraining, Scaler, head_logits, train_head
from pukd_ray.spans import Span

FOLDS = 5
CHECKPOINTS = 10
BOOTSTRAPS = 200
SCORER_STEPS = 500  # P against U overfits soon: few steps, of which the best by held-out AUC


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


@ray.remote(num_cpus=1)
def fit_fold(p: np.ndarray, u: np.ndarray, fold: int, training: HeadTraining) -> HeldOut:
    """Train on the other folds of p [n_p, C] and u [n_u, C], score this one."""
    from pukd_ray.networks.teacher import use_threads

    began = time.time()
    use_threads()
    p_fold, u_fold = fold_of(len(p), training.seed), fold_of(len(u), training.seed + 1)
    p_rows, u_rows = np.flatnonzero(p_fold == fold), np.flatnonzero(u_fold == fold)
    p_train, u_train = p[p_fold != fold], u[u_fold != fold]
    scaler = Scaler.of(u_train)
    steps = checkpoint_steps(training.steps)
    p_logits: list[np.ndarray] = []
    u_logits: list[np.ndarray] = []

    def score(step: int, head: Any) -> None:
        del step
        p_logits.append(head_logits(head, scaler, p[p_rows]))
        u_logits.append(head_logits(head, scaler, u[u_rows]))

    train_head(p_train, u_train, scaler, training, checkpoints=steps, on_checkpoint=score)
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


@ray.remote(num_cpus=0.5)
def estimate_prior(fits: list[ray.ObjectRef], units: np.ndarray, seed: int) -> PriorReport:
    """Pool the folds' held-out scores, standardised per fold, and estimate the prior with its interval."""
    held_out: list[HeldOut] = ray.get(fits)
    aucs = [np.mean([_auc(h.p_logits[i], h.u_logits[i]) for h in held_out]) for i in range(len(held_out[0].steps))]
    best = int(np.argmax(aucs))
    p = np.zeros(sum(len(h.p_rows) for h in held_out))
    u = np.zeros(sum(len(h.u_rows) for h in held_out))
    folds = []
    for h in held_out:
        mean, sd = h.u_logits[best].mean(), h.u_logits[best].std() or 1.0
        p[h.p_rows], u[h.u_rows] = (h.p_logits[best] - mean) / sd, (h.u_logits[best] - mean) / sd
        folds.append(bbe_prior(p[h.p_rows], u[h.u_rows]).value)
    raw_p = np.concatenate([h.p_logits[best] for h in held_out])
    raw_u = np.concatenate([h.u_logits[best] for h in held_out])
    estimate = bbe_prior(p, u)
    dedpul, ratio = dedpul_prior(p, u), elkan_noto_ratio(expit(raw_p), expit(raw_u))
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(BOOTSTRAPS):
        w_p = resample_weights(rng, len(p)).astype(int)
        w_u = resample_weights(rng, len(u), units).astype(int)
        draws.append(bbe_prior(np.repeat(p, w_p), np.repeat(u, w_u)).value)
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
    """What the PU round says about the head that will be trained on everything."""

    steps: int
    """Chosen by proxy accuracy."""
    proxy_accuracy: float
    proxy_curve: tuple[tuple[int, float], ...]
    recall: float
    """Share of held-out P with logit > 0."""
    selected_share: float
    """Share of held-out U with logit > 0."""
    calibration: Calibration
    bootstrap: tuple[tuple[float, float], ...]
    """(slope, offset) refitted on resampled P and units, each with its own prior."""
    p_logits: np.ndarray
    u_logits: np.ndarray


@ray.remote(num_cpus=0.5)
def assess_fit(
    fits: list[ray.ObjectRef], units: np.ndarray, prior: float, prior_bootstrap: tuple[float, ...], seed: int
) -> FitReport:
    """Choose the steps and calibrate on the folds' pooled held-out logits."""
    import torch

    held_out: list[HeldOut] = ray.get(fits)
    steps = held_out[0].steps

    def pooled(i: int) -> tuple[np.ndarray, np.ndarray]:
        p = np.zeros(sum(len(h.p_rows) for h in held_out), np.float32)
        u = np.zeros(sum(len(h.u_rows) for h in held_out), np.float32)
        for h in held_out:
            p[h.p_rows], u[h.u_rows] = h.p_logits[i], h.u_logits[i]
        return p, u

    curve = []
    for i in range(len(steps)):
        p, u = pooled(i)
        curve.append(proxy_accuracy(torch.from_numpy(p), torch.from_numpy(u), prior))
    best = int(np.argmax(curve))
    p, u = pooled(best)
    rng = np.random.default_rng(seed)
    refits = []
    for drawn in prior_bootstrap:
        fit = fit_platt(
            p,
            u,
            float(np.clip(drawn, 1e-4, 1 - 1e-4)),
            p_weights=resample_weights(rng, len(p)),
            u_weights=resample_weights(rng, len(u), units),
        )
        refits.append((fit.slope, fit.offset))
    return FitReport(
        steps=steps[best],
        proxy_accuracy=curve[best],
        proxy_curve=tuple(zip(steps, curve, strict=True)),
        recall=float((p > 0).mean()),
        selected_share=float((u > 0).mean()),
        calibration=fit_platt(p, u, prior),
        bootstrap=tuple(refits),
        p_logits=p,
        u_logits=u,
    )
