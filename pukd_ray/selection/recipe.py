"""How a selector is made of features: the one recipe of the stage `selector` and of the study that measures it.

`fit_and_calibrate` has its five steps in order; an `Executor` runs their jobs, in this process or on a cluster. What
the selector then takes of a corpus is estimated by `pukd_ray.selection.histogram`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from pukd_ray.config import SelectorConfig
from pukd_ray.networks.selector import PixelSelector, SelectorHead
from pukd_ray.networks.teacher import dump_state
from pukd_ray.selection.calibration import Calibration, carry_over, rescale_logits
from pukd_ray.selection.crossfit import (
    FOLDS,
    FitReport,
    Groups,
    HeldOut,
    PriorReport,
    assess_fit,
    estimate_prior,
    fit_fold,
)
from pukd_ray.selection.training import (
    Examples,
    SelectorNetwork,
    Training,
    Trunk,
    fit_selector,
    log_max_phi,
    logits_of,
    seen_by,
)

SCORER_STEPS = 500  # P against U overfits soon: few steps, of which the best by held-out AUC


@dataclass(frozen=True)
class FinalFit:
    """The selector trained on everything."""

    head: bytes
    """state_dict of the `SelectorHead`, and `log_max_phi`."""
    trunk: bytes | None
    """state_dict of the trunk, where it was fine-tuned."""
    log_max_phi: float
    """What `rescale_logits` needs."""
    u_logits: np.ndarray
    """Logits of the sample of U, rescaled, float32 [n_u]."""
    risk_curve: tuple[tuple[int, float], ...] = ()
    """(step, risk of its global batch), where it was recorded."""

    @classmethod
    def of(
        cls,
        network: SelectorNetwork,
        seen: Examples,
        training: Training,
        device: torch.device | None = None,
        risk_curve: Sequence[tuple[int, float]] = (),
    ) -> FinalFit:
        """Of a network on `device`, trained so on what it has `seen`."""
        head = network if isinstance(network, SelectorHead) else network.head
        scale = log_max_phi(network, seen, training, device)
        return cls(
            dump_state({**head.state_dict(), "log_max_phi": torch.tensor(scale, dtype=torch.float64)}),
            dump_state(network.extractor.model.state_dict()) if isinstance(network, PixelSelector) else None,
            scale,
            rescale_logits(logits_of(network, seen.u, device), scale),
            tuple(risk_curve),
        )


@dataclass(frozen=True)
class FittedSelector:
    """All that the recipe finds out."""

    first: PriorReport
    """From the scorers of P against U."""
    fit: FitReport
    """From the PU round."""
    training: Training
    """Of the selector on everything."""
    final: FinalFit
    calibration: Calibration
    """Of the logits of `final`."""
    bootstrap: list[Calibration]
    """Its refits on resampled P and units."""


class Executor(Protocol):
    """Where the recipe's jobs run. It holds the features, the trunk and the groups of P and U; what a fold held out may
    be a reference to it, which only the executor looks into."""

    def fit_folds(self, name: str, training: Training, *, with_trunk: bool) -> Sequence[Any]:
        """`fit_fold` for each fold; without trunk on features alone."""

    def estimate_prior(self, held_out: Sequence[Any], seed: int) -> PriorReport:
        """`crossfit.estimate_prior`."""

    def assess_fit(
        self, held_out: Sequence[Any], prior: float, training: Training, first: PriorReport | None
    ) -> FitReport:
        """`crossfit.assess_fit`."""

    def fit_final(self, training: Training) -> FinalFit:
        """Train on all of P and the sample."""


@dataclass(frozen=True)
class InProcess:
    """The `Executor` that needs nothing else: one job after the other, here."""

    features: Examples
    groups: Groups
    trunk: Trunk | None = None

    def fit_folds(self, name: str, training: Training, *, with_trunk: bool) -> list[HeldOut]:
        """As `Executor` says."""
        del name  # no progress to show
        return [fit_fold(self.features, k, training, self.trunk if with_trunk else None) for k in range(FOLDS)]

    def estimate_prior(self, held_out: Sequence[HeldOut], seed: int) -> PriorReport:
        """As `Executor` says."""
        return estimate_prior(held_out, self.groups, seed)

    def assess_fit(
        self, held_out: Sequence[HeldOut], prior: float, training: Training, first: PriorReport | None
    ) -> FitReport:
        """As `Executor` says."""
        return assess_fit(held_out, self.groups, prior, training, first)

    def fit_final(self, training: Training) -> FinalFit:
        """As `Executor` says."""
        network = fit_selector(self.features, training, self.trunk)
        return FinalFit.of(network, seen_by(self.features, self.trunk), training)


def fit_and_calibrate(
    executor: Executor,
    selector: SelectorConfig,
    seed: int,
    check_prior: Callable[[PriorReport], None] | None = None,
) -> FittedSelector:
    """Estimate the prior, choose the steps, train the selector on everything and calibrate it.

    Args:
        executor: holds the data, runs the jobs.
        selector: the config's `selector`.
        seed: of all that is random.
        check_prior: sees the first estimate before the costly part, and may raise.
    """
    estimated = selector.prior == "auto"

    # 1. P against U, cross-fitted: a first prior. It needs no trunk of its own.
    scorers = executor.fit_folds("P against U", scorer_training(selector, seed), with_trunk=False)
    first = executor.estimate_prior(scorers, seed)
    if check_prior is not None:
        check_prior(first)

    # 2. The same folds under the PU risk.
    prior, training = pu_training(selector, first, seed)
    folds = executor.fit_folds(selector.loss, training, with_trunk=True)

    # 3. Their held-out logits choose the steps, calibrate and refine the prior.
    fit = executor.assess_fit(folds, prior, training, first if estimated else None)

    # 4. The selector on all of P.
    training = final_training(training, fit)
    final = executor.fit_final(training)

    # 5. Its logits differ a little from the folds': the calibration is carried over to them.
    calibration, bootstrap = carry_over(fit.calibration, fit.bootstrap, final.u_logits, fit.prior)
    return FittedSelector(first, fit, training, final, calibration, bootstrap)


def scorer_training(selector: SelectorConfig, seed: int) -> Training:
    """Round 1: P against U, equally weighted."""
    steps = min(selector.steps, SCORER_STEPS)
    return Training("naive", 0.5, steps, selector.batch_size, selector.lr, seed)


def pu_training(selector: SelectorConfig, first: PriorReport, seed: int) -> tuple[float, Training]:
    """(prior to start from, round 2)."""
    if selector.prior != "auto":
        prior = used = float(np.clip(selector.prior, 1e-4, 1 - 1e-4))
    else:
        prior = float(np.clip(first.value, 1e-4, 1 - 1e-4))
        # A prior too small is the dangerous side (docs/method.md, "A wrong prior is not symmetric"): err high in
        # training.
        used = float(np.clip(max(prior, first.upper / 2), 1e-3, 0.99))
    training = Training(selector.loss, used, selector.steps, selector.batch_size, selector.lr, seed, selector.batches)
    return prior, training


def final_training(training: Training, fit: FitReport) -> Training:
    """The selector on everything: stopped where the folds were best, on the schedule that they followed."""
    return replace(training, steps=fit.steps, horizon=training.steps)
