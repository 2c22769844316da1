"""One 5-fold split of P and the sample of U serves prior, step choice, proxy accuracy and calibration.

Round 1 trains small selectors at a grid of priors; where their held-out logits part U says which is right
(`pukd_ray.selection.verdict`). Round 2 trains the selector under the PU risk with that prior; its held-out logits
choose the number of steps and calibrate. No image is ever scored by a network that was trained on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pukd_ray.runtime.devices import ALONE, Worker
from pukd_ray.runtime.timing import Span
from pukd_ray.selection.blend import Blend, Nearness, Tails, fit_nearness
from pukd_ray.selection.by_class import ClassBins
from pukd_ray.selection.calibration import Binned, Calibration, resample_weights, rescale_logits, tilt_of, tilted
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
from pukd_ray.selection.verdict import Verdict

FOLDS = 5
CHECKPOINTS = 10
BOOTSTRAPS = 200


@dataclass(frozen=True)
class Groups:
    """What is known of P and U beside their features, in the order of their rows."""

    units: np.ndarray
    """Unit of each of U, [n_u]: the bootstrap draws them whole."""
    p_classes: np.ndarray
    """The teacher's label of each of P, int64 [n_p]."""
    u_classes: np.ndarray
    """The same for U, [n_u]."""
    p_weights: np.ndarray | None = None
    """By which P stands for the relevant images of U, [n_p], mean 1, where that is known; else it is estimated."""
    tails: Tails | None = None
    """How near they are to P; None where that is not to be blended with the logit."""

    def with_tails(self, p: np.ndarray, u: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Groups, Nearness]:
        """(the same with `tails`, what they are from) of the last tap of P and U, as in `fit_nearness`."""
        nearness, tails = fit_nearness(p, u, labels, fold_of(len(p), seed), seed)
        return replace(self, tails=tails), nearness


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


def fold_rows(features: Examples, fold: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of P and of U that `fold` holds out."""
    p_fold, u_fold = fold_of(len(features.p), seed), fold_of(len(features.u), seed + 1)
    return np.flatnonzero(p_fold == fold), np.flatnonzero(u_fold == fold)


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


def fit_fold(
    features: Examples, fold: int, training: Training, trunk: Trunk | None = None, worker: Worker = ALONE
) -> HeldOut:
    """Train on the other folds, score this one; of P only the images themselves are scored."""
    began = time.time()
    features = features.on(worker)
    if trunk is not None:
        trunk = replace(trunk, pixels=trunk.pixels.on(worker))
    p_rows, u_rows = fold_rows(features, fold, training.seed)
    rest = np.setdiff1d(np.arange(len(features.p)), p_rows), np.setdiff1d(np.arange(len(features.u)), u_rows)
    seen = seen_by(features, trunk)
    held_out, learnt = seen.take(p_rows, u_rows), seen.take(*rest)
    last = training if trunk is None else training.finetuning()
    steps = checkpoint_steps(last.steps)
    p_logits: list[np.ndarray] = []
    u_logits: list[np.ndarray] = []

    def score(step: int, network: SelectorNetwork) -> None:
        del step
        scale = log_max_phi(network, learnt, training, worker.device)
        p_logits.append(rescale_logits(logits_of(network, held_out.p[:, 0], worker.device), scale))
        u_logits.append(rescale_logits(logits_of(network, held_out.u, worker.device), scale))

    if trunk is not None:
        trunk = replace(trunk, pixels=learnt)
    fit_selector(features.take(*rest), training, trunk, Callbacks(steps, score), worker)
    return HeldOut(steps, p_rows, u_rows, np.stack(p_logits), np.stack(u_logits), (began, time.time()))


def _in_row_order(
    held_out: Sequence[HeldOut], p_parts: Sequence[np.ndarray], u_parts: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The folds' values of P [n_p] and U [n_u], float32, back in the order of the rows."""
    p_rows, u_rows = (np.concatenate([getattr(h, rows) for h in held_out]) for rows in ("p_rows", "u_rows"))
    p, u = np.empty(len(p_rows), np.float32), np.empty(len(u_rows), np.float32)
    p[p_rows], u[u_rows] = np.concatenate(p_parts), np.concatenate(u_parts)
    return p, u


@dataclass(frozen=True)
class FitReport:
    """What the PU round says about the selector that will be trained on everything."""

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
    """Held out, as `pu_logit`: blended, if they are."""
    p_weights: np.ndarray
    """By which P stands for the relevant images of U, float64 [n_p], mean 1."""
    u_logits: np.ndarray
    blend: Blend | None = None
    """How they were."""

    def taking(self, share: float) -> FitReport:
        """The same with the threshold, 0, where it takes this share of U: all logits are moved alike."""
        by = np.float32(np.quantile(self.u_logits, 1 - share))
        return replace(
            self,
            recall=float((self.p_logits > by).mean()),
            selected_share=float((self.u_logits > by).mean()),
            calibration=self.calibration.shifted(float(by)),
            bootstrap=tuple(refit.shifted(float(by)) for refit in self.bootstrap),
            p_logits=self.p_logits - by,
            u_logits=self.u_logits - by,
        )


def assess_fit(held_out: Sequence[HeldOut], groups: Groups, verdict: Verdict, training: Training) -> FitReport:
    """Choose the steps and calibrate on the folds' pooled held-out logits.

    Args:
        held_out: one per fold.
        groups: of P and U.
        verdict: the prior, from whose interval each refit of the calibration draws its own: what is not known of it
            widens the intervals of precision and recall.
        training: what the folds were trained for.
    """
    tried = held_out[0].steps

    def pooled(i: int) -> tuple[np.ndarray, np.ndarray]:
        return _in_row_order(held_out, [h.p_logits[i] for h in held_out], [h.u_logits[i] for h in held_out])

    # Of the whole schedule the same share, where the folds' last phase had fewer steps.
    steps = [max(1, round(step * training.steps / tried[-1])) for step in tried]
    curve = []
    for i in range(len(tried)):
        p, u = pooled(i)
        curve.append(proxy_accuracy(torch.from_numpy(p), torch.from_numpy(u), verdict.train))
    best = latest_good(curve, pooled(int(np.argmax(curve)))[0], verdict.train)
    p, u = pooled(best)
    blend = None
    if groups.tails is not None:
        blend = Blend.learn(p, u, groups.tails)
        p, u = blend(p, groups.tails.p), blend(u, groups.tails.u)
    binned, rng = Binned.of(p, u), np.random.default_rng(training.seed)
    p_weights = groups.p_weights
    if p_weights is None:
        p_weights = ClassBins.of(p, u, groups.p_classes, groups.u_classes).fit().p_weights

    def fitted(prior: float, divergence: float, weights: np.ndarray, u_weights: np.ndarray | None) -> Calibration:
        tilt = tilt_of(divergence, p)
        return replace(binned.fit(prior, tilted(weights, p, tilt), u_weights)[0], tilt=tilt)

    calibration = fitted(verdict.prior, verdict.bias_of_logits(), p_weights, None)
    refits = [
        fitted(
            verdict.drawn_prior(rng),
            verdict.drawn_bias_of_logits(rng),
            p_weights * resample_weights(rng, len(p)),
            resample_weights(rng, len(u), groups.units),
        )
        for _ in range(BOOTSTRAPS)
    ]
    return FitReport(
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
        blend=blend,
    )
