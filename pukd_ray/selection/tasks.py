"""The jobs of the recipe as Ray tasks: features and held-out logits stay in the object store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from pukd_ray.config import RunConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.console import progress
from pukd_ray.runtime.devices import Precision, Worker, assigned_device, use_threads
from pukd_ray.runtime.engine import gpus_per_train_worker
from pukd_ray.runtime.timing import Span, Stopwatch
from pukd_ray.selection.blend import Blend
from pukd_ray.selection.crossfit import (
    FOLDS,
    FitReport,
    Groups,
    HeldOut,
    assess_fit,
    fit_fold,
    fold_rows,
)
from pukd_ray.selection.features import LABELS, Features, load_last_tap
from pukd_ray.selection.grid import Grid, GridFold, fit_grid_fold
from pukd_ray.selection.labels import label_weights, stand_in
from pukd_ray.selection.recipe import FinalFit
from pukd_ray.selection.train_loop import fit_on_group, load_examples
from pukd_ray.selection.training import Examples, Training, Trunk
from pukd_ray.selection.verdict import Evidence, Verdict, finer_priors, weigh

GPU_VALUES = 2**25
"""Features of U (images x width) from which folds are trained on a GPU: below, starting on one takes longer."""


@dataclass(frozen=True)
class RayTasks:
    """The recipe's `Executor` of a run: on CPUs one task per fold, on a GPU one for all of them, which share the
    features there; the final training by Ray Train."""

    run: RunContext
    files: list[str]
    """The feature cache."""
    features: ray.ObjectRef
    trunk: ray.ObjectRef
    """Of None where it is frozen."""
    groups: ray.ObjectRef
    needs_p: bool
    """As `Executor` says."""
    gpus: float = 0.0
    """Of a task that trains all folds; 0: a CPU each."""
    spans: list[Span] = field(default_factory=list)
    """When trainings were at work."""
    seconds: dict[str, float] = field(default_factory=lambda: {"prior": 0.0, "fits": 0.0})
    """Of the grid of priors, and of the trainings after it."""

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        watch = Stopwatch()
        yield
        self.seconds[part] += watch.seconds

    @classmethod
    def load(cls, run: RunContext, files: list[str]) -> tuple[RayTasks, Features]:
        """(the executor, what the feature cache says beside the features)."""
        features, trunk, light_ref = _load_examples.remote(run.folder, files, run.config, run.weights)
        light: Features = ray.get(light_ref)
        labelled = (light.p_units == LABELS).any()
        p_weights = stand_in(light.p_units, light.p_rows, label_weights(run.folder)) if labelled else None
        groups = ray.put(Groups(light.u_units, light.p_teacher, light.u_teacher, p_weights))
        # Without a few of both the run ends by `check_sample`.
        if run.config.selector.blend and len(light.p_labels) >= FOLDS and len(light.u_units):
            groups = _fit_nearness.remote(run.folder, files, groups, run.config.seed)
        is_large = len(light.u_units) * light.u.shape[1] >= GPU_VALUES or run.config.selector.trunk == "finetune"
        gpus = gpus_per_train_worker(run.config.resources, run.cluster) if is_large else 0.0
        return cls(run, files, features, trunk, groups, p_weights is None, gpus), light

    def fit_grid(self, name: str, training: Training, priors: Sequence[float]) -> ray.ObjectRef:
        """As `Executor` says; `name` labels the progress."""
        with self._timed("prior"):
            if self.gpus:
                together = _fit_grid_folds.options(num_gpus=self.gpus)
                folds = together.remote(self.features, training, priors, self.run.config.resources.precision)
            else:
                folds = [_fit_grid_fold.remote(self.features, fold, training, priors) for fold in range(FOLDS)]
            return _join_folds.remote(priors, *self._watched(name, folds))

    def finer_priors(self, coarse: ray.ObjectRef) -> tuple[float, ...]:
        """As `Executor` says."""
        priors: tuple[float, ...] = ray.get(_finer_priors.remote(coarse))
        return priors

    def weigh(self, grids: Sequence[Any], seed: int) -> Evidence:
        """As `Executor` says."""
        evidence: Evidence = ray.get(_weigh.remote(self.features, self.groups, seed, *grids))
        return evidence

    def fit_folds(self, name: str, training: Training) -> list[ray.ObjectRef]:
        """As `Executor` says; `name` labels the progress."""
        with self._timed("fits"):
            if self.gpus:
                together = _fit_folds.options(num_gpus=self.gpus)
                folds = together.remote(self.features, self.trunk, training, self.run.config.resources.precision)
            else:
                folds = [_fit_fold.remote(self.features, self.trunk, fold, training) for fold in range(FOLDS)]
            return self._watched(name, folds)

    def _watched(self, name: str, folds: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
        """The same, once they are done."""
        waiting = folds
        with progress(name, FOLDS, "folds") as bar:
            while waiting:
                done, waiting = ray.wait(waiting)
                self.spans.extend(fold.span for fold in ray.get(done))
                bar.update(len(done))
        return folds

    def assess_fit(self, held_out: Sequence[ray.ObjectRef], verdict: Verdict, training: Training) -> FitReport:
        """As `Executor` says."""
        report: FitReport = ray.get(_assess_fit.remote(self.groups, verdict, training, *held_out))
        return report

    def fit_final(self, training: Training, take: float | None, blend: Blend | None) -> FinalFit:
        """As `Executor` says."""
        with self._timed("fits"):
            final, span = fit_on_group(self.run, self.files, training, take)
        self.spans.append(span)
        return final.blended(blend, ray.get(self.groups).tails)


@ray.remote(num_cpus=0.5, num_returns=3)
def _load_examples(
    folder: RunFolder, files: list[str], config: RunConfig, weights: Shared
) -> tuple[Examples, Trunk | None, Features]:
    return load_examples(folder, files, config, weights)


@ray.remote(num_cpus=1)
def _fit_nearness(folder: RunFolder, files: list[str], groups: Groups, seed: int) -> Groups:
    """With `tails`; what the pass needs of them is written."""
    use_threads()
    p, u, labels = load_last_tap(folder, files)
    groups, nearness = groups.with_tails(p, u, labels, seed)
    folder.write_bytes("selector/nearness.npz", nearness.dump())
    return groups


@ray.remote(num_cpus=1)
def _fit_fold(features: Examples, trunk: Trunk | None, fold: int, training: Training) -> HeldOut:
    use_threads()
    return fit_fold(features, fold, training, trunk)


@ray.remote(num_cpus=1, num_returns=FOLDS)
def _fit_folds(features: Examples, trunk: Trunk | None, training: Training, precision: Precision) -> list[HeldOut]:
    use_threads()
    worker = Worker(device=assigned_device(), precision=precision)
    features = features.on(worker)
    return [fit_fold(features, fold, training, trunk, worker) for fold in range(FOLDS)]


# Folds come as arguments, not as a list: Ray fetches only what is an argument.


@ray.remote(num_cpus=0.5)
def _assess_fit(groups: Groups, verdict: Verdict, training: Training, *held_out: HeldOut) -> FitReport:
    return assess_fit(held_out, groups, verdict, training)


@ray.remote(num_cpus=1)
def _fit_grid_fold(features: Examples, fold: int, training: Training, priors: Sequence[float]) -> GridFold:
    use_threads()
    return fit_grid_fold(features, fold_rows(features, fold, training.seed), training, priors)


@ray.remote(num_cpus=1, num_returns=FOLDS)
def _fit_grid_folds(
    features: Examples, training: Training, priors: Sequence[float], precision: Precision
) -> list[GridFold]:
    use_threads()
    worker = Worker(device=assigned_device(), precision=precision)
    features = features.on(worker)
    rows = [fold_rows(features, fold, training.seed) for fold in range(FOLDS)]
    return [fit_grid_fold(features, held_out, training, priors, worker) for held_out in rows]


@ray.remote(num_cpus=0.5)
def _join_folds(priors: Sequence[float], *folds: GridFold) -> Grid:
    return Grid.of(priors, folds)


@ray.remote(num_cpus=0.5)
def _finer_priors(coarse: Grid) -> tuple[float, ...]:
    return finer_priors(coarse)


@ray.remote(num_cpus=0.5)
def _weigh(features: Examples, groups: Groups, seed: int, *grids: Grid) -> Evidence:
    return weigh(grids, features, groups.p_classes, groups.u_classes, groups.units, seed)
