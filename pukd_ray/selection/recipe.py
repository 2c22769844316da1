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
from pukd_ray.runtime.devices import ALONE, Worker
from pukd_ray.selection.blend import Blend, Tails
from pukd_ray.selection.calibration import Calibration, carry_over, rescale_logits
from pukd_ray.selection.crossfit import (
    FOLDS,
    FitReport,
    Groups,
    HeldOut,
    assess_fit,
    fit_fold,
    fold_rows,
)
from pukd_ray.selection.grid import COARSE, Grid, fit_grid_fold
from pukd_ray.selection.losses import LOSSES
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
from pukd_ray.selection.verdict import (
    Evidence,
    LabelledPrior,
    Verdict,
    audited,
    examine,
    finer_priors,
    given,
    judge,
    weigh,
)

GRID_STEPS = 300  # at 200 steps, batches of 384 and a width of 32 a task lost its valley that had one at these
GRID_BATCH = 512
GRID_LR = 0.003


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
    """`pu_logit` of the sample of U, float32 [n_u]."""
    risk_curve: tuple[tuple[int, float], ...] = ()
    """(step, risk of its global batch), where it was recorded."""
    trained_share: float = 0.0
    """Share of U above 0 as trained, before the threshold was set: next to none where the clamp won."""
    blend: Blend | None = None
    """How `u_logits` were blended, if they are."""

    @classmethod
    def of(
        cls,
        network: SelectorNetwork,
        seen: Examples,
        training: Training,
        take: float | None = None,
        device: torch.device | None = None,
        risk_curve: Sequence[tuple[int, float]] = (),
    ) -> FinalFit:
        """Of a network on `device`, trained so on what it has `seen`.

        With `take` its bias is set so that it takes this share of U, not what lies above 0 as it was trained.
        """
        head = network if isinstance(network, SelectorHead) else network.head
        scale = log_max_phi(network, seen, training, device)
        logits = logits_of(network, seen.u, device)
        trained_share = float((logits > 0).mean())
        if take is not None:
            with torch.no_grad():
                head.attention.classify.bias.sub_(float(np.quantile(logits, 1 - take)))
            logits = logits_of(network, seen.u, device)  # as they are rounded in the pass
        return cls(
            dump_state({**head.state_dict(), "log_max_phi": torch.tensor(scale, dtype=torch.float64)}),
            dump_state(network.extractor.model.state_dict()) if isinstance(network, PixelSelector) else None,
            scale,
            rescale_logits(logits, scale),
            tuple(risk_curve),
            trained_share,
        )

    def blended(self, blend: Blend | None, tails: Tails | None) -> FinalFit:
        """With the logits of U blended as the folds' were; of U as many stay positive."""
        if blend is None or tails is None:
            return self
        fitted = blend.fitted_to(self.u_logits, tails.u)
        return replace(self, u_logits=fitted(self.u_logits, tails.u), blend=fitted)


@dataclass(frozen=True)
class FittedSelector:
    """All that the recipe finds out."""

    verdict: Verdict
    """The prior, and how far to trust it."""
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

    @property
    def needs_p(self) -> bool:
        """Whether P stands for the relevant images of U in estimates; else labelled images do (`Groups.p_weights`)."""

    def fit_grid(self, name: str, training: Training, priors: Sequence[float]) -> Any:
        """`fit_grid_fold` for each fold, as a `Grid` or a reference to one."""

    def finer_priors(self, coarse: Any) -> Sequence[float]:
        """`verdict.finer_priors`."""

    def weigh(self, grids: Sequence[Any], seed: int) -> Evidence:
        """`verdict.weigh` of all grids together."""

    def fit_folds(self, name: str, training: Training) -> Sequence[Any]:
        """`fit_fold` for each fold."""

    def assess_fit(self, held_out: Sequence[Any], verdict: Verdict, training: Training) -> FitReport:
        """`crossfit.assess_fit`."""

    def fit_final(self, training: Training, take: float | None, blend: Blend | None) -> FinalFit:
        """Train on all of P and the sample; `take` as in `FinalFit.of`, `blend` as in `FinalFit.blended`."""


