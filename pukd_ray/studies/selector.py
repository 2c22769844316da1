"""How good selectors are on the pools of `pukd_ray.demo.pools`, with and without parts of the method.

A run is one pool, seed and setting: the recipe of the stage `selector`, in one process and on features that were
extracted once, and the estimates of the stage `select`. Truth is only used to measure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from pukd_ray.config import SelectorConfig, TeacherConfig
from pukd_ray.demo.pools import MEASURED, Bank, draw_pool
from pukd_ray.networks.actor import teacher_prediction
from pukd_ray.networks.teacher import Teacher
from pukd_ray.runtime.console import progress
from pukd_ray.runtime.devices import use_threads
from pukd_ray.selection.crossfit import Groups
from pukd_ray.selection.cuts import precision_count
from pukd_ray.selection.features import as_half
from pukd_ray.selection.histogram import bin_edges, bin_scores, estimate_selection
from pukd_ray.selection.recipe import FittedSelector, InProcess, fit_and_calibrate
from pukd_ray.selection.training import Examples, Trunk
from pukd_ray.selection.verdict import Verdict
from pukd_ray.selection.views import random_views
from pukd_ray.studies.pages import describe_machine

UNIT_ROWS = 800  # rows that the bootstrap draws together, as a unit of the corpus
TARGET_PRECISION = 0.8
TRUST = {"high": 2.0, "low": 1.0, "none": 0.0}
"""As figures."""


@dataclass(frozen=True)
class Setting:
    """What a run changes of the defaults."""

    selector: Mapping[str, Any] = field(default_factory=dict)
    """Config keys of `selector`."""
    prior_factor: float | None = None
    """The true prior times this instead of an estimate."""
    per_class: int = 100
    taps: tuple[str, ...] | None = None
    bias: float = 0.0
    """P is drawn from each class with probability proportional to exp(bias * standardised mean pixel)."""


SETTINGS: dict[str, Setting] = {
    "default": Setting(),
    "trunk: finetune": Setting({"trunk": "finetune"}),
    "prior: true": Setting(prior_factor=1.0),
    "prior: half": Setting(prior_factor=0.5),
    "prior: double": Setting(prior_factor=2.0),
    "loss: vpu": Setting({"loss": "vpu"}),
    "loss: naive": Setting({"loss": "naive"}),
    "batches: plain": Setting({"batches": "plain"}),
    "50 per class": Setting(per_class=50),
    "20 per class": Setting(per_class=20),
    "taps: last": Setting(taps=("relu4",)),
    "grid: 1": Setting({"grid": 1}),
    "views: 1": Setting({"views": 1}),
}
BIASED: dict[str, Setting] = {
    "P biased, 0.7": Setting(bias=0.7),
    "P biased, 1.2": Setting(bias=1.2),
    "P biased, 0.7, prior: true": Setting(bias=0.7, prior_factor=1.0),
    "P biased, 1.2, prior: true": Setting(bias=1.2, prior_factor=1.0),
}
"""Not on the page: P as a biased sample, and what a selector that is told the prior makes of it."""


@dataclass(frozen=True)
class Cache:
    """Features and the teacher's prediction for the whole bank, for one choice of taps and grid."""

    features: np.ndarray
    """float16 [N, C]."""
    classes: np.ndarray
    """The teacher's labels, int64 [N]."""
    confidence: np.ndarray
    """float32 [N]."""
    cpu_seconds_per_image: float


def extract_bank(bank: Bank, teacher: TeacherConfig, weights: bytes, grid: int | str) -> Cache:
    """Run the teacher over all images of the bank, in this process."""
    network = Teacher(teacher, weights, torch.device("cpu"), grid)  # type: ignore[arg-type]
    began = time.process_time()
    parts = [network(bank.images[i : i + 512, None]) for i in range(0, len(bank.images), 512)]
    seconds = time.process_time() - began
    features = np.concatenate([as_half(f.numpy()) for f, _ in parts])
    classes, confidence, _ = teacher_prediction(torch.cat([z for _, z in parts]).numpy())
    return Cache(features, classes, confidence, seconds / len(bank.images))


