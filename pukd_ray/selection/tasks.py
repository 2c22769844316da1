"""The jobs of the recipe as Ray tasks: features and held-out logits stay in the object store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import ray

from pukd_ray.config import RunConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import progress
from pukd_ray.runtime.devices import use_threads
from pukd_ray.runtime.timing import Span
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
from pukd_ray.selection.features import Features
from pukd_ray.selection.recipe import FinalFit
from pukd_ray.selection.train_loop import fit_on_group, load_examples
from pukd_ray.selection.training import Examples, Training, Trunk, fit_selector, seen_by


@dataclass(frozen=True)
class RayTasks:
    """The recipe's `Executor` of a run: one task per fold, the final training by Ray Train."""

    run: RunContext
    files: list[str]
    """The feature cache."""
    features: ray.ObjectRef
    trunk: ray.ObjectRef
    """Of None where it is frozen."""
    groups: ray.ObjectRef
    spans: list[Span] = field(default_factory=list)
    """When trainings were at work."""

    @classmethod
    def load(cls, run: RunContext, files: list[str]) -> tuple[RayTasks, Features]:
        """(the executor, what the feature cache says beside the features)."""
        features, trunk, light_ref = _load_examples.remote(run.folder, files, run.config, run.weights)
        light: Features = ray.get(light_ref)
        groups = ray.put(Groups(light.u_units, light.p_teacher, light.u_teacher))
        return cls(run, files, features, trunk, groups), light

    def fit_folds(self, name: str, training: Training, *, with_trunk: bool) -> list[ray.ObjectRef]:
        """As `Executor` says; `name` labels the progress."""
        trunk = self.trunk if with_trunk else None
        with progress(name, FOLDS, "folds") as bar:
            folds = waiting = [_fit_fold.remote(self.features, trunk, fold, training) for fold in range(FOLDS)]
            while waiting:
                done, waiting = ray.wait(waiting)
                self.spans.extend(fold.span for fold in ray.get(done))
                bar.update(len(done))
        return folds

    def estimate_prior(self, held_out: Sequence[ray.ObjectRef], seed: int) -> PriorReport:
        """As `Executor` says."""
        report: PriorReport = ray.get(_estimate_prior.remote(self.groups, seed, *held_out))
        return report

    def assess_fit(
        self, held_out: Sequence[ray.ObjectRef], prior: float, training: Training, first: PriorReport | None
    ) -> FitReport:
        """As `Executor` says."""
        report: FitReport = ray.get(_assess_fit.remote(self.groups, prior, training, first, *held_out))
        return report

    def fit_final(self, training: Training) -> FinalFit:
        """As `Executor` says."""
        final, span = fit_on_group(self.run, self.files, training)
        self.spans.append(span)
        return final

    def selected_by(self, trainings: Sequence[Training]) -> list[np.ndarray]:
        """Which of U selectors trained so would take, bool [n_u] each."""
        taken: list[np.ndarray] = []
        with progress("sensitivity", len(trainings), "priors") as bar:
            for result in [_selected_of_sample.remote(self.features, self.trunk, t) for t in trainings]:
                of_sample, span = ray.get(result)
                taken.append(of_sample)
                self.spans.append(span)
                bar.update(1)
        return taken


@ray.remote(num_cpus=0.5, num_returns=3)
def _load_examples(
    folder: RunFolder, files: list[str], config: RunConfig, weights: Shared
) -> tuple[Examples, Trunk | None, Features]:
    return load_examples(folder, files, config, weights)


@ray.remote(num_cpus=1)
def _fit_fold(features: Examples, trunk: Trunk | None, fold: int, training: Training) -> HeldOut:
    use_threads()
    return fit_fold(features, fold, training, trunk)


# Folds come as arguments, not as a list: Ray fetches only what is an argument.


@ray.remote(num_cpus=0.5)
def _estimate_prior(groups: Groups, seed: int, *held_out: HeldOut) -> PriorReport:
    return estimate_prior(held_out, groups, seed)


@ray.remote(num_cpus=0.5)
def _assess_fit(
    groups: Groups, prior: float, training: Training, first: PriorReport | None, *held_out: HeldOut
) -> FitReport:
    return assess_fit(held_out, groups, prior, training, first)


@ray.remote(num_cpus=1)
def _selected_of_sample(features: Examples, trunk: Trunk | None, training: Training) -> tuple[np.ndarray, Span]:
    began = time.time()
    use_threads()
    network = fit_selector(features, training, trunk)
    taken = FinalFit.of(network, seen_by(features, trunk), training).u_logits > 0
    return taken, (began, time.time())