@dataclass(frozen=True)
class InProcess:
    """The `Executor` that needs nothing else: one job after the other, here."""

    features: Examples
    groups: Groups
    trunk: Trunk | None = None
    worker: Worker = ALONE

    @property
    def needs_p(self) -> bool:
        """As `Executor` says."""
        return self.groups.p_weights is None

    def fit_grid(self, name: str, training: Training, priors: Sequence[float]) -> Grid:
        """As `Executor` says."""
        del name  # no progress to show
        rows = [fold_rows(self.features, k, training.seed) for k in range(FOLDS)]
        return Grid.of(priors, [fit_grid_fold(self.features, r, training, priors, self.worker) for r in rows])

    def finer_priors(self, coarse: Grid) -> tuple[float, ...]:
        """As `Executor` says."""
        return finer_priors(coarse)

    def weigh(self, grids: Sequence[Grid], seed: int) -> Evidence:
        """As `Executor` says."""
        groups = self.groups
        return weigh(grids, self.features, groups.p_classes, groups.u_classes, groups.units, seed)

    def fit_folds(self, name: str, training: Training) -> list[HeldOut]:
        """As `Executor` says."""
        del name
        return [fit_fold(self.features, k, training, self.trunk, self.worker) for k in range(FOLDS)]

    def assess_fit(self, held_out: Sequence[HeldOut], verdict: Verdict, training: Training) -> FitReport:
        """As `Executor` says."""
        return assess_fit(held_out, self.groups, verdict, training)

    def fit_final(self, training: Training, take: float | None, blend: Blend | None) -> FinalFit:
        """As `Executor` says."""
        network = fit_selector(self.features, training, self.trunk, worker=self.worker)
        final = FinalFit.of(network, seen_by(self.features, self.trunk), training, take, self.worker.device)
        return final.blended(blend, self.groups.tails)


def fit_and_calibrate(
    executor: Executor,
    selector: SelectorConfig,
    seed: int,
    check_verdict: Callable[[Verdict], None] | None = None,
    labels: LabelledPrior | None = None,
) -> FittedSelector:
    """Estimate the prior, choose the steps, train the selector on everything and calibrate it.

    Args:
        executor: holds the data, runs the jobs.
        selector: the config's `selector`.
        seed: of all that is random.
        check_verdict: sees the prior before the costly part, and may raise.
        labels: the prior that people's labels tell, for `prior` audit.
    """
    # 1. The prior.
    verdict = conclude_prior(executor, selector, seed, labels)
    if check_verdict is not None:
        check_verdict(verdict)

    # 2. The same folds under the selector's own loss.
    training = Training(
        selector.loss, verdict.train, selector.steps, selector.batch_size, selector.lr, seed, selector.batches
    )
    folds = executor.fit_folds(selector.loss, training)

    # 3. Their held-out logits choose the steps, weigh what else is known of an image, and calibrate.
    fit = executor.assess_fit(folds, verdict, training)

    if verdict.evidence is None:  # the same look at a prior that is given: what it makes of U, and whether P is like it
        looked_at = Grid(np.array([verdict.train]), fit.p_logits[None], fit.u_logits[None])
        verdict = examine(verdict, executor.weigh([looked_at], seed), needs_p=executor.needs_p)
        if executor.needs_p:  # a bias that is found tilts the calibration
            fit = executor.assess_fit(folds, verdict, training)

    # 4. The selector on all of P, stopped where the folds were best, on the schedule that they followed. Its boundary
    # is where it belongs if U has a gap there. Else ranking and threshold are two decisions: it was trained with a
    # generous prior, and would take too many.
    training = replace(training, steps=fit.steps, horizon=training.steps)
    take = None if verdict.has_gap or LOSSES[selector.loss].rescales else verdict.prior
    final = executor.fit_final(training, take, fit.blend)
    if take is not None:
        fit = fit.taking(take)

    # 5. Its logits differ a little from the folds': the calibration is carried over to them.
    calibration, bootstrap = carry_over(fit.calibration, fit.bootstrap, final.u_logits, verdict.prior)
    return FittedSelector(verdict, fit, training, final, calibration, bootstrap)


def conclude_prior(
    executor: Executor, selector: SelectorConfig, seed: int, labels: LabelledPrior | None = None
) -> Verdict:
    """The prior, unless it is known: small selectors at a grid of priors, cross-fitted, coarse and then finer."""
    if selector.prior == "audit":
        assert labels is not None
        return audited(labels)
    if selector.prior != "auto":
        return given(float(np.clip(selector.prior, 1e-4, 1 - 1e-4)))
    training = grid_training(selector, seed)
    coarse = executor.fit_grid("priors", training, COARSE)
    fine = executor.fit_grid("finer priors", training, executor.finer_priors(coarse))
    return judge(executor.weigh([coarse, fine], seed))


def grid_training(selector: SelectorConfig, seed: int) -> Training:
    """Of the grid: shorter trainings blunt the valley, longer ones gain nothing."""
    return Training(
        "nnpu",
        0.5,  # each of the grid has its own
        min(selector.steps, GRID_STEPS),
        min(selector.batch_size, GRID_BATCH),
        max(selector.lr, GRID_LR),
        seed,
    )