def measure(
    bank: Bank,
    cache: Cache,
    teacher: TeacherConfig,
    weights: bytes,
    pool_name: str,
    seed: int,
    setting: Setting,
    base: Mapping[str, Any],
    *,
    tuning: bool = False,
) -> dict[str, float]:
    """One run; `base` are config keys of `selector` that all runs share."""
    use_threads()
    pool = draw_pool(bank, pool_name, seed=seed, per_class=setting.per_class, tuning=tuning, bias=setting.bias)
    true_prior = float(pool.relevant.mean())
    selector = SelectorConfig(**{**base, **setting.selector})
    if setting.prior_factor is not None:
        selector = replace(selector, prior=setting.prior_factor * true_prior)
    teacher = replace(teacher, taps=setting.taps)
    network = Teacher(teacher, weights, torch.device("cpu"), selector.grid)
    views = random_views(bank.images[pool.positives, None], selector.augment, selector.views, pool.positives + seed)
    p = np.stack([as_half(network(views[:, v])[0].numpy()) for v in range(views.shape[1])], 1)
    features = Examples(p, cache.features[pool.corpus])
    trunk = None
    if selector.trunk == "finetune":
        trunk = Trunk(teacher, weights, selector.grid, Examples(views, bank.images[pool.corpus, None]))

    began = time.process_time()
    groups = Groups(np.arange(len(pool.corpus)) // UNIT_ROWS, cache.classes[pool.positives], cache.classes[pool.corpus])
    fitted = fit_and_calibrate(InProcess(features, groups, trunk), selector, seed)
    fit_seconds = time.process_time() - began

    return {
        **figures_of(fitted, pool.relevant),
        "confidence_ap": float(average_precision_score(pool.relevant, cache.confidence[pool.corpus])),
        "feature_seconds": cache.cpu_seconds_per_image * (len(pool.corpus) + p.shape[0] * p.shape[1]),
        "fit_seconds": fit_seconds,
    }


def figures_of(fitted: FittedSelector, relevant: np.ndarray) -> dict[str, float]:
    """What a selector and its estimates are worth on the sample that it was fitted on; truth bool [n_u]."""
    verdict, fit, calibration, logits = fitted.verdict, fitted.fit, fitted.calibration, fitted.final.u_logits
    binned = bin_scores(logits, logits > 0, bin_edges(np.r_[fit.p_logits, fit.u_logits]))
    estimated = estimate_selection(binned, fit.p_logits, fit.p_weights, calibration, fitted.bootstrap)
    figures = {
        **_quality(logits, relevant),
        **_at_target(logits, calibration(logits), relevant),
        **verdict_figures(verdict, relevant),
        "steps": fit.steps,
        "proxy_accuracy": fit.proxy_accuracy,
        "accuracy": float(((logits > 0) == relevant).mean()),
        "calibration_error": _calibration_error(calibration(logits), relevant),
    }
    figures["precision_estimated"], figures["recall_estimated"] = estimated["precision"], estimated["recall"]
    figures["precision_lower"], figures["precision_upper"] = estimated["precision_interval"]
    figures["recall_lower"], figures["recall_upper"] = estimated["recall_interval"]
    return figures


def verdict_figures(verdict: Verdict, relevant: np.ndarray) -> dict[str, float]:
    """The prior as it was concluded, and in truth."""
    return {
        "true_prior": float(relevant.mean()),
        "prior": verdict.prior,
        "prior_lower": verdict.lower,
        "prior_upper": verdict.upper,
        "prior_used": verdict.train,
        "trust": TRUST[verdict.trust],
        **_evidence(verdict),
    }


def _evidence(verdict: Verdict) -> dict[str, float]:
    """What the prior was concluded from; nothing of one that was given."""
    e = verdict.evidence
    if e is None:
        return {}
    return {
        "gap": float(e.boundary.inner),
        "prior_boundary": e.boundary.value,
        "boundary_lower": e.boundary.lower_bound,
        "boundary_upper": e.boundary.upper_bound,
        "prior_ratio": e.ratio.value,
        "ratio_lower": float(np.quantile(e.ratio.draws, 0.05)),
        "ratio_upper": float(np.quantile(e.ratio.draws, 0.95)),
        "prior_bbe": e.bbe,
        "alike": e.alike,
        "auc": e.test.auc,
        "auc_error": e.test.error,
        "biased": float(e.biased),
    }


def _quality(logits: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    taken = logits > 0
    hits = float((taken & relevant).sum())
    precision, recall, _ = precision_recall_curve(relevant, logits)
    return {
        "ap": float(average_precision_score(relevant, logits)),
        "precision": hits / max(1, int(taken.sum())),
        "recall": hits / float(relevant.sum()),
        "f1": 2 * hits / float(taken.sum() + relevant.sum()),
        "best_f1": float((2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()),
        "recall_at_target": float(recall[precision >= TARGET_PRECISION].max()),
    }


def _at_target(logits: np.ndarray, probability: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """What `selection.rule: precision` takes."""
    order = np.argsort(-logits, kind="stable")
    count = precision_count(probability[order], np.ones(len(order)), TARGET_PRECISION)
    hits = float(relevant[order[:count]].sum())
    return {"target_precision": hits / max(1, count), "target_recall": hits / float(relevant.sum())}


def _calibration_error(probability: np.ndarray, relevant: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean |mean probability - share of relevant| over equal-width bins."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = np.bincount(index, probability, bins) - np.bincount(index, relevant, bins)
    return float(np.abs(gaps).sum() / len(probability))


# -- many runs --------------------------------------------------------------------------------------------------

QUICK = {"steps": 300, "batch_size": 512, "lr": 0.003}
"""The ablations' settings, far cheaper than the defaults, which have a table of their own."""
RARE_TOO = ("prior: true", "prior: half", "prior: double", "loss: naive")


@dataclass(frozen=True)
class Run:
    """What is run, and under which key its figures are kept."""

    base: str
    """`default` or `quick`."""
    pool: str
    setting: str
    seed: int

    @property
    def key(self) -> str:
        """`base/pool/setting/seed`."""
        return f"{self.base}/{self.pool}/{self.setting}/{self.seed}"


def biased_runs(seeds: int) -> list[Run]:
    """`hard` with a biased P."""
    return [Run("quick", "hard", setting, seed) for seed in range(seeds) for setting in BIASED]


def describe(run: Run, figures: Mapping[str, float]) -> str:
    """One line for people."""
    f = figures
    trust = next(name for name, value in TRUST.items() if value == f["trust"])
    return (
        f"{run.key}: prior {f['prior']:.3f} [{f['prior_lower']:.3f}, {f['prior_upper']:.3f}], truth "
        f"{f['true_prior']:.3f}, trust {trust}; average precision {f['ap']:.4f}, precision {f['precision']:.3f} "
        f"(estimated {f['precision_estimated']:.3f}), recall {f['recall']:.3f} ({f['recall_estimated']:.3f})"
    )


def all_runs(seeds: int, coverage_seeds: int) -> list[Run]:
    """The runs of docs/results.md: default settings, ablations, and the coverage of the intervals."""
    runs = [Run("quick", "hard", setting, seed) for seed in range(seeds) for setting in SETTINGS]
    runs += [Run("quick", "rare", setting, seed) for seed in range(seeds) for setting in RARE_TOO]
    runs += [Run("default", pool, "default", seed) for seed in range(seeds) for pool in MEASURED]
    runs += [Run("quick", pool, "default", seed) for seed in range(coverage_seeds) for pool in MEASURED]
    return list(dict.fromkeys(runs))


@ray.remote(num_cpus=1)
def _measure(
    bank: Bank, caches: dict[str, Cache], teacher: TeacherConfig, weights: bytes, run: Run, tuning: bool
) -> tuple[str, dict[str, float]]:
    setting = (SETTINGS | BIASED)[run.setting]
    base = QUICK if run.base == "quick" else {}
    cache = caches[_cache_key(setting)]
    return run.key, measure(bank, cache, teacher, weights, run.pool, run.seed, setting, base, tuning=tuning)


def _cache_key(setting: Setting) -> str:
    return f"{setting.taps}/{setting.selector.get('grid', 'auto')}"


def run_study(
    file: Path, bank: Bank, teacher: TeacherConfig, weights: bytes, runs: list[Run], *, tuning: bool = False
) -> dict[str, Any]:
    """Make the runs that `file` (JSON) does not have yet, adding each as it ends; return all it then has."""
    study: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    study["pools"] = {
        name: [
            draw_pool(bank, name, seed=seed, tuning=tuning).facts(bank)
            for seed in range(1 + max(run.seed for run in runs))
        ]
        for name in MEASURED
    }
    study["machine"] = describe_machine()
    missing = [run for run in runs if run.key not in study["runs"]]
    caches = {}
    for setting in {run.setting for run in missing}:
        s = (SETTINGS | BIASED)[setting]
        if _cache_key(s) not in caches:
            grid = s.selector.get("grid", "auto")
            caches[_cache_key(s)] = extract_bank(bank, replace(teacher, taps=s.taps), weights, grid)
    bank_ref, caches_ref = ray.put(bank), ray.put(caches)
    waiting = [_measure.remote(bank_ref, caches_ref, teacher, weights, run, tuning) for run in missing]
    with progress("study", len(runs), "runs", len(runs) - len(missing)) as bar:
        while waiting:
            done, waiting = ray.wait(waiting)
            for key, figures in ray.get(done):
                study["runs"][key] = {name: round(value, 5) for name, value in figures.items()}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(study, indent=1, sort_keys=True) + "\n")
            bar.update(len(done))
    return study
